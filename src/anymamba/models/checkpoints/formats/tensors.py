"""What a file of named tensors gives, and whether it is replaced while it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.ops.packed_linear import PackedWeight

MAPPED_BYTES = 1 << 26  # bytes to read before a file is opened again, which frees the pages read so far


class StoredTensor(NamedTuple):
    """Shape and dtype of a tensor, which are known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class TensorFile(Protocol):
    """A file of named tensors, or several that belong together."""

    path: Path

    @property
    def formats(self) -> Mapping[str, str]:
        """The block formats of the matrices that are stored in blocks of integers, by name."""
        ...

    def stored(self) -> dict[str, StoredTensor]:
        """All tensors by name."""
        ...

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name, in order; each is a view of the mapped file, valid until the next is requested."""
        ...

    def blocks(self, name: str) -> PackedWeight | None:
        """A matrix as it lies in the mapped file; None if this kind of file does not give that."""
        ...


class Unchanged:
    """Tells when a file is replaced while it is read, by what `stat` says of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first = self._now()

    def require(self) -> None:
        """Raise CheckpointError if the file is another one now; its tensors must not be mixed with the earlier ones."""
        if self._now() != self.first:
            raise CheckpointError(f"{self.path} was replaced while it was read; load it again")

    def _now(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
