"""One call of the kernels: tensors become pointers and strides, packed as the struct Parameters of parameters.cuh."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc, replaying

if TYPE_CHECKING:
    from anymamba.kernels.selective_scan.arguments import ScanArguments

ROWS = ("u", "delta", "z", "B", "C", "y", "dy", "du", "ddelta", "dz")
"""Fields that are a struct Rows: address, strides of batch, length and group, dtype, whether aligned."""

FIELDS = (
    *("A", "D", "delta_bias", "constant_B", "constant_C", "initial_state", "last_state", "dlast_state"),
    *("dinitial_state", "saved", "chunk_states", "chunk_decays", "chunk_steps", "leaving"),
    *("checkpoints", "dA_of_warps"),
    *("dA_parts", "dD_parts", "dbias_parts", "dB_parts", "dC_parts", "dA", "dD", "dbias", "dB", "dC"),
    *("offsets", "sequence_of", "batch", "length", "d_inner", "d_state", "n_groups", "n_sequences"),
    *(
        "chunk",
        "n_chunks",
        "blocks_of_group",
        "states",
        "channels",
        "n_parts",
        "first_chunk",
        "softplus",
        "zoh",
        "passage",
        "lanes",
        "aligned",
    ),
    *("dA_dtype", "dD_dtype", "dbias_dtype", "dB_dtype", "dC_dtype"),
)
"""Fields that are an address or a number, in the order of the struct; the dtypes are those of nvrtc.DTYPES."""

PLACE = {name: i * 6 for i, name in enumerate(ROWS)} | {name: i + 6 * len(ROWS) for i, name in enumerate(FIELDS)}
N_VALUES = 6 * len(ROWS) + len(FIELDS)
PACK = struct.Struct(f"{N_VALUES}q").pack

LARGEST_STRIDE = 1 << 21
"""Elements: kernels compute with 32 bits inside a tile; a tensor with larger strides between tokens is copied."""


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a number's parts."""
    return dtype.to_real() if dtype.is_complex else dtype


class Call:
    """The arguments of the kernels of one call; it keeps what they point to alive.

    Its methods raise ValueError for a tensor on another device than u's.
    """

    def __init__(self, a: ScanArguments) -> None:
        self.dtype = a.dtype
        self.like = a.u
        self._device = a.u.device
        self.index: int = a.u.device.index or 0
        self.values = [0] * N_VALUES
        self._held: dict[int, Tensor] = {}
        self._scratch: list[Tensor] = []
        self.set(
            batch=a.batch,
            length=a.length,
            d_inner=a.d_inner,
            d_state=a.d_state,
            n_groups=a.n_groups,
            n_sequences=a.n_sequences,
            n_chunks=1,
            chunk=-(-a.length // 64) * 64,
            aligned=1,
            first_chunk=1,
            softplus=a.delta_softplus,
            zoh=a.b_discretization == "zoh",
        )
        self.per_group = a.d_inner // a.n_groups
        self.padded = -(-self.per_group // 32) * 32  # channels of a group in scratch tensors
        self.set(channels=self.padded * a.n_groups)

    def set(self, **numbers: int) -> None:
        """Fields that are numbers."""
        for name, value in numbers.items():
            self.values[PLACE[name]] = int(value)

    def __getitem__(self, name: str) -> int:
        return self.values[PLACE[name]]

    def rows(self, **tensors: Tensor | None) -> None:
        """Tensors (batch, length, channels), or (batch, length, groups, states), as they lie in memory.

        What cannot be read so is copied: a strided last dimension, or strides that no kernel multiplies.
        """
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            tensor = readable(tensor)
            self._hold(name, tensor)
            shape, stride = tensor.shape, tensor.stride()
            batch = 0 if shape[0] == 1 else stride[0]
            length = 0 if shape[1] == 1 else stride[1]
            group, in_row = 0, self.per_group
            if len(shape) == 4:
                group, in_row = 0 if shape[2] == 1 else stride[2], shape[3]
            address, dtype = tensor.data_ptr(), tensor.dtype
            aligned = not (address | (batch | length | group | in_row) * dtype.itemsize) & 15
            if not aligned:
                self.values[PLACE["aligned"]] = 0
            number = nvrtc.DTYPES[real(dtype)]
            self.values[PLACE[name] : PLACE[name] + 6] = (address, batch, length, group, number, aligned)

    def dense(self, **tensors: Tensor | None) -> None:
        """Tensors as dense ones of their dtype, from a multiple of 16 bytes; a null address where one is absent."""
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.contiguous()
                address = tensor.data_ptr()
                if address % 16:
                    tensor = tensor.clone()
                    address = tensor.data_ptr()
                self._hold(name, tensor)
                self.values[PLACE[name]] = address

    def _hold(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self._device:
            raise ValueError(
                f"the scan wants its tensors on one device, got u on {self._device}, {name} on {tensor.device}"
            )
        self._held[PLACE[name]] = tensor

    def states(self, **tensors: Tensor | None) -> None:
        """Tensors as dense ones of the state's dtype."""
        self._converted(tensors, self.dtype)

    def vectors(self, **tensors: Tensor | None) -> None:
        """Tensors as dense ones of the state's real dtype."""
        self._converted(tensors, real(self.dtype))

    def _converted(self, tensors: dict[str, Tensor | None], dtype: torch.dtype) -> None:
        self.dense(**{k: t if t is None or t.dtype == dtype else t.to(dtype) for k, t in tensors.items()})

    def gradients(self, **tensors: Tensor | None) -> None:
        """Dense tensors that are written in a dtype of their own."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self.dense(**{name: tensor})
                self.values[PLACE[f"{name}_dtype"]] = nvrtc.DTYPES[real(tensor.dtype)]

    def scratch(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor that is written before it is read, of the state's dtype unless one is given."""
        tensor = self.like.new_empty(shape, dtype=dtype or self.dtype)
        self.dense(**{name: tensor})
        self._scratch.append(tensor)
        return tensor

    def launch(
        self, variant: nvrtc.Variant, n_blocks: int, threads: int, shared: int = 0, *, early: bool = False
    ) -> None:
        """Queue a kernel; `early` as in `nvrtc.Kernel.launch`."""
        how = (nvrtc.kernel(variant, self.index), n_blocks, threads, shared, early)
        replaying.queue(replaying.Launch(*how, PACK, self.values, self._held, self._scratch))


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that kernels can read: the last dimension is dense and strides are moderate."""
    strides = tensor.stride()[1:]
    fine = (strides[-1] == 1 or tensor.shape[-1] == 1) and max(strides) < LARGEST_STRIDE
    return tensor if fine else tensor.contiguous()
