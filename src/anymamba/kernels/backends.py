"""The backends of each op, best first, and the interface of a backend module.

To add a backend, write a module and add it to `BACKENDS`; no other code names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from anymamba.kernels.add_norm import cpu as norm_cpu
from anymamba.kernels.add_norm import cuda as norm_cuda
from anymamba.kernels.add_norm import portable as norm_portable
from anymamba.kernels.add_norm import reference as norm_reference
from anymamba.kernels.causal_conv1d import cpu as conv_cpu
from anymamba.kernels.causal_conv1d import cuda as conv_cuda
from anymamba.kernels.causal_conv1d import portable as conv_portable
from anymamba.kernels.causal_conv1d import reference as conv_reference
from anymamba.kernels.causal_conv1d import triton as conv_triton
from anymamba.kernels.linear_cross_entropy import cuda as loss_cuda
from anymamba.kernels.linear_cross_entropy import portable as loss_portable
from anymamba.kernels.linear_cross_entropy import reference as loss_reference
from anymamba.kernels.packed_linear import cpu as packed_cpu
from anymamba.kernels.packed_linear import cuda as packed_cuda
from anymamba.kernels.packed_linear import reference as packed_reference
from anymamba.kernels.selective_scan import cpu as scan_cpu
from anymamba.kernels.selective_scan import cuda as scan_cuda
from anymamba.kernels.selective_scan import portable as scan_portable
from anymamba.kernels.selective_scan import reference as scan_reference
from anymamba.kernels.selective_scan import triton as scan_triton


class Backend(Protocol):
    """A module that computes one op. `arguments` is the op's record. The op's `reference` describes the results."""

    NAME: str
    TRANSPARENT: frozenset[str]
    """Which of "forward" and "step" are differentiable torch operations, which autograd and tracers can follow."""
    CLAMPS_OFFSETS: bool
    """Whether wrong `cu_seqlens` are clamped on the device, so that the CPU need not read them; defaults to False."""

    def unavailable(self, device_type: str, /) -> str | None:
        """The reason why it cannot serve a device, or None if it can."""

    def refuses(self, arguments: Any, /) -> str | None:
        """The reason why it does not support these arguments, or None if it does."""

    def description(self) -> str:
        """One line for the report: what it is, and which arguments go to another backend."""

    forward: Callable[..., Any]
    """Takes the record, and for the scan whether to save states for the backward pass; returns the outputs."""

    backward: Callable[..., list[Tensor | None]]
    """Takes the gradients of the outputs, the record and what forward saved; returns the gradients of the record's
    floating-point tensors in their order, with None for tensors that are not given. None in place of the second
    output's gradient stands for zeros. Not called where `forward` is transparent."""

    step: Callable[..., tuple[Tensor, Tensor]]
    """`forward` at length one, from `initial_state`; for ops that have one."""

    summary: Callable[..., tuple[Tensor, Tensor]]
    """For the scan of sequences that are spread over processes; in less time than `forward`. It takes the record of at
    least one token, and returns the state after the last token of each row, and the sum of the row's steps. In a packed
    row that is the state of the last sequence that is not empty. Not called where `forward` is transparent."""

    reverse_summary: Callable[..., Tensor]
    """The same backwards. It takes the gradients of the outputs and the record, and returns the gradient of the state
    before the first token of each row."""


BACKENDS: dict[str, tuple[Any, ...]] = {
    "selective_scan": (scan_cpu, scan_cuda, scan_triton, scan_portable, scan_reference),
    "causal_conv1d": (conv_cpu, conv_cuda, conv_triton, conv_portable, conv_reference),
    "add_norm": (norm_cpu, norm_cuda, norm_portable, norm_reference),
    "linear_cross_entropy": (loss_cuda, loss_portable, loss_reference),
    "packed_linear": (packed_cpu, packed_cuda, packed_reference),
}
