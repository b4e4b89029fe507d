"""English books in the public domain, split by author: 161 MB of text from compressed files with known hashes.

The files are lines of JSON with `author`, `title` and `text`. The package does not have them.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILES = {
    "books_train.jsonl.xz": "b0ebda5c9df231873e1b376182abebf4bbef14ed7fd9f61a98dc649b5d68b1e0",
    "books2_train.jsonl.xz": "5d20471ad71dc6217488718fe8699d111950ce0f206c704d751ee22a30bf3722",
    "books_valid.jsonl.xz": "68284720c74409085fe9c7886b2bc70c3803edad0c11a12b5d97dac3f38ac945",
}
"""The files and their SHA-256."""
HELD_OUT_FILE = "books_valid.jsonl.xz"
"""All authors of this file are held out."""
HELD_OUT_PERMILLE = 25
"""Share of the other authors that are held out, chosen by a hash of the name."""
SEPARATOR = 0
"""The byte between two books; no book contains it."""


@dataclass(frozen=True)
class Books:
    """Both sides of the corpus. No author is on both."""

    training: bytes
    held_out: bytes
    training_authors: tuple[str, ...]
    held_out_authors: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the training side, then the held-out side, in 16 digits."""
        return hashlib.sha256(self.training + self.held_out).hexdigest()[:16]


@cache
def read_books(folder: Path) -> Books:
    """Read the corpus from the folder with the files.

    Raises FileNotFoundError, which names the missing file, and ValueError for a file with another hash.
    """
    return split_by_author(books_of(folder, FILES))


def books_of(folder: Path, files: Mapping[str, str]) -> Iterator[tuple[str, str, bytes]]:
    """The file, author and text of each book, in the order of the files."""
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"the books need {', '.join(files)}; {path} does not exist: choose their folder")
        packed = path.read_bytes()
        if (found := hashlib.sha256(packed).hexdigest()) != digest:
            raise ValueError(f"{path} must have the SHA-256 {digest}, got {found}; replace the file")
        for line in io.BytesIO(lzma.decompress(packed)):
            book = json.loads(line)
            yield name, book["author"], book["text"].encode()


def split_by_author(books: Iterator[tuple[str, str, bytes]]) -> Books:
    """Join the books of each side, with a separator after each."""
    every = list(books)
    first = {author for file, author, _ in every if file == HELD_OUT_FILE}
    held_out = first | {author for _, author, _ in every if is_held_out(author)}
    training, others = ([book for book in every if (book[1] in held_out) is side] for side in (False, True))
    return Books(joined(training), joined(others), authors_of(training), authors_of(others))


def joined(books: list[tuple[str, str, bytes]]) -> bytes:
    """The texts, with the separator after each."""
    return b"".join(text + bytes([SEPARATOR]) for _, _, text in books)


def authors_of(books: list[tuple[str, str, bytes]]) -> tuple[str, ...]:
    """The authors, sorted, each once."""
    return tuple(sorted({author for _, author, _ in books}))


def is_held_out(author: str) -> bool:
    """Whether an author of any file is held out."""
    return int(hashlib.sha256(author.encode()).hexdigest(), 16) % 1000 < HELD_OUT_PERMILLE
