"""Decompresses files and counts the bytes read from disk; damaged data is an error that names the file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from .files import suffixes

BLOCK = 1 << 20  # bytes read at once
_BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends a file of bgzip (SAM specification, section 4.1.2)."""


@contextmanager
def open_decompressed(file: Path, on_read: Callable[[int], None]) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed according to its suffix.

    Raises ValueError, naming the file, if it is one of bgzip without its last block, and while it is read for damaged
    data.
    """
    with io.BufferedReader(_CountedFile(file, on_read), BLOCK) as raw:
        compression = suffixes(file)[1]
        if compression in (".gz", ".bgz"):
            require_whole_bgzip(file)
        if not compression:
            yield cast(BinaryIO, raw)
            return
        with io.BufferedReader(_Decompressed(file, _decompressor(compression, raw)), BLOCK) as stream:
            yield cast(BinaryIO, stream)


def require_whole_bgzip(file: Path) -> None:
    """Raise ValueError if a file is one of bgzip that lacks its last block.

    Each block is a whole gzip member, so a file that is cut between two blocks is gzip without an error.
    """
    with file.open("rb") as stream:
        head = stream.read(14)
        is_bgzip = head[:4] == b"\x1f\x8b\x08\x04" and head[12:] == b"BC"  # the extra field of block sizes
        stream.seek(max(0, file.stat().st_size - len(_BGZIP_END)))
        if is_bgzip and stream.read() != _BGZIP_END:
            raise ValueError(f"{file} is truncated: the last block of bgzip is missing; copy it again")


def _decompressor(compression: str, raw: Any) -> IO[bytes]:
    if compression in (".gz", ".bgz"):  # bgzip files are blocks of gzip
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if compression == ".bz2":
        return bz2.BZ2File(raw)
    if compression == ".xz":
        return lzma.LZMAFile(raw)
    pyarrow = import_pyarrow()
    # not the zstandard package: its stream reader does not notice a truncated file
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")


def import_pyarrow() -> Any:
    """Import pyarrow; raises ImportError, which names the extra to install, if it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise ImportError(".zst and .parquet files need pyarrow: pip install 'anymamba[train]'") from None
    return pyarrow


class _CountedFile(io.FileIO):
    """A file that reports the number of bytes read from it."""

    def __init__(self, file: Path, on_read: Callable[[int], None]) -> None:
        super().__init__(file)
        self._on_read = on_read
        self._left = file.stat().st_size  # parquet reads some bytes twice: count at most the size of the file

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._report(count or 0)
        return count

    def readall(self) -> bytes:
        data = super().readall()
        self._report(len(data))
        return data

    def _report(self, count: int) -> None:
        new = min(count, self._left)
        if new > 0:
            self._left -= new
            self._on_read(new)


class _Decompressed(io.RawIOBase):
    """A decompressing stream whose errors name the file."""

    def __init__(self, file: Path, stream: IO[bytes]) -> None:
        self._file, self._stream = file, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, lzma.LZMAError, zlib.error, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk, not of the format
            raise ValueError(f"{self._file}: damaged or truncated {self._file.suffix} data ({error})") from None
        buffer[: len(data)] = data
        return len(data)
