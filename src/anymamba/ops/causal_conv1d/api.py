"""The causal depthwise convolution: its public functions and their contract."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import Activations, ConvArguments, ConvState, Offsets
from anymamba.ops import dispatch
from anymamba.ops.causal_conv1d.checks import checked, checked_step
from anymamba.ops.causal_conv1d.over_group import inputs_before
from anymamba.ops.causal_conv1d.registration import OP, run
from anymamba.ops.groups import SequenceGroup


class ConvOutput(NamedTuple):
    """The result of a convolution."""

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
    group: SequenceGroup | None = None,
    backend: str | None = None,
) -> ConvOutput:
    """Convolve each channel with its own filter over the present and past inputs.

        y[t] = act(bias + sum_i weight[i] x[t - width + 1 + i])

    Sums are computed in float32 or wider. Inputs before the sequence are the initial state, or zero.

    Args:
        x: (batch, length, d_inner).
        weight: (d_inner, width) for any width of at least 1; the last column multiplies the present input.
        bias: (d_inner,); defaults to none.
        activation: None or "silu".
        initial_state: (n_sequences, width - 1, d_inner), oldest first; defaults to zeros. n_sequences is batch, or the
            number of sequences that cu_seqlens packs.
        cu_seqlens: int32 offsets of sequences packed along the length of one row, as in `selective_scan`.
        group, backend: as in `selective_scan`.
    Returns y, like x, and last_state; gradients flow through both to every tensor. Forward-mode, second and higher
    derivatives run as the torch operations of backend "reference".
    Raises ValueError for wrong shapes and names, TypeError for wrong dtypes, RuntimeError if a named backend cannot
    serve.
    Source: the short convolution of the Mamba block (arXiv:2312.00752, section 3.4).
    """
    arguments = checked(ConvArguments(x, weight, bias, initial_state, cu_seqlens), activation)
    if group is not None:
        before = inputs_before(x, weight.shape[1] - 1, initial_state, cu_seqlens, group)
        local = None if cu_seqlens is None else group.local_offsets(cu_seqlens)
        arguments = arguments._replace(initial_state=before, cu_seqlens=local)
    y, last_state = run(arguments, dispatch.resolve(OP, x.device.type, backend, arguments))
    return ConvOutput(y, last_state if group is None else group.only_where_it_ends(last_state, cu_seqlens))


def causal_conv1d_step(
    state: ConvState,
    x: Float[Tensor, "batch d_inner"],
    weight: Float[Tensor, "d_inner width"],
    bias: Float[Tensor, " d_inner"] | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `causal_conv1d` for one token: it takes the state and returns the new one.

    Returns y (batch, d_inner) and the state (batch, width - 1, d_inner), both in the dtype of x. It is exported as
    plain torch operations.
    """
    arguments = checked_step(ConvArguments(x, weight, bias, state), activation)
    y, last_state = dispatch.step_kernel(OP, arguments, x.device.type, backend)(arguments)
    return y[:, 0], last_state.contiguous()  # compiled steps guard on strides, so every state has the same ones
