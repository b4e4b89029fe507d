"""The arguments of every backend of the causal convolution: the op's tensors and options in one record."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Activations = Float[Tensor, "batch length d_inner"]
"""x and y."""
ConvState = Float[Tensor, "n_sequences width_minus_1 d_inner"]
"""The last width - 1 inputs of each sequence, oldest first."""
Offsets = Int[Tensor, " n_sequences_plus_1"]
"""cu_seqlens, as in the selective scan."""


class ConvArguments(NamedTuple):
    """Tensors and options of `anymamba.causal_conv1d`, in the order in which torch's registered op takes them."""

    x: Activations
    weight: Float[Tensor, "d_inner width"]
    bias: Float[Tensor, " d_inner"] | None = None
    initial_state: ConvState | None = None
    cu_seqlens: Offsets | None = None
    silu: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    @property
    def options(self) -> tuple[Any, ...]:
        return self[5:]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @property
    def n_sequences(self) -> int:
        """Rows of the states: the batch size, or the number of packed sequences."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_sequences, self.weight.shape[1] - 1, self.x.shape[2]

    def state_gradient(self, given: Tensor | None) -> Tensor:
        """The gradient of the last state; zeros in place of None."""
        return self.x.new_zeros(self.state_shape) if given is None else given

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums and of weight gradients: float64 if x or the weights are, otherwise float32."""
        narrow = torch.promote_types(self.x.dtype, self.weight.dtype)
        return torch.promote_types(torch.float32, narrow)

    def of_sequence(self, index: int, start: int, stop: int) -> ConvArguments:
        """The arguments of a single packed sequence."""
        state = None if self.initial_state is None else self.initial_state[index : index + 1]
        return self._replace(x=self.x[:, start:stop], initial_state=state, cu_seqlens=None)
