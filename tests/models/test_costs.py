"""Parameters, operations and state bytes against counts by hand."""

from __future__ import annotations

import pytest
import torch

from anymamba import MambaOptions, ModelConfig
from anymamba.models.costs import OperationCounter, layer_cost
from anymamba.parts.options import AttentionOptions, MLPOptions

CONFIG = ModelConfig(
    d_model=32,
    n_layers=1,
    mamba=MambaOptions(d_state=16),
    attention=AttentionOptions(n_heads=4, positions="none"),
    mlp=MLPOptions(kind="gelu", d_hidden=64, bias=False),
)


def test_an_mlp():
    cost = layer_cost("mlp", CONFIG, 10)
    assert cost.parameters == 2 * 32 * 64
    assert 2 * 2 * 32 * 64 <= cost.flops_per_token <= 2 * 2 * 32 * 64 + 20 * 64  # and what GELU takes
    assert cost.state_bytes == 0


def test_attention_grows_with_the_length():
    short, long = (layer_cost("attention", CONFIG, length) for length in (64, 256))
    assert short.parameters == 4 * 32 * 32
    assert long.flops_per_token - short.flops_per_token == pytest.approx(4 * (256 - 64) * 32, rel=0.05)
    assert long.state_bytes - short.state_bytes == pytest.approx(2 * 4 * 32 * (256 - 64), abs=64)


def test_mamba_does_not():
    short, long = (layer_cost("mamba", CONFIG, length) for length in (64, 256))
    d, n, r = 64, 16, 2
    products = 2 * (32 * 2 * d + d * (r + 2 * n) + r * d + d * 32)
    assert short.flops_per_token == pytest.approx(products + 9 * d * n + 2 * 4 * d, rel=0.02)
    assert long.flops_per_token == pytest.approx(short.flops_per_token, rel=0.02)
    assert long.state_bytes == short.state_bytes == 4 * (d * n + d * 3)


def test_fourier_transforms_of_both_kinds():
    x = torch.randn(3, 64)
    with OperationCounter() as there:
        spectrum = torch.fft.rfft(x)
    with OperationCounter() as back:
        torch.fft.irfft(spectrum, 64)
    assert there.total == back.total == 2.5 * 3 * 64 * 6
