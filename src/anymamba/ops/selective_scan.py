"""The selective scan (S6): the operator's contract, its checks, its registration with torch and its gradient.

Which code runs is decided by `ops.dispatch`; the maths is `kernels/selective_scan/reference.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from anymamba.ops import dispatch, functions, observers
from anymamba.ops.checks import (
    n_sequences,
    require_borders,
    require_floating,
    require_same_device,
    require_shape,
    resolved,
)
from anymamba.ops.functions import Tensors

OP = "selective_scan"
B_DISCRETIZATIONS = ("euler", "zoh")


class ScanOutput(NamedTuple):
    """What a scan returns."""

    y: Float[Tensor, "batch length d_inner"]
    """Like u, in its dtype."""
    last_state: Float[Tensor, "n_sequences d_inner d_state"] | Complex[Tensor, "n_sequences d_inner d_state"]
    """The state after the last token of each sequence, float32 or wider."""


def selective_scan(
    u: Float[Tensor, "batch length d_inner"],
    delta: Float[Tensor, "batch length d_inner"],
    A: Float[Tensor, "d_inner d_state"] | Complex[Tensor, "d_inner d_state"],
    B: Float[Tensor, "..."] | Complex[Tensor, "..."],
    C: Float[Tensor, "..."] | Complex[Tensor, "..."],
    D: Float[Tensor, " d_inner"] | None = None,
    z: Float[Tensor, "batch length d_inner"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
    *,
    delta_softplus: bool = False,
    b_discretization: str = "euler",
    initial_state: Float[Tensor, "n_sequences d_inner d_state"] | None = None,
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"] | None = None,
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
        D: (d_inner,) skip; absent means none.
        z: gate, like u; absent means none.
        delta_bias: (d_inner,) added to delta before the softplus.
        delta_softplus: apply softplus to delta + delta_bias.
        b_discretization: "euler" or "zoh".
        initial_state: (n_sequences, d_inner, d_state); absent means zeros. n_sequences is batch, or what cu_seqlens
            packs.
        cu_seqlens: int32 borders 0 = c[0] <= c[1] <= ... <= length of sequences packed along the length of one row; the
            state starts afresh at each. A sequence may be empty.
        backend: "cpu", "triton", "portable" or "reference"; defaults to that of the context `anymamba.backend`, or to
            the best there is.
    Returns y, like u, and last_state (n_sequences, d_inner, d_state). Gradients flow to every tensor, through both.
    Derivatives in forward mode, and second and higher ones, run as torch operations, those of backend "reference",
    whichever backend computes the values: they hold (batch, length, d_inner, d_state) tensors.
    Raises ValueError for shapes and names, TypeError for dtypes, RuntimeError when a named backend cannot serve.
    Source: Mamba (arXiv:2312.00752), section 2 and Algorithm 2; B as in the published checkpoints.
    """
    B, C = _check(u, delta, A, B, C, D, z, delta_bias, b_discretization, initial_state, cu_seqlens)
    name = dispatch.resolve(OP, u.device.type, backend, is_complex=A.is_complex())
    tensors = [resolved(t) for t in (u, delta, A, B, C, D, z, delta_bias, initial_state)]
    return ScanOutput(*_run((*tensors, cu_seqlens), ScanOptions(delta_softplus, b_discretization, name)))


