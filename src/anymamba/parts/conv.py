"""The short causal convolution as a layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.ops.causal_conv1d import (
    ConvOutput,
    causal_conv1d,
    causal_conv1d_step,
    inputs_before,
    last_inputs_before,
)
from anymamba.ops.groups import SequenceGroup, current_group
from anymamba.parts.derived import DerivesTensors
from anymamba.parts.padding import Rows
from anymamba.parts.recipes import again


class ShortConvolution(DerivesTensors):
    """Depthwise causal convolution followed by SiLU; each channel has its own filter."""

    def __init__(self, d_inner: int, width: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_inner, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d_inner, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default for a depthwise convolution: uniform on ±width^-0.5, the weight before the bias."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Float[Tensor, "batch length d_inner"],
        state: Float[Tensor, "n_sequences width_minus_1 d_inner"] | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Rows | None = None,
    ) -> ConvOutput:
        """The convolved sequence and the last width - 1 inputs of each sequence.

        Args:
            rows: says which tokens of padded rows are real; x is zero at the others.
        """
        group = current_group(x.shape[1])
        if group is None:
            return self._convolved(x, state, cu_seqlens, rows)
        local = None if cu_seqlens is None else group.local_offsets(cu_seqlens)
        y, last = self._convolved(x, self._before(x, state, cu_seqlens, rows, group), local, rows)
        return ConvOutput(y, group.only_where_it_ends(last, cu_seqlens))

    def _convolved(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, rows: Rows | None) -> ConvOutput:
        inputs = (x, self.weight, self.bias, state, cu_seqlens)
        y, last = _convolve(*inputs)
        again(y, lambda *inputs: _convolve(*inputs).y, *inputs)
        return ConvOutput(y, last if rows is None else rows.last(x, state, self.weight.shape[1] - 1))

    def _before(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, rows: Rows | None, group: SequenceGroup
    ) -> Float[Tensor, "n_sequences width_minus_1 d_inner"]:
        """The inputs before this process's part."""
        n = self.weight.shape[1] - 1
        if rows is None:
            return inputs_before(x, n, state, cu_seqlens, group)
        state = None if state is None else state.to(x.dtype)
        return last_inputs_before(rows.last(x, None, n), rows.lengths, n, state, group)

    def step(
        self, x: Float[Tensor, "batch d_inner"], state: Float[Tensor, "batch width_minus_1 d_inner"]
    ) -> tuple[Tensor, Tensor]:
        """One token and the new state."""
        weight = self.weight if self._kept is None else self.derived("weight", self._channels_last)
        return causal_conv1d_step(state, x, weight, self.bias, activation="silu")

    def _channels_last(self) -> Float[Tensor, "d_inner width"]:
        """The weight in the layout that kernels read: the taps of all channels at one position are contiguous."""
        return self.weight.T.contiguous().T


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> ConvOutput:
    return causal_conv1d(x, weight, bias, activation="silu", initial_state=state, cu_seqlens=cu_seqlens)
