"""Checks a GGUF file's header before it is read: every length is compared with the size of the file.

The `gguf` package loops as often as the header says, so a hostile header must be rejected first.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from anymamba.base.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_ENTRIES = 1 << 24
"""Most elements of one array, most keys, and most tensors; the largest vocabularies have less than 2^19 tokens."""
MAX_DIMS = 4


class _Header:
    """Reads a header in order; a length beyond the end of the file is an error that names the field."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.field = file, path, "the header"
        self.left = path.stat().st_size

    def fail(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.field} {words}; the file is truncated, corrupt or not GGUF")

    def skip(self, size: int) -> None:
        if size > self.left:
            raise self.fail(f"claims {size:,} bytes where {self.left:,} are left")
        self.left -= size
        self.file.seek(size, 1)

    def bytes(self, size: int) -> bytes:
        if size > self.left:
            raise self.fail(f"claims {size:,} bytes where {self.left:,} are left")
        self.left -= size
        return self.file.read(size)

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def count(self, words: str) -> int:
        number = self.number("Q")
        if number > MAX_ENTRIES or number > self.left:
            raise self.fail(f"claims {number:,} {words}")
        return number

    def name(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")


def check_header(path: Path) -> None:
    """Check all keys, values and tensor infos.

    Raises CheckpointError, which names the field or tensor with an impossible length, type or offset.
    """
    with open(path, "rb") as file:
        header = _Header(file, path)
        if header.bytes(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {MAGIC!r}")
        version = header.number("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{path} is of GGUF version {version}; only little-endian files of version 2 or 3 can be read"
            )
        n_tensors, n_keys = header.count("tensors"), header.count("keys")
        for number in range(n_keys):
            header.field = f"metadata key {number}"
            header.field = f"metadata key {header.name()!r}"
            _value(header, header.number("I"))
        tensors = [_tensor(header, number) for number in range(n_tensors)]
    for name, offset, size in tensors:  # alignment padding is not counted here
        if offset + size > header.left:
            raise CheckpointError(f"{path}: tensor {name!r} ends beyond the file; it is truncated or corrupt")


def _value(header: _Header, kind: int) -> None:
    if kind in SCALAR_BYTES:
        header.skip(SCALAR_BYTES[kind])
    elif kind == STRING:
        header.skip(header.number("Q"))
    elif kind == ARRAY:
        entry, count = header.number("I"), header.count("entries")
        if entry in SCALAR_BYTES:
            header.skip(count * SCALAR_BYTES[entry])
        elif entry == STRING:
            for _ in range(count):
                header.skip(header.number("Q"))
        else:
            raise header.fail(f"is an array of type {entry}")
    else:
        raise header.fail(f"is of type {kind}")


def _tensor(header: _Header, number: int) -> tuple[str, int, int]:
    """Name and offset of a tensor, and the smallest number of bytes that its shape needs."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header.field = f"tensor {number}"
    name = header.name()
    header.field = f"tensor {name!r}"
    n_dims = header.number("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise header.fail(f"has {n_dims} dimensions")
    elements = 1
    for _ in range(n_dims):
        elements *= header.number("Q")
    kind = header.number("I")
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        raise header.fail(f"is of type {kind}") from None
    return name, header.number("Q"), elements // block * block_bytes
