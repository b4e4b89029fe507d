"""Results that the backward pass computes again instead of keeping them.

The result of a cheap operation, such as a norm or a short convolution, takes as much memory as that of an expensive
one. Inside `recomputing`, operations that save such a result for the backward pass save how to compute it:

    with recomputing(x):
        y = again(convolve(x, weight), convolve, x, weight)
        ...  # operations that save y

The inputs x and weight are kept anyway, for the backward pass of `convolve`. The result has the same bits when it is
computed again, and so have all gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from anymamba.ops import dispatch
from anymamba.ops.observers import may_pack_saved_tensors, plain

DEVICES: tuple[str, ...] = ("cuda",)
"""Types of devices on which `recomputing` is active: memory is scarce there, and cheap operations take little time."""
LEAST_SIZE = 1 << 20
"""Numbers in the input of the operations. With fewer, Python code takes most of a step, and memory is plentiful."""

_thread = threading.local()


def recomputing(x: Tensor) -> AbstractContextManager[object]:
    """A context in which operations save the recipes of results that were passed to `again`.

    It does nothing without gradients, on other devices than DEVICES, for small inputs, under `torch.func`, while torch
    traces or compiles, and inside a caller's hooks for saved tensors, which checkpointing sets too. A context inside
    another one is part of the outer one.

    Args:
        x: an input of the operations.
    """
    if x.device.type in DEVICES and torch.is_grad_enabled() and plain(x) and x.numel() >= LEAST_SIZE:
        return _Recipes() if may_pack_saved_tensors() else nullcontext()
    return nullcontext()


def is_recomputing() -> bool:
    """Whether `again` has an effect."""
    return not torch.compiler.is_compiling() and getattr(_thread, "recipes", None) is not None


def again(y: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return y. Inside `recomputing`, operations that save y save function(*inputs) instead.

    Args:
        y: equal to function(*inputs), in memory of its own.
        function: gives the same bits each time, without autocast. It reads only tensors that are in `inputs`.
        inputs: tensors that are kept for the backward pass anyway, and other values.
    """
    if is_recomputing():
        _thread.recipes.add(y, function, inputs)
    return y


class _Recipe:
    """How to compute a tensor again, with the backend with which it was computed first."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...], device: str) -> None:
        self.function, self.device, self.backend = function, device, dispatch.insisted()
        self.inputs = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
        self.versions = [t._version if isinstance(t, Tensor) else None for t in inputs]
        self.n_saved = self.n_left = 0
        self.value: Tensor | None = None

    def result(self) -> Tensor:
        """The tensor. It is kept until every operation that saved it has asked for it."""
        value = self._computed() if self.value is None else self.value
        self.n_left -= 1
        self.value = value if self.n_left > 0 else None
        self.n_left = self.n_left if self.n_left > 0 else self.n_saved
        return value

    def _computed(self) -> Tensor:
        for tensor, version in zip(self.inputs, self.versions, strict=True):
            if version is not None:
                _require_version(tensor, version)
        usual = not (torch.is_grad_enabled() or torch.is_autocast_enabled(self.device))
        if usual and dispatch.insisted() == self.backend:  # contexts take longer than a launch
            return self.function(*self.inputs)
        with torch.no_grad(), dispatch.without_autocast(self.device), dispatch.insist(self.backend):
            return self.function(*self.inputs)


class _Use(NamedTuple):
    """What an operation saves of a tensor that is computed again: the recipe, and its view of the result."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Recipes(AbstractContextManager[object]):
    """The recipes of one context, by the address of their result's memory."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[_Recipe, Tensor, int]] = {}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> None:
        self._hooks.__enter__()
        _thread.recipes = self

    def __exit__(self, *exception: object) -> None:
        _thread.recipes = None
        self._hooks.__exit__(*exception)
        self._found.clear()
        del self._hooks  # it refers back to this object

    def add(self, y: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        storage = y.untyped_storage()
        if plain(y) and y.numel() and storage.nbytes() == y.nbytes:
            # y itself is held, so that nothing else gets its memory while the context lasts
            self._found[storage.data_ptr()] = _Recipe(function, inputs, y.device.type), y, y._version

    def _pack(self, tensor: Tensor) -> _Use | tuple[Tensor, int]:
        """What is kept of a tensor that an operation saves."""
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            recipe, y, version = self._found.get(tensor.untyped_storage().data_ptr(), (None, tensor, 0))
            if recipe is not None and tensor.dtype == y.dtype and y._version == version:
                recipe.n_saved += 1
                recipe.n_left += 1
                return _Use(recipe, tensor.size(), tensor.stride(), tensor.storage_offset())
        return tensor, tensor._version


def _unpack(packed: _Use | tuple[Tensor, int]) -> Tensor:
    if isinstance(packed, _Use):
        return packed.recipe.result().as_strided(packed.size, packed.stride, packed.offset)
    _require_version(*packed)
    return packed[0]


def _require_version(tensor: Tensor, version: int) -> None:
    """Raise the error of torch for a saved tensor that was changed: torch compares no versions where hooks are set."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tensor.dtype} {list(tensor.shape)} is at version {tensor._version}, expected version {version}; "
            "change a copy, or change it after the backward pass"
        )
