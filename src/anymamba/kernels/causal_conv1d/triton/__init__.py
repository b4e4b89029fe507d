"""The causal convolution in Triton for GPUs of NVIDIA, AMD and Intel.

Nothing here waits for the GPU, and every sum has an order of its own. With TRITON_INTERPRET=1 it serves CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.runtimes import triton

NAME = "triton"
TRANSPARENT: frozenset[str] = frozenset()
CLAMPS_OFFSETS = True

BLOCK, TOKENS = 128, 16
"""Channels and tokens of a tile."""
STATE_BLOCK = 128
"""Channels of a program of the states."""
PIECE = 512
"""Tokens of a part of the weights' gradients."""
WIDEST = 64
"""Taps that are unrolled."""


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve tensors on a device, in words; None where it can."""
    return triton.unavailable(device_type)


def refuses(arguments: ConvArguments) -> str | None:
    if arguments.width > WIDEST:
        return f"it supports at most {WIDEST} taps, got {arguments.width}"
    return triton.refuses(arguments.x.device, arguments.tensors)


def description() -> str:
    return f"{triton.description()}; more than {WIDEST} taps go to portable"


def forward(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence."""
    y, last_state = a.x.new_empty(a.x.shape), a.x.new_empty(a.state_shape)
    if a.x.numel() == 0:
        return y, last_state.zero_() if a.initial_state is None else last_state.copy_(a.initial_state)
    call = _Call(a)
    call.tiles("forward", y=y, **call.taps)
    if a.width > 1:
        call.states("last_states", x=call.x, initial=call.initial, last=last_state, **call.strides_of_x)
    return y, last_state


def backward(dy: Tensor, dlast_state: Tensor | None, a: ConvArguments) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state (None where the input is None)."""
    inputs = (a.x, a.weight, a.bias, a.initial_state)
    dlast_state = a.state_gradient(dlast_state)
    if a.x.numel() == 0:
        found = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        return [*found[:3], None if found[3] is None else found[3].copy_(dlast_state)]
    dy, dlast_state = (t.resolve_conj().resolve_neg() for t in (dy, dlast_state))
    dlast_state, call = dlast_state.to(a.x.dtype).contiguous(), _Call(a)
    g = call.slopes(dy)
    dx = a.x.new_empty(a.x.shape)
    call.tiles("inputs", g=g, dlast=dlast_state, dx=dx, **call.weight)
    parts = call.parts(g).sum(0)
    dweight = a.weight.new_empty(a.weight.shape).copy_(parts[:-1].T)
    dbias = None if a.bias is None else a.bias.new_empty(a.bias.shape).copy_(parts[-1])
    if a.initial_state is None:
        return [dx, dweight, dbias, None]
    dinitial = a.x.new_empty(a.state_shape)
    if a.width > 1:
        call.states("initial_states", g=g, dlast=dlast_state, dinitial=dinitial, **call.weight)
    return [dx, dweight, dbias, dinitial.to(a.initial_state.dtype)]


def step(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, width - 1, d)."""
    return forward(a)


class _Call:
    """The arguments of the kernels of one call, which is not empty."""

    def __init__(self, a: ConvArguments) -> None:
        self._a = a
        self.x = triton.dense(a.x)
        assert self.x is not None
        self.initial = None if a.initial_state is None else a.initial_state.to(a.x.dtype).contiguous()
        self._offsets, self._sequence_of = None, None
        if a.cu_seqlens is not None:
            self._offsets, self._sequence_of = triton.sequences(a.cu_seqlens, a.x.shape[1])
        self.strides_of_x: dict[str, Any] = {"x_row": self.x.stride(0), "x_token": self.x.stride(1)}
        self.weight: dict[str, Any] = {"weight": a.weight, "w_channel": a.weight.stride(0), "w_tap": a.weight.stride(1)}
        bias = None if a.bias is None else a.bias.contiguous()
        self.taps: dict[str, Any] = {
            **self.strides_of_x,
            **self.weight,
            "x": self.x,
            "bias": bias,
            "initial": self.initial,
            "SILU": a.silu,
            "R": self._sums(),
        }

    def _sums(self) -> Any:
        """Triton's name of the dtype of sums."""
        import triton.language as tl

        return tl.float64 if self._a.dtype == torch.float64 else tl.float32

    def _launch(self, name: str, n_programs: int, **arguments: Any) -> None:
        from anymamba.kernels.causal_conv1d.triton import kernels

        _, length, d_inner = self._a.x.shape
        sizes = {"length": length, "d_inner": d_inner, "WIDTH": self._a.width}
        triton.launch(getattr(kernels, name), self._a.x, n_programs, **arguments, **sizes, offsets=self._offsets)

    def tiles(self, name: str, piece: int = TOKENS, **arguments: Any) -> None:
        """A kernel whose programs have tiles of tokens and channels."""
        batch, length, d_inner = self._a.x.shape
        block = min(BLOCK, 1 << (d_inner - 1).bit_length())
        sizes: dict[str, Any] = {"sequence_of": self._sequence_of, "TOKENS": TOKENS, "BLOCK": block}
        self._launch(name, batch * -(-length // piece) * -(-d_inner // block), **arguments, **sizes)

    def states(self, name: str, **arguments: Any) -> None:
        """A kernel whose programs have the state of a sequence in a block of channels."""
        n_blocks = -(-self._a.x.shape[2] // STATE_BLOCK)
        self._launch(name, self._a.n_sequences * n_blocks, **arguments, BLOCK=STATE_BLOCK)

    def slopes(self, dy: Tensor) -> Tensor:
        """The gradient of the convolution before SiLU."""
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        out = self._a.x.new_empty(self._a.x.shape, dtype=self._a.dtype)
        self.tiles("slopes", dy=dy, out=out, dy_row=dy.stride(0), dy_token=dy.stride(1), **self.taps)
        return out

    def parts(self, g: Tensor) -> Tensor:
        """Sums over pieces of time for each tap and the bias."""
        batch, length, d_inner = self._a.x.shape
        n_pieces = -(-length // PIECE)
        parts = g.new_empty(batch * n_pieces, self._a.width + 1, d_inner)
        own: dict[str, Any] = {"g": g, "parts": parts, "n_pieces": n_pieces, "PIECE": PIECE}
        self.tiles("weights", PIECE, x=self.x, initial=self.initial, **self.strides_of_x, **own)
        return parts
