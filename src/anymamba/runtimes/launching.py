"""Pass arguments to CUDA kernels: addresses, strides and numbers in a struct whose fields all have 8 bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc, replaying

TensorT = TypeVar("TensorT", Tensor, Tensor | None)

MISSING = 0
"""The address for a tensor that is not given."""


class Layout(NamedTuple):
    """The positions of the fields of a struct Parameters."""

    place: dict[str, int]
    pack: Callable[..., bytes]


def layout(tensors: dict[str, int], fields: tuple[str, ...]) -> Layout:
    """The layout of a struct that has tensors first, then addresses and numbers.

    Args:
        tensors: the number of dimensions of each tensor. A tensor is a struct of its address, its strides except the
            last one, and its dtype.
        fields: the names of the other fields, in their order.
    """
    place, at = {}, 0
    for name, n_dimensions in tensors.items():
        place[name] = at
        at += n_dimensions + 1
    place |= {name: at + i for i, name in enumerate(fields)}
    return Layout(place, struct.Struct(f"{at + len(fields)}q").pack)


class Call:
    """The arguments of the kernels of one call. Keeps the tensors that they point to alive.

    Args:
        layout: the layout of the struct.
        like: a tensor on the device.
    """

    def __init__(self, layout: Layout, like: Tensor) -> None:
        self._layout = layout
        self._like = like
        self._index: int = like.device.index or 0
        self._values = [0] * (max(layout.place.values()) + 1)
        self._held: dict[int, Tensor] = {}
        self._scratch: list[Tensor] = []

    @property
    def n_multiprocessors(self) -> int:
        """The number of multiprocessors of the device."""
        return nvrtc.device(self._index).n_multiprocessors

    def set(self, **numbers: int) -> None:
        """Set fields that are numbers."""
        for name, value in numbers.items():
            self._values[self._layout.place[name]] = int(value)

    def __getitem__(self, name: str) -> int:
        return self._values[self._layout.place[name]]

    def strided(self, **tensors: Tensor | None) -> None:
        """Pass tensors with their strides. One whose last dimension is not contiguous is copied."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            tensor = tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
            strides = [0 if size == 1 else s for size, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
            at = self._layout.place[name]
            self._held[at] = tensor
            values = (tensor.data_ptr(), *strides, nvrtc.DTYPES[tensor.dtype])
            self._values[at : at + len(values)] = values

    def dense(self, **tensors: Tensor | None) -> None:
        """Pass tensors as contiguous ones, aligned to 16 bytes. None stays MISSING."""
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.contiguous()
                tensor = tensor.clone() if tensor.data_ptr() % 16 else tensor
                at = self._layout.place[name]
                self._held[at] = tensor
                self._values[at] = tensor.data_ptr()

    def typed(self, **tensors: Tensor | None) -> None:
        """The same as `dense`, and set the field NAME_dtype to each tensor's dtype."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self.dense(**{name: tensor})
                self.set(**{f"{name}_dtype": nvrtc.DTYPES[tensor.dtype]})

    def scratch(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Pass and return a new uninitialised tensor."""
        tensor = self._like.new_empty(shape, dtype=dtype)
        self.dense(**{name: tensor})
        self._scratch.append(tensor)
        return tensor

    def launch(
        self, variant: nvrtc.Variant, n_blocks: int, threads: int, shared: int = 0, *, early: bool = False
    ) -> None:
        """Queue a kernel; `early` as in `nvrtc.Kernel.launch`."""
        how = (nvrtc.kernel(variant, self._index), n_blocks, threads, shared, early)
        replaying.queue(replaying.Launch(*how, self._layout.pack, self._values, self._held, self._scratch))


def resolved(tensor: TensorT) -> TensorT:
    """The tensor as its memory has it: autograd hands over lazily conjugated and negated ones."""
    return tensor if tensor is None else tensor.resolve_conj().resolve_neg()


def copied(target: Tensor, tensor: Tensor | None) -> Tensor:
    """Write a tensor, or zeros, into `target`."""
    return target.zero_() if tensor is None else target.copy_(tensor)


def aligned(tensor: Tensor | None, elements: int) -> bool:
    """Whether the start and the length of every row are multiples of this many elements."""
    if tensor is None:
        return True
    *sizes, last = tensor.shape
    *steps, one = tensor.stride()
    if one != 1 or last % elements or tensor.data_ptr() % (elements * tensor.element_size()):
        return False
    return not any(step % elements for size, step in zip(sizes, steps, strict=True) if size > 1)


PIECE = 16
"""Bytes that a thread reads or writes at once."""


def numbers_of_piece(tensor: Tensor) -> int:
    """The numbers of a tensor in 16 bytes."""
    return PIECE // tensor.itemsize


def in_pieces(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows are at multiples of 16 bytes."""
    return tensor if aligned(tensor, numbers_of_piece(tensor)) else tensor.clone(memory_format=torch.contiguous_format)


def is_served(tensor: Tensor) -> bool:
    """Whether kernels run where a tensor is: on a GPU for which they can be compiled."""
    if not tensor.is_cuda:
        return False
    return not nvrtc.reason() and not nvrtc.refuses_gpu(tensor.device.index or 0)
