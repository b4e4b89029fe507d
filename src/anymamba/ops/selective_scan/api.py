"""The selective scan (S6): its contract and public functions. The maths is `kernels/selective_scan/reference.py`."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import (
    Activations,
    Offsets,
    PerChannel,
    ScanArguments,
    State,
    StateMatrix,
    StepMatrix,
)
from anymamba.ops import dispatch
from anymamba.ops.selective_scan.checks import checked, checked_step
from anymamba.ops.selective_scan.registration import OP, run


class ScanOutput(NamedTuple):
    """What a scan returns."""

    y: Activations
    """Like u, in its dtype."""
    last_state: State
    """The state after the last token of each sequence, float32 or wider."""


def selective_scan(
    u: Activations,
    delta: Activations,
    A: StateMatrix,
    B: StepMatrix,
    C: StepMatrix,
    D: PerChannel | None = None,
    z: Activations | None = None,
    delta_bias: PerChannel | None = None,
    *,
    delta_softplus: bool = False,
    b_discretization: str = "euler",
    initial_state: State | None = None,
    cu_seqlens: Offsets | None = None,
    backend: str | None = None,
) -> ScanOutput:
    """Run the selective state space recurrence over a sequence.

        h[t] = exp(delta[t] A) h[t-1] + Bbar[t] u[t]
        y[t] = C[t] . h[t] + D u[t],   times silu(z[t]) where z is given

    The state is kept in float32 or wider. A is discretised by zero-order hold; Bbar = delta B (Euler, as in the
    published checkpoints) or (exp(delta A) - 1) / A * B (exact zero-order hold). With a complex A conjugate pairs are
    implied and y = 2 Re(C . h). Dtypes may differ from tensor to tensor.

    Args:
        u: input, (batch, length, d_inner).
        delta: step, like u; before the softplus if there is one. 0 after it freezes the state (-inf before it).
        A: (d_inner, d_state), real or complex, usually with a negative real part.
        B, C: (d_inner, d_state) constant, (batch, length, d_state) selective, or (batch, length, n_groups, d_state),
            where channel d uses group d // (d_inner / n_groups). Complex where A is.
        D: (d_inner,) skip; None for none.
        z: gate, like u; None for none.
        delta_bias: (d_inner,) added to delta before the softplus.
        delta_softplus: apply softplus to delta + delta_bias.
        b_discretization: "euler" or "zoh".
        initial_state: (n_sequences, d_inner, d_state); defaults to zeros. n_sequences is batch, or the number of
            sequences that cu_seqlens packs.
        cu_seqlens: int32 offsets 0 = c[0] <= c[1] <= ... <= c[n_sequences] = length of sequences packed along the
            length of one row; each begins with a state of its own. A sequence may be empty.
        backend: a name of `anymamba info`, such as "cpu" or "portable"; defaults to that of the context
            `anymamba.backend`, or to the best there is.
    Returns y, like u, and last_state (n_sequences, d_inner, d_state). Gradients flow to every tensor, through both.
    Derivatives in forward mode, and second and higher ones, run as torch operations, those of backend "reference",
    whichever backend computes the values: they hold (batch, length, d_inner, d_state) tensors.
    Raises ValueError for shapes and names, TypeError for dtypes, RuntimeError when a named backend cannot serve.
    Source: Mamba (arXiv:2312.00752), section 2 and Algorithm 2; B as in the published checkpoints.
    """
    arguments = checked(
        ScanArguments(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, b_discretization)
    )
    return ScanOutput(*run(arguments, dispatch.resolve(OP, u.device.type, backend, arguments)))


def selective_scan_step(
    state: State,
    u: Float[Tensor, "batch d_inner"],
    delta: Float[Tensor, "batch d_inner"],
    A: StateMatrix,
    B: StepMatrix,
    C: StepMatrix,
    D: PerChannel | None = None,
    z: Float[Tensor, "batch d_inner"] | None = None,
    delta_bias: PerChannel | None = None,
    *,
    delta_softplus: bool = False,
    b_discretization: str = "euler",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`: the state goes in and the new state comes out.

    Args: as there, without the length; B and C are (d_inner, d_state) constant or (batch, n_groups, d_state) selective.
    Returns y (batch, d_inner) in the dtype of u, and the state (batch, d_inner, d_state), a new tensor.
    Differentiable to any order; under export it is traced as plain torch operations.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, state)
    arguments = checked_step(ScanArguments(*tensors, None, delta_softplus, b_discretization))
    kernel = dispatch.step_kernel(OP, arguments, u.device.type, backend)
    with dispatch.without_autocast(u.device.type):
        y, state = kernel(arguments)
    return y[:, 0], state
