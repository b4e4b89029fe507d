"""Tokenise files into a cached `datasets` table, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..documents import find_files, iter_documents
from ..tokenizer import Tokenizer
from .encoding import encode_documents, token_dtype
from .store import TOKENS_FILE
from .tokens import DOCUMENTS_FILE, FILES_FILE, TokenTable

WINDOW = 65_536  # most tokens of a row
_BATCH_TOKENS, _BATCH_ROWS = 64 * WINDOW, 65_536  # a record batch is written when it reaches either
_FORMAT = 2  # part of the cache's key: raise it if the same input gives another table
_META_FILE = "meta.json"


def build_token_table(
    paths: str | Path | Iterable[str | Path],
    tokenizer: Tokenizer,
    *,
    text_field: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    keep: Callable[[str], bool] | None = None,
) -> TokenTable:
    """The documents of files as a memory-mapped table of tokens; taken from the cache if the files have not changed.

    Files are streamed: memory does not grow with a document's length. `datasets` can read the table on disk, too
    (`Dataset.from_file(".../tokens.arrow")`): its rows have at most 65,536 tokens with their document and offset. It is
    built in a temporary folder and renamed when complete, so a killed build leaves no incomplete table.

    Args:
        paths: files, folders and patterns, as for `find_files`.
        tokenizer: turns text into tokens.
        text_field: the field of .jsonl, .csv and .parquet rows that holds the text; defaults to "text".
        cache_dir: the folder of cached tables; defaults to `$XDG_CACHE_HOME/anymamba/tokens`, or to one in `~/.cache`.
        progress: called with (bytes read, bytes of all files) while the table is built; not called for a cached one.
        keep: tells from a document's name whether to take it; defaults to all. The cached table holds all of them.
    Raises ValueError if no document is left, FileNotFoundError for a path without files, OSError if the disk is full.
    """
    files = find_files(paths)
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    folder = cache / _key(files, tokenizer, text_field)
    if _meta(folder) is None:
        _build_once(folder, files, tokenizer, text_field, progress)
    meta = _meta(folder)
    assert meta is not None, "a table that was just built is complete"
    table = TokenTable.open(folder, meta["n_empty"])
    if keep is None:
        return table
    kept = table.split(lambda name: not keep(name))[0]
    if not kept.n_documents:
        raise ValueError(f"none of the {table.n_documents} documents of {_listed(files)} is kept")
    return kept


def default_cache() -> Path:
    """The folder where tables are cached; it may be deleted while nothing uses it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anymamba" / "tokens"


