"""The backends of each op, best first, and what a module must have to be one.

A backend of another op or device is one module more in `BACKENDS`: nothing else names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from anymamba.kernels.causal_conv1d import cpu as conv_cpu
from anymamba.kernels.causal_conv1d import portable as conv_portable
from anymamba.kernels.causal_conv1d import reference as conv_reference
from anymamba.kernels.selective_scan import cpu as scan_cpu
from anymamba.kernels.selective_scan import portable as scan_portable
from anymamba.kernels.selective_scan import reference as scan_reference


class Backend(Protocol):
    """A module that computes one op. `arguments` is the op's record; results are described in the op's reference."""

    NAME: str
    TRANSPARENT: frozenset[str]
    """Of "forward" and "step", those that are differentiable torch operations: autograd and tracers see through."""

    def unavailable(self, device_type: str, /) -> str | None:
        """Why it cannot serve a device, in words; None where it can."""

    def refuses(self, arguments: Any, /) -> str | None:
        """Why it leaves these arguments to another backend, in words; None where it takes them."""

    def description(self) -> str:
        """One line for the report: what it is, and what goes elsewhere."""

    forward: Callable[..., Any]
    """From the record (and for the scan whether to save states for the backward pass) to the outputs."""

    backward: Callable[..., list[Tensor | None]]
    """From the gradients of the outputs, the record and what was saved to the gradients of the record's floating-point
    tensors, in their order; None where one is absent."""

    step: Callable[..., tuple[Tensor, Tensor]]
    """Forward at length one, from `initial_state`."""


BACKENDS: dict[str, tuple[Any, ...]] = {
    "selective_scan": (scan_cpu, scan_portable, scan_reference),
    "causal_conv1d": (conv_cpu, conv_portable, conv_reference),
}
