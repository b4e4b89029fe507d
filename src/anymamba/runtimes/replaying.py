"""Repeat calls of CUDA kernels without planning them again.

What a call allocates and launches depends only on its options and on the shapes, strides, dtypes and alignment of its
tensors; to work it out takes Python longer than a small kernel runs. So the first call of its kind is recorded. Later
ones allocate the same, fill in their own addresses and launch.

A call is recorded if every address that its kernels get is that of an input, of a result or of a scratch tensor. One
that converts or copies a tensor is planned each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc

Results = Sequence[Any]
"""Tensors, None where there is none, and numbers, which are the same for all calls of a kind."""

MOST_PLANS = 4096
"""Calls of different kinds that are kept; then the older half is forgotten."""
SCRATCH_ALIGNMENT = 256
"""Bytes at whose multiples scratch tensors begin in their common allocation."""

_thread = threading.local()
_plans: dict[Any, Plan | None] = {}
"""None: a call of this kind cannot be repeated."""


class Launch(NamedTuple):
    """A kernel that a call launches."""

    kernel: nvrtc.Kernel
    n_blocks: int
    threads: int
    shared: int
    early: bool
    pack: Callable[..., bytes]
    values: list[int]
    """The fields of the kernels' struct."""
    held: dict[int, Tensor]
    """Tensors by the fields that have their addresses."""
    scratch: list[Tensor]


class Step(NamedTuple):
    """A launch that is repeated."""

    kernel: nvrtc.Kernel
    n_blocks: int
    threads: int
    shared: int
    early: bool
    numbers: tuple[tuple[int, int], ...]
    """Fields of the struct that differ from the previous launch, with their values."""
    addresses: tuple[tuple[int, int], ...]
    """Fields that get an address from here on, with its index: those of the inputs, the results and scratch tensors."""


class Plan(NamedTuple):
    """What a call allocates and launches."""

    pack: Callable[..., bytes]
    values: list[int]
    inputs: tuple[int, ...]
    """Indices of the tensors whose addresses are used."""
    results: tuple[Any, ...]
    """The shape and dtype of each tensor; others as they are."""
    scratch: tuple[int, ...]
    """Offsets of the scratch tensors in their common allocation, and its size."""
    steps: tuple[Step, ...]

    def run(self, tensors: Sequence[Tensor | None]) -> Results:
        """Do what the recorded call did, with other tensors."""
        like = tensors[0]
        assert like is not None
        addresses = [tensors[i].data_ptr() for i in self.inputs]  # type: ignore[union-attr]
        results = list(self.results)
        for i, made in enumerate(results):
            if type(made) is tuple:
                results[i] = tensor = like.new_empty(made[0], dtype=made[1])
                addresses.append(tensor.data_ptr())
        if len(self.scratch) > 1:
            scratch = like.new_empty(self.scratch[-1], dtype=torch.uint8)  # alive until all is launched
            base = scratch.data_ptr()
            addresses += [base + offset for offset in self.scratch[:-1]]
        values = self.values.copy()
        for kernel, n_blocks, threads, shared, early, numbers, fields in self.steps:
            for field, value in numbers:
                values[field] = value
            for field, i in fields:
                values[field] = addresses[i]
            kernel.launch(n_blocks, threads, shared, self.pack(*values), early)
        return results


def replayed(
    name: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...], compute: Callable[[], Results]
) -> Results:
    """The results of `compute`, or of a call that repeats what an earlier one of its kind did.

    Args:
        name: of what is computed.
        tensors: all that `compute` reads; the first is not None, and none is lazily conjugated or negated.
        options: what else it depends on.
        compute: writes its results with kernels alone. Apart from them it may convert or copy what the kernels get.
    """
    key = (name, options, *(_kind(t) for t in tensors))
    plan = _plans.get(key)
    if plan is not None:
        return plan.run(tensors)
    if key in _plans or _are_ambiguous(tensors):
        return compute()
    launches: list[Launch] = []
    _thread.launches = launches
    try:
        results = compute()
    finally:
        _thread.launches = None
    if len(_plans) >= MOST_PLANS:
        for oldest in list(_plans)[: MOST_PLANS // 2]:
            _plans.pop(oldest, None)
    _plans[key] = _plan(tensors, results, launches)
    return results


def queue(launch: Launch) -> None:
    """Queue a kernel, and note it if the call of this thread is being recorded."""
    launches = getattr(_thread, "launches", None)
    if launches is not None:
        launches.append(launch._replace(values=launch.values.copy(), held=launch.held.copy()))
    content = launch.pack(*launch.values)
    launch.kernel.launch(launch.n_blocks, launch.threads, launch.shared, content, launch.early)


def _kind(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.data_ptr() & 15


def _are_ambiguous(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an address does not tell the input."""
    addresses = [t.data_ptr() for t in tensors if t is not None and t.numel()]
    return len(set(addresses)) < len(addresses)


def _plan(tensors: Sequence[Tensor | None], results: Results, launches: Sequence[Launch]) -> Plan | None:
    """The plan of a recorded call; None where it cannot be repeated."""
    if not launches or len({launch.pack for launch in launches}) > 1:
        return None
    read = {i: t for i, t in enumerate(tensors) if t is not None and t.numel()}
    made = [t for t in results if isinstance(t, Tensor)]
    scratch = [t for t in launches[-1].scratch if all(t is not result for result in made)]
    everything = [*read.values(), *made, *scratch]
    index = {t.data_ptr(): i for i, t in enumerate(everything) if t.numel()}
    held = {t.data_ptr() for launch in launches for t in launch.held.values()} - {0}
    written = {t.data_ptr() for t in made if t.numel()}
    if len(index) < sum(t.numel() > 0 for t in everything) or not written <= held <= set(index):
        return None
    if not all(t.is_contiguous() for t in (*made, *scratch)):
        return None
    offsets = [0]
    for tensor in scratch:
        offsets.append(offsets[-1] + -(-tensor.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT)
    return Plan(
        launches[0].pack,
        launches[0].values,
        tuple(read),
        tuple((r.shape, r.dtype) if isinstance(r, Tensor) else r for r in results),
        tuple(offsets),
        tuple(_steps(launches, index)),
    )


def _steps(launches: Sequence[Launch], index: dict[int, int]) -> Iterator[Step]:
    values, bound = launches[0].values, dict[int, int]()
    for launch in launches:
        of_fields = {field: t.data_ptr() for field, t in launch.held.items() if t.data_ptr()}
        changes = enumerate(zip(values, launch.values, strict=True))
        numbers = ((field, new) for field, (old, new) in changes if old != new and field not in of_fields)
        addresses = ((field, index[address]) for field, address in of_fields.items() if bound.get(field) != address)
        how = launch.n_blocks, launch.threads, launch.shared, launch.early
        yield Step(launch.kernel, *how, tuple(numbers), tuple(addresses))
        values, bound = launch.values, bound | of_fields
