"""Tokenise files into a cached `datasets` table, once."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from anymamba.base import manifest
from anymamba.base.errors import CheckpointError, DataWarning
from anymamba.base.files import atomic_folder, own_file, require_utf8, sweep

from ..cache import FORMAT, Sources, default_cache, mark_used, table_key
from ..documents import find_files, iter_documents, refuse
from ..tokenizer import Tokenizer
from .encoding import encode_documents, token_dtype
from .store import TOKENS_FILE
from .tokens import DOCUMENTS_FILE, FILES_FILE, TokenTable

WINDOW = 65_536  # most tokens of a row
_BATCH_TOKENS, _BATCH_ROWS = 64 * WINDOW, 65_536  # a record batch is written when it reaches either
_META_FILE = "meta.json"


def build_token_table(
    paths: str | Path | Iterable[str | Path],
    tokenizer: Tokenizer,
    *,
    text_field: str | None = None,
    exclude: Sequence[str] = (),
    on_bad_row: Literal["error", "skip"] = "error",
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
        exclude: patterns of files to leave out, as for `find_files`.
        on_bad_row: "skip" leaves out rows that have no text or cannot be read, and warns (DataWarning) how many;
            "error" raises for the first one.
        cache_dir: the folder of cached tables; defaults to `$XDG_CACHE_HOME/anymamba/tokens`, or to one in `~/.cache`.
        progress: called with (bytes read, bytes of all files) while the table is built; not called for a cached one.
        keep: tells from a document's name whether to take it; defaults to all. The cached table holds all of them.
    Raises ValueError if no document is left, FileNotFoundError for a path without files, OSError if the disk is full.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', got {on_bad_row!r}")
    files = find_files(paths, exclude)
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    require_utf8(cache)
    reading = _Reading(files, tokenizer, text_field, on_bad_row == "skip")
    folder = cache / table_key(reading.options, files)
    table, meta = _open(folder, reading, progress)
    mark_used(folder)
    if meta["n_bad_rows"]:
        _warn_of_bad_rows(meta)
    if keep is None:
        return table
    kept = table.split(lambda name: not keep(name))[0]
    if not kept.n_documents:
        raise ValueError(f"none of the {table.n_documents} documents of {_listed(files)} is kept")
    return kept


class _Reading(NamedTuple):
    """What decides the contents of a table."""

    files: list[Path]
    tokenizer: Tokenizer
    text_field: str | None
    skip_bad_rows: bool

    @property
    def options(self) -> list[Any]:
        """All but the files, for the key."""
        return [FORMAT, self.tokenizer.fingerprint, self.text_field, self.skip_bad_rows]


def _meta(folder: Path) -> dict[str, Any] | None:
    """What was noted when a table was completed; None if there is none, or if a file differs from its digest.

    Arrow files have no checksums, and damaged ones can end the process. Comparing takes half a second for each GB.
    """
    try:
        if not {TOKENS_FILE, DOCUMENTS_FILE, FILES_FILE, _META_FILE} <= manifest.check(folder):
            return None
        return json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
    except (CheckpointError, FileNotFoundError):  # the latter if another process is replacing it
        return None


def _open(
    folder: Path, reading: _Reading, progress: Callable[[int, int | None], None] | None
) -> tuple[TokenTable, dict[str, Any]]:
    """A table, built if it is not there, and what was noted when it was completed."""
    meta = _meta(folder) or _build_once(folder, reading, progress)
    try:
        return TokenTable.open(folder, meta["n_empty"]), meta
    except FileNotFoundError:  # another process has just cleaned the cache
        meta = _build_once(folder, reading, progress)
        return TokenTable.open(folder, meta["n_empty"]), meta


def _build_once(folder: Path, reading: _Reading, progress: Callable[[int, int | None], None] | None) -> dict[str, Any]:
    """Build a table unless another process does so first, and return what is noted in it."""
    with ExitStack() as owned:
        with _writing(folder.parent):
            owned.enter_context(own_file(folder, wait=None))
        if meta := _meta(folder):
            return meta
        sweep(folder.parent)
        with atomic_folder(folder, replace=True) as building:
            building.mkdir()
            _build(building, folder.parent, reading, progress)
    return json.loads((folder / _META_FILE).read_text(encoding="utf-8"))


def _build(folder: Path, cache: Path, reading: _Reading, progress: Callable[[int, int | None], None] | None) -> None:
    """Write all files of a table into a folder; errors name the cache."""
    files, tokenizer, text_field, skip = reading
    total, done = sum(file.stat().st_size for file in files), 0
    bad: list[str] = []

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    def on_bad_row(error: ValueError) -> None:
        if not skip:
            refuse(error)
        bad.append(str(error) if not bad else "")

    writer = _TableWriter(folder, cache, files, token_dtype(tokenizer))
    try:
        documents = iter_documents(files, text_field, on_read, on_bad_row)
        for ids, end in encode_documents(documents, tokenizer, on_bad_row):
            writer.add(ids)
            if end is not None:
                writer.end_document(end.file, end.row, end.n_bytes)
        if not writer.n_documents:
            skipped = f", and {len(bad):,} bad rows were skipped, the first of them {bad[0]}" if bad else ""
            raise ValueError(f"nothing to read in {_listed(files)}: no document has any text{skipped}")
        names = [str(file) for file in files]
        with _writing(cache):
            Sources(reading.options, tokenizer.name, writer.n_documents, writer.n_tokens, names).write(folder)
        writer.finish({"n_bad_rows": len(bad), "first_bad_row": bad[0] if bad else None})
    finally:
        writer.close()


def _warn_of_bad_rows(meta: dict[str, Any]) -> None:
    rows = f"{meta['n_bad_rows']:,} bad row{'s' if meta['n_bad_rows'] > 1 else ''}"
    warnings.warn(f"skipped {rows}, the first: {meta['first_bad_row']}", DataWarning, stacklevel=3)


def _listed(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn an OSError in the body into one that says that the cache cannot be written, and the way out."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the table of tokens in {cache} ({error.strerror or error}); "
            f"free space there, or choose another folder with cache_dir or XDG_CACHE_HOME",
        ) from error


class _TableWriter:
    """Writes tokens.arrow (windows of tokens), documents.arrow and files.arrow by `datasets`, in record batches."""

    def __init__(self, folder: Path, cache: Path, files: list[Path], dtype: np.dtype) -> None:
        self._folder, self._cache = folder, cache
        self._files, self._file_number = files, {file: number for number, file in enumerate(files)}
        int64 = np.dtype(np.int64)
        windows = {"document": int64, "offset": int64, "tokens": [dtype]}
        documents = dict.fromkeys(("n_tokens", "n_bytes", "file", "row"), int64)
        with _writing(cache):
            self._tokens = _ArrowFile(folder / TOKENS_FILE, windows)
            self._documents = _ArrowFile(folder / DOCUMENTS_FILE, documents)
        self._ids: list[np.ndarray] = []
        self._windows: list[tuple[int, int, int]] = []  # document, offset, tokens
        self._waiting = 0  # number of tokens not yet written
        self._ended: list[tuple[int, int, int, int]] = []
        self._length = 0  # of the document that is being written
        self.n_documents = self.n_empty = self.n_tokens = 0

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
            self.n_tokens += self._length
        else:
            self.n_empty += 1
        self._length = 0
        if len(self._ended) == _BATCH_ROWS:
            self._write_documents()

    def finish(self, notes: dict[str, Any]) -> None:
        """Write the remaining tokens and, last, the notes that mark the table as complete."""
        self._write_windows()
        self._write_documents()
        with _writing(self._cache):
            names = _ArrowFile(self._folder / FILES_FILE, {"path": np.dtype(bytes)})
            names.write({"path": [os.fsencode(file) for file in self._files]})  # names need not be UTF-8
            for file in (self._tokens, self._documents, names):
                file.finish()
            (self._folder / _META_FILE).write_text(json.dumps({"n_empty": self.n_empty, **notes}))
            manifest.write(self._folder)

    def close(self) -> None:
        """Close the files, complete or not."""
        self._tokens.close()
        self._documents.close()

    def _write_windows(self) -> None:
        if not self._windows:
            return
        document, offset, length = np.array(self._windows, np.int64).T
        offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        with _writing(self._cache):
            self._tokens.write({"document": document, "offset": offset, "tokens": (offsets, np.concatenate(self._ids))})
        self._ids, self._windows, self._waiting = [], [], 0

    def _write_documents(self) -> None:
        if not self._ended:
            return
        columns = np.array(self._ended, np.int64).T
        with _writing(self._cache):
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
            return Value("binary" if kind.kind == "S" else kind.name)

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
