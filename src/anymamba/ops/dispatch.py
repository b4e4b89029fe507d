"""Choose the backend of an op, report which backends are available, and count which ones ran.

The rule: take the first backend in the op's list that serves the device and supports the arguments. A backend that is
named and cannot serve is an error that says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.kernels.backends import BACKENDS, Backend
from anymamba.ops import devices, observers

calls: Counter[tuple[str, str, str]] = Counter()
"""How often each (op, backend, pass) ran; pass is "forward", "backward" or "step"."""

_insisted: list[str | None] = []


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for every op inside the `with` block, also in layers, models, drop-ins and transformers models.

    An op's own `backend` argument takes precedence, and an inner context over an outer one. The setting applies to the
    whole process, like torch's own backend flags. Derivatives that the backend does not have are computed as usual, and
    so are ops that have no backend of this name: the loss has none in compiled C++.

    Args:
        name: a backend from the list of `anymamba info`, such as "cpu", "portable" or "reference".
    Raises ValueError at once for an unknown name. An op that the backend cannot serve raises RuntimeError when it runs.
    """
    known = dict.fromkeys(module.NAME for modules in BACKENDS.values() for module in modules)
    if name not in known:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(known)}")
    with insist(name):
        yield


@contextmanager
def insist(name: str | None) -> Iterator[None]:
    """`backend` without its check. None cancels outer contexts."""
    _insisted.append(name)
    try:
        yield
    finally:
        _insisted.pop()


def insisted() -> str | None:
    """The backend that the innermost context asks for."""
    return _insisted[-1] if _insisted else None


def resolve(op: str, device_type: str, backend: str | None, arguments: Any = None) -> str:
    """The name of the backend that serves an op.

    Args:
        op: a key of BACKENDS.
        device_type: `tensor.device.type`.
        backend: a backend name; defaults to that of the context `backend`, or to the best one that can serve.
        arguments: the op's record; None checks only the device.
    Raises ValueError for an unknown name and RuntimeError for a backend that cannot serve; both list the alternatives.
    """
    name = backend or _insisted_on(op)
    if name is None:
        return next(_serving(op, device_type, arguments))
    why = _why_not(kernel(op, name), arguments, device_type)
    if why is not None:
        usable = ", ".join(_serving(op, device_type, arguments))
        raise RuntimeError(
            f"backend {name!r} cannot serve {op} on {device_type}: {why}; leave backend=None or use one of {usable}"
        )
    return name


def _insisted_on(op: str) -> str | None:
    """The backend that the innermost context asks for, if the op has one of that name."""
    if not _insisted:
        return None
    return _insisted[-1] if any(_insisted[-1] == module.NAME for module in BACKENDS[op]) else None


def _serving(op: str, device_type: str, arguments: Any) -> Iterator[str]:
    for module in BACKENDS[op]:
        if _why_not(module, arguments, device_type) is None:
            yield module.NAME


def _why_not(module: Backend, arguments: Any, device_type: str) -> str | None:
    return module.unavailable(device_type) or (None if arguments is None else module.refuses(arguments))


def transparent(op: str, what: str, arguments: Any) -> str:
    """The first backend whose `what`, "forward" or "step", is made of differentiable torch operations."""
    served = (m for m in BACKENDS[op] if what in m.TRANSPARENT and m.refuses(arguments) is None)
    return next(module.NAME for module in served)


def kernel(op: str, backend: str) -> Any:
    """The module of a backend.

    Raises ValueError for a name that no backend of the op has.
    """
    for module in BACKENDS[op]:
        if backend == module.NAME:
            return module
    raise ValueError(
        f"unknown backend {backend!r} for {op}; the backends are {', '.join(m.NAME for m in BACKENDS[op])}"
    )


def clamps_offsets(op: str, backend: str) -> bool:
    """Whether a backend clamps wrong offsets on the device, so that their values need not be read on the CPU."""
    return getattr(kernel(op, backend), "CLAMPS_OFFSETS", False)


def step_kernel(
    op: str, arguments: Any, device_type: str, backend: str | None
) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """The step function of the backend that serves, or under autograd, transforms and tracers of one that is made of
    torch operations."""
    name, tensors = resolve(op, device_type, backend, arguments), arguments.tensors
    if "step" not in kernel(op, name).TRANSPARENT and (
        not observers.plain(*tensors) or observers.differentiable(*tensors) or observers.has_tangent(*tensors)
    ):
        name = transparent(op, "step", arguments)
    count(op, name, "step")
    return kernel(op, name).step


def _can_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# Versions of torch before 2.13 cannot trace it; this is what torch.compiler.assume_constant_result sets.
_can_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which operations keep the dtypes of their operands. An exported program keeps this context."""
    if not _can_autocast(device_type):
        return nullcontext()
    needed = torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if needed else nullcontext()


def autocast_dtype(device_type: str, *dtypes: torch.dtype) -> torch.dtype | None:
    """The dtype to which autocast converts operands of these dtypes in a product, or None: it is off, or one of them is
    float64, which it leaves as it is."""
    if not _can_autocast(device_type) or not torch.is_autocast_enabled(device_type) or torch.float64 in dtypes:
        return None
    return torch.get_autocast_dtype(device_type)


def count(op: str, backend: str, what: str) -> None:
    """Count a pass, unless it is traced: compiled code would guard on the number and be recompiled each time."""
    if not torch.compiler.is_compiling():
        calls[op, backend, what] += 1


class BackendStatus(NamedTuple):
    """One row of the report."""

    op: str
    backend: str
    device: str
    available: bool
    chosen: bool
    reason: str
    """Why the backend is not available, or its description if it is."""


def report(device_type: str | None = None) -> list[BackendStatus]:
    """For each op and backend: whether it runs on a device, and if not, why. Defaults to the best device."""
    if device_type is None:
        device_type = devices.best_device().type
    lines = []
    for op, modules in BACKENDS.items():
        why = {module.NAME: module.unavailable(device_type) for module in modules}
        chosen = _insisted_on(op) or resolve(op, device_type, None)
        for module in modules:
            reason = why[module.NAME]
            words = module.description() if reason is None else reason
            lines.append(BackendStatus(op, module.NAME, device_type, reason is None, chosen == module.NAME, words))
    return lines
