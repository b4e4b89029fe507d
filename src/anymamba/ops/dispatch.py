"""Which backend runs: one rule, one report, and counters of what ran.

The rule: the first backend of ORDER that serves the device and the kind of A. A named backend that cannot serve raises
and says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.kernels import native
from anymamba.kernels.causal_conv1d import cpu as conv_cpu
from anymamba.kernels.causal_conv1d import portable as conv_portable
from anymamba.kernels.causal_conv1d import reference as conv_reference
from anymamba.kernels.selective_scan import cpu as scan_cpu
from anymamba.kernels.selective_scan import portable as scan_portable
from anymamba.kernels.selective_scan import reference as scan_reference
from anymamba.ops import observers

ORDER = ("cpu", "triton", "portable", "reference")

KERNELS: dict[str, dict[str, ModuleType]] = {
    "selective_scan": {"cpu": scan_cpu, "portable": scan_portable, "reference": scan_reference},
    "causal_conv1d": {"cpu": conv_cpu, "portable": conv_portable, "reference": conv_reference},
}

TRANSPARENT = ("portable", "reference")
"""Backends whose steps are torch operations."""

_NO_NATIVE = native.reason()  # asked once, so that torch.compile can trace `resolve`

calls: Counter[tuple[str, str, str]] = Counter()
"""How often (op, backend, pass) ran; pass is "forward", "backward" or "step"."""


_insisted: list[str] = []


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Insist on a backend for every op that runs inside: of layers, models, drop-ins and transformers' models, too.

    A `backend` argument of an op goes first; of nested contexts the inner one does. The setting is the process's, as
    torch's own choices of backends are. The derivatives that a backend does not have run as they do without it.

    Args:
        name: "cpu", "triton", "portable" or "reference".
    Raises ValueError at once for an unknown name, and where an op runs RuntimeError if the backend cannot serve it.
    """
    _require_known(name)
    _insisted.append(name)
    try:
        yield
    finally:
        _insisted.pop()


class BackendStatus(NamedTuple):
    """One line of the report."""

    op: str
    backend: str
    device: str
    available: bool
    chosen: bool
    reason: str
    """Why it is not available, or what it is."""


def resolve(op: str, device_type: str, backend: str | None, *, is_complex: bool = False) -> str:
    """The name of the backend that serves an op on a device.

    Args:
        op: a key of KERNELS.
        device_type: `tensor.device.type`.
        backend: a name to insist on; None takes that of the context `backend`, or the best there is.
        is_complex: whether A is.
    Raises ValueError for an unknown name, RuntimeError for a backend that cannot serve, both saying what can.
    """
    backend = backend or _default(op, device_type, is_complex)
    _require_known(backend, f" for {op}")
    why = unavailable(op, backend, device_type, is_complex=is_complex)
    if why is not None:
        serve = (name for name in ORDER if unavailable(op, name, device_type, is_complex=is_complex) is None)
        usable = ", ".join(serve)
        raise RuntimeError(
            f"backend {backend!r} cannot serve {op} on {device_type}: {why}; leave backend=None or take one of {usable}"
        )
    return backend


def _require_known(name: str, use: str = "") -> None:
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}{use}; there are {', '.join(ORDER)}")


def _default(op: str, device_type: str, is_complex: bool = False) -> str:
    """The backend that a context insists on, else the best there is."""
    if _insisted:
        return _insisted[-1]
    return next(name for name in ORDER if unavailable(op, name, device_type, is_complex=is_complex) is None)


def unavailable(op: str, backend: str, device_type: str, *, is_complex: bool = False) -> str | None:
    """Why a backend cannot serve an op on a device; None where it can."""
    if backend == "cpu":
        if device_type != "cpu":
            return "it serves tensors on the CPU"
        return "it is for real A" if is_complex and _NO_NATIVE is None else _NO_NATIVE
    if backend in KERNELS[op]:
        return None
    return "this version has no Triton kernels" if device_type == "cuda" else "it serves tensors on a GPU"


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which operations keep the dtypes of their operands; what is exported keeps it for autocast later."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    needed = torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if needed else nullcontext()


def of_step(backend: str, *tensors: Tensor | None) -> str:
    """The backend for a step: plain torch operations where autograd, a transform or a tracer must see through it."""
    opaque = backend not in TRANSPARENT
    seen = opaque and (
        not observers.plain(*tensors) or observers.differentiable(*tensors) or observers.has_tangent(*tensors)
    )
    return "portable" if seen else backend


def count(op: str, backend: str, what: str) -> None:
    """Count a pass, unless it is traced: compiled code would guard on the number and be compiled anew each time."""
    if not torch.compiler.is_compiling():
        calls[op, backend, what] += 1


def kernel(op: str, backend: str) -> ModuleType:
    """The module of a backend that `resolve` has named."""
    return KERNELS[op][backend]


def report(device_type: str | None = None) -> list[BackendStatus]:
    """For each op and backend whether it runs on a device (default: the best device there is) and why not."""
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    what = {
        "cpu": "" if _NO_NATIVE else f"compiled C++: {native.description()}",
        "portable": "plain PyTorch, chunked",
        "reference": "a loop over time: slow, the oracle of the tests",
    }
    lines = []
    for op in KERNELS:
        chosen = _default(op, device_type)
        for backend in ORDER:
            why = unavailable(op, backend, device_type)
            reason = what.get(backend, "") if why is None else why
            if (op, backend, why) == ("selective_scan", "cpu", None):
                reason += "; complex A goes to portable"
            lines.append(BackendStatus(op, backend, device_type, why is None, backend == chosen, reason))
    return lines
