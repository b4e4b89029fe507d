"""Hyena's long convolution alone, and the operator around it."""

from __future__ import annotations

import math

import pytest
import torch
from contract import check_contract, check_gradients, close, states_close

from anymamba.layers.hyena import Hyena, HyenaFilter, ImplicitFilter
from anymamba.parts.state import concatenate_rows, select_rows, state_bytes

SMALL = {"max_length": 40, "emb_dim": 5, "d_filter": 6}
FILTERS = {
    "default": {},
    "learned-positions": {"learn_positions": True},
    "window": {"slow_decay": 0.9, "fast_decay": 0.2, "decay_target": 0.1, "shift": 0.05},
    "network": {"emb_dim": 3, "n_inner": 0, "w": 1.0},
}
OPERATORS = {"default": {}, "order-3": {"order": 3}, "order-4-bare": {"order": 4, "short_width": 1, "bias": False}}


def moved(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer in float64, its weights away from their initialisation."""
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def naive_filters(f: ImplicitFilter, width: int, length: int, windows=(1.5, 0.3, 0.01, 0.0)) -> torch.Tensor:
    """(n_filters, length, width), one position and one channel at a time."""
    slow, fast, target, shift = windows
    bands = (f.layers[0].weight.shape[1] - 1) // 2
    n_filters = f.output.weight.shape[0] // width
    h = torch.zeros(n_filters, length, width, dtype=torch.float64)
    for n in range(length):
        t = n / (f.max_length - 1)
        angles = [2 * math.pi * n / f.max_length * (1e-4 + (bands - 1 - 1e-4) * i / (bands - 1)) for i in range(bands)]
        x = torch.tensor([t, *map(math.cos, angles), *(-math.sin(a) for a in angles)], dtype=torch.float64)
        x = x if f.positions is None else f.positions[n]
        for layer in f.layers:
            x = torch.sin(f.frequency * (layer.weight @ x + layer.bias))
        x = f.output.weight @ x
        for c in range(width):
            part = c / (width - 1)
            rate = -math.log(target) / slow * (1 - part) - math.log(target) / fast * part
            for i in range(n_filters):
                h[i, n, c] = x[i * width + c] * (math.exp(-t * rate) + shift)
    return h


def naive_long_convolution(x: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A lower-triangular matrix per channel, row by row."""
    y = bias * x
    for t in range(x.shape[1]):
        for s in range(t + 1):
            y[:, t] = y[:, t] + h[t - s] * x[:, s]
    return y


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_the_filter_is_one_function_however_it_is_cut(options):
    torch.manual_seed(0)
    layer = moved(HyenaFilter(5, **{**SMALL, **options}))
    check_contract(layer, 5)
    check_gradients(layer, 5)


@pytest.mark.parametrize("options", OPERATORS.values(), ids=OPERATORS)
def test_the_operator_is_one_function_however_it_is_cut(options):
    torch.manual_seed(1)
    layer = moved(Hyena(5, **SMALL, **options))
    check_contract(layer, 5)
    check_gradients(layer, 5)


@torch.no_grad()
@pytest.mark.parametrize("learn_positions", [False, True])
def test_the_filter_is_its_equation(learn_positions):
    torch.manual_seed(2)
    layer = moved(HyenaFilter(4, **SMALL, learn_positions=learn_positions))
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    h = naive_filters(layer.filter, 4, 40)[0]
    close(layer(x)[0], naive_long_convolution(x, h, layer.filter.bias[0]), "HyenaFilter", 1e-11)


@torch.no_grad()
def test_the_options_of_the_window():
    torch.manual_seed(3)
    windows = (0.9, 0.2, 0.1, 0.05)
    names = ("slow_decay", "fast_decay", "decay_target", "shift")
    f = moved(ImplicitFilter(4, 2, **SMALL, n_inner=1, **dict(zip(names, windows, strict=True))))
    close(f(33).transpose(1, 2), naive_filters(f, 4, 33, windows), "the filters", 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("order", [2, 4])
def test_the_operator_is_its_equation(order):
    torch.manual_seed(4)
    d, length = 3, 11
    layer = moved(Hyena(d, order=order, **SMALL))
    x = torch.randn(2, length, d, dtype=torch.float64)
    u = x @ layer.in_proj.weight.T + layer.in_proj.bias
    short = torch.zeros_like(u) + layer.conv.bias
    for t in range(length):
        for lag in range(min(3, t + 1)):
            short[:, t] += layer.conv.weight[:, 2 - lag] * u[:, t - lag]
    parts = [short[..., i * d : (i + 1) * d] for i in range(order + 1)]
    v, filters = parts[order], naive_filters(layer.filter, d, length)
    for i in range(order - 1):
        v = naive_long_convolution(v * parts[order - 1 - i], filters[i], layer.filter.bias[i])
    expected = (v * parts[0]) @ layer.out_proj.weight.T + layer.out_proj.bias
    close(layer(x)[0], expected, f"Hyena of order {order}", 1e-11)


def test_initialisation():
    torch.manual_seed(5)
    f = HyenaFilter(512).filter
    assert (f.max_length, f.emb_dim) == (2048, 33)
    assert [tuple(layer.weight.shape) for layer in f.layers] == [(64, 33), (64, 64), (64, 64)]
    assert f.output.bias is None and tuple(f.output.weight.shape) == (512, 64)
    assert (f.frequency == 14).all() and f.frequency.shape == (64,)
    assert abs(f.bias.mean()) < 0.2 and abs(f.bias.std() - 1) < 0.1
    assert f.layers[1].weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    learned = HyenaFilter(4, learn_positions=True, w=10.0).filter
    close(learned.positions, learned._features(learned.max_length, torch.float64).float(), "positions", 0.0)
    assert (learned.frequency == 10).all()


def test_reset_draws_everything_anew():
    for build in (
        lambda **like: HyenaFilter(4, **SMALL, learn_positions=True, **like),
        lambda **like: Hyena(4, **SMALL, order=3, learn_positions=True, **like),
    ):
        torch.manual_seed(6)
        expected = build()
        empty = build(device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for parameter in empty.parameters():
                parameter.fill_(math.nan)
        torch.manual_seed(6)
        empty.reset_parameters()
        for (name, a), b in zip(empty.named_parameters(), expected.parameters(), strict=True):
            close(a, b, name, 0.0)


def test_the_published_size_of_two_layers_with_learned_positions():
    """69M parameters in two layers of the induction-heads model: nearly all are positions."""
    layers = [Hyena(128, max_length=2**20, learn_positions=True, device="meta") for _ in range(2)]
    assert sum(layer.filter.positions.numel() for layer in layers) == 2 * 33 * 2**20
    assert round(sum(p.numel() for layer in layers for p in layer.parameters()) / 1e6) == 69


@torch.no_grad()
def test_a_sequence_can_have_max_length_tokens_and_no_more():
    torch.manual_seed(7)
    for layer in (moved(HyenaFilter(3, **SMALL)), moved(Hyena(3, **SMALL, order=3))):
        x = torch.randn(2, 41, 3, dtype=torch.float64)
        _, full = layer(x[:, :40])
        for beyond in (lambda: layer(x), lambda: layer(x[:, :1], full), lambda: layer.step(x[:, 0], full)):  # noqa: B023
            with pytest.raises(
                ValueError, match=r"max_length = 40 positions, got a sequence of 41; build .* at least 41"
            ):
                beyond()


@torch.no_grad()
def test_the_tokens_count_and_not_the_slots():
    """A short row taken from a batch with a long one, and rows with padding, may still grow to max_length."""
    torch.manual_seed(8)
    layer = moved(Hyena(3, **SMALL))
    x = torch.randn(1, 40, 3, dtype=torch.float64)
    whole, _ = layer(x)
    _, long = layer(torch.randn(1, 35, 3, dtype=torch.float64))
    _, short = layer(x[:, :2])
    short = select_rows(concatenate_rows([long, short]), torch.tensor([1]))
    y, _ = layer(x[:, 2:12], short)
    close(y, whole[:, 2:12], "35 slots, 2 of them filled, and 10 tokens", 1e-11)
    mask = torch.tensor([[True] * 30 + [False] * 40])
    padded = torch.cat([x[:, 2:32], torch.full((1, 40, 3), math.nan, dtype=torch.float64)], 1)
    y, state = layer(padded, short, attention_mask=mask)
    close(y[:, :30], whole[:, 2:32], "behind the padding", 1e-11)
    assert state.filters[0].inputs.shape == (1, 32, 3)
    y, state = layer(x[:, 32:39], state)
    close(y, whole[:, 32:39], "going on", 1e-11)
    y, _ = layer.step(x[:, 39], state)
    close(y, whole[:, 39], "the last token", 1e-11)


@torch.no_grad()
def test_rows_without_a_token():
    torch.manual_seed(9)
    layer = moved(HyenaFilter(3, **SMALL))
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    _, state = layer(torch.full_like(x, 1e3), attention_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert state.filled.tolist() == [0, 0]
    close(layer(x, state)[0], layer(x)[0], "from nothing", 1e-12)


def test_errors_say_what_to_do():
    for options, message in (
        ({"emb_dim": 4}, "emb_dim must be odd and at least 3.*got 4"),
        ({"emb_dim": 1}, "emb_dim must be odd and at least 3.*got 1"),
        ({"n_inner": -1}, "n_inner must be at least 0, got -1"),
        ({"d_filter": 0}, "d_filter must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"fast_decay": 0.0}, "fast_decay must be positive.*got 1.5, 0.0 and 0.01"),
        ({"decay_target": 1.0}, "decay_target between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            HyenaFilter(4, **options)
    with pytest.raises(ValueError, match=r"order must be at least 2.*got 1"):
        Hyena(4, order=1)
    with pytest.raises(ValueError, match="short_width must be at least 1, got 0"):
        Hyena(4, short_width=0)
    layer = HyenaFilter(4)
    with pytest.raises(ValueError, match="a row per sequence, got 3 rows for 2"):
        layer(torch.randn(2, 5, 4), layer.init_state(3))


@torch.no_grad()
def test_the_state_is_all_inputs_and_the_short_convolution():
    layer = Hyena(8, order=3, max_length=64)
    for batch, length in ((1, 0), (2, 10), (3, 64)):
        _, state = layer(torch.randn(batch, length, 8))
        assert state_bytes(state) == batch * (4 * 2 * 4 * 8 + 2 * (4 * length * 8 + 8))
    _, state = HyenaFilter(8, max_length=64)(torch.randn(2, 10, 8))
    assert state_bytes(state) == 2 * (4 * 10 * 8 + 8)


@torch.no_grad()
@pytest.mark.parametrize("kind", [HyenaFilter, Hyena])
def test_bfloat16_keeps_the_filter_wide(kind):
    torch.manual_seed(10)
    layer = kind(16, max_length=64, dtype=torch.bfloat16)
    assert kind is HyenaFilter or layer.in_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in layer.filter.parameters()} == {torch.float32}
    x = torch.randn(2, 50, 16).bfloat16()
    y, state = layer(x)
    step, state = layer.step(x[:, 0], state)
    fresh = layer.init_state(2, torch.bfloat16)
    assert y.dtype == step.dtype == torch.bfloat16
    wide = layer.float()
    expected, after = wide(x.float())
    close(y.float(), expected, "bfloat16", 0.02)
    close(step.float(), wide.step(x[:, 0].float(), after)[0], "a step in bfloat16", 0.02)
    close(layer.to(torch.bfloat16)(x, fresh)[0].float(), expected, "from init_state", 0.02)


@torch.no_grad()
def test_autocast_leaves_the_filter_alone():
    f = ImplicitFilter(4, max_length=4096)
    expected = f(4096)
    with torch.autocast("cpu", torch.bfloat16):
        close(f(4096), expected, "the filter under autocast", 0.0)


@torch.no_grad()
def test_a_float32_filter_is_that_of_float64_at_every_length():
    torch.manual_seed(11)
    f = ImplicitFilter(16, max_length=1024)
    whole = f(1024)
    exact = ImplicitFilter(16, max_length=1024).double()
    exact.load_state_dict({name: p.double() for name, p in f.state_dict().items()})
    assert whole.dtype == torch.float32
    close(whole.double(), exact(1024), "float64", 1e-6)
    for length in (1, 5, 100, 999):
        close(f(length), whole[..., :length], f"length {length}", 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", [HyenaFilter, Hyena])
def test_float32_modes_agree_over_a_long_sequence(kind):
    torch.manual_seed(12)
    layer, x = kind(4), torch.randn(1, 300, 4) + 0.5
    whole, last = layer(x)
    first, state = layer(x[:, :133])
    second, after = layer(x[:, 133:], state)
    close(torch.cat([first, second], 1), whole, "two pieces", 6e-7)
    states_close(after, last, "two pieces", 6e-7)
    stepped, state = [], layer.init_state(1)
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        stepped.append(y)
    close(torch.stack(stepped, 1), whole, "steps", 6e-7)
    states_close(state, last, "steps", 6e-7)
