"""S6 alone, and the blocks that put projections and a gate around any map of sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from contract import check_contract, check_gradients, check_kind_of_the_state, check_rows_of_the_state, close
from torch import Tensor

from anymamba import Mamba
from anymamba.layers.mamba import MambaBlock
from anymamba.layers.no_gate import NoGate
from anymamba.layers.s6 import S6
from anymamba.parts.sequence import SequenceLayer

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


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def naive_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise and causal, term by term; the last column of the weight is the present."""
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    width = weight.shape[1]
    for t in range(x.shape[1]):
        for lag in range(min(width, t + 1)):
            y[:, t] += weight[:, width - 1 - lag] * x[:, t - lag]
    return y


def naive_selection(layer: S6 | Mamba, u: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The step (batch, length, width) after softplus, and B and C (batch, length, width, d_state)."""
    ssm, N, at, matrices = layer.ssm, layer.d_state, 0, []
    rows = torch.empty(*u.shape[:2], 0, dtype=u.dtype) if layer.x_proj is None else linear(u, layer.x_proj)
    dt = torch.zeros_like(u)
    if layer.selective_delta:
        dt, at = rows[..., : layer.dt_rank] @ layer.dt_proj.weight.T, layer.dt_rank
    for name, selective in (("B", layer.selective_B), ("C", layer.selective_C)):
        size = 2 * N if ssm.is_complex else N
        if selective:
            M, at = rows[..., at : at + size], at + size
            M = torch.complex(M[..., :N], M[..., N:]) if ssm.is_complex else M
            M = M[:, :, None]
        else:
            M = getattr(ssm, name)
            M = torch.complex(M[..., 0], M[..., 1]) if ssm.is_complex else M
        matrices.append(M.expand(*u.shape, N))
    assert at == rows.shape[-1], "x_proj has rows that nobody reads"
    return torch.log(1 + torch.exp(dt + ssm.delta_bias)), matrices


def naive_s6(layer: S6 | Mamba, u: Tensor) -> Tensor:
    """Algorithm 2 by its recurrence, one channel at a time."""
    delta, (B, C) = naive_selection(layer, u)
    A = -torch.exp(layer.ssm.A_log)
    A = torch.complex(A, layer.ssm.A_imag) if layer.ssm.is_complex else A
    y = torch.zeros_like(u)
    for channel in range(u.shape[2]):
        h = torch.zeros(u.shape[0], layer.d_state, dtype=A.dtype)
        for t in range(u.shape[1]):
            step = delta[:, t, channel, None]
            decay = torch.exp(step * A[channel])
            drive = step if layer.b_discretization == "euler" else (decay - 1) / A[channel]
            h = decay * h + drive * B[:, t, channel] * u[:, t, channel, None]
            read = (C[:, t, channel] * h).sum(-1)
            y[:, t, channel] = (2 * read.real if A.is_complex() else read) + layer.ssm.D[channel] * u[:, t, channel]
    return y


def naive_gated(layer: Mamba | MambaBlock, x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
    """Figure 3: projections, convolution, a map, the gate."""
    u, z = linear(x, layer.in_proj).split(layer.d_inner, -1)
    u = silu(naive_convolution(u, layer.conv.weight, layer.conv.bias))
    return linear(inner(u) * silu(z), layer.out_proj)


SELECTIONS = list(itertools.product([True, False], repeat=3))
INITS = ["s4d-real", "s4d-lin", "constant", "random"]


@torch.no_grad()
@pytest.mark.parametrize("rule", ["euler", "zoh"])
@pytest.mark.parametrize("A_init", INITS)
def test_s6_is_its_recurrence(A_init, rule):
    torch.manual_seed(1)
    u = torch.randn(2, 9, 6, dtype=torch.float64)
    for selection in SELECTIONS:
        selective = dict(zip(("selective_delta", "selective_B", "selective_C"), selection, strict=True))
        layer = moved(S6(6, d_state=4, dt_rank=2, A_init=A_init, b_discretization=rule, **selective))
        close(layer(u)[0], naive_s6(layer, u), f"S6, selective {selection}", 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("biases", [(True, False), (False, True)], ids=["published", "reversed"])
@pytest.mark.parametrize("rule", ["euler", "zoh"])
@pytest.mark.parametrize("A_init", INITS)
def test_mamba_is_its_figure(A_init, rule, biases):
    torch.manual_seed(5)
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    for selection in SELECTIONS:
        selective = dict(zip(("selective_delta", "selective_B", "selective_C"), selection, strict=True))
        sizes = {"d_state": 3, "d_conv": 3, "dt_rank": 2, "conv_bias": biases[0], "bias": biases[1]}
        layer = moved(Mamba(5, **sizes, A_init=A_init, b_discretization=rule, **selective))
        expected = naive_gated(layer, x, lambda u, layer=layer: naive_s6(layer, u))
        close(layer(x)[0], expected, f"Mamba, selective {selection}", 1e-12)


class RunningSum(SequenceLayer):
    """An inner map whose output is known without it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def run(self, x, state, rows):
        return x.cumsum(1), (x.sum(1),)


@torch.no_grad()
@pytest.mark.parametrize("biases", [(True, False), (False, True)], ids=["published", "reversed"])
def test_the_mamba_block_is_its_figure_around_any_map(biases):
    torch.manual_seed(6)
    layer = moved(MambaBlock(5, RunningSum, d_conv=3, expand=1.6, conv_bias=biases[0], bias=biases[1]))
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    close(layer(x)[0], naive_gated(layer, x, lambda u: u.cumsum(1)), "MambaBlock", 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_no_gate_is_a_map_and_a_linear_mix(bias):
    torch.manual_seed(7)
    layer = moved(NoGate(5, RunningSum, bias=bias))
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    mapped = x.cumsum(1)
    mapped = mapped * (1 + torch.erf(mapped / math.sqrt(2))) / 2  # the exact GELU
    close(layer(x)[0], linear(mapped, layer.out_proj), "NoGate", 1e-12)


@torch.no_grad()
def test_mamba_refuses_states_that_do_not_fit():
    layer = moved(Mamba(6, d_state=3))
    check_rows_of_the_state(layer, 6)
    check_kind_of_the_state(layer, 6)


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


def test_a_mask_and_offsets_exclude_each_other():
    x = torch.randn(1, 4, 6)
    with pytest.raises(ValueError, match="not both"):
        S6(6)(x, attention_mask=torch.ones(1, 4), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
