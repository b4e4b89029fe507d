"""S6 alone, and the blocks that put projections and a gate around any map of sequences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from contract import check_contract, check_gradients, close

from anymamba import Mamba
from anymamba.layers.mamba import MambaBlock
from anymamba.layers.no_gate import NoGate
from anymamba.layers.s6 import S6

OPTIONS = {
    "default": {},
    "sizes": {"d_state": 3, "dt_rank": 2},
    "zoh": {"b_discretization": "zoh"},
    "constant": {"selective_delta": False, "selective_B": False, "selective_C": False},
    "constant-B": {"selective_B": False},
    "complex": {"A_init": "s4d-lin", "b_discretization": "zoh"},
}


def moved(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer in float64, its weights away from their initialisation."""
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_s6_is_one_function_however_it_is_cut(options):
    torch.manual_seed(0)
    layer = moved(S6(10, **options))
    check_contract(layer, 10)
    check_gradients(layer, 10)


def test_s6_is_its_recurrence():
    torch.manual_seed(1)
    layer = moved(S6(6, d_state=4, dt_rank=2))
    u = torch.randn(2, 9, 6, dtype=torch.float64)
    dt, B, C = (u @ layer.x_proj.weight.T).split([2, 4, 4], -1)
    delta = F.softplus(dt @ layer.dt_proj.weight.T + layer.ssm.delta_bias)
    A, h, rows = -layer.ssm.A_log.exp(), torch.zeros(2, 6, 4, dtype=torch.float64), []
    for t in range(9):
        for channel in range(6):
            step = delta[:, t, channel, None]
            h[:, channel] = torch.exp(step * A[channel]) * h[:, channel] + step * B[:, t] * u[:, t, channel, None]
        rows.append((h * C[:, t, None]).sum(-1) + layer.ssm.D * u[:, t])
    close(layer(u)[0], torch.stack(rows, 1), "S6", 1e-12)


def test_the_mamba_block_around_s6_is_mamba():
    """One set of weights, two ways to build the layer."""
    torch.manual_seed(2)
    whole = moved(Mamba(8, d_state=5, dt_rank=3, bias=True))
    block = MambaBlock(8, lambda width: S6(width, 5, 3), bias=True).double()
    state_dict = whole.state_dict()
    inner = {f"inner.{k}": v for k, v in state_dict.items() if k.startswith(("x_proj", "dt_proj", "ssm"))}
    block.load_state_dict(inner | {k: v for k, v in state_dict.items() if k.startswith(("in_", "conv", "out_"))})
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    close(block(x)[0], whole(x)[0], "block", 1e-12)


@pytest.mark.parametrize("block", [MambaBlock, NoGate])
def test_a_block_is_one_function_however_it_is_cut(block):
    torch.manual_seed(3)
    layer = moved(block(6, lambda width: S6(width, d_state=3)))
    check_contract(layer, 6)
    check_gradients(layer, 6)


@pytest.mark.parametrize("block", [MambaBlock, NoGate])
def test_reset_parameters_draws_what_construction_draws(block):
    torch.manual_seed(4)
    layer = block(6, lambda width: S6(width, d_state=3))
    drawn = {name: p.clone() for name, p in layer.named_parameters()}
    torch.manual_seed(4)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, drawn[name]), name


def test_the_default_rank_follows_the_width():
    assert S6(33).dt_rank == math.ceil(33 / 16)


@pytest.mark.parametrize(("sizes", "message"), [({"width": 0}, "width"), ({"width": 4, "d_state": 0}, "d_state")])
def test_sizes_must_be_positive(sizes, message):
    with pytest.raises(ValueError, match=f"{message} must be at least 1, got 0"):
        S6(**sizes)


def test_a_mask_and_borders_exclude_each_other():
    x = torch.randn(1, 4, 6)
    with pytest.raises(ValueError, match="not both"):
        S6(6)(x, attention_mask=torch.ones(1, 4), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
