"""Random access to UCSC's .2bit files, of either byte order."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .letters import LOWER, unpack
from .runs import overlapping

_SIGNATURE = 0x1A412743
_N = ord("N")


class _Blocks(NamedTuple):
    """Stretches of a sequence, sorted."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class _Record(NamedTuple):
    """Where the parts of one sequence are in the file."""

    offset: int
    length: int
    n_unknown: int
    """Number of stretches of N."""
    n_masked: int
    """Number of stretches of lower case."""
    bases: int
    """Where the packed bases begin."""


class TwoBitReader:
    """Random access to a .2bit file (version 0, or 1 with 64-bit offsets). The file is mapped, not read.

    A base is N in the file's stretches of N, and in lower case in its masked stretches.
    Source: https://genome.ucsc.edu/FAQ/FAQformat.html#format7

    Raises ValueError, naming file and sequence, for a file that is damaged, truncated or of another format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._size = path.stat().st_size
            if self._size < 16:
                raise self._damaged("it ends in its header")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._order = self._byte_order()
            self._records = {name: self._record(name, offset) for name, offset in self._index()}
        except BaseException:
            self._map.close()
            raise
        self.lengths = {name: record.length for name, record in self._records.items() if record.length}
        self.empty = [name for name, record in self._records.items() if not record.length]
        """Names of the sequences without a base, which are left out."""
        self._blocks: dict[str, tuple[_Blocks, _Blocks]] = {}

    def read(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters [start, end) of a sequence as ASCII codes."""
        bases = self._records[name].bases
        letters = unpack(self._map[bases + start // 4 : bases + (end + 3) // 4], start % 4, end - start)
        if name not in self._blocks:
            self._blocks[name] = self._read_blocks(name)
        unknown, masked = self._blocks[name]
        for first, last in _stretches(unknown, start, end):
            letters[first:last] = _N
        for first, last in _stretches(masked, start, end):
            letters[first:last] |= LOWER
        return letters

    def unknown_runs(self, name: str) -> NDArray[np.int64]:
        """Where a sequence has N, (n_runs, 2)."""
        record = self._records[name]
        starts, ends = self._block_list(name, record.offset + 8, record.n_unknown)
        starts = np.maximum(starts, np.concatenate([[0], ends])[:-1])  # stretches may overlap; both ends are sorted
        return np.stack([starts, ends], axis=1)[starts < ends]

    @property
    def n_unknown(self) -> int:
        """The number of N in all sequences."""
        return sum(int(np.diff(self.unknown_runs(name)).sum()) for name in self.lengths)

    def close(self) -> None:
        """Close the mapped file."""
        self._map.close()

    def _byte_order(self) -> str:
        for order in "<>":
            signature, version, _, _ = struct.unpack_from(f"{order}4I", self._map)
            if signature == _SIGNATURE:
                if version > 1:
                    raise ValueError(f"{self._path} is .2bit of version {version}; versions 0 and 1 can be read")
                self._offset_code = "Q" if version else "I"
                return order
        raise ValueError(f"{self._path} is not .2bit: its first four bytes are {self._map[:4].hex(' ')}")

    def _index(self) -> list[tuple[str, int]]:
        """The name and the offset of each sequence."""
        (count,) = struct.unpack_from(f"{self._order}I", self._map, 8)
        at, found, seen = 16, [], set()
        width = struct.calcsize(self._offset_code)
        for _ in range(count):
            if at >= self._size or at + 1 + self._map[at] + width > self._size:
                raise self._damaged(f"it ends in its index of {count:,} sequences")
            name_end = at + 1 + self._map[at]
            name = self._map[at + 1 : name_end].decode("utf-8", "surrogateescape")
            if not name or name in seen:
                raise self._damaged(f"two sequences have the name {name!r}" if name else "a sequence has no name")
            seen.add(name)
            found.append((name, struct.unpack_from(self._order + self._offset_code, self._map, name_end)[0]))
            at = name_end + width
        if not found:
            raise ValueError(f"{self._path} has no sequence")
        return found

    def _record(self, name: str, offset: int) -> _Record:
        length, n_unknown = self._number(name, offset), self._number(name, offset + 4)
        at_masked = offset + 8 + 8 * n_unknown
        n_masked = self._number(name, at_masked)
        bases = at_masked + 4 + 8 * n_masked + 4
        if bases + (length + 3) // 4 > self._size:
            raise self._damaged(f"it ends in sequence {name!r} of {length:,} bases")
        return _Record(offset, length, n_unknown, n_masked, bases)

    def _number(self, name: str, at: int) -> int:
        if at + 4 > self._size:
            raise self._damaged(f"it ends before sequence {name!r}")
        return struct.unpack_from(f"{self._order}I", self._map, at)[0]

    def _read_blocks(self, name: str) -> tuple[_Blocks, _Blocks]:
        """The stretches of N and of lower case."""
        record = self._records[name]
        at_masked = record.offset + 8 + 8 * record.n_unknown
        return (
            self._block_list(name, record.offset + 8, record.n_unknown),
            self._block_list(name, at_masked + 4, record.n_masked),
        )

    def _block_list(self, name: str, at: int, count: int) -> _Blocks:
        numbers = np.frombuffer(self._map[at : at + 8 * count], f"{self._order}u4").astype(np.int64)
        starts, ends = numbers[:count], numbers[:count] + numbers[count:]
        in_order = (starts[1:] >= starts[:-1]).all() and (ends[1:] >= ends[:-1]).all()
        if not in_order or (ends > self._records[name].length).any():
            raise self._damaged(f"stretches of N or of lower case are out of order or outside in sequence {name!r}")
        return _Blocks(starts, ends)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path} is damaged or truncated .2bit: {what}; copy it again")


def _stretches(blocks: _Blocks, start: int, end: int) -> list[tuple[int, int]]:
    """The parts of the blocks in [start, end), counted from start."""
    found = overlapping(blocks.starts, blocks.ends, start, end)
    first, last = blocks.starts[found].clip(min=start) - start, blocks.ends[found].clip(max=end) - start
    return list(zip(first.tolist(), last.tolist(), strict=True))
