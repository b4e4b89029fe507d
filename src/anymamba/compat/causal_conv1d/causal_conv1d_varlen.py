"""The last inputs of packed sequences, as states of a convolution."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor


def causal_conv1d_varlen_states(
    x: Float[Tensor, "total dim"], cu_seqlens: Int[Tensor, " batch_plus_1"], state_len: int
) -> Float[Tensor, "batch dim state_len"]:
    """The last `state_len` inputs of each packed sequence, the newest last, padded with 0 on the left.

    Source: the interface of causal-conv1d 1.7.0.
    """
    batch = cu_seqlens.numel() - 1
    states = x.new_zeros(batch, state_len, x.shape[1])
    offsets = cu_seqlens.tolist()
    for row, (start, end) in enumerate(pairwise(offsets)):
        count = min(end - start, state_len)
        if count:
            states[row, state_len - count :] = x[end - count : end]
    return states.transpose(1, 2)


causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
