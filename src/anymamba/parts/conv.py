"""The short causal convolution as a layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.ops.causal_conv1d import ConvOutput, causal_conv1d, causal_conv1d_step
from anymamba.parts.derived import DerivesTensors
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
    ) -> ConvOutput:
        """The convolved sequence and the last width - 1 inputs of each sequence."""
        inputs = (x, self.weight, self.bias, state, cu_seqlens)
        output = _convolve(*inputs)
        again(output.y, lambda *inputs: _convolve(*inputs).y, *inputs)
        return output

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
