"""Attention: the equation with explicit loops, the contract, the cache as a value, positions, windows, precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contract import check_contract, check_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anymamba.layers import attention
from anymamba.layers.attention import Attention, AttentionState
from anymamba.parts.rotary import rotate, xpos_scale
from anymamba.parts.state import concatenate_rows, map_state, select_rows, state_bytes, where_rows

WIDTH = 12
OPTIONS = {
    "none": {},
    "rotary": {"positions": "rotary"},
    "xpos": {"positions": "xpos", "bias": True},
    "grouped": {"positions": "rotary", "n_heads": 6, "n_kv_heads": 2, "d_head": 4},
    "grouped-xpos-window": {"positions": "xpos", "n_heads": 6, "n_kv_heads": 2, "d_head": 4, "window": 4},
    "conv": {"positions": "rotary", "d_conv": 4},
    "conv-1": {"d_conv": 1},
    "window": {"positions": "rotary", "window": 3},
    "window-1": {"window": 1},
    "window-conv": {"window": 5, "d_conv": 3, "rotary_base": 100.0, "positions": "rotary"},
}


def make(seed: int = 0, **options) -> Attention:
    """A float64 layer moved away from its initialisation."""
    torch.manual_seed(seed)
    arguments = {"d_model": WIDTH, "n_heads": 3, "dtype": torch.float64, **options}
    layer = Attention(arguments.pop("d_model"), arguments.pop("n_heads"), **arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """The same with masks that a few queries share, so that short tests have several of them."""
    if request.param == "blocks":
        monkeypatch.setattr(attention, "MOST_QUERIES", 5)


@torch.no_grad()
def naive(layer: Attention, x: Tensor) -> Tensor:
    """One row (length, d_model): every query with every key, one number at a time."""
    length, d = x.shape[0], layer.d_head
    qkv = x @ layer.in_proj.weight.T
    if layer.in_proj.bias is not None:
        qkv = qkv + layer.in_proj.bias
    if layer.conv is not None:
        weight, width = layer.conv.weight, layer.conv.weight.shape[1]
        rows = [
            layer.conv.bias + sum(weight[:, width - 1 - i] * qkv[t - i] for i in range(width) if i <= t)
            for t in range(length)
        ]
        qkv = torch.stack(rows) if rows else qkv
    heads = qkv.view(length, -1, d)
    group = layer.n_heads // layer.n_kv_heads
    y = torch.zeros(length, layer.n_heads, d, dtype=x.dtype)
    for h in range(layer.n_heads):
        kv = layer.n_heads + h // group
        for t in range(length):
            first = 0 if layer.window is None else max(0, t - layer.window + 1)
            scores = [score(layer, heads[t, h], heads[s, kv], t, s) / math.sqrt(d) for s in range(first, t + 1)]
            weights = torch.tensor(scores, dtype=x.dtype).softmax(0)
            for weight_, s in zip(weights, range(first, t + 1), strict=True):
                y[t, h] += weight_ * heads[s, kv + layer.n_kv_heads]
    y = y.flatten(1) @ layer.out_proj.weight.T
    return y if layer.out_proj.bias is None else y + layer.out_proj.bias


def score(layer: Attention, q: Tensor, k: Tensor, t: int, s: int) -> float:
    """q . k; with positions the real part of a sum over complex pairs, turned and faded by the distance."""
    if layer.positions == "none":
        return float(q @ k)
    half = layer.d_head // 2
    total = 0.0
    for i in range(half):
        a, b = complex(q[i], q[i + half]), complex(k[i], k[i + half])
        angle = (t - s) * layer.rotary_base ** (-i / half)
        fade = ((i / half + 0.4) / 1.4) ** ((t - s) / 512) if layer.positions == "xpos" else 1.0
        total += fade * (a * b.conjugate() * complex(math.cos(angle), math.sin(angle))).real
    return total


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_equation(name, blocks):
    layer = make(**OPTIONS[name])
    for length in (1, 11):
        x = torch.randn(1, length, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            y, _ = layer(x)
        expected = naive(layer, x[0])[None]
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_contract(name):
    check_contract(make(**OPTIONS[name]), WIDTH)


@pytest.mark.parametrize("name", ["rotary", "grouped-xpos-window"])
def test_contract_in_blocks(name, monkeypatch):
    monkeypatch.setattr(attention, "MOST_QUERIES", 5)
    check_contract(make(**OPTIONS[name]), WIDTH, lengths=(1, 13))


@pytest.mark.parametrize("name", ["conv", "window", "grouped-xpos-window"])
def test_contract_with_gradients_recorded(name):
    """Caches are concatenated there, not written in place."""
    check_contract.__wrapped__(make(**OPTIONS[name]), WIDTH, lengths=(7,))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name):
    check_gradients(make(**OPTIONS[name]), WIDTH)


@torch.no_grad()
def stepped(layer: Attention, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def snapshot(state: AttentionState) -> AttentionState:
    return map_state(Tensor.clone, state)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", ["window-conv", "grouped"])
def test_a_state_that_is_stepped_from_twice_gives_each_time_what_a_copy_gives(name, uneven, inference):
    layer = make(**OPTIONS[name])
    with torch.inference_mode(inference), torch.no_grad():
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[1, 4:] = not uneven
        _, state = layer(torch.randn(2, 6, WIDTH, dtype=torch.float64), attention_mask=mask)
        _, state = stepped(layer, torch.randn(2, 3, WIDTH, dtype=torch.float64), state)
        kept = snapshot(state)
        futures = torch.randn(3, 2, 7, WIDTH, dtype=torch.float64)
        expected = [stepped(layer, x, snapshot(kept))[0] for x in futures]
        # fork: three futures of one state, advanced in turn, so that each meets what the others wrote
        states, outputs = [state] * 3, [[], [], []]
        for t in range(7):
            for i in range(3):
                y, states[i] = layer.step(futures[i][:, t], states[i])
                outputs[i].append(y)
        for i in range(3):
            torch.testing.assert_close(torch.stack(outputs[i], 1), expected[i], rtol=1e-12, atol=1e-12)
        # rollback: the state is still what it was
        y, _ = stepped(layer, futures[1], state)
        torch.testing.assert_close(y, expected[1], rtol=1e-12, atol=1e-12)
        y, _ = layer(futures[2], copy.deepcopy(state) if not inference else state)
        torch.testing.assert_close(y, expected[2], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rotary", "window"])
def test_rows_are_reordered_repeated_dropped_and_joined(name):
    layer = make(**OPTIONS[name])
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    _, state = stepped(layer, x, layer.init_state(3))
    more = torch.randn(4, 4, WIDTH, dtype=torch.float64)
    index = torch.tensor([2, 0, 0, 1])
    y, _ = stepped(layer, more, select_rows(state, index))
    expected, _ = layer(torch.cat([x[index], more], 1))
    torch.testing.assert_close(y, expected[:, 5:], rtol=1e-12, atol=1e-12)
    _, longer = stepped(layer, more[:1], layer.init_state(1))
    _, longer = stepped(layer, more[1:2], longer)
    y, after = stepped(layer, more, concatenate_rows([state, longer]))
    expected, _ = layer(torch.cat([more[0], more[1], more[3]])[None])
    torch.testing.assert_close(y[3:], expected[:, 8:], rtol=1e-12, atol=1e-12)
    fresh = where_rows(torch.tensor([True, False, True, True]), after, layer.init_state(4))
    y, _ = stepped(layer, more, fresh)
    torch.testing.assert_close(y[1:2], layer(more[1:2])[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rotary", "window"])
def test_tokens_are_appended_in_place_and_only_by_the_newest_state(name):
    layer = make(**OPTIONS[name])
    _, state = stepped(layer, torch.randn(1, 4, WIDTH, dtype=torch.float64), layer.init_state(1))
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    _, first = layer.step(x, state)
    _, second = layer.step(x, state)
    storage = [s.keys.untyped_storage().data_ptr() for s in (state, first, second)]
    assert storage[0] == storage[1] != storage[2]
    moved, before = 0, first
    for _ in range(120):
        _, after = layer.step(x, before)
        moved += after.keys.untyped_storage().data_ptr() != before.keys.untyped_storage().data_ptr()
        before = after
    assert moved <= 4  # each half as long again, or 32 tokens on


def test_a_graph_is_not_written_into():
    """The graph of a step has saved keys that later steps append to."""
    layer = make(positions="rotary")
    layer.in_proj.requires_grad_(False)
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        _, state = stepped(layer, x, layer.init_state(1))
    x.requires_grad_()
    y, after = layer.step(x[:, 0], state)
    with torch.no_grad():
        for newest in (state, after):
            stepped(layer, x, newest)
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_a_state_of_inference_mode_goes_on_outside_it():
    layer = make(positions="rotary")
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        _, state = stepped(layer, x, layer.init_state(1))
    y, _ = stepped(layer, x, state)
    expected, _ = layer(torch.cat([x, x], 1))
    torch.testing.assert_close(y, expected[:, 6:].detach(), rtol=1e-12, atol=1e-12)


def test_state_sizes():
    layer = Attention(16, 4, n_kv_heads=2, d_conv=3, window=5)
    _, state = layer(torch.randn(2, 9, 16))
    assert state.keys.shape == state.values.shape == (2, 2, 4, 4)
    assert state.conv.shape == (2, 2, 32)
    assert state.n_seen.tolist() == [9, 9]
    layer = Attention(16, 4, n_kv_heads=2)
    _, state = layer(torch.randn(2, 9, 16))
    assert state_bytes(state) == 2 * (9 * 2 * 2 * 4 * 4 + 8)  # per row: 2 n_kv_heads d_head floats a token, and a count
    assert state_bytes(layer.init_state(3)) == 3 * 8
    assert layer.init_state(1, torch.bfloat16).keys.dtype == torch.bfloat16


def test_padding_is_not_cached_beyond_the_longest_row():
    layer = Attention(16, 4)
    mask = torch.tensor([[True] * 3 + [False] * 5, [True] * 6 + [False] * 2])
    _, state = layer(torch.randn(2, 8, 16), attention_mask=mask)
    assert state.keys.shape[2] == 6 and state.n_seen.tolist() == [3, 6]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["none", "rotary", "xpos"])
@pytest.mark.parametrize("window", [None, 6])
def test_bfloat16_is_near_float32(positions, window):
    torch.manual_seed(0)
    layer = Attention(32, 4, positions=positions, window=window, d_conv=4)
    x = torch.randn(2, 40, 32)
    y, _ = layer(x)
    narrow = layer.to(torch.bfloat16)
    whole, state = narrow(x.bfloat16())
    assert whole.dtype == state.keys.dtype == torch.bfloat16
    assert (whole.float() - y).abs().max() < 0.03 * y.abs().max()
    step, state = narrow.step(x[:, 0].bfloat16(), state)
    assert step.dtype == state.keys.dtype == torch.bfloat16


class HostTensors(TorchDispatchMode):
    """Counts tensors that are made from Python's numbers; a CUDA graph cannot copy them to the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", ["none", "rotary", "xpos"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_training_step_can_be_recorded(positions, window):
    layer, x = Attention(16, 2, positions=positions, window=window), torch.randn(2, 9, 16)
    with HostTensors() as made:
        torch.tensor(1)
        assert made.count == 1
        layer(x)[0].sum().backward()
    assert made.count == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_xpos_is_stable_in_long_sequences(dtype):
    """2^14 tokens and beyond what an absolute scale could hold: float32 and float16 against float64."""
    torch.manual_seed(0)
    layer = Attention(4, 1, positions="xpos", dtype=torch.float64)
    before = 40_000
    state = layer.init_state(1)._replace(
        keys=torch.randn(1, 1, before, 4, dtype=torch.float64),
        values=torch.randn(1, 1, before, 4, dtype=torch.float64),
        n_seen=torch.tensor([before]),
    )
    x = torch.randn(1, 3000, 4, dtype=torch.float64)
    narrow = copy.deepcopy(layer).to(dtype)
    given = map_state(lambda t: t.to(dtype) if t.is_floating_point() else t, state)
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float32 else 5e-3}
    whole, _ = layer(x)
    torch.testing.assert_close(narrow(x.to(dtype))[0].double(), whole, **tolerance)
    expected, _ = layer(x[:, :50], state)
    torch.testing.assert_close(narrow(x[:, :50].to(dtype), given)[0].double(), expected, **tolerance)
    expected, _ = layer.step(x[:, 0], state)
    torch.testing.assert_close(narrow.step(x[:, 0].to(dtype), given)[0].double(), expected, **tolerance)


