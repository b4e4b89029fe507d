"""The paper's exact statements: Theorem 1, the published parameter counts, the sizes of the presets."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from anymamba import LanguageModel, Mamba, ModelConfig, preset, selective_scan
from anymamba.models.presets import MAMBA


def gated_recurrence(rule: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A scan with N = 1, A = -1, B = C = 1 and softplus, and h = (1 - g) h + g x, where g = sigmoid(gate)."""
    torch.manual_seed(0)
    x, gate = torch.randn(2, 50, 3, dtype=dtype), 3 * torch.randn(2, 50, 3, dtype=dtype)
    one = torch.ones(3, 1, dtype=dtype)
    y, _ = selective_scan(x, gate, -one, one, one, delta_softplus=True, b_discretization=rule)
    g, h, want = torch.sigmoid(gate), torch.zeros(2, 3, dtype=dtype), []
    for t in range(50):
        h = (1 - g[:, t]) * h + g[:, t] * x[:, t]
        want.append(h)
    return y, torch.stack(want, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_theorem_1_holds_under_zero_order_hold(dtype):
    y, want = gated_recurrence("zoh", dtype)
    assert (y - want).abs().max() < 8 * torch.finfo(dtype).eps


def test_theorem_1_fails_under_eulers_rule():
    y, want = gated_recurrence("euler", torch.float64)
    assert (y - want).abs().max() > 0.1


def formula(d_model: int, n_layers: int, vocab: int) -> int:
    """The number of parameters, counted by hand (one block: norm, projections, convolution, step, A, D)."""
    d_inner, d_state, rank = 2 * d_model, 16, math.ceil(d_model / 16)
    block = 2 * d_model * d_inner + 5 * d_inner + d_inner * (rank + 2 * d_state) + rank * d_inner + d_inner
    block += d_inner * d_state + d_inner + d_inner * d_model + d_model
    return n_layers * block + vocab * d_model + d_model


@pytest.mark.parametrize(
    ("d_model", "n_layers", "vocab", "published"),
    [
        (1024, 48, 50280, "371.5M"),
        (128, 12, 16, "1.40M"),
        (256, 16, 16, "7.01M"),
        (512, 24, 16, "40.69M"),
    ],
)
def test_published_parameter_counts(d_model, n_layers, vocab, published):
    digits = len(published.rstrip("M").partition(".")[2])
    model = LanguageModel(ModelConfig(d_model=d_model, n_layers=n_layers, vocab_size=vocab), device="meta")
    assert model.n_parameters() == formula(d_model, n_layers, vocab)
    assert f"{model.n_parameters() / 1e6:.{digits}f}M" == published


@pytest.mark.parametrize("vocab", [12, 50277])
def test_the_vocabulary_is_padded_to_a_multiple_of_8(vocab):
    config = ModelConfig(d_model=8, n_layers=1, vocab_size=vocab)
    assert config.padded_vocab_size == {12: 16, 50277: 50280}[vocab]


@pytest.mark.parametrize(
    ("name", "layers", "width", "millions"),
    [
        ("mamba-130m", 24, 768, 129),
        ("mamba-370m", 48, 1024, 372),
        ("mamba-790m", 48, 1536, 793),
        ("mamba-1.4b", 48, 2048, 1372),
        ("mamba-2.8b", 64, 2560, 2768),
    ],
)
def test_presets_have_the_papers_sizes(name, layers, width, millions):
    config = preset(name)
    assert (config.n_layers, config.d_model, config.dt_rank) == (layers, width, width // 16)
    assert config.mamba == type(config.mamba)(), "published models have the default options"
    assert (config.vocab_size, config.padded_vocab_size, config.tie_embeddings) == (50277, 50280, True)
    model = LanguageModel(config, device="meta")
    assert model.n_parameters() == formula(width, layers, 50280)
    assert round(model.n_parameters() / 1e6) == millions


@pytest.mark.parametrize("name", sorted(set(MAMBA) - {n for n in MAMBA if n.startswith("mamba-")}))
def test_small_presets_hold_what_the_formula_says(name):
    config = preset(name)
    model = LanguageModel(config, device="meta")
    assert model.n_parameters() == formula(config.d_model, config.n_layers, config.padded_vocab_size)


def test_presets_are_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown preset 'mamba-7b'; the presets are nano, .*mamba-130m"):
        preset("mamba-7b")


def test_layer_defaults_are_the_published_ones():
    layer, config = Mamba(768), preset("mamba-130m")
    assert (layer.d_inner, layer.d_state, layer.d_conv, layer.dt_rank) == (1536, 16, 4, 48)
    assert layer.x_proj.weight.shape == (80, 1536) and layer.dt_proj.weight.shape == (1536, 48)
    assert layer.ssm.A_log.shape == (1536, 16)
    assert (config.d_inner, config.norm, config.norm_eps, config.residual_in_fp32) == (1536, "rmsnorm", 1e-5, True)


def test_options_of_the_config_are_those_of_the_layer():
    """The names and defaults of the layer's arguments and of the config's fields agree."""
    import inspect

    signature = inspect.signature(Mamba)
    defaults = {k: p.default for k, p in signature.parameters.items() if k not in ("d_model", "device", "dtype")}
    options = type(preset("tiny").mamba)
    assert defaults == {f.name: f.default for f in dataclasses.fields(options)}
