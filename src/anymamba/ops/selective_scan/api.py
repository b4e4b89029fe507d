"""The selective scan (S6): public functions and contract. The maths is in `kernels/selective_scan/reference.py`."""

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
from anymamba.ops.groups import SequenceGroup
from anymamba.ops.selective_scan import over_group
from anymamba.ops.selective_scan.checks import checked, checked_step
from anymamba.ops.selective_scan.registration import OP, run


class ScanOutput(NamedTuple):
    """The result of a scan."""

    y: Activations
    """Like u, in its dtype."""
    last_state: State
    """The state after the last token of each sequence, in float32 or wider."""


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
    group: SequenceGroup | None = None,
    backend: str | None = None,
) -> ScanOutput:
    """Run the selective state space recurrence over a sequence.

        h[t] = exp(delta[t] A) h[t-1] + Bbar[t] u[t]
        y[t] = C[t] . h[t] + D u[t],   times silu(z[t]) if z is given

    The state is kept in float32 or wider. A is discretised by zero-order hold; Bbar = delta B (Euler, as in the
    published checkpoints) or (exp(delta A) - 1) / A * B (exact zero-order hold). With a complex A, conjugate pairs are
    implied and y = 2 Re(C . h). The tensors may have different dtypes.

    Args:
        u: input, (batch, length, d_inner).
        delta: step, like u; it is before the softplus if there is one. A step of 0 leaves the state unchanged; before
            the softplus that is -inf.
        A: (d_inner, d_state), real or complex, usually with a negative real part.
        B, C: (d_inner, d_state) constant, (batch, length, d_state) selective, or (batch, length, n_groups, d_state),
            where channel d uses group d // (d_inner / n_groups). Complex if A is.
        D: (d_inner,) skip; defaults to none.
        z: gate, like u; defaults to none.
        delta_bias: (d_inner,), added to delta before the softplus; defaults to none.
        delta_softplus: apply softplus to delta + delta_bias.
        b_discretization: "euler" or "zoh".
        initial_state: (n_sequences, d_inner, d_state); defaults to zeros. n_sequences is batch, or the number of
            sequences that cu_seqlens packs.
        cu_seqlens: int32 offsets 0 = c[0] <= c[1] <= ... <= c[n_sequences] = length of sequences packed along the
            length of one row; each sequence has its own initial state. A sequence may be empty.
        group: processes that each have a contiguous part of the sequence, from `anymamba.parallel.sequence_group`. u,
            delta, z and selective B and C are then this process's part; offsets and initial states are those of the
            whole sequence. last_state is that of sequences whose last token is here, and zero for others. All
            processes must run the op and its backward pass; the gradients of A, D, delta_bias, initial_state and
            constant B and C are to be summed over them. Defaults to none: the sequence is here.
        backend: a backend from the list of `anymamba info`, such as "cpu" or "portable"; defaults to that of the
            context `anymamba.backend`, or to the best one that can serve.
    Returns y, like u, and last_state (n_sequences, d_inner, d_state). Gradients flow through both to every tensor.
    Forward-mode, second and higher derivatives run as the torch operations of backend "reference", whichever backend
    computes the values; they hold (batch, length, d_inner, d_state) tensors.
    Raises ValueError for wrong shapes and names, TypeError for wrong dtypes, RuntimeError if a named backend cannot
    serve.
    Source: Mamba (arXiv:2312.00752), section 2 and Algorithm 2; B as in the published checkpoints.
    """
    arguments = checked(
        ScanArguments(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, b_discretization)
    )
    name = dispatch.resolve(OP, u.device.type, backend, arguments)
    return ScanOutput(*(run(arguments, name) if group is None else over_group.run(arguments, group, name)))


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
    """Run `selective_scan` for one token: it takes the state and returns the new one.

    Args: as in `selective_scan`, without the length; B and C are (d_inner, d_state) constant or (batch, n_groups,
        d_state) selective.
    Returns y (batch, d_inner) in the dtype of u, and the state (batch, d_inner, d_state), a new tensor.
    Differentiable to any order. It is exported as plain torch operations.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, state)
    arguments = checked_step(ScanArguments(*tensors, None, delta_softplus, b_discretization))
    kernel = dispatch.step_kernel(OP, arguments, u.device.type, backend)
    with dispatch.without_autocast(u.device.type):
        y, state = kernel(arguments)
    return y[:, 0], state
