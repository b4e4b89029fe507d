"""Linear attention against the sums of its definition, term by term."""

from __future__ import annotations

import pytest
import torch
from contract import check_contract, check_gradients, close

from anymamba.layers import linear_attention
from anymamba.layers.linear_attention import CHUNK, LinearAttention
from anymamba.parts.state import state_bytes

OPTIONS = {"default": {}, "relu": {"feature_map": "relu"}, "bias": {"bias": True}}


def layer(**options) -> LinearAttention:
    torch.manual_seed(0)
    module = LinearAttention(12, 3, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def naive(module: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """Σ_{i<=t} φ(q_t)·φ(k_i) v_i / (Σ_{i<=t} φ(q_t)·φ(k_i) + 1e-6), head by head, every pair by itself."""

    def phi(a):
        return a.clamp(min=0) if module.feature_map == "relu" else torch.where(a > 0, a + 1, a.exp())

    weight, bias = module.in_proj.weight, module.in_proj.bias
    projected = x @ weight.T + (0 if bias is None else bias)
    y = torch.zeros_like(x)
    d = module.d_head
    for h in range(module.n_heads):
        q, k, v = (projected[..., part * module.d_model + h * d :][..., :d] for part in range(3))
        for t in range(x.shape[1]):
            scores = [(phi(q[:, t]) * phi(k[:, i])).sum(-1, keepdim=True) for i in range(t + 1)]
            total = sum(score * v[:, i] for i, score in enumerate(scores))
            y[:, t, h * d : (h + 1) * d] = total / (sum(scores) + 1e-6)
    return y @ module.out_proj.weight.T + (0 if module.out_proj.bias is None else module.out_proj.bias)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_one_function_however_it_is_cut(options, monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNK", 4)  # several chunks in short sequences
    check_contract(layer(**options), 12, lengths=(1, 3, 4, 5, 13))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_it_computes_the_sums(options):
    module = layer(**options)
    x = torch.randn(1, CHUNK + 7, 12, dtype=torch.float64)
    close(module(x)[0], naive(module, x), "naive", 1e-11)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients(options):
    check_gradients(layer(**options), 12)


def test_gradients_across_chunks():
    """A loss at the end reaches the first chunk, as differences say."""
    module = layer()
    x = torch.randn(1, 2 * CHUNK + 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0][:, -1], (x,), fast_mode=True)
    (gradient,) = torch.autograd.grad(module(x)[0][:, -1].sum(), x)
    assert gradient[:, 0].abs().max() > 0


def test_the_state_is_two_sums():
    """Σ φ(k) vᵀ and Σ φ(k), in float32 also for bfloat16 activations: 4 n_heads d_head (d_head + 1) bytes a row."""
    module = LinearAttention(12, 3, dtype=torch.bfloat16)
    for state in (module.init_state(5), module(torch.randn(5, 70, 12).bfloat16())[1]):
        assert state.S.shape == (5, 3, 4, 4) and state.z.shape == (5, 3, 4)
        assert state_bytes(state) == 5 * 4 * 3 * 4 * (4 + 1)
    module = layer()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    _, k, v = (part.view(2, 9, 3, 4) for part in (x @ module.in_proj.weight.T).chunk(3, dim=-1))
    k = torch.where(k > 0, k + 1, k.exp())
    _, state = module(x)
    close(state.S, (k[..., :, None] * v[..., None, :]).sum(1), "S", 1e-12)
    close(state.z, k.sum(1), "z", 1e-12)


@torch.no_grad()
def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    module = LinearAttention(12, 3)
    x = torch.randn(2, 130, 12)
    expected, _ = module(x)
    y, narrow = module.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and module.step(x[:, 0].bfloat16(), narrow)[0].dtype == torch.bfloat16
    close(y.float(), expected, "bfloat16", 0.03)


def test_nothing_learned_of_values_that_no_query_sees():
    """relu features may all be zero: the result is zero then, not NaN."""
    module = layer(feature_map="relu")
    with torch.no_grad():
        module.in_proj.weight[: module.d_model] = 0
    y, _ = module(torch.randn(1, 5, 12, dtype=torch.float64))
    assert torch.equal(y, torch.zeros_like(y))


def test_initialisation():
    """Uniform on ±1/sqrt(d_model), no biases unless asked for, and anew by reset_parameters."""
    module = LinearAttention(64, 4)
    assert module.in_proj.bias is None and module.out_proj.bias is None
    before = module.in_proj.weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.in_proj.weight, before)
    for weight in (module.in_proj.weight, module.out_proj.weight):
        assert weight.abs().max() <= 1 / 8 and weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_errors():
    with pytest.raises(ValueError, match="d_model must be a multiple of n_heads, got 10 and 3; change either"):
        LinearAttention(10, 3)
    with pytest.raises(ValueError, match="multiple of n_heads, got 10 and 0"):
        LinearAttention(10, 0)
    with pytest.raises(ValueError, match=r"feature_map must be one of elu\+1, relu, got 'exp'"):
        LinearAttention(12, 3, feature_map="exp")
