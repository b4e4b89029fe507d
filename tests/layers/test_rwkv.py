"""RWKV-4's layers against their sums, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from contract import check_contract, check_gradients, close

from anymamba.layers import rwkv
from anymamba.layers.rwkv import CHUNK, RWKVChannelMix, RWKVTimeMix
from anymamba.parts.state import state_bytes

LAYERS = {
    "time": lambda **like: RWKVTimeMix(7, layer=1, n_layers=3, **like),
    "time-first": lambda **like: RWKVTimeMix(7, **like),
    "channel": lambda **like: RWKVChannelMix(7, layer=2, n_layers=3, **like),
    "channel-narrow": lambda **like: RWKVChannelMix(7, d_hidden=5, **like),
}


def moved(module: torch.nn.Module, size: float = 0.5) -> torch.nn.Module:
    """Away from the initialisation, which gives zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module.eval()


def mixed(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    previous = torch.zeros_like(x)
    previous[:, 1:] = x[:, :-1]
    return share * x + (1 - share) * previous


def naive_wkv(k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Every weight of every pair by itself; the largest of each sum is taken out so that exp cannot overflow."""
    outputs = []
    for t in range(k.shape[1]):
        logs = [k[:, i] - (t - 1 - i) * w for i in range(t)] + [u + k[:, t]]
        largest = torch.stack(logs).max(0).values
        weights = [torch.exp(log - largest) for log in logs]
        outputs.append(sum(a * v[:, i] for i, a in enumerate(weights)) / sum(weights))
    return torch.stack(outputs, 1)


def naive(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    r = torch.sigmoid(mixed(x, module.mix_receptance) @ module.receptance.weight.T)
    k = mixed(x, module.mix_key) @ module.key.weight.T
    if isinstance(module, RWKVChannelMix):
        return r * (k.clamp(min=0) ** 2 @ module.value.weight.T)
    v = mixed(x, module.mix_value) @ module.value.weight.T
    wkv = naive_wkv(k, v, module.wkv.time_decay.exp(), module.wkv.time_first)
    return (r * wkv) @ module.output.weight.T


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_it_is_one_function_however_it_is_cut(make, monkeypatch):
    monkeypatch.setattr(rwkv, "CHUNK", 4)  # several chunks in short sequences
    check_contract(moved(make().double()), 7, lengths=(1, 3, 4, 5, 13))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_it_computes_its_sums(make):
    module = moved(make().double())
    x = torch.randn(2, 71, 7, dtype=torch.float64)
    close(module(x)[0], naive(module, x), "naive", 1e-10)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_gradients(make):
    check_gradients(moved(make().double()), 7)


def test_gradients_across_chunks():
    """A loss at the end reaches every token and parameter as the naive sums say."""
    module = moved(RWKVTimeMix(7).double())
    with torch.no_grad():
        module.wkv.time_decay.fill_(-4)
    x = torch.randn(1, 2 * CHUNK + 3, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad(module(x)[0][:, -1].sum(), inputs)
    expected = torch.autograd.grad(naive(module, x)[:, -1].sum(), inputs)
    for a, b in zip(ours, expected, strict=True):
        close(a, b, "gradient", 1e-10)
    assert ours[0][:, 0].abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_no_key_overflows(scale):
    """Keys in the hundreds, whose exponentials float32 has not, give what float64 with the maximum taken out gives."""
    module = moved(RWKVTimeMix(7).double())
    module.key.weight.mul_(scale)
    x = torch.randn(2, 70, 7, dtype=torch.float64).float().double()
    expected = naive(module, x)
    y, state = module.float()(x.float())
    assert torch.isfinite(y).all() and torch.isfinite(state.log_weight).all()
    close(y.double(), expected, f"keys times {scale}", 5e-6 * max(1.0, scale / 10))


@torch.no_grad()
def test_float32_keeps_its_precision_over_long_sequences():
    """Decays from exp(-5) to exp(3) a step over 20,000 tokens: no positions are multiplied with them."""
    module = moved(RWKVTimeMix(9).double(), 0.1)
    module.key.weight.mul_(5)
    module.output.weight.normal_()
    x = torch.randn(1, 20_000, 9, dtype=torch.float64).float().double()
    expected, _ = module(x)
    y, _ = module.float()(x.float())
    close(y.double(), expected, "float32", 5e-6)


@torch.no_grad()
def test_the_state_is_the_average_and_its_weight():
    module = moved(RWKVTimeMix(7).double())
    x = torch.randn(2, 40, 7, dtype=torch.float64)
    _, state = module(x)
    k, v = mixed(x, module.mix_key) @ module.key.weight.T, mixed(x, module.mix_value) @ module.value.weight.T
    weights = [torch.exp(k[:, i] - (39 - i) * module.wkv.time_decay.exp()) for i in range(40)]
    close(state.log_weight, sum(weights).log(), "log weight", 1e-11)
    close(state.average, sum(a * v[:, i] for i, a in enumerate(weights)) / sum(weights), "average", 1e-11)
    assert torch.equal(state.previous, x[:, -1])


def test_the_size_of_the_state():
    """Time mix: two numbers of four bytes and one of the activations' size a channel; channel mix: the latter."""
    time, channel = RWKVTimeMix(7, dtype=torch.bfloat16), RWKVChannelMix(7, dtype=torch.bfloat16)
    x = torch.randn(5, 40, 7).bfloat16()
    for state in (time.init_state(5), time(x)[1]):
        assert state.average.dtype == state.log_weight.dtype == torch.float32
        assert state_bytes(state) == 5 * 7 * (2 * 4 + 2)
    for state in (channel.init_state(5), channel(x)[1]):
        assert state_bytes(state) == 5 * 7 * 2


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_bfloat16_is_near_float32(make):
    module = moved(make())
    x = torch.randn(2, 70, 7)
    expected, _ = module(x)
    y, narrow = module.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and module.step(x[:, 0].bfloat16(), narrow)[0].dtype == torch.bfloat16
    close(y.float(), expected, "bfloat16", 0.05)
    assert {p.dtype for name, p in module.named_parameters() if name.startswith("wkv")} <= {torch.float32}


@pytest.mark.parametrize(("layer", "n_layers"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_initialisation_of_the_time_mix(layer, n_layers):
    module = RWKVTimeMix(10, layer=layer, n_layers=n_layers)
    depth, rest = layer / (n_layers - 1) if n_layers > 1 else 0.0, 1 - layer / n_layers
    for h in range(10):
        assert module.wkv.time_decay[h].item() == pytest.approx(-5 + 8 * (h / 9) ** (0.7 + 1.3 * depth), abs=1e-5)
        assert module.wkv.time_first[h].item() == pytest.approx(math.log(0.3) + (0.0, 0.5, -0.5)[h % 3], abs=1e-5)
        assert module.mix_key[h].item() == pytest.approx((h / 10) ** rest, abs=1e-5)
        assert module.mix_value[h].item() == pytest.approx((h / 10) ** rest + 0.3 * depth, abs=1e-5)
        assert module.mix_receptance[h].item() == pytest.approx((h / 10) ** (rest / 2), abs=1e-5)
    for projection in (module.receptance, module.key, module.output):
        assert not projection.weight.any() and projection.starts_at_zero
    close(module.value.weight @ module.value.weight.T, torch.eye(10), "orthogonal", 1e-5)


def test_initialisation_of_the_channel_mix():
    module = RWKVChannelMix(10, layer=1, n_layers=4)
    assert module.d_hidden == 40
    for mix in (module.mix_key, module.mix_receptance):
        close(mix, (torch.arange(10) / 10) ** 0.75, "mix", 1e-6)
    for projection in (module.receptance, module.value):
        assert not projection.weight.any() and projection.starts_at_zero
    close(module.key.weight.T @ module.key.weight, 4 * torch.eye(10), "orthogonal", 1e-4)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_new_layer_gives_zeros_and_learns(make):
    module = make()
    y, _ = module(torch.randn(2, 9, 7))
    assert not y.any()
    (y - 1).square().sum().backward()
    last = module.output if isinstance(module, RWKVTimeMix) else module.value
    assert last.weight.grad.abs().max() > 0


def test_one_channel():
    y, _ = moved(RWKVTimeMix(1))(torch.randn(2, 5, 1))
    assert torch.isfinite(y).all()


def test_errors():
    with pytest.raises(ValueError, match="layer must be between 0 and n_layers - 1, got layer 4 of 4; layers count"):
        RWKVTimeMix(8, layer=4, n_layers=4)
    with pytest.raises(ValueError, match="got layer -1 of 4"):
        RWKVChannelMix(8, layer=-1, n_layers=4)
    with pytest.raises(ValueError, match="d_model and d_hidden must be at least 1, got 8 and 0"):
        RWKVChannelMix(8, d_hidden=0)
    with pytest.raises(ValueError, match="d_model and d_hidden must be at least 1, got 0"):
        RWKVTimeMix(0)