def test_rotation_is_a_complex_product_and_depends_on_the_distance_alone():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 7, 100], [3, -4, 5, 2**20, 7]])
    turned = torch.complex(*rotate(x, positions, 50.0).chunk(2, -1))
    angle = positions[..., None] * 50.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)
    near = rotate(x.float(), positions)
    far = rotate(x.float(), positions + 2**20)
    torch.testing.assert_close((near[:, 0] * near[:, 2]).sum(-1), (far[:, 0] * far[:, 2]).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(x, positions[:1]), rotate(x, positions[:1].expand(2, -1)), rtol=0, atol=0)


def test_xpos_scale_is_a_power():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    y = xpos_scale(x, torch.tensor([[0, 512, -1024]]))
    zeta = torch.tensor([0.4 / 1.4, 0.9 / 1.4] * 2, dtype=torch.float64)
    expected = x * torch.stack([zeta**0, zeta, zeta**-2])[None, :, None]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_initialisation_is_that_of_linear_maps():
    torch.manual_seed(0)
    layer = Attention(64, 4, bias=True, d_conv=4)
    for projection in (layer.in_proj, layer.out_proj):
        bound = 64**-0.5
        assert 0.95 * bound < projection.weight.abs().max() <= bound
        assert projection.bias.abs().max() <= bound
    before = [p.clone() for p in layer.parameters()]
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert Attention(64, 4).in_proj.bias is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_heads": 5}, "d_model must be a multiple of n_heads, got 12 and 5; change either or give d_head"),
        ({"n_heads": 3, "n_kv_heads": 2}, "n_heads must be a multiple of n_kv_heads, got 3 and 2"),
        ({"n_heads": 0}, "n_heads must be at least 1, got 0"),
        ({"n_heads": 3, "window": 0}, "window must be at least 1, got 0"),
        ({"n_heads": 3, "d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"n_heads": 3, "positions": "absolute"}, "positions must be one of none, rotary, xpos, got 'absolute'"),
        ({"n_heads": 4, "positions": "rotary"}, "rotary positions need an even d_head, got 3"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(12, **arguments)


def test_rotary_needs_pairs():
    for function in (rotate, xpos_scale):
        with pytest.raises(ValueError, match="d_head must be even, got 3"):
            function(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, dtype=torch.int64))
