"""anymamba's `mamba_ssm` operators against the recurrence written out, with every shape, dtype and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from anymamba.compat.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from anymamba.compat.mamba_ssm.ops.triton import layer_norm, layernorm
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
from anymamba.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)

BATCH, DIM, STATE, LENGTH = 2, 6, 4, 13


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """Section 2 of the paper, token by token, in the peer's layout (batch, dim, length)."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    batch, dim, length = u.shape

    def at(M, t):  # (batch, dim, state)
        if M.ndim == 2:
            return M.expand(batch, *M.shape)
        if A.is_complex() and not M.is_complex():
            M = torch.view_as_complex(M.unflatten(-1, (-1, 2)).contiguous())
        M = M[:, None] if M.ndim == 3 else M
        return M[..., t].repeat_interleave(dim // M.shape[1], dim=1)

    h = torch.zeros(batch, *A.shape, dtype=torch.promote_types(A.dtype, u.dtype))
    ys = []
    for t in range(length):
        step = delta[..., t, None]
        h = torch.exp(step * A) * h + step * at(B, t) * u[..., t, None]
        y = (h * at(C, t)).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, dim=2)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return (y, h) if return_last_state else y


def inputs(kind: str = "selective", complex_A: bool = False, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    A = -torch.rand(DIM, STATE, generator=generator, dtype=dtype) - 0.1
    A = torch.complex(A, normal(DIM, STATE)) if complex_A else A
    length = 2 * LENGTH if complex_A else LENGTH
    constant = torch.complex(normal(DIM, STATE), normal(DIM, STATE)) if complex_A else normal(DIM, STATE)
    shapes = {"selective": (BATCH, STATE, length), "groups": (BATCH, 3, STATE, length)}
    B = constant if kind == "constant" else normal(*shapes[kind])
    C = constant.clone() if kind == "constant" else normal(*shapes[kind])
    full = (BATCH, DIM, LENGTH)
    return {
        "u": normal(*full), "delta": normal(*full), "A": A, "B": B, "C": C, "D": normal(DIM), "z": normal(*full),
        "delta_bias": normal(DIM),
    }  # fmt: skip


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("kind", ["selective", "groups", "constant"])
def test_scan(function, complex_A, kind):
    values = inputs(kind, complex_A)
    for options in ({}, {"D": None, "z": None}, {"delta_bias": None}):
        given = values | options
        want, state = recurrence(**given, delta_softplus=True, return_last_state=True)
        got, last = function(**given, delta_softplus=True, return_last_state=True)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(last, state)
        assert torch.equal(function(**given, delta_softplus=True), got)


@pytest.mark.parametrize("complex_A", [False, True])
def test_gradients_through_the_output_and_the_last_state(complex_A):
    values = {k: v[..., :10] if k in ("B", "C") and complex_A else v for k, v in inputs("selective", complex_A).items()}
    values |= {k: values[k][..., :5] for k in ("u", "delta", "z")}
    if not complex_A:
        values |= {k: values[k][..., :5] for k in ("B", "C")}
    names = list(values)
    leaves = tuple(values[name].clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        lambda *given: selective_scan_fn(
            **dict(zip(names, given, strict=True)), delta_softplus=True, return_last_state=True
        ),
        leaves,
        fast_mode=True,
    )


def test_half_precision():
    values = inputs(dtype=torch.float32)
    narrow = {k: v.bfloat16() if k in ("u", "delta", "z", "B", "C") else v for k, v in values.items()}
    got, state = selective_scan_fn(**narrow, delta_softplus=True, return_last_state=True)
    want = recurrence(**{k: v.float() for k, v in narrow.items()}, delta_softplus=True)
    assert got.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (got.float() - want).abs().max() < 0.01 * want.abs().max()


def test_scan_misuse():
    values = inputs()
    with pytest.raises(ValueError, match=r"u must be \(batch, dim, length\)"):
        selective_scan_fn(**values | {"u": values["u"][0]})
    with pytest.raises(ValueError, match=r"B must be \(dim, dstate\), \(batch, dstate, length\) or"):
        selective_scan_fn(**values | {"B": values["B"][0, 0]})


# ------------------------------------------------------------------------------------------ one token


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("groups", [None, 2])
def test_state_update(heads, groups):
    """With heads the groups divide them in order; the state is changed in place."""
    generator = torch.Generator().manual_seed(1)
    shape = (DIM,) if heads is None else (heads, DIM)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    state, x, dt, z = normal(BATCH, *shape, STATE), normal(BATCH, *shape), normal(BATCH, *shape), normal(BATCH, *shape)
    A, D, bias = -torch.rand(*shape, STATE, generator=generator, dtype=torch.float64), normal(*shape), normal(*shape)
    B, C = (normal(BATCH, STATE) if groups is None else normal(BATCH, groups, STATE) for _ in "BC")
    channels = DIM * (heads or 1)
    wide = [M[:, None] if groups is None else M for M in (B, C)]
    wide = [M.repeat_interleave(channels // M.shape[1], dim=1).view(BATCH, *shape, STATE) for M in wide]
    step = F.softplus(dt + bias)[..., None]
    want_state = torch.exp(step * A) * state + step * wide[0] * x[..., None]
    want = ((want_state * wide[1]).sum(-1) + D * x) * F.silu(z)
    for function in (selective_state_update, selective_state_update_ref):
        kept = state.clone()
        got = function(kept, x, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(kept, want_state)


def test_state_update_with_its_documented_defaults():
    values = inputs(dtype=torch.float32)
    state = torch.zeros(BATCH, DIM, STATE)
    ys = []
    for t in range(LENGTH):
        x, dt, B, C = (values[k][..., t] for k in ("u", "delta", "B", "C"))
        ys.append(selective_state_update(state, x, dt.abs(), values["A"], B, C))
    want, last = recurrence(
        values["u"], values["delta"].abs(), values["A"], values["B"], values["C"], return_last_state=True
    )
    torch.testing.assert_close(torch.stack(ys, dim=2), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


def test_the_output_is_that_of_the_state_before_rounding():
    values = inputs(dtype=torch.float32)
    x, dt, B, C = (values[k][..., 0] for k in ("u", "delta", "B", "C"))
    start = torch.randn(BATCH, DIM, STATE).bfloat16()
    narrow, wide = start.clone(), start.float()
    a = selective_state_update(narrow, x, dt, values["A"], B, C, dt_softplus=True)
    b = selective_state_update(wide, x, dt, values["A"], B, C, dt_softplus=True)
    assert torch.equal(a, b) and torch.equal(narrow, wide.bfloat16())


def test_state_indices_and_padding():
    values = inputs(dtype=torch.float32)
    x, dt, B, C = (values[k][..., 0] for k in ("u", "delta", "B", "C"))
    pool = torch.randn(5, DIM, STATE)
    before = pool.clone()
    got = selective_state_update(
        pool, x, dt, values["A"], B, C, dt_softplus=True, state_batch_indices=torch.tensor([3, -1], dtype=torch.int32)
    )
    row = before[3:4].clone()
    alone = selective_state_update(row, x[:1], dt[:1], values["A"], B[:1], C[:1], dt_softplus=True)
    torch.testing.assert_close(got[:1], alone)
    torch.testing.assert_close(pool[3:4], row)
    assert not got[1].any() and torch.equal(pool[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


STEP_SHAPES = {"plain": (), "indices": (), "pool": (), "heads": (2,)}


@pytest.mark.parametrize("kind", STEP_SHAPES)
def test_gradients_through_state_updates(kind):
    """Two updates in place and the state after them: a whole state, rows of one, a part of another tensor."""
    generator = torch.Generator().manual_seed(4)
    shape, options = (*STEP_SHAPES[kind], DIM), {}
    if kind == "indices":
        options = {"state_batch_indices": torch.tensor([2, -1], dtype=torch.int32)}

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    rows = 3 if kind == "indices" else BATCH
    state, x, dt, z = (
        normal(rows, *shape, STATE),
        normal(2, BATCH, *shape),
        normal(2, BATCH, *shape),
        normal(BATCH, *shape),
    )
    A, B, C, D, bias = normal(*shape, STATE), normal(BATCH, STATE), normal(BATCH, STATE), normal(*shape), normal(*shape)

    def updates(state, x, dt, z, A, B, C, D, bias):
        state = state.clone()
        part = torch.stack([state, state])[1] if kind == "pool" else state
        ys = [
            selective_state_update(part, x[t], dt[t], -A.exp(), B, C, D, z, bias, dt_softplus=True, **options)
            for t in range(2)
        ]
        return *ys, part

    assert torch.autograd.gradcheck(updates, (state, x, dt, z, A, B, C, D, bias), fast_mode=True)


def test_a_state_of_inference_mode_is_updated_outside_it():
    values = inputs(dtype=torch.float32)
    x, dt, B, C = (values[k][..., 0] for k in ("u", "delta", "B", "C"))
    plain = torch.randn(BATCH, DIM, STATE)
    with torch.inference_mode():
        state = plain.clone()
    rows = torch.tensor([1, -1])
    for grad, options in ((False, {}), (True, {}), (True, {"state_batch_indices": rows})):
        A = values["A"].clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            want = selective_state_update(plain, x, dt, A, B, C, dt_softplus=True, **options)
            got = selective_state_update(state, x, dt, A, B, C, dt_softplus=True, **options)
        plain = plain.detach()
        torch.testing.assert_close(got, want)
        assert torch.equal(state, plain) and state.is_inference()
    got.sum().backward()
    assert A.grad.any()


TRACED = {"plain": {}, "indices": {"state_batch_indices": torch.tensor([2, -1], dtype=torch.int32)}}


@pytest.mark.parametrize("options", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("grad", [True, False])
def test_a_state_update_compiles_into_one_graph(options, grad):
    values = inputs(dtype=torch.float32)
    x, dt, B, C = (values[k][..., 0] for k in ("u", "delta", "B", "C"))
    step = torch.compile(
        lambda state: selective_state_update(state, x, dt, values["A"], B, C, **options),
        fullgraph=True,
        backend="eager",
    )
    got = torch.randn(BATCH + 1 if options else BATCH, DIM, STATE)
    want = got.clone()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(step(got), selective_state_update(want, x, dt, values["A"], B, C, **options))
    torch.testing.assert_close(got, want)


def test_a_state_update_on_the_meta_device():
    values = {k: v.to("meta") for k, v in inputs(dtype=torch.float32).items()}
    x, dt, B, C = (values[k][..., 0] for k in ("u", "delta", "B", "C"))
    for options in TRACED.values():
        indices = {name: value.to("meta") for name, value in options.items()}
        state = torch.empty(BATCH + 1 if options else BATCH, DIM, STATE, device="meta")
        assert selective_state_update(state, x, dt, values["A"], B, C, **indices).shape == (BATCH, DIM)


# ------------------------------------------------------------------------------------------ the whole layer


def layer(complex_A: bool = False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    rank, d_model, width = 3, 5, 4
    rows = rank + 2 * STATE * (2 if complex_A else 1)

    def normal(*shape, scale=0.5):
        return scale * torch.randn(*shape, generator=generator, dtype=dtype)

    A = -torch.rand(DIM, STATE, generator=generator, dtype=dtype) - 0.1
    A = torch.complex(A, normal(DIM, STATE)) if complex_A else A
    return {
        "xz": normal(BATCH, 2 * DIM, 7), "conv1d_weight": normal(DIM, 1, width), "conv1d_bias": normal(DIM),
        "x_proj_weight": normal(rows, DIM), "delta_proj_weight": normal(DIM, rank), "A": A, "D": normal(DIM),
        "out_proj_weight": normal(d_model, DIM), "out_proj_bias": normal(d_model), "delta_bias": normal(DIM),
    }  # fmt: skip


def written_out(values, *, B=None, C=None, norms=None, eps=1e-6, biases=(None, None)):
    x, z = values["xz"].chunk(2, dim=1)
    width = values["conv1d_weight"].shape[2]
    x = F.silu(F.conv1d(F.pad(x, (width - 1, 0)), values["conv1d_weight"], values["conv1d_bias"], groups=DIM))
    A, rank = values["A"], values["delta_proj_weight"].shape[1]
    rows = torch.einsum("rd,bdl->brl", values["x_proj_weight"], x)
    size = STATE * (2 if A.is_complex() else 1)
    dt, B_rows, C_rows = rows[:, :rank], rows[:, rank : rank + size], rows[:, rank + size : rank + 2 * size]

    def norm(M, weight):
        if weight is None:
            return M
        return M * torch.rsqrt(M.pow(2).mean(1, keepdim=True) + eps) * weight[:, None]

    def matrix(M, bias, weight):
        M = M if bias is None else M + bias[:, None]
        M = norm(M, weight)
        if A.is_complex():  # real and imaginary parts in turn along the rows, to the same along the length
            M = torch.stack([M[:, 0::2], M[:, 1::2]], dim=-1).flatten(2)
        return M

    b, c, d = norms or (None, None, None)
    delta = norm(torch.einsum("dr,brl->bdl", values["delta_proj_weight"], dt), d)
    B = matrix(B_rows, biases[0], b) if B is None else B
    C = matrix(C_rows, biases[1], c) if C is None else C
    y = recurrence(x, delta, A, B, C, values["D"], z, values["delta_bias"], True)
    return torch.einsum("md,bdl->blm", values["out_proj_weight"], y) + values["out_proj_bias"]


@pytest.mark.parametrize("complex_A", [False, True])
def test_inner(complex_A):
    values = layer(complex_A)
    want = written_out(values)
    for function in (mamba_inner_fn, mamba_inner_ref):
        torch.testing.assert_close(function(**values), want)
    torch.testing.assert_close(mamba_inner_fn(**values, checkpoint_lvl=0), want)


def test_inner_with_B_C_and_norms():
    values = layer()
    given = torch.randn(BATCH, 1, STATE, 7, dtype=torch.float64)
    only_C = values | {"x_proj_weight": values["x_proj_weight"][: 3 + STATE]}
    constant = torch.randn(DIM, STATE, dtype=torch.float64)
    torch.testing.assert_close(mamba_inner_fn(**only_C, B=given), _with_C(only_C, B=given))
    bare = values | {"x_proj_weight": values["x_proj_weight"][:3]}
    torch.testing.assert_close(
        mamba_inner_fn(**bare, B=constant, C=constant), written_out(bare, B=constant, C=constant)
    )
    norms = tuple(torch.rand(size, dtype=torch.float64) + 0.5 for size in (STATE, STATE, DIM))
    biases = tuple(torch.randn(STATE, dtype=torch.float64) for _ in "BC")
    got = mamba_inner_fn(
        **values, B_proj_bias=biases[0], C_proj_bias=biases[1], b_rms_weight=norms[0], c_rms_weight=norms[1],
        dt_rms_weight=norms[2], b_c_dt_rms_eps=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(got, written_out(values, norms=norms, eps=1e-3, biases=biases))


def _with_C(values, B):
    rows = torch.cat([values["x_proj_weight"][:3], torch.zeros(STATE, DIM, dtype=torch.float64)])
    padded = values | {"x_proj_weight": torch.cat([rows, values["x_proj_weight"][3:]])}
    return written_out(padded, B=B)


def test_every_tensor_of_inner_has_its_gradient():
    """A vector for out_proj's bias, and the norms' weights: both are wrong in the original."""
    values = layer()
    norms = {"b_rms_weight": STATE, "c_rms_weight": STATE, "dt_rms_weight": DIM}
    values |= {name: torch.rand(size, dtype=torch.float64) + 0.5 for name, size in norms.items()}
    names = list(values)
    leaves = tuple(v.clone().requires_grad_() for v in values.values())
    assert torch.autograd.gradcheck(
        lambda *given: mamba_inner_fn(**dict(zip(names, given, strict=True))), leaves, fast_mode=True
    )


def test_inner_under_autocast():
    values = layer(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mamba_inner_fn(**values)
    want = mamba_inner_fn(**values)
    assert got.dtype == torch.bfloat16 and (got.float() - want).abs().max() < 0.05 * want.abs().max()


# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(rms, dtype):
    x, residual, x1 = (torch.randn(3, 4, 16).to(dtype) for _ in range(3))
    weight, bias, weight1 = (torch.randn(16).to(dtype) for _ in range(3))
    rowscale = torch.rand(3, 4)
    bias = None if rms else bias
    function, plain = (rms_norm_fn, rms_norm_ref) if rms else (layer_norm_fn, layer_norm_ref)

    def norm(total, w, b):
        total = total.double()
        centred = total if rms else total - total.mean(-1, keepdim=True)
        y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * w.double()
        return y if b is None else y + b.double()

    def close(got, want):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)

    out = function(x, weight, bias, eps=1e-5)
    assert out.dtype == dtype
    close(out, norm(x, weight, bias))
    total = x.double() + residual.double()
    out, kept = function(x, weight, bias, residual, eps=1e-5, prenorm=True, residual_in_fp32=True)
    assert kept.dtype == torch.float32
    close(out, norm(total, weight, bias))
    close(kept, total)
    assert function(x, weight, bias, residual, prenorm=True)[1].dtype == dtype
    scaled = (x * rowscale[..., None].to(dtype)).double() + x1.double()
    first, second = function(x, weight, bias, None, x1, weight1, None, eps=1e-5, rowscale=rowscale)
    close(first, norm(scaled, weight, bias))
    close(second, norm(scaled, weight1, None))
    close(plain(x, weight, bias, residual, eps=1e-5), norm(total, weight, bias))


def test_dropout_and_its_mask():
    x, weight = torch.ones(2, 1000), torch.ones(1000)
    out, total, mask, mask1 = rms_norm_fn(x, weight, None, dropout_p=0.3, prenorm=True, return_dropout_mask=True)
    assert mask1 is None and 0.6 < mask.float().mean() < 0.8
    torch.testing.assert_close(total, mask / 0.7)
    assert out.shape == x.shape
    assert rms_norm_fn(x, weight, None, return_dropout_mask=True)[1:] == (None, None)


def test_norm_and_linear():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    linear, bias = torch.randn(5, 8), torch.randn(5)
    out, total = layer_norm_linear_fn(x, weight, None, linear, bias, residual, prenorm=True, is_rms_norm=True)
    torch.testing.assert_close(out, F.linear(rms_norm_fn(x, weight, None, residual), linear, bias))
    torch.testing.assert_close(total, x + residual)
    plain = layer_norm_linear_fn(x, weight, None, linear, None)
    torch.testing.assert_close(plain, layer_norm_fn(x, weight, None) @ linear.T)


def test_the_norm_module():
    norm = RMSNorm(16, eps=1e-3, dropout_p=0.5)
    assert norm.bias is None and list(dict(norm.named_parameters())) == ["weight"] and norm.eps == 1e-3
    x, residual = torch.randn(2, 16), torch.randn(2, 16)
    out, total = norm.eval()(x, residual, prenorm=True, residual_in_fp32=True)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(out, F.rms_norm(x + residual, (16,), norm.weight, 1e-3))
    assert (norm.train()(torch.ones(4, 16)) == 0).any()
    assert layernorm.RMSNorm is RMSNorm and set(layernorm.__all__) <= set(dir(layer_norm))
