"""Check the arguments of a selective scan, and bring them into the form that backends take."""

from __future__ import annotations

from torch import Tensor

from anymamba.kernels.selective_scan.arguments import N_TENSORS, ScanArguments
from anymamba.ops.checks import n_sequences, require_floating, require_same_device, require_shape, without_lazy

B_DISCRETIZATIONS = ("euler", "zoh")
NAMES = ScanArguments._fields[:N_TENSORS]


def checked(a: ScanArguments) -> ScanArguments:
    """Check the arguments, make a selective B and C (batch, length, n_groups, d_state) with equal groups, and resolve
    lazy tensors.

    Raises ValueError for wrong shapes, sizes, names and devices, TypeError for wrong dtypes.
    """
    if a.u.ndim != 3:
        raise ValueError(f"u must be (batch, length, d_inner), got {tuple(a.u.shape)}")
    batch, length, d_inner = a.u.shape
    if a.A.ndim != 2 or a.A.shape[0] != d_inner or a.A.shape[1] < 1:
        raise ValueError(f"A must be (d_inner, d_state) = ({d_inner}, at least 1), got {tuple(a.A.shape)}")
    d_state = a.A.shape[1]
    for name, tensor in (("delta", a.delta), ("z", a.z)):
        if tensor is not None:
            require_shape(name, tensor, (batch, length, d_inner), "(batch, length, d_inner)")
    for name, tensor in (("D", a.D), ("delta_bias", a.delta_bias)):
        if tensor is not None:
            require_shape(name, tensor, (d_inner,), "(d_inner,)")
    for name, tensor in (("u", a.u), ("delta", a.delta), ("z", a.z), ("D", a.D), ("delta_bias", a.delta_bias)):
        if tensor is not None:
            require_floating(name, tensor)
    if a.b_discretization not in B_DISCRETIZATIONS:
        raise ValueError(f'b_discretization must be "euler" or "zoh", got {a.b_discretization!r}')
    for name, tensor in (("A", a.A), ("B", a.B), ("C", a.C), ("initial_state", a.initial_state)):
        if tensor is not None:
            _require_kind_of_A(name, tensor, a.A)
    if len({t.device for t in a.tensors if t is not None}) > 1:
        require_same_device("selective_scan", dict(zip(NAMES, a.tensors, strict=True)))
    rows = n_sequences(batch, a.cu_seqlens)
    if a.initial_state is not None:
        require_shape("initial_state", a.initial_state, (rows, d_inner, d_state), "(n_sequences, d_inner, d_state)")
    B = _grouped("B", a.B, batch, length, d_inner, d_state)
    C = _grouped("C", a.C, batch, length, d_inner, d_state)
    if B is not a.B or C is not a.C or B.shape != C.shape:
        B, C = _equal_groups(B, C)
        a = ScanArguments(a.u, a.delta, a.A, B, C, *a[5:])
    return without_lazy(a)


def checked_step(a: ScanArguments) -> ScanArguments:
    """Check the arguments of one token, (batch, d_inner) and (batch, n_groups, d_state), and return them as a sequence
    of length one."""
    state = a.initial_state
    assert state is not None
    if a.A.ndim != 2:
        raise ValueError(f"A must be (d_inner, d_state), got {tuple(a.A.shape)}")
    d_inner, d_state = a.A.shape
    require_shape("u", a.u, (None, d_inner), "(batch, d_inner)")
    require_shape("state", state, (a.u.shape[0], d_inner, d_state), "(batch, d_inner, d_state)")
    _require_kind_of_A("state", state, a.A)
    if a.u.device != state.device:
        require_same_device("selective_scan", {"u": a.u, "state": state})
    B, C = _with_length("B", a.B), _with_length("C", a.C)
    z = None if a.z is None else a.z[:, None]
    return checked(ScanArguments(a.u[:, None], a.delta[:, None], a.A, B, C, a.D, z, *a[7:]))


def _with_length(name: str, M: Tensor) -> Tensor:
    if M.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be (d_inner, d_state) or (batch, n_groups, d_state), got {tuple(M.shape)}; "
            "for (batch, d_state) insert a dimension of one group"
        )
    return M if M.ndim == 2 else M[:, None]


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
    """Repeat the single group of B or C if the other has several groups."""
    if B.ndim == C.ndim == 4 and B.shape[2] != C.shape[2]:
        if 1 not in (B.shape[2], C.shape[2]):
            raise ValueError(f"B and C must have the same n_groups or one group, got {B.shape[2]} and {C.shape[2]}")
        n_groups = max(B.shape[2], C.shape[2])
        B, C = (M.expand(-1, -1, n_groups, -1) for M in (B, C))
    return B, C
