"""Retention against its parallel form with the paper's normalisations, and against a loop over time."""

from __future__ import annotations

import math

import pytest
import torch
from contract import check_contract, check_gradients, close

from anymamba.layers import retnet
from anymamba.layers.retnet import CHUNK, Retention
from anymamba.parts.state import state_bytes

OPTIONS = {"default": {"n_heads": 2}, "narrow": {"n_heads": 3, "d_value": 9}, "one": {"n_heads": 1, "norm_eps": 1e-3}}


def layer(d_model: int = 12, **options) -> Retention:
    torch.manual_seed(0)
    module = Retention(d_model, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def turned(x: torch.Tensor) -> torch.Tensor:
    """Channel pairs (i, i + d/2) of (batch, length, d) as complex numbers, turned by t / 10000^(2i/d)."""
    first, second = x.chunk(2, dim=-1)
    d = x.shape[-1]
    rates = 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * rates
    number = torch.complex(first, second) * torch.exp(1j * angle)
    return torch.cat([number.real, number.imag], -1)


def naive(module: Retention, x: torch.Tensor, normalise_rows: bool = False) -> torch.Tensor:
    """Each head as a dense matrix over all pairs of tokens; optionally with the paper's row normalisation."""
    q, k, v, g = (x @ getattr(module, f"{name}_proj").weight.T for name in "qkvg")
    heads = []
    for h in range(module.n_heads):
        q_h, k_h, v_h = (t.chunk(module.n_heads, dim=-1)[h] for t in (q, k, v))
        gamma = 1 - 2.0 ** (-5 - h)
        length = x.shape[1]
        powers = [[gamma ** (n - m) if n >= m else 0.0 for m in range(length)] for n in range(length)]
        decay = torch.tensor(powers, dtype=torch.float64)
        scores = turned(q_h) @ (turned(k_h) / math.sqrt(module.d_head)).transpose(1, 2)
        if normalise_rows:
            scores = scores * (decay / decay.sum(1, keepdim=True).sqrt())
            scores = scores / scores.sum(-1, keepdim=True).abs().clamp(min=1)
        else:
            scores = scores * decay
        o = scores @ v_h
        heads.append(o / (o.square().mean(-1, keepdim=True) + module.norm.eps).sqrt())
    return (torch.cat(heads, -1) * (g * torch.sigmoid(g))) @ module.out_proj.weight.T


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_one_function_however_it_is_cut(options, monkeypatch):
    monkeypatch.setattr(retnet, "CHUNK", 4)  # several chunks in short sequences
    check_contract(layer(**options), 12, lengths=(1, 3, 4, 5, 13))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_it_computes_the_parallel_form(options):
    module = layer(**options)
    x = torch.randn(1, CHUNK + 7, 12, dtype=torch.float64)
    close(module(x)[0], naive(module, x), "naive", 1e-10)


@torch.no_grad()
def test_the_row_normalisation_of_the_paper_is_divided_out():
    """It changes nothing but the share of epsilon in the heads' norms."""
    module = layer(n_heads=2, norm_eps=1e-14)
    x = torch.randn(1, CHUNK + 7, 12, dtype=torch.float64)
    close(module(x)[0], naive(module, x, normalise_rows=True), "with normalised rows", 1e-8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients(options):
    check_gradients(layer(**options), 12)


def test_gradients_across_chunks():
    module = layer(n_heads=2)
    x = torch.randn(1, 2 * CHUNK + 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0][:, -1], (x,), fast_mode=True)
    (gradient,) = torch.autograd.grad(module(x)[0][:, -1].sum(), x)
    assert gradient[:, 0].abs().max() > 0


@torch.no_grad()
def test_the_state_fades_and_counts():
    """S is the fading sum of k vᵀ; each row knows its own position."""
    module = layer(n_heads=2)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    _, state = module(x, attention_mask=mask)
    assert state.position.tolist() == [9, 4]
    k, v = (x @ weight.T for weight in (module.k_proj.weight, module.v_proj.weight))
    for row, n in enumerate((9, 4)):
        for h, (k_h, v_h) in enumerate(zip(k.chunk(2, -1), v.chunk(2, -1), strict=True)):
            S = torch.zeros(6, 12, dtype=torch.float64)
            for t in range(n):
                S = (1 - 2.0 ** (-5 - h)) * S + torch.outer(turned(k_h)[row, t], v_h[row, t]) / math.sqrt(6)
            close(state.S[row, h], S, f"row {row}, head {h}", 1e-12)


def test_the_size_of_the_state():
    """4 d_model d_value / n_heads + 8 bytes a row, S in float32 also for bfloat16 activations."""
    module = Retention(12, 2, dtype=torch.bfloat16)
    for state in (module.init_state(5), module(torch.randn(5, 70, 12).bfloat16())[1]):
        assert state.S.shape == (5, 2, 6, 12) and state.S.dtype == torch.float32
        assert state_bytes(state) == 5 * (4 * 12 * 24 // 2 + 8)


@torch.no_grad()
def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    module = Retention(16, 2)
    with torch.no_grad():
        module.out_proj.weight.mul_(4)
    x = torch.randn(2, 130, 16)
    expected, _ = module(x)
    y, narrow = module.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and module.step(x[:, 0].bfloat16(), narrow)[0].dtype == torch.bfloat16
    close(y.float(), expected, "bfloat16", 0.05)


@torch.no_grad()
def test_long_sequences_neither_underflow_nor_overflow():
    """The fastest head fades to 1e-57 within 4096 tokens: float32 stays as good as float64."""
    module = layer(n_heads=2)
    x = torch.randn(1, 4096, 12, dtype=torch.float64)
    expected, _ = module(x)
    y, state = module.float()(x.float())
    assert torch.isfinite(y).all() and torch.isfinite(state.S).all()
    error = (y - expected).abs() / expected.abs().max()
    assert error.max() < 1e-3 and error.mean() < 1e-6, (error.max().item(), error.mean().item())


def test_initialisation():
    """Xavier-uniform: ±gain sqrt(6 / (inputs + outputs)), gain 2^-2.5 and 2^-1; no biases, values twice as wide."""
    module = Retention(96)
    assert module.n_heads == 4 and module.d_value == 192
    assert not [name for name, _ in module.named_parameters() if name.endswith("bias")]
    for name, gain in {"q": 2**-2.5, "k": 2**-2.5, "v": 2**-2.5, "g": 2**-2.5, "out": 0.5}.items():
        weight = getattr(module, f"{name}_proj").weight
        bound = gain * math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    before = module.q_proj.weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.q_proj.weight, before)


def test_errors():
    with pytest.raises(ValueError, match=r"d_model must be a multiple of 2 \* n_heads.*got 12 and 4 heads; change"):
        Retention(12, 4)
    with pytest.raises(ValueError, match="got 12 and 0 heads"):
        Retention(12, 0)
    with pytest.raises(ValueError, match="d_value must be a multiple of n_heads, got 7 and 2; change either"):
        Retention(12, 2, d_value=7)
