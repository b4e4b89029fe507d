"""The corpus of books: hashes, sides without a common author, and what its windows are made of."""

from __future__ import annotations

import hashlib
import json
import lzma

import pytest

from anymamba.data.books import HELD_OUT_FILE, books_of, is_held_out, split_by_author


def packed(folder, name: str, books: list[tuple[str, str]]) -> str:
    """Write a file of authors and texts; returns its hash."""
    lines = "\n".join(json.dumps({"author": author, "title": "", "text": text}) for author, text in books)
    (folder / name).write_bytes(lzma.compress(lines.encode()))
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_no_author_is_on_both_sides(tmp_path):
    authors = [f"author {i}" for i in range(400)]
    chosen = {author for author in authors if is_held_out(author)}
    assert 2 <= len(chosen) <= 25
    train = [(author, f"text of {author}") for author in authors] + [("Jane", "early")]
    files = {"train.xz": packed(tmp_path, "train.xz", train)}
    files[HELD_OUT_FILE] = packed(tmp_path, HELD_OUT_FILE, [("Jane", "Ätsch")])
    books = split_by_author(books_of(tmp_path, files))
    assert set(books.held_out_authors) == {*chosen, "Jane"}
    assert not set(books.held_out_authors) & set(books.training_authors)
    assert books.held_out.endswith(b"early\0" + "Ätsch".encode() + b"\0")
    assert books.training.count(b"\0") == 400 - len(chosen) and len(books.digest) == 16


def test_missing_and_changed_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"books need a.xz; .*a.xz does not exist"):
        list(books_of(tmp_path, {"a.xz": "0"}))
    packed(tmp_path, "a.xz", [("A", "b")])
    with pytest.raises(ValueError, match="must have the SHA-256 0, got"):
        list(books_of(tmp_path, {"a.xz": "0"}))
