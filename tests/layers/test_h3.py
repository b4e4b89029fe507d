"""H3 around several maps of sequences: an average written here, Hyena's filter, S4D, S6."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from contract import check_contract, check_gradients, close
from torch import Tensor, nn

from anymamba.layers import h3
from anymamba.layers.h3 import H3
from anymamba.layers.hyena import HyenaFilter
from anymamba.layers.s4d import S4D
from anymamba.layers.s6 import S6
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import concatenate_rows, select_rows, state_bytes, state_tensors


class AverageState(NamedTuple):
    h: Tensor


class Average(SequenceLayer):
    """h[t] = a h[t - 1] + x[t], y = h: one number of state per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.5, 0.9, width))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.decay, 0.5)

    def init_state(self, batch, dtype=None):
        return AverageState(torch.zeros(batch, len(self.decay), dtype=dtype or self.decay.dtype))

    def run(self, x, state, rows):
        h = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state.h
        y = []
        for t in range(x.shape[1]):
            new = self.decay * h + x[:, t]
            h = new if rows is None else torch.where(rows.mask[:, t, None], new, h)
            y.append(h)
        return (torch.stack(y, 1) if y else x), AverageState(h)


INNER = {
    "average": Average,
    "hyena": lambda width: HyenaFilter(width, max_length=40, emb_dim=3, d_filter=4),
    "s4d": lambda width: S4D(width, 4),
    "s6": lambda width: S6(width, 3),
}
OPTIONS = {
    "default": {"d_shift": 5},
    "heads": {"d_head": 2, "d_shift": 3},
    "one-head-bare": {"d_head": 4, "d_shift": 1, "bias": False},
    "long-shift": {"d_shift": 64},
}


