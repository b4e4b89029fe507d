"""Reads the header of a GGUF file once and trusts nothing in it: lengths and offsets are compared with the file's size.

Source: the GGUF specification. The rule for offsets is that of llama.cpp: each tensor begins where the padding of the
one before it ends.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anymamba.base.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values, as `struct` spells them."""
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Types of tensors that are read: name, elements of a block, bytes of a block."""
MAX_ENTRIES = 1 << 24
"""Most elements of one array, most keys, and most tensors; the largest vocabularies have less than 2^19 tokens."""
MAX_DIMS = 4
LONGEST_FIELD = 100
"""Characters of a name in an error: the length of one may be what is damaged."""


class Value(NamedTuple):
    """Where a metadata value lies in the header; an array has the type of its entries and their number."""

    kind: int
    start: int
    stop: int
    entries: int | None = None


class TensorInfo(NamedTuple):
    """A tensor in the file. The last dimension is contiguous."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    """From the beginning of the file, in bytes."""
    n_bytes: int
    """0 for a type that is not read."""


class Header:
    """The metadata and the tensors of a file."""

    def __init__(self, path: Path, data: bytes, values: dict[str, Value], tensors: dict[str, TensorInfo]) -> None:
        self.path, self.values, self.tensors = path, values, tensors
        self._data = data

    def value(self, key: str) -> Any:
        """A metadata value; None if the file has none of that key.

        Raises CheckpointError for a string that is not UTF-8 and a truth value other than 0 and 1.
        """
        place = self.values.get(key)
        if place is None:
            return None
        try:
            found = self._decoded(place)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: metadata key {key!r} cannot be read ({error})") from error
        return found if place.entries is not None else found[0]

    def _decoded(self, place: Value) -> list[Any]:
        """The entries of an array, or a list of the one value."""
        if place.kind == STRING:
            return list(self._strings(place))
        if place.kind == 7 and set(self._data[place.start : place.stop]) - {0, 1}:
            raise ValueError("a truth value must be 0 or 1")
        count = 1 if place.entries is None else place.entries
        found = struct.unpack_from(f"<{count}{SCALARS[place.kind]}", self._data, place.start)
        if place.kind == FLOAT32:
            return [float(str(np.float32(value))) for value in found]
        return list(found)

    def _strings(self, place: Value) -> Iterator[str]:
        at = place.start
        while at < place.stop:
            (size,) = struct.unpack_from("<Q", self._data, at)
            yield self._data[at + 8 : at + 8 + size].decode("utf-8")
            at += 8 + size


def read_header(path: Path) -> Header:
    """Read keys, values and tensor infos; arrays are decoded when they are asked for.

    Raises CheckpointError, naming the field or tensor, if a length, type or offset is impossible.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if not size:
            return _walk(path, b"", size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _walk(path, mapped, len(mapped))


def _walk(path: Path, data: bytes | mmap.mmap, size: int) -> Header:
    walk = _Walk(path, data, size)
    if walk.bytes(4) != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {MAGIC!r}")
    version = walk.number("I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} is of GGUF version {version}; only little-endian files of version 2 or 3 can be read"
        )
    n_tensors, n_keys = walk.count("tensors"), walk.count("keys")
    values: dict[str, Value] = {}
    for number in range(n_keys):
        walk.field = f"metadata key {number}"
        key = walk.text()
        walk.field = f"metadata key {key!r}"
        if key in values:
            raise walk.fail("is there twice")
        values[key] = walk.value(walk.number("I"))
    infos = [_tensor_info(walk, number) for number in range(n_tensors)]
    header = Header(path, bytes(data[: walk.place]), values, {})
    header.tensors.update(_placed(infos, walk, _alignment(header)))
    return header


class _Walk:
    """A place in the bytes of a header. Reading beyond the end of the file is an error that names the field."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.place, self.field = 0, "the header"

    def fail(self, words: str) -> CheckpointError:
        field = self.field if len(self.field) <= LONGEST_FIELD else f"{self.field[:LONGEST_FIELD]}..."
        return CheckpointError(f"{self.path}: {field} {words}; the file is truncated, corrupt or not GGUF")

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        start = self.place
        if size > self.size - start:
            raise self.fail(f"claims {size:,} bytes where {self.size - start:,} are left")
        self.place = start + size
        return start

    def bytes(self, size: int) -> bytes:
        start = self.take(size)
        return self.data[start : start + size]

    def number(self, code: str) -> int:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, words: str) -> int:
        number = self.number("Q")
        if number > MAX_ENTRIES or number > self.size - self.place:
            raise self.fail(f"claims {number:,} {words}")
        return number

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        entries = None
        if kind == ARRAY:
            kind, entries = self.number("I"), self.count("entries")
            if kind not in SCALARS and kind != STRING:
                raise self.fail(f"is an array of type {kind}")
        start = self.place
        if kind in SCALARS:
            self.take((1 if entries is None else entries) * struct.calcsize(f"<{SCALARS[kind]}"))
        elif kind == STRING:
            for _ in range(1 if entries is None else entries):
                self.take(self.number("Q"))
        else:
            raise self.fail(f"is of type {kind}")
        return Value(kind, start, self.place, entries)


class _Info(NamedTuple):
    """A tensor as the header describes it; the offset is from the first tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor_info(walk: _Walk, number: int) -> _Info:
    walk.field = f"tensor {number}"
    name = walk.text()
    walk.field = f"tensor {name!r}"
    n_dims = walk.number("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise walk.fail(f"has {n_dims} dimensions")
    shape = tuple(walk.number("Q") for _ in range(n_dims))[::-1]
    return _Info(name, shape, walk.number("I"), walk.number("Q"))


def _alignment(header: Header) -> int:
    if ALIGNMENT not in header.values:
        return DEFAULT_ALIGNMENT
    value, kind = header.value(ALIGNMENT), header.values[ALIGNMENT].kind
    if kind != UINT32 or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise CheckpointError(f"{header.path}: {ALIGNMENT} must be a power of 2 of type uint32, got {value!r}")
    return value


def _placed(infos: list[_Info], walk: _Walk, alignment: int) -> dict[str, TensorInfo]:
    """The tensors by name, each where the one before it ends, the last at the end of the file."""
    found: dict[str, TensorInfo] = {}
    first = _padded(walk.place, alignment)
    checked, end = True, 0
    for info in infos:
        walk.field = f"tensor {info.name!r}"
        if info.name in found:
            raise walk.fail("is there twice")
        kind, n_bytes = _kind_and_bytes(info, walk)
        checked = checked and info.kind in KINDS  # after a type that is not read, offsets are not known
        if checked and info.offset != _padded(end, alignment):
            raise walk.fail(f"has offset {info.offset:,}, wanted {_padded(end, alignment):,}")
        end = info.offset + n_bytes
        if first + end > walk.size:
            raise walk.fail(f"ends beyond the file, at byte {first + end:,} of {walk.size:,}")
        found[info.name] = TensorInfo(info.shape, kind, first + info.offset, n_bytes)
    if checked and infos and walk.size > _padded(first + end, alignment):
        raise walk.fail(f"is the last one and ends at byte {first + end:,} of {walk.size:,}")
    return found


def _kind_and_bytes(info: _Info, walk: _Walk) -> tuple[str, int]:
    """The name of a tensor's type and the bytes that the tensor takes; 0 if the type is not read."""
    if info.kind not in KINDS:
        return _other_kind(info.kind, walk), 0
    kind, block, block_bytes = KINDS[info.kind]
    if info.shape[-1] % block:
        raise walk.fail(f"has rows of {info.shape[-1]:,} elements, which {kind} cannot hold: its blocks have {block}")
    return kind, math.prod(info.shape) // block * block_bytes


def _other_kind(kind: int, walk: _Walk) -> str:
    """The name of a type that is not read, as far as `gguf` is there to tell it."""
    try:
        from gguf import GGMLQuantizationType
    except ImportError:
        return f"number {kind}"
    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        raise walk.fail(f"is of type {kind}") from None


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
