"""The table of documents: the length, the name and the tokens of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike, NDArray

from ..documents import document_name
from ..token_ids import row_of_ids
from .store import TokenStore, open_store

DOCUMENTS_FILE = "documents.arrow"
FILES_FILE = "files.arrow"


class DocumentNames(Sequence[str]):
    """The names of documents, made on access from a file's number and a row instead of kept as millions of strings."""

    def __init__(self, files: Sequence[Any], file: NDArray[np.integer], row: NDArray[np.integer]) -> None:
        self._files, self._file, self._row = files, file, row
        self._last = (-1, "")  # number and path of the last file: the next document is often in the same one

    def __len__(self) -> int:
        return len(self._file)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> DocumentNames: ...
    def __getitem__(self, index: int | slice) -> str | DocumentNames:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row, file = int(self._row[index]), int(self._file[index])
        if file != self._last[0]:
            self._last = file, str(self._files[file])
        return document_name(self._last[1], None if row < 0 else row)

    def select(self, documents: NDArray[np.integer]) -> DocumentNames:
        """The names of some of the documents."""
        return DocumentNames(self._files, self._file[documents], self._row[documents])


class _StoredPaths(Sequence[str]):
    """A column of paths, which are bytes on disk and need not be UTF-8."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return os.fsdecode(self._column[index].as_py())


class TokenTable:
    """Documents as tokens, in the order of their files. Documents without tokens are left out and counted in n_empty.

    Made by `build_token_table` from files, or by `from_arrays`.
    """

    lengths: Int[np.ndarray, " n_documents"]
    """Number of tokens in each document."""
    byte_lengths: Int[np.ndarray, " n_documents"]
    """Number of bytes in each document, before tokenisation."""
    names: DocumentNames
    """The name of each document: its file, with `:row` if the file holds several."""
    n_empty: int
    """Number of empty documents that were left out."""

    def __init__(
        self,
        store: TokenStore,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        byte_lengths: NDArray[np.int64],
        names: DocumentNames,
        n_empty: int = 0,
    ) -> None:
        self.store, self.starts = store, starts  # starts: the offset of each document in the store's stream
        self.lengths, self.byte_lengths, self.names, self.n_empty = lengths, byte_lengths, names, n_empty

    @classmethod
    def from_arrays(
        cls, documents: Sequence[ArrayLike], byte_lengths: ArrayLike | None = None, names: Sequence[str] | None = None
    ) -> TokenTable:
        """A table in memory.

        Args:
            documents: the token ids of each document: lists, ranges, arrays or tensors of integers.
            byte_lengths: the number of bytes in each; defaults to the number of tokens, as for byte tokens.
            names: the name of each; defaults to "document 0", "document 1", ...
        """
        arrays = [row_of_ids(document, f"document {i}") for i, document in enumerate(documents)]
        lengths = np.array([len(array) for array in arrays], np.int64)
        sizes = lengths if byte_lengths is None else np.asarray(byte_lengths, np.int64)
        names = [f"document {i}" for i in range(len(arrays))] if names is None else list(names)
        if not len(arrays) == len(sizes) == len(names):
            raise ValueError(f"got {len(arrays)} documents, {len(sizes)} byte_lengths and {len(names)} names")
        kept = np.flatnonzero(lengths)
        flat = np.concatenate([arrays[i] for i in kept]) if len(kept) else np.zeros(0, np.uint8)
        store = TokenStore(flat, np.array([0, len(flat)]), np.array([0]))
        lengths = lengths[kept]
        everything = DocumentNames(names, kept, np.full(len(kept), -1))
        n_empty = len(arrays) - len(kept)
        return cls(store, np.cumsum(lengths) - lengths, lengths, sizes[kept], everything, n_empty)

    @classmethod
    def open(cls, folder: Path, n_empty: int = 0) -> TokenTable:
        """The table in a folder of the cache."""
        import pyarrow

        def columns(name: str) -> Any:
            return pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / name))).read_all()

        documents = columns(DOCUMENTS_FILE)
        lengths, sizes, file, row = (
            documents.column(name).to_numpy() for name in ("n_tokens", "n_bytes", "file", "row")
        )
        names = DocumentNames(_StoredPaths(columns(FILES_FILE).column("path").combine_chunks()), file, row)
        return cls(open_store(folder), np.cumsum(lengths) - lengths, lengths, sizes, names, n_empty)

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all documents."""
        return int(self.lengths.sum())

    @property
    def n_bytes(self) -> int:
        """Number of bytes in all documents, before tokenisation."""
        return int(self.byte_lengths.sum())

    def read(self, document: int, start: int, stop: int) -> Int[np.ndarray, " tokens"]:
        """The tokens [start, stop) of a document. Usually a view of the mapped file, which must not be written to."""
        if not 0 <= start <= stop <= self.lengths[document]:
            raise ValueError(
                f"document {document} ({self.names[document]}) has {self.lengths[document]} tokens, "
                f"asked for {start} to {stop}"
            )
        first = int(self.starts[document])
        return self.store.slice(first + start, first + stop)

    def select(self, documents: ArrayLike) -> TokenTable:
        """A table of some of the documents, given by number; tokens are shared, not copied."""
        index = np.asarray(documents, np.int64).reshape(-1)
        return TokenTable(
            self.store, self.starts[index], self.lengths[index], self.byte_lengths[index], self.names.select(index)
        )

    def split(self, held_out: Callable[[str], bool]) -> tuple[TokenTable, TokenTable]:
        """Two tables: the documents whose names are not held out, and those whose names are."""
        out = np.fromiter((held_out(name) for name in self.names), bool, self.n_documents)
        return self.select(np.flatnonzero(~out)), self.select(np.flatnonzero(out))