def moved(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer in float64, its weights away from their initialisation."""
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def build(d_model: int, inner: str, **options) -> H3:
    return moved(H3(d_model, INNER[inner](d_model // options.get("d_head", 1)), **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_h3_is_one_function_however_it_is_cut(options):
    torch.manual_seed(0)
    layer = build(4, "average", **options)
    check_contract(layer, 4, lengths=(1, 2, 7, 11))
    check_gradients(layer, 4)


@pytest.mark.parametrize("inner", ["hyena", "s4d", "s6"])
def test_so_it_is_around_other_layers(inner):
    torch.manual_seed(1)
    layer = build(4, inner, d_head=2, d_shift=4)
    check_contract(layer, 4, lengths=(1, 7))
    check_gradients(layer, 4)


@torch.no_grad()
@pytest.mark.parametrize("d_head", [1, 2, 6])
def test_h3_is_its_equation(d_head):
    torch.manual_seed(2)
    d, length, d_shift = 6, 9, 4
    layer = build(d, "average", d_head=d_head, d_shift=d_shift)
    x = torch.randn(2, length, d, dtype=torch.float64)
    q, k, v = (x @ layer.in_proj.weight.T + layer.in_proj.bias).split(d, -1)
    shifted = layer.shift.D * k
    for t in range(length):
        for lag in range(min(d_shift, t + 1)):
            shifted[:, t] += layer.shift.C[:, d_shift - 1 - lag] * k[:, t - lag]
    y = torch.zeros_like(x)
    for head in range(d // d_head):
        for i in range(head * d_head, (head + 1) * d_head):
            for j in range(head * d_head, (head + 1) * d_head):
                h = torch.zeros(2, dtype=torch.float64)
                for t in range(length):
                    h = layer.inner.decay[head] * h + shifted[:, t, i] * v[:, t, j]
                    y[:, t, j] += q[:, t, i] * h
    close(layer(x)[0], y @ layer.out_proj.weight.T + layer.out_proj.bias, f"heads of {d_head}", 1e-12)


@torch.no_grad()
def test_one_channel_per_head_is_the_elementwise_product_around_any_layer():
    torch.manual_seed(3)
    layer = build(5, "s4d", d_shift=3)
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    q, k, v = layer.in_proj(x).chunk(3, -1)
    past = torch.cat([torch.zeros(2, 2, 5, dtype=torch.float64), k], 1)
    k = sum(layer.shift.C[:, i] * past[:, i : i + 8] for i in range(3)) + layer.shift.D * k
    close(layer(x)[0], layer.out_proj(q * layer.inner(k * v)[0]), "d_head = 1", 1e-12)


def test_initialisation():
    torch.manual_seed(4)
    layer = H3(256, Average(256))
    C, D = layer.shift.C.detach(), layer.shift.D.detach()
    assert C.shape == (256, 64)
    assert C.abs().max().item() == pytest.approx(1 / 8, rel=0.01) and abs(C.mean()) < 0.002
    assert abs(D.mean()) < 0.2 and abs(D.std() - 1) < 0.1
    assert layer.in_proj.bias is not None and layer.out_proj.bias is not None


def test_reset_draws_everything_anew():
    def new(**like):
        return H3(6, S6(3, **like), d_head=2, d_shift=4, **like)

    torch.manual_seed(5)
    expected = new()
    empty = new(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(5)
    empty.reset_parameters()
    for (name, a), b in zip(empty.named_parameters(), expected.parameters(), strict=True):
        close(a, b, name, 0.0)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="d_model must be a multiple of d_head, got 6 and 4; change one"):
        H3(6, Average(6), d_head=4)
    with pytest.raises(ValueError, match=r"n_heads = d_model / d_head = 3 channels, got 6; build it"):
        H3(6, S6(6), d_head=2)
    for name in ("d_model", "d_head", "d_shift"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            H3(**{"d_model": 4, "inner": Average(4), name: 0})


@torch.no_grad()
def test_the_state_has_the_batch_first():
    """(d_shift - 1) d_model inputs, and d_head^2 states of the inner layer over d_model / d_head channels."""
    layer = H3(6, Average(3), d_head=2, d_shift=5)
    for state in (layer.init_state(3), layer(torch.randn(3, 7, 6))[1]):
        assert [tuple(t.shape) for t in state_tensors(state)] == [(3, 4, 6), (3, 4, 3)]
        assert state_bytes(state) == 3 * 4 * (4 * 6 + 2 * 6)


@torch.no_grad()
def test_states_of_rows_can_be_joined_and_chosen():
    torch.manual_seed(6)
    layer = build(6, "hyena", d_head=2, d_shift=3)
    parts = [torch.randn(1, n, 6, dtype=torch.float64) for n in (9, 2)]
    alone = [layer(part)[1] for part in parts]
    both = select_rows(concatenate_rows(alone), torch.tensor([1, 0]))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    y, _ = layer(x, both)
    for i, state in enumerate(reversed(alone)):
        close(y[i : i + 1], layer(x[i : i + 1], state)[0], f"row {i}", 1e-12)


@torch.no_grad()
def test_padding_may_hold_anything():
    torch.manual_seed(7)
    layer = build(4, "s6", d_head=2, d_shift=3)
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    expected, state = layer(x[:, :5])
    x[:, 5:] = math.nan
    y, after = layer(x, attention_mask=torch.arange(9)[None] < 5)
    close(y[:, :5], expected, "outputs", 1e-12)
    for a, b in zip(state_tensors(after), state_tensors(state), strict=True):
        close(a, b, "state", 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["hyena", "s4d", "s6"])
def test_bfloat16_keeps_the_shift_wide(inner):
    torch.manual_seed(8)
    layer = H3(8, INNER[inner](4), d_head=2, d_shift=6).to(torch.bfloat16)
    assert layer.shift.C.dtype == layer.shift.D.dtype == torch.float32
    assert layer.in_proj.weight.dtype == torch.bfloat16
    x = torch.randn(2, 20, 8).bfloat16()
    y, state = layer(x)
    fresh, _ = layer(x, layer.init_state(2, torch.bfloat16))
    step, _ = layer.step(x[:, 0], state)
    assert y.dtype == fresh.dtype == step.dtype == state.shift.dtype == torch.bfloat16
    wide = layer.float()
    expected, after = wide(x.float())
    for result in (y, fresh):
        close(result.float(), expected, "bfloat16", 0.03)
    close(step.float(), wide.step(x[:, 0].float(), after)[0], "a step in bfloat16", 0.03)


@pytest.mark.parametrize("d_head", [1, 2, 3])
def test_the_order_of_memory_on_a_gpu_changes_no_number(monkeypatch, d_head):
    torch.manual_seed(0)
    layer = h3.H3(12, S4D(12 // d_head, 4), d_head=d_head, d_shift=3).double()
    x, dy = torch.randn(2, 17, 12, dtype=torch.float64, requires_grad=True), torch.randn(2, 17, 12).double()
    found, seen = [], []
    for reorders in (False, True):
        monkeypatch.setattr(h3.H3, "_reorders", lambda self, t, reorders=reorders: reorders)
        layer.inner.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        y, _ = layer(x)
        found.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), dy, allow_unused=True)))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    if d_head > 1:
        assert seen[-1].permute(2, 1, 0).is_contiguous()  # what `toeplitz.convolve` takes without a copy


@pytest.mark.parametrize("d_shift", [2, 5, 16])
def test_a_shift_by_products_is_the_shift(monkeypatch, d_shift):
    torch.manual_seed(0)
    shift = h3.ShiftSSM(3, d_shift).double()
    for length in (1, 4, 17):
        u = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
        found = []
        for served in (False, True):
            monkeypatch.setattr(h3.toeplitz, "serves_taps", lambda *given, served=served: served)
            y, last = shift(u, None)
            found.append((y, last, *torch.autograd.grad(y.square().sum(), (u, *shift.parameters()))))
        for a, b in zip(*found, strict=True):
            close(b, a, f"length {length}")
