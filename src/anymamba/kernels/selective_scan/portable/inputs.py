"""The scan's tensors by group, with channels last."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from anymamba.kernels.elementwise import softplus
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.portable.splitting import Span


@dataclass(frozen=True)
class Inputs:
    """The op's tensors for some rows of the batch; A, constant B and C as (g, n, p), vectors as (g, 1, p)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    zoh: bool
    initial_state: Tensor | None  # (rows or sequences, g, n, p)
    n_groups: int
    real: torch.dtype
    dtype: torch.dtype

    def rows(self, rows: slice) -> Inputs:
        """The inputs of a slice of the batch."""

        def cut(M: Tensor) -> Tensor:
            return M if M.ndim == 3 else M[rows]

        return replace(
            self,
            u=self.u[rows],
            delta=self.delta[rows],
            B=cut(self.B),
            C=cut(self.C),
            z=None if self.z is None else self.z[rows],
            initial_state=None if self.initial_state is None else self.initial_state[rows],
        )

    def channels(self, x: Tensor, span: Span) -> Tensor:
        """A span of (b, l, d) as (k, t, s, b, g, 1, p) in the working precision."""
        x = x[:, span.tokens].to(self.real)
        return rearrange(x, "b (k s t) (g p) -> k t s b g 1 p", g=self.n_groups, **span.sizes)

    def states(self, M: Tensor, span: Span) -> Tensor:
        """A span of B or C as (k, t, s, b, g, n, 1), or for a constant one as a (k, g, n, p) view."""
        if M.ndim == 3:
            return M.expand(span.n_blocks, *M.shape)
        return rearrange(M[:, span.tokens].to(self.dtype), "b (k s t) g n -> k t s b g n 1", **span.sizes)


def prepare(a: ScanArguments) -> Inputs:
    """Convert the op's arguments to the layout and precision of the computation."""
    real, dtype, n_groups = a.real_dtype, a.dtype, a.n_groups

    def per_group(M: Tensor) -> Tensor:
        return rearrange(M.to(dtype), "(g p) n -> g n p", g=n_groups).contiguous()

    def vector(v: Tensor | None) -> Tensor | None:
        return None if v is None else rearrange(v.to(real), "(g p) -> g 1 p", g=n_groups)

    state = a.initial_state
    if state is not None:
        state = rearrange(state.to(dtype), "b (g p) n -> b g n p", g=n_groups).contiguous()
    B, C = (per_group(M) if M.ndim == 2 else M for M in (a.B, a.C))
    return Inputs(
        u=a.u,
        delta=a.delta,
        A=per_group(a.A),
        B=B,
        C=C,
        D=vector(a.D),
        z=a.z,
        delta_bias=vector(a.delta_bias),
        delta_softplus=a.delta_softplus,
        zoh=a.zoh,
        initial_state=state,
        n_groups=n_groups,
        real=real,
        dtype=dtype,
    )


class Channels:
    """The tensors of a span without a state dimension, each (k, t, s, b, g, 1, p), and its B and C."""

    def __init__(self, inputs: Inputs, span: Span) -> None:
        self.x = inputs.channels(inputs.u, span)
        self.raw = inputs.channels(inputs.delta, span)  # Δ before the softplus
        if inputs.delta_bias is not None:
            self.raw = self.raw + inputs.delta_bias
        self.step = softplus(self.raw) if inputs.delta_softplus else self.raw
        self.drive = self.step * self.x
        self.gate = None if inputs.z is None else inputs.channels(inputs.z, span)
        self.B, self.C = inputs.states(inputs.B, span), inputs.states(inputs.C, span)


def write_channels(target: Tensor, span: Span, values: Tensor) -> None:
    """Write (k, t, s, b, g, 1, p) into a span of (b, l, d)."""
    target[:, span.tokens] = rearrange(values, "k t s b g 1 p -> b (k s t) (g p)")


def contiguous_like(like: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape and dtype."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
