"""Reads documents: a text file is one document, each row of .jsonl, .csv and .parquet is one."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from .files import READ, ROW_SUFFIXES, TEXT_SUFFIXES, file_format
from .genomes import format_by_content, refusal
from .streams import BLOCK, import_pyarrow, open_decompressed

DEFAULT_TEXT_FIELD = "text"
OnBadRow = Callable[[ValueError], None]


@dataclass(frozen=True, slots=True)
class Document:
    """One document. It must be read before the next one is requested."""

    file: Path
    row: int | None
    """Line (.jsonl, .csv) or row (.parquet) in the file, from 1; None if the document is the whole file."""
    pieces: Iterator[bytes]
    """Its bytes; those of a whole file come in pieces of at most 1 MiB."""

    @property
    def name(self) -> str:
        """The file, and `:row` for a row."""
        return document_name(self.file, self.row)


def document_name(file: Path | str, row: int | None) -> str:
    """The name of a document in messages and for splits."""
    return str(file) if row is None else f"{file}:{row}"


def refuse(error: ValueError) -> None:
    """Raise a bad row's error with the way out; what is done with a bad row unless the caller has something else."""
    raise ValueError(f"{error}; correct the row, or leave bad rows out with on_bad_row='skip' (--on-bad-row skip)")


def iter_documents(
    files: Iterable[Path],
    text_field: str | None = None,
    on_read: Callable[[int], None] | None = None,
    on_bad_row: OnBadRow = refuse,
) -> Iterator[Document]:
    """The documents of files, in order, streamed.

    Args:
        files: as from `find_files`; the suffix decides how each is read.
        text_field: the field of a row that holds its text; None: "text".
        on_read: called with the number of bytes read from disk since the last call, before decompression.
        on_bad_row: called with the error of each row that has no text or cannot be read; if it returns, reading goes on
            with the next row.
    Raises ValueError, naming file and line, for data that is binary, damaged, malformed, without the field, or DNA.
    """
    files = list(files)
    if text_field is not None and not any(file_format(file) in ROW_SUFFIXES for file in files):
        raise ValueError(
            f"text_field={text_field!r} needs {', '.join(ROW_SUFFIXES)} files; all of these are plain text"
        )
    field = DEFAULT_TEXT_FIELD if text_field is None else text_field
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    for file in files:
        with open_decompressed(file, on_read or (lambda count: None)) as stream:
            reader = readers.get(file_format(file))
            yield from reader(file, stream, field, on_bad_row) if reader else _read_text(file, stream)


def _read_text(file: Path, stream: BinaryIO) -> Iterator[Document]:
    """The whole file as one document."""
    first = stream.read(BLOCK)
    sequences = format_by_content(first)
    if sequences is not None:
        raise refusal(file, sequences, "content")
    if b"\0" in first:
        unknown = "" if file_format(file) in TEXT_SUFFIXES else f"; the endings that are read are {READ}"
        raise ValueError(
            f"{file} is not text: NUL at byte {first.index(0)}; leave it out, or convert it (UTF-16 or UTF-32) to "
            f"UTF-8{unknown}"
        )

    def pieces() -> Iterator[bytes]:
        piece = first
        while piece:
            yield piece
            piece = stream.read(BLOCK)

    yield Document(file, None, pieces())


def _read_jsonl(file: Path, stream: BinaryIO, field: str, on_bad_row: OnBadRow) -> Iterator[Document]:
    """One JSON object per line; blank lines are skipped."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = _text_of_line(line, field, document_name(file, number))
        except ValueError as error:
            on_bad_row(error)
            continue
        # a lone surrogate (\ud800) becomes bytes that are not UTF-8; the tokenizer decides whether to accept them
        yield Document(file, number, iter((text.encode("utf-8", "surrogatepass"),)))


def _text_of_line(line: bytes, field: str, where: str) -> str:
    """The text in a line of JSON. Raises ValueError if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: wanted an object with field {field!r}, got {_kind(record)}")
    if field not in record:
        raise _missing_field(where, field, record)
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} must be a string, got {_kind(text)}")
    return text


def _read_csv(file: Path, stream: BinaryIO, field: str, on_bad_row: OnBadRow) -> Iterator[Document]:
    """Comma-separated values with a header. Fields may be of any size and contain newlines; bytes are preserved."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    limit = csv.field_size_limit(
        min(sys.maxsize, 2**31 - 1)
    )  # the default, 131,072 characters, is too small for documents
    rows = csv.reader(text, strict=True)
    try:
        header = [name.removeprefix("\ufeff") for name in next(rows, [])]
        if header and field not in header:
            raise _missing_field(str(file), field, header)
        for line, row in _csv_rows(file, rows, on_bad_row):
            if len(row) == len(header):
                value = row[header.index(field)]
                yield Document(file, line, iter((value.encode("utf-8", "surrogateescape"),)))
            elif row:
                name = document_name(file, line)
                on_bad_row(ValueError(f"{name}: {len(row)} values for the {len(header)} of the header"))
    except csv.Error as error:
        raise ValueError(f"{document_name(file, rows.line_num)}: malformed csv ({error})") from None
    finally:
        csv.field_size_limit(limit)
        text.detach()  # the caller closes the stream


def _csv_rows(file: Path, rows: Any, on_bad_row: OnBadRow) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv reader with the line where each begins.

    Raises csv.Error for a quotation that does not end: it holds all that follows, which is no bad row.
    """
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise
            on_bad_row(ValueError(f"{document_name(file, line)}: malformed csv ({error})"))
            continue
        yield line, row


def _read_parquet(file: Path, stream: BinaryIO, field: str, on_bad_row: OnBadRow) -> Iterator[Document]:
    """One document per row, by row groups. Compressed files are unpacked to a temporary file, because parquet seeks."""
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    with tempfile.TemporaryFile() as unpacked:
        if not stream.seekable():
            shutil.copyfileobj(stream, unpacked, BLOCK)
            stream = cast(BinaryIO, unpacked)
        try:
            table = parquet.ParquetFile(stream)
            if field not in table.schema_arrow.names:
                raise _missing_field(str(file), field, table.schema_arrow.names)
            _check_column(file, field, table.schema_arrow.field(field).type)
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).cast(pyarrow.large_binary()):
                    row += 1
                    if value.is_valid:
                        yield Document(file, row, iter((value.as_py(),)))
                    else:
                        name = document_name(file, row)
                        on_bad_row(ValueError(f"{name}: field {field!r} must be a string, got null"))
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{file}: not a readable parquet file ({error})") from None


def _check_column(file: Path, field: str, kind: Any) -> None:
    types = import_pyarrow().types
    value = kind.value_type if types.is_dictionary(kind) else kind
    text = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(accepts(value) for accepts in text):
        raise ValueError(f"{file}: field {field!r} must hold strings, got {kind}")


def _missing_field(where: str, field: str, present: Iterable[str]) -> ValueError:
    names = ", ".join(map(repr, present)) or "none"
    return ValueError(
        f"{where}: no field {field!r}; the fields there are {names}; choose one with text_field (--text-field)"
    )


def _kind(value: Any) -> str:
    """The type of a JSON value, as JSON names it."""
    words = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
    }
    return words.get(type(value), "an object")