def selective_scan_step(
    state: Float[Tensor, "batch d_inner d_state"] | Complex[Tensor, "batch d_inner d_state"],
    u: Float[Tensor, "batch d_inner"],
    delta: Float[Tensor, "batch d_inner"],
    A: Float[Tensor, "d_inner d_state"] | Complex[Tensor, "d_inner d_state"],
    B: Float[Tensor, "..."] | Complex[Tensor, "..."],
    C: Float[Tensor, "..."] | Complex[Tensor, "..."],
    D: Float[Tensor, " d_inner"] | None = None,
    z: Float[Tensor, "batch d_inner"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
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
    if A.ndim != 2:
        raise ValueError(f"A must be (d_inner, d_state), got {tuple(A.shape)}")
    d_inner, d_state = A.shape
    require_shape("u", u, (None, d_inner), "(batch, d_inner)")
    require_shape("state", state, (u.shape[0], d_inner, d_state), "(batch, d_inner, d_state)")
    _require_kind_of_A("state", state, A)
    require_same_device(OP, u=u, state=state)
    u_long, delta_long = u[:, None], delta[:, None]
    z_long = None if z is None else z[:, None]
    B_long, C_long = _with_length("B", B), _with_length("C", C)
    _check(u_long, delta_long, A, B_long, C_long, D, z_long, delta_bias, b_discretization, None, None)
    name = dispatch.resolve(OP, u.device.type, backend, is_complex=A.is_complex())
    name = dispatch.of_step(name, state, u, delta, A, B, C, D, z, delta_bias)
    dispatch.count(OP, name, "step")
    with dispatch.without_autocast(u.device.type):
        return dispatch.kernel(OP, name).step(
            state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization
        )


def _with_length(name: str, M: Tensor) -> Tensor:
    if M.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be (d_inner, d_state) or (batch, n_groups, d_state), got {tuple(M.shape)}; "
            "for (batch, d_state) insert a dimension of one group"
        )
    return M if M.ndim == 2 else M[:, None]


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check the op's tensors; returns B and C constant or as (batch, length, n_groups, d_state) with equal groups."""
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, length, d_inner), got {tuple(u.shape)}")
    batch, length, d_inner = u.shape
    if A.ndim != 2 or A.shape[0] != d_inner or A.shape[1] < 1:
        raise ValueError(f"A must be (d_inner, d_state) = ({d_inner}, at least 1), got {tuple(A.shape)}")
    d_state = A.shape[1]
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None:
            require_shape(name, tensor, (batch, length, d_inner), "(batch, length, d_inner)")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            require_shape(name, tensor, (d_inner,), "(d_inner,)")
    for name, tensor in (("u", u), ("delta", delta), ("z", z), ("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            require_floating(name, tensor)
    if b_discretization not in B_DISCRETIZATIONS:
        raise ValueError(f'b_discretization must be "euler" or "zoh", got {b_discretization!r}')
    for name, tensor in (("A", A), ("B", B), ("C", C), ("initial_state", initial_state)):
        if tensor is not None:
            _require_kind_of_A(name, tensor, A)
    require_same_device(
        OP, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    rows = n_sequences(batch, cu_seqlens)
    if initial_state is not None:
        require_shape("initial_state", initial_state, (rows, d_inner, d_state), "(n_sequences, d_inner, d_state)")
    return _equal_groups(*(_grouped(n, M, batch, length, d_inner, d_state) for n, M in (("B", B), ("C", C))))


def _require_kind_of_A(name: str, tensor: Tensor, A: Tensor) -> None:
    require_floating(name, tensor, allow_complex=True)
    if tensor.is_complex() != A.is_complex():
        raise TypeError(f"{name} must be complex exactly when A is, got {tensor.dtype} and A {A.dtype}")


def _grouped(name: str, M: Tensor, batch: int, length: int, d_inner: int, d_state: int) -> Tensor:
    if M.ndim == 2:
        require_shape(name, M, (d_inner, d_state), "(d_inner, d_state)")
        return M
    if M.ndim == 3:
        require_shape(name, M, (batch, length, d_state), "(batch, length, d_state)")
        return M[:, :, None]
    require_shape(name, M, (batch, length, None, d_state), "(batch, length, n_groups, d_state)")
    if M.shape[2] < 1 or d_inner % M.shape[2]:
        raise ValueError(
            f"d_inner must be a multiple of the n_groups of {name}, got {d_inner} and {M.shape[2]}; change either"
        )
    return M


def _equal_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One group is repeated where the other has several."""
    if B.ndim == C.ndim == 4 and B.shape[2] != C.shape[2]:
        if 1 not in (B.shape[2], C.shape[2]):
            raise ValueError(f"B and C must have the same n_groups or one group, got {B.shape[2]} and {C.shape[2]}")
        n_groups = max(B.shape[2], C.shape[2])
        B, C = (M.expand(-1, -1, n_groups, -1) for M in (B, C))
    return B, C


def working_dtype(u: Tensor, delta: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of the state: float32 or wider, complex where A is."""
    return torch.promote_types(torch.float32, torch.promote_types(A.dtype, torch.promote_types(u.dtype, delta.dtype)))


# ------------------------------------------------------------------------------------------ the ways to run


class ScanOptions(NamedTuple):
    """What a scan takes besides tensors."""

    delta_softplus: bool
    b_discretization: str
    backend: str


def _run(tensors: Tensors, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """y and the last state of u, delta, A, B, C, D, z, delta_bias, initial_state and cu_seqlens."""
    way = observers.way(*tensors)
    if way == "operations" or options.backend == "reference":
        return _operations(tensors, options)
    if way == "function":
        return functions.apply(RULE, options, *tensors)
    run = _forward if way == "kernel" else _forward_op
    save = observers.differentiable(*tensors) and not torch.jit.is_tracing()  # a trace must not depend on its mode
    return _call(run, tensors, options, save)[:2]


def _operations(tensors: Tensors, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, differentiable to any order and in any mode."""
    *values, initial_state, cu_seqlens = tensors
    u, softplus, rule = tensors[0], options.delta_softplus, options.b_discretization
    assert u is not None
    require_borders(cu_seqlens, u.shape[1])
    dispatch.count(OP, "reference", "forward")
    with dispatch.without_autocast(u.device.type):
        forward = dispatch.kernel(OP, "reference").forward
        y, last_state, _ = forward(*values, softplus, rule, initial_state, cu_seqlens)
    return y, last_state


def _call(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]], tensors: Tensors, options: ScanOptions, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_forward` or the registered op, which list their arguments in an order of their own."""
    *values, initial_state, cu_seqlens = tensors
    softplus, rule, backend = options
    return forward(*values, softplus, rule, initial_state, cu_seqlens, save, backend)


def _rule_forward(tensors: Tensors, options: ScanOptions) -> tuple[Tensor, Tensor, Tensor]:
    plain = observers.way(*tensors) == "kernel"
    return _call(_forward if plain else _forward_op, tensors, options, save=True)


def _rule_backward(
    dy: Tensor, dlast_state: Tensor, tensors: Tensors, options: ScanOptions, saved: Tensor
) -> list[Tensor | None]:
    *values, initial_state, cu_seqlens = tensors
    softplus, rule, backend = options
    plain = observers.way(dy, dlast_state, saved, *tensors) == "kernel"
    run: Callable[..., list[Tensor]] = _backward_kernel if plain else _backward_op
    grads = run(dy, dlast_state, *values, softplus, rule, initial_state, cu_seqlens, saved, backend)
    present = (*values, initial_state)
    return [None if t is None else g for t, g in zip(present, grads, strict=True)]


RULE = functions.Rule(_rule_forward, _rule_backward, _operations)


# ------------------------------------------------------------------------------------------ registration


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    require_borders(cu_seqlens, u.shape[1])
    dispatch.count(OP, backend, "forward")
    with dispatch.without_autocast(u.device.type):
        return dispatch.kernel(OP, backend).forward(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization, initial_state, cu_seqlens, save
        )


_forward_op = torch.library.custom_op("anymamba::selective_scan", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, d_inner = u.shape
    d_state = A.shape[1]
    dtype = working_dtype(u, delta, A)
    rows = n_sequences(batch, cu_seqlens)
    n_groups = next((M.shape[2] for M in (B, C) if M.ndim == 4), 1)
    saved_shape = dispatch.kernel(OP, backend).saved_shape(batch, length, d_inner, d_state, n_groups) if save else (0,)
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty(rows, d_inner, d_state, dtype=dtype),
        u.new_empty(saved_shape, dtype=dtype),
    )


def _backward_kernel(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    dispatch.count(OP, backend, "backward")
    with dispatch.without_autocast(u.device.type):
        grads = dispatch.kernel(OP, backend).backward(
            dy,
            dlast_state,
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            b_discretization,
            initial_state,
            cu_seqlens,
            saved,
        )
    return [u.new_empty(0) if g is None else g for g in grads]


_backward_op = torch.library.custom_op("anymamba::selective_scan_backward", _backward_kernel, mutates_args=())


@_backward_op.register_fake
def _(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [u.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, delta_softplus, b_discretization, initial_state, cu_seqlens, save, backend = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])
    ctx.options = (delta_softplus, b_discretization, save, backend)


def _backward(ctx, dy, dlast_state, _):
    *tensors, initial_state, cu_seqlens, saved = ctx.saved_tensors
    delta_softplus, b_discretization, save, backend = ctx.options
    if not save:  # it was called by something that hides from it that gradients are wanted
        options = (delta_softplus, b_discretization, initial_state, cu_seqlens, True, backend)
        saved = _forward_op(*tensors, *options)[2]
    grads = _backward_op(
        dy,
        dlast_state,
        *tensors,
        delta_softplus,
        b_discretization,
        initial_state,
        cu_seqlens,
        saved,
        backend,
    )
    inputs = (*tensors, initial_state)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = (
        None if t is None else g for t, g in zip(inputs, grads, strict=True)
    )
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None, None, dinitial, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)
