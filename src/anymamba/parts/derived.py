"""Tensors that a step computes only from weights, kept until the weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

ValueT = TypeVar("ValueT")


class DerivesTensors(nn.Module):
    """A module that computes tensors only from its weights, such as A from A_log."""

    _kept: dict[str, Any] | None = None

    def derived(self, name: str, compute: Callable[[], ValueT]) -> ValueT:
        """Return the result of `compute`. Inside a `KeptTensors` context it is called once."""
        kept = self._kept
        if kept is None:
            return compute()
        if name not in kept:
            kept[name] = compute()
        return kept[name]


class KeptTensors:
    """A context around each step of one generation: inside it, derived tensors are computed once and kept.

    On entry it compares the versions and addresses of the weights with those of the last entry; a change drops the kept
    tensors. Writing through `weight.data` changes neither, so make a new object after that.

    Args:
        model: the modules whose derived tensors are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [m for m in model.modules() if isinstance(m, DerivesTensors)]
        self._entries = [(m.__dict__, m._parameters, _Kept()) for m in modules]

    def __enter__(self) -> None:
        for attributes, parameters, kept in self._entries:
            weights = [
                (p.data_ptr(), None if p.is_inference() else p._version) for p in parameters.values() if p is not None
            ]
            if weights != kept.weights:
                kept.weights = weights
                kept.tensors.clear()
            attributes["_kept"] = kept.tensors

    def __exit__(self, *exception: object) -> None:
        for attributes, _, _ in self._entries:
            attributes["_kept"] = None


class _Kept:
    """The derived tensors of one module, and the weights that they belong to."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, int | None]] = []
        self.tensors: dict[str, Any] = {}
