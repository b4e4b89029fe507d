"""Files of tensors: safetensors and torch's archives, as one file or in shards, mapped into memory and checked.

A reader yields tensors that are views of the mapped file. Each is valid until the next one is requested, so that the
pages of a large file do not stay in memory. Pickles are only read by torch with weights_only, which runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.models.checkpoints.formats.tensors import MAPPED_BYTES, StoredTensor, TensorFile, Unchanged
from anymamba.models.checkpoints.formats.torch_archive import TorchFile
from anymamba.ops.packed_linear import FORMATS, PackedWeight, unpack

CONFIG = "config.json"
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
OTHER_PICKLES = ("model.pt", "model.pth", "pytorch_model.pt")

BLOCKS = {name: format for name, format in FORMATS.items() if format.columns > 1}
"""The packed formats whose rows are blocks of integers with scales."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SafetensorsFile:
    """One safetensors file.

    Args:
        formats: the block formats of the matrices that are stored as bytes, (n_out, row_bytes).
    """

    def __init__(self, path: Path, formats: Mapping[str, str] | None = None) -> None:
        self.path, self._unchanged = path, Unchanged(path)
        self.formats: Mapping[str, str] = formats or {}
        self._whole: Any = None  # the open file that the tensors of `blocks` are views of

    def stored(self) -> dict[str, StoredTensor]:
        found = {}
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                kind, shape = part.get_dtype(), tuple(part.get_shape())
                if name in self.formats:
                    found[name] = self._of_blocks(name, kind, shape)
                elif kind not in _DTYPES:
                    raise CheckpointError(f"{self.path}: {name} must be floating point, got {kind}")
                else:
                    found[name] = StoredTensor(shape, _DTYPES[kind])
        return found

    def _of_blocks(self, name: str, kind: str, shape: tuple[int, ...]) -> StoredTensor:
        """The shape of the matrix that blocks stand for."""
        size = BLOCKS[self.formats[name]].n_bytes
        if kind != "U8" or len(shape) != 2 or shape[1] % size:
            raise CheckpointError(
                f"{self.path}: {name} must be rows of {self.formats[name]} blocks, (n_out, a multiple of {size} bytes) "
                f"in U8, got {shape} in {kind}; copy it again"
            )
        return StoredTensor((shape[0], shape[1] // size * BLOCKS[self.formats[name]].columns), torch.float32)

    def blocks(self, name: str) -> PackedWeight | None:
        if self._whole is None:
            with self._open():  # checks it
                self._whole = safe_open(self.path, framework="pt")
        self._unchanged.require()
        tensor = self._whole.get_tensor(name)
        return of_blocks(tensor, self.formats[name]) if name in self.formats else as_packed(tensor)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        rest = list(names)[::-1]
        while rest:
            budget = MAPPED_BYTES
            with self._open() as file:
                while rest and budget > 0:
                    name = rest.pop()
                    tensor = file.get_tensor(name)
                    budget -= tensor.numel() * tensor.element_size()
                    yield name, self._values(name, tensor)
                    del tensor

    def _values(self, name: str, tensor: Tensor) -> Tensor:
        return unpack(of_blocks(tensor, self.formats[name])) if name in self.formats else tensor

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                self._unchanged.require()
                yield file
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path} is truncated or not a safetensors file ({error}); copy it again"
            ) from error


class ShardedFiles:
    """Several files and an index that says which tensor is in which."""

    def __init__(self, path: Path, open_shard: Callable[[Path], TensorFile]) -> None:
        self.path, folder = path, path.parent
        table = read_json(path).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
        for name in sorted(set(table.values())):
            if Path(name).name != name or name in ("", ".", ".."):
                raise CheckpointError(f"{path}: {name!r} in weight_map must be a file in the same folder")
            if not (folder / name).is_file():
                raise CheckpointError(f"{path} names the shard {name}, which is not there; copy it too")
        self._shard_of: dict[str, str] = table
        self._shards = {name: open_shard(folder / name) for name in dict.fromkeys(table.values())}
        self.formats = {k: v for shard in self._shards.values() for k, v in shard.formats.items()}

    def stored(self) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for shard_name, shard in self._shards.items():
            for name, tensor in shard.stored().items():
                if self._shard_of.get(name, shard_name) != shard_name or name in found:
                    raise CheckpointError(f"{shard.path} holds {name}, which {self.path.name} places elsewhere")
                found[name] = tensor
                self._shard_of.setdefault(name, shard_name)
        missing = sorted(set(self._shard_of) - set(found))
        if missing:
            place = self.path.parent / self._shard_of[missing[0]]
            raise CheckpointError(f"{place} lacks {missing[0]}, which {self.path.name} places there")
        return found

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        queues: dict[str, list[str]] = {}
        for name in names:
            queues.setdefault(self._shard_of[name], []).append(name)
        for shard, wanted in queues.items():
            yield from self._shards[shard].read(wanted)

    def blocks(self, name: str) -> PackedWeight | None:
        return self._shards[self._shard_of[name]].blocks(name)


DTYPE_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The packed formats of matrices of plain numbers."""


def of_blocks(rows: Tensor, format: str) -> PackedWeight:
    """Rows of bytes (n_out, row_bytes) as the matrix that they stand for."""
    _, columns, size, _ = BLOCKS[format]
    return PackedWeight(rows, format, rows.shape[1] // size * columns)


def as_packed(matrix: Tensor) -> PackedWeight | None:
    """A matrix of plain numbers as packed rows, without a copy; None for a dtype that products do not take."""
    if matrix.dtype not in DTYPE_FORMATS or matrix.ndim != 2:
        return None
    return PackedWeight(matrix.view(torch.uint8), DTYPE_FORMATS[matrix.dtype], matrix.shape[1])


def open_weights(folder: Path, verify: bool = True, formats: Mapping[str, str] | None = None) -> TensorFile:
    """Open the weights of a model folder; prefers safetensors to torch's archives, and one file to shards.

    Args:
        verify: compare torch's archives with their CRC-32s; safetensors have none.
        formats: the block formats of matrices that are stored as bytes, in safetensors only.
    Raises FileNotFoundError if there are none, CheckpointError if there is only a bare pickle.
    """
    kinds: dict[str, Callable[[Path], TensorFile]]
    kinds = {SAFETENSORS: partial(SafetensorsFile, formats=formats), TORCH: partial(TorchFile, verify=verify)}
    for name, open_file in kinds.items():
        if (folder / name).exists():
            return open_file(folder / name)
        if (folder / f"{name}.index.json").exists():
            return ShardedFiles(folder / f"{name}.index.json", open_file)
    for name in OTHER_PICKLES:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name} is a pickle, which can run code when it is read; convert it to {SAFETENSORS} first"
            )
    raise FileNotFoundError(f"{folder} has no {SAFETENSORS} and no {TORCH}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises CheckpointError if the file holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a table of keys and values, got {type(values).__name__}")
    return values


@contextmanager
def failures_told(name: str) -> Iterator[None]:
    """Turn a library's own errors about a full disk into an OSError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(f"{name} could not be written ({error}); is the disk full?") from error