def _key(files: list[Path], tokenizer: Tokenizer, text_field: str | None) -> str:
    """The name of a table in the cache: a hash of its inputs, with the files' sizes and times instead of their bytes."""
    digest = hashlib.sha256(json.dumps([_FORMAT, tokenizer.fingerprint, text_field]).encode())
    for file in files:
        stat = file.stat()
        digest.update(json.dumps([str(file), str(file.resolve()), stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


def _meta(folder: Path) -> dict[str, Any] | None:
    """The notes written when a table was completed; None if there are none, or if the files' sizes have changed."""
    try:
        meta = json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in meta["sizes"]}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return meta if sizes == meta["sizes"] else None


def _build_once(
    folder: Path,
    files: list[Path],
    tokenizer: Tokenizer,
    text_field: str | None,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Build a table unless another process does it first. The lock is released when the process that holds it ends."""
    from filelock import FileLock

    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if _meta(folder) is not None:
            return
        for left in [folder, *folder.parent.glob(f".{folder.name}-*")]:  # of a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _build(building, files, tokenizer, text_field, progress)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _build(
    folder: Path,
    files: list[Path],
    tokenizer: Tokenizer,
    text_field: str | None,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Write all files of a table into a folder."""
    total, done = sum(file.stat().st_size for file in files), 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    writer = _TableWriter(folder, files, token_dtype(tokenizer))
    try:
        for ids, end in encode_documents(iter_documents(files, text_field, on_read), tokenizer):
            writer.add(ids)
            if end is not None:
                writer.end_document(end.file, end.row, end.n_bytes)
        if not writer.n_documents:
            raise ValueError(f"nothing to read in {_listed(files)}: no document has any text")
        writer.finish()
    finally:
        writer.close()


def _listed(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an OSError in the body into one that says that the cache cannot be written, and the way out."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the table of tokens in {folder.parent} ({error.strerror or error}); "
            f"free space there, or choose another folder with cache_dir or XDG_CACHE_HOME",
        ) from error


class _TableWriter:
    """Writes tokens.arrow (windows of tokens), documents.arrow and files.arrow by `datasets`, in record batches."""

    def __init__(self, folder: Path, files: list[Path], dtype: np.dtype) -> None:
        self._folder = folder
        self._files, self._file_number = files, {file: number for number, file in enumerate(files)}
        int64 = np.dtype(np.int64)
        windows = {"document": int64, "offset": int64, "tokens": [dtype]}
        documents = dict.fromkeys(("n_tokens", "n_bytes", "file", "row"), int64)
        with _writing(folder):
            self._tokens = _ArrowFile(folder / TOKENS_FILE, windows)
            self._documents = _ArrowFile(folder / DOCUMENTS_FILE, documents)
        self._ids: list[np.ndarray] = []
        self._windows: list[tuple[int, int, int]] = []  # document, offset, tokens
        self._waiting = 0  # number of tokens not yet written
        self._ended: list[tuple[int, int, int, int]] = []
        self._length = 0  # of the document that is being written
        self.n_documents = self.n_empty = 0

    def add(self, ids: np.ndarray) -> None:
        """Append tokens to the current document."""
        for start in range(0, len(ids), WINDOW):
            window = ids[start : start + WINDOW]
            self._ids.append(window)
            self._windows.append((self.n_documents, self._length, len(window)))
            self._length += len(window)
            self._waiting += len(window)
            if self._waiting >= _BATCH_TOKENS or len(self._windows) == _BATCH_ROWS:
                self._write_windows()

    def end_document(self, file: Path, row: int | None, n_bytes: int) -> None:
        """Complete the current document; one without tokens is only counted."""
        if self._length:
            self._ended.append((self._length, n_bytes, self._file_number[file], -1 if row is None else row))
            self.n_documents += 1
        else:
            self.n_empty += 1
        self._length = 0
        if len(self._ended) == _BATCH_ROWS:
            self._write_documents()

    def finish(self) -> None:
        """Write the remaining tokens and, last, the notes that mark the table as complete."""
        self._write_windows()
        self._write_documents()
        with _writing(self._folder):
            names = _ArrowFile(self._folder / FILES_FILE, {"path": np.dtype(str)})
            names.write({"path": [str(file) for file in self._files]})
            for file in (self._tokens, self._documents, names):
                file.finish()
            sizes = {name: (self._folder / name).stat().st_size for name in (TOKENS_FILE, DOCUMENTS_FILE, FILES_FILE)}
            (self._folder / _META_FILE).write_text(json.dumps({"sizes": sizes, "n_empty": self.n_empty}))

    def close(self) -> None:
        """Close the files, complete or not."""
        self._tokens.close()
        self._documents.close()

    def _write_windows(self) -> None:
        if not self._windows:
            return
        document, offset, length = np.array(self._windows, np.int64).T
        offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        with _writing(self._folder):
            self._tokens.write({"document": document, "offset": offset, "tokens": (offsets, np.concatenate(self._ids))})
        self._ids, self._windows, self._waiting = [], [], 0

    def _write_documents(self) -> None:
        if not self._ended:
            return
        columns = np.array(self._ended, np.int64).T
        with _writing(self._folder):
            self._documents.write(dict(zip(("n_tokens", "n_bytes", "file", "row"), columns, strict=True)))
        self._ended = []


class _ArrowFile:
    """One Arrow stream written by `datasets`; the type of a column of lists is given as [dtype]."""

    def __init__(self, path: Path, columns: dict[str, Any]) -> None:
        try:
            from datasets import Features, List, Value
            from datasets.arrow_writer import ArrowWriter
        except ImportError:
            raise ImportError("reading data files needs the datasets library: pip install 'anymamba[train]'") from None

        def feature(kind: Any) -> Any:
            if isinstance(kind, list):
                return List(feature(kind[0]))
            return Value("string" if kind.kind == "U" else kind.name)

        self._stream = path.open("wb")
        self._writer = ArrowWriter(features=Features({k: feature(v) for k, v in columns.items()}), stream=self._stream)

    def write(self, columns: dict[str, Any]) -> None:
        """Write one record batch; a column of lists is given as (offsets, values)."""
        import pyarrow

        def array(column: Any) -> Any:
            return pyarrow.ListArray.from_arrays(*column) if isinstance(column, tuple) else pyarrow.array(column)

        table = pyarrow.table({name: array(column) for name, column in columns.items()})
        self._writer.write_table(table, writer_batch_size=_BATCH_ROWS)

    def finish(self) -> None:
        """Write the end of the stream and close the file."""
        self._writer.finalize()

    def close(self) -> None:
        """Close the file as it is. An unfinished file will be deleted, so errors from a full disk are ignored."""
        with suppress(OSError):
            self._stream.close()
