"""The causal depthwise convolution: its contract and its public functions."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import Activations, ConvArguments, ConvState, Offsets
from anymamba.ops import dispatch
from anymamba.ops.causal_conv1d.checks import checked, checked_step
from anymamba.ops.causal_conv1d.registration import OP, run


class ConvOutput(NamedTuple):
    """What a convolution returns."""

    y: Activations
    """Like x, in its dtype."""
    last_state: ConvState
    """The last width - 1 inputs of each sequence, oldest first, in the dtype of x."""


def causal_conv1d(
    x: Activations,
    weight: Float[Tensor, "d_inner width"],
    bias: Float[Tensor, " d_inner"] | None = None,
    *,
    activation: str | None = None,
    initial_state: ConvState | None = None,
    cu_seqlens: Offsets | None = None,
    backend: str | None = None,
) -> ConvOutput:
    """Convolve each channel with its own filter over the present and the past.

        y[t] = act(bias + sum_i weight[i] x[t - width + 1 + i])

    Sums are in float32 or wider. What lies before the sequence is the initial state, or zero.

    Args:
        x: (batch, length, d_inner).
        weight: (d_inner, width), the last column is the present; any width of at least 1.
        bias: (d_inner,); None for none.
        activation: None or "silu".
        initial_state: (n_sequences, width - 1, d_inner), oldest first; defaults to zeros. n_sequences is batch, or the
            number of sequences that cu_seqlens packs.
        cu_seqlens: int32 offsets of sequences packed along the length of one row, as in `selective_scan`.
        backend: as in `selective_scan`.
    Returns y, like x, and last_state; gradients flow to every tensor, through both. Derivatives in forward mode, and
    second and higher ones, run as torch operations, those of backend "reference".
    Raises ValueError for shapes and names, TypeError for dtypes, RuntimeError when a named backend cannot serve.
    Source: the short convolution of the Mamba block (arXiv:2312.00752, section 3.4).
    """
    arguments = checked(ConvArguments(x, weight, bias, initial_state, cu_seqlens), activation)
    return ConvOutput(*run(arguments, dispatch.resolve(OP, x.device.type, backend, arguments)))


def causal_conv1d_step(
    state: ConvState,
    x: Float[Tensor, "batch d_inner"],
    weight: Float[Tensor, "d_inner width"],
    bias: Float[Tensor, " d_inner"] | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`: the state goes in and the new state comes out.

    Returns y (batch, d_inner) and the state (batch, width - 1, d_inner), both in the dtype of x. Plain torch
    operations under export.
    """
    arguments = checked_step(ConvArguments(x, weight, bias, state), activation)
    y, last_state = dispatch.step_kernel(OP, arguments, x.device.type, backend)(arguments)
    return y[:, 0], last_state.contiguous()  # as it came: a compiled step guards on strides
