"""The bytes of a FASTA file at any place: a mapped file, or the blocks of bgzip."""

from __future__ import annotations

import mmap
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from ..documents import require_whole_bgzip

_KEPT = 64  # decompressed blocks, of at most 64 KiB, that are kept


class MappedFile:
    """The bytes of a file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end); fewer at the end of the file."""
        return self._map[start:end]

    def close(self) -> None:
        """Close the mapped file."""
        self._map.close()


class BgzipFile:
    """The decompressed bytes of a file of bgzip, by its index. The last blocks are kept.

    Args:
        path: the file.
        index: its .gzi: the number of blocks but the first, then the compressed and the decompressed offset of each, as
            little-endian numbers of 64 bits.
    Raises ValueError, naming the file, if it is truncated or damaged, or if the index does not fit it.
    """

    def __init__(self, path: Path, index: Path) -> None:
        require_whole_bgzip(path)
        self._path, self._index = path, index
        self._file = MappedFile(path)
        data = index.read_bytes()
        offsets = np.frombuffer(data[8 : len(data) // 8 * 8], "<u8").astype(np.int64)
        size = path.stat().st_size
        count = int.from_bytes(data[:8], "little")
        fits = len(data) == 8 + 16 * count and (np.diff(offsets.reshape(-1, 2), axis=0, prepend=0) > 0).all()
        if not fits:
            self.close()
            raise ValueError(f"{index} is no index of bgzip; delete it, or make it with bgzip --reindex {path}")
        if (offsets[0::2] >= size).any():
            self.close()
            raise self._misfit()
        self._places = np.concatenate([[0], offsets[0::2], [size]])  # of the blocks in the file
        self._starts = np.concatenate([[0], offsets[1::2]])  # of their contents
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end); fewer at the end of the file."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        pieces = b"".join(self._block(i) for i in range(first, last))
        skipped = start - int(self._starts[first])
        return pieces[skipped : skipped + end - start]

    def close(self) -> None:
        """Close the mapped file."""
        self._file.close()

    def _block(self, i: int) -> bytes:
        if i in self._blocks:
            self._blocks.move_to_end(i)
            return self._blocks[i]
        data = self._decompressed(i)
        if i + 1 < len(self._starts) and len(data) != self._starts[i + 1] - self._starts[i]:
            raise self._misfit()
        self._blocks[i] = data
        if len(self._blocks) > _KEPT:
            self._blocks.popitem(last=False)
        return data

    def _misfit(self) -> ValueError:
        return ValueError(f"{self._index} does not fit {self._path}; make it again with bgzip --reindex {self._path}")

    def _decompressed(self, i: int) -> bytes:
        one = zlib.decompressobj(31)
        try:
            data = one.decompress(self._file.read(int(self._places[i]), int(self._places[i + 1])))
        except zlib.error as error:
            raise ValueError(f"{self._path}: damaged gzip data in block {i:,} ({error}); copy it again") from None
        if not one.eof:
            raise ValueError(f"{self._path}: truncated gzip data in block {i:,}; copy it again")
        return data
