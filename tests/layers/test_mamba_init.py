"""Initialisation as published, and that it survives what frameworks do to modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anymamba import Mamba
from anymamba.parts import init
from anymamba.parts.conv import ShortConvolution
from anymamba.parts.norm import NORMS, LayerNorm, RMSNorm, build_norm

D_MODEL = 512


def steps(layer: Mamba) -> torch.Tensor:
    """The initial step of each channel."""
    return F.softplus(layer.ssm.delta_bias.detach().double())


def assert_log_uniform(values: torch.Tensor, low: float, high: float) -> None:
    """By the largest distance of the empirical distribution (Kolmogorov and Smirnov, far beyond chance at 2.5)."""
    ranks = (values.log() - math.log(low)) / (math.log(high) - math.log(low))
    ranks = ranks.sort().values
    n = len(ranks)
    assert ranks[0] > -1e-3 and ranks[-1] < 1 + 1e-3
    distance = (ranks - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)
    assert distance < 2.5, f"distance {distance:.2f}"


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    weight = weight.detach().double()
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.abs().max() > 0.98 * bound
    assert abs(weight.std().item() - bound / math.sqrt(3)) < 0.05 * bound


def assert_published(layer: Mamba, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
    """The statistics of the published initialisation."""
    d_inner, d_state, rank = layer.d_inner, layer.d_state, layer.dt_rank
    assert_log_uniform(steps(layer), dt_min, dt_max)
    assert torch.equal(layer.ssm.A_log, torch.log(torch.arange(1, d_state + 1.0)).repeat(d_inner, 1))
    assert torch.equal(layer.ssm.D, torch.ones(d_inner))
    assert_uniform(layer.dt_proj.weight, rank**-0.5)
    assert_uniform(layer.in_proj.weight, layer.d_model**-0.5)  # kaiming with a = sqrt(5) is 1 / sqrt(fan in)
    assert_uniform(layer.x_proj.weight, d_inner**-0.5)
    assert_uniform(layer.out_proj.weight, d_inner**-0.5)
    assert_uniform(layer.conv.weight, layer.d_conv**-0.5)
    assert_uniform(layer.conv.bias, layer.d_conv**-0.5)


def test_statistics():
    layer = Mamba(D_MODEL)
    assert layer.dt_rank == 32 and layer.d_inner == 1024
    assert_published(layer)
    assert layer.in_proj.bias is None and layer.out_proj.bias is None and layer.dt_proj.bias is None


def test_range_and_floor():
    layer = Mamba(D_MODEL, dt_min=0.01, dt_max=0.5)
    assert_log_uniform(steps(layer), 0.01, 0.5)
    floored = steps(Mamba(D_MODEL, dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-3))
    assert floored.min() > 1e-3 * (1 - 1e-4)
    assert 0.6 < (floored < 1e-3 * (1 + 1e-4)).double().mean() < 0.9  # three quarters of the log range


def test_equal_ends_give_one_step():
    assert torch.allclose(steps(Mamba(64, dt_min=0.03, dt_max=0.03)), torch.tensor(0.03).double(), rtol=1e-4)


def test_dt_init():
    layer = Mamba(D_MODEL, dt_init="constant", dt_scale=0.5)
    assert layer.dt_proj.weight.eq(0.5 * layer.dt_rank**-0.5).all()
    assert_uniform(Mamba(D_MODEL, dt_scale=3.0).dt_proj.weight, 3 * 32**-0.5)


@pytest.mark.parametrize("value", [1e-6, 1e-4, 0.1, 1.0, 30.0, 1000.0])
def test_inverse_softplus(value):
    x = init.inverse_softplus(torch.tensor(value, dtype=torch.float64))
    assert math.isclose(F.softplus(x).item(), value, rel_tol=1e-9)


def test_initial_A():
    layer = Mamba(16, A_init="s4d-lin", d_state=5)
    A = layer.ssm.A()
    assert torch.allclose(A.real, torch.tensor(-0.5)) and A.dtype == torch.complex64
    assert torch.equal(A.imag, math.pi * torch.arange(5.0).repeat(32, 1))
    assert torch.allclose(Mamba(16, A_init="constant").ssm.A(), torch.tensor(-0.5))
    assert torch.allclose(Mamba(16).ssm.A()[3], -torch.arange(1, 17.0))
    random = Mamba(D_MODEL, A_init="random").ssm.A_log
    assert abs(random.mean()) < 0.05 and abs(random.std() - 1) < 0.05


@pytest.mark.parametrize("A_init", ["s4d-real", "s4d-lin"])
def test_constant_B_and_C(A_init):
    ssm = Mamba(D_MODEL, A_init=A_init, selective_B=False, selective_C=False).ssm
    B, C = ssm.constant("B"), ssm.constant("C")
    assert torch.equal(B, torch.ones_like(B)) and B.shape == C.shape == (1024, 16)
    assert abs(C.abs().square().mean().item() - 1) < 0.05 and abs(C.mean().item()) < 0.05


def test_survives_apply_that_zeroes_biases_and_draws_embeddings_anew():
    """What many training frameworks do to every module of a model."""
    layer = Mamba(D_MODEL, bias=True)

    def careless(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    before = layer.ssm.delta_bias.clone()
    layer.apply(careless)
    assert torch.equal(layer.ssm.delta_bias, before)
    assert layer.in_proj.bias.eq(0).all()
    assert_log_uniform(steps(layer), 0.001, 0.1)


@pytest.mark.parametrize("narrow", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_narrowing_leaves_the_ssm_parameters(narrow):
    layer = Mamba(64, selective_B=False, A_init="s4d-lin")
    before = {k: v.clone() for k, v in layer.ssm.state_dict().items()}
    layer = narrow(layer)
    assert layer.in_proj.weight.dtype in (torch.bfloat16, torch.float16)
    for name, value in layer.ssm.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name]), name


def test_double_widens_and_narrowing_returns_to_float32():
    layer = Mamba(64).double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer = layer.half()
    assert {p.dtype for p in layer.ssm.parameters()} == {torch.float32}
    assert layer.out_proj.weight.dtype == torch.float16


def test_gradients_of_the_ssm_stay_wide_too():
    layer = Mamba(16)
    layer(torch.randn(1, 3, 16))[0].sum().backward()
    layer.bfloat16()
    assert layer.ssm.A_log.grad.dtype == torch.float32 and layer.in_proj.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_construction_in_a_dtype(dtype, wide):
    layer = Mamba(64, dtype=dtype, output_norm="layernorm", inner_norms=True)
    assert {p.dtype for p in layer.ssm.parameters()} == {wide}
    assert {p.dtype for n, p in layer.named_parameters() if not n.startswith("ssm.")} == {dtype}
    x = torch.randn(2, 5, 64, dtype=dtype)
    assert layer(x)[0].dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "conv_bias": False, "dt_init": "constant"},
        {"selective_delta": False, "selective_B": False, "selective_C": False, "A_init": "s4d-lin"},
        {"A_init": "random", "output_norm": "layernorm", "inner_norms": True},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_meta_device_then_reset_has_the_values_of_construction(options):
    torch.manual_seed(3)
    want = Mamba(64, **options)
    layer = Mamba(64, **options, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    for (name, a), (_, b) in zip(layer.named_parameters(), want.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_meta_device_then_reset_has_the_published_statistics():
    layer = Mamba(D_MODEL, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_published(layer)


def test_random_numbers_are_drawn_in_the_published_order():
    """A plain re-creation: in_proj, conv, x_proj, dt_proj with its bias, its weight again, the step, out_proj."""
    torch.manual_seed(11)
    layer = Mamba(48, d_state=8)
    torch.manual_seed(11)
    in_proj = nn.Linear(48, 192, bias=False)
    conv = nn.Conv1d(96, 96, 4, groups=96, padding=3)
    x_proj = nn.Linear(96, 3 + 16, bias=False)
    dt_proj = nn.Linear(3, 96)
    nn.init.uniform_(dt_proj.weight, -(3**-0.5), 3**-0.5)
    dt = torch.exp(torch.rand(96) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    out_proj = nn.Linear(96, 48, bias=False)
    assert torch.equal(layer.in_proj.weight, in_proj.weight)
    assert torch.equal(layer.conv.weight, conv.weight[:, 0]) and torch.equal(layer.conv.bias, conv.bias)
    assert torch.equal(layer.x_proj.weight, x_proj.weight)
    assert torch.equal(layer.dt_proj.weight, dt_proj.weight)
    assert torch.allclose(layer.ssm.delta_bias, dt + torch.log(-torch.expm1(-dt)), rtol=0, atol=0)
    assert torch.equal(layer.out_proj.weight, out_proj.weight)


# ------------------------------------------------------------------------------------------ norms and convolution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms(dtype):
    x = (torch.randn(3, 7, 10) * 5 + 2).to(dtype)
    wide = x.double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + 0.1).sqrt()
    centred = wide - wide.mean(-1, keepdim=True)
    layer = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    for norm, want in ((RMSNorm(10, 0.1, dtype=dtype), rms), (LayerNorm(10, 0.1, dtype=dtype), layer)):
        y = norm(x)
        assert y.dtype == dtype
        assert torch.allclose(y.double(), want, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
        with torch.no_grad():
            norm.weight.fill_(2)
        assert torch.allclose(norm(x).double(), 2 * want, atol=8 * torch.finfo(dtype).eps, rtol=0.01)
        norm.reset_parameters()
        assert torch.equal(norm(x), y)


def test_norms_return_the_dtype_of_their_weight_and_sum_in_float32():
    x = torch.full((1, 4096), 300.0)  # squares overflow float16
    for name in NORMS:
        norm = build_norm(name, 4096, 1e-5, dtype=torch.float16)
        assert norm(x).dtype == torch.float16 and norm(x.half()).isfinite().all()


def test_norm_gradients():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for name in NORMS:
        norm = build_norm(name, 6, 1e-5, dtype=torch.float64)
        torch.autograd.gradcheck(lambda x, *p, norm=norm: norm(x), (x, *norm.parameters()))


def test_convolution_without_bias_and_reset():
    torch.manual_seed(5)
    conv = ShortConvolution(8, 3, bias=False)
    assert conv.bias is None
    torch.manual_seed(5)
    again = ShortConvolution(8, 3, bias=False, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    again.reset_parameters()
    assert torch.equal(conv.weight, again.weight)
