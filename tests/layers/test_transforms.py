"""Every mixer under torch's transforms and tracers: the values and derivatives that eager code and differences give.

Each is seen as one function of numbers that uses it in every way there is. An input, a state and the parameters go in.
Out come what `forward` gives from the beginning, from the state with a mask, from there packed, and a step from there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from anymamba import MambaOptions, ModelConfig
from anymamba.layers.attention import Attention
from anymamba.layers.hyena import HyenaFilter
from anymamba.layers.positions import LearnedPositions
from anymamba.layers.retnet import Retention
from anymamba.layers.rwkv import RWKVTimeMix
from anymamba.models.mixers import MIXERS, build_mixer
from anymamba.parts.options import (
    AttentionOptions,
    GAUOptions,
    H3Options,
    HyenaOptions,
    LinearAttentionOptions,
    MLPOptions,
    RetentionOptions,
    S4DOptions,
    S4Options,
)
from anymamba.parts.state import map_state, state_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # torch's own, of forward over reverse mode
    pytest.mark.filterwarnings("ignore:torch.searchsorted"),  # of mapped offsets
]

WIDTH = 8

OPTIONS: dict[str, Any] = {
    "mamba": MambaOptions(d_state=3, dt_rank=2),
    "s4": S4Options(d_state=4),
    "s4d": S4DOptions(d_state=4),
    "hyena": HyenaOptions(max_length=32, emb_dim=3, d_filter=4, w=1.0),
    "h3": H3Options(d_shift=3, d_head=2),
    "attention": AttentionOptions(n_heads=2, n_kv_heads=1, d_conv=3, positions="xpos"),
    "gau": GAUOptions(d_key=4, max_distance=4),
    "linear_attention": LinearAttentionOptions(n_heads=2),
    "retention": RetentionOptions(n_heads=2),
    "mlp": MLPOptions(d_hidden=8),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small for a second one, which would only wait and take the other tests' time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixer(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(d_model=WIDTH, n_layers=2, vocab_size=20, mixers=(name,), **OPTIONS)
    return perturbed(build_mixer(name, config, 0, {}).double())


def perturbed(layer: nn.Module) -> nn.Module:
    """Weights that start at zero would hide what depends on others."""
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.add_(0.1 * drawn(*parameter.shape, seed=i))
    return layer


class Uses(nn.Module):
    """A layer used in every way; a module, for `functional_call` and tracers."""

    mask = torch.tensor([[False, False, True, True], [True, True, False, True]])
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            self.state = layer(drawn(2, 3, WIDTH, seed=3))[1]
        self.places = [i for i, t in enumerate(state_tensors(self.state)) if t.is_floating_point() or t.is_complex()]

    def forward(self, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """x: (2, 11, WIDTH); parts: the numbers of a state, complex ones as pairs."""
        mask, offsets = self.mask.to(x.device), self.offsets.to(x.device)
        whole, _ = self.layer(x[:, :3])
        padded, state = self.layer(x[:, 3:7], self.filled(parts), attention_mask=mask)
        packed, state = self.layer(x[:, 7:10].reshape(1, 6, WIDTH), state, cu_seqlens=offsets)
        step, _ = self.layer.step(x[:, 10], state)
        return whole, padded * mask[..., None], packed, step

    def filled(self, parts: Sequence[Tensor]) -> Any:
        """The state with these numbers in it."""
        tensors = list(state_tensors(self.state))
        for i, part in zip(self.places, parts, strict=True):
            tensors[i] = torch.complex(*part.unbind(-1)) if tensors[i].is_complex() else part
        given = iter(tensors)
        return map_state(lambda _: next(given), self.state)


class Case:
    """`Uses` as a function of its inputs, the state's numbers and the layer's parameters."""

    def __init__(self, layer: nn.Module) -> None:
        self.uses = Uses(layer)
        tensors = list(state_tensors(self.uses.state))
        parts = [torch.view_as_real(tensors[i]) if tensors[i].is_complex() else tensors[i] for i in self.uses.places]
        self.activations = (drawn(2, 11, WIDTH), *parts)
        named = dict(self.uses.named_parameters())
        self.names, self.parameters = list(named), tuple(p.detach() for p in named.values())
        self.inputs = (*self.activations, *self.parameters)
        self.everything = tuple(range(len(self.inputs)))
        self.directions = tuple(drawn(*t.shape, seed=7 + i) for i, t in enumerate(self.inputs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        n = len(self.activations)
        return functional_call(self.uses, dict(zip(self.names, inputs[n:], strict=True)), inputs[:n])

    def scalar(self, *inputs: Tensor) -> Tensor:
        """One number that weighs every output differently."""
        return torch.stack([(y * weights(y)).sum() for y in self(*inputs)]).sum()

    def gradient(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of the scalar in plain reverse mode."""
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(self.scalar(*leaves), leaves, materialize_grads=True)


def weights(like: Tensor) -> Tensor:
    return torch.cos(1.7 * torch.arange(like.numel(), dtype=torch.float64)).view(like.shape)


def differences(function: Callable[..., Any], inputs: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor]:
    """The derivative in a direction by central differences."""
    step = 1e-6
    above, below = (function(*(t + h * v for t, v in zip(inputs, along, strict=True))) for h in (step, -step))
    if isinstance(above, Tensor):
        above, below = (above,), (below,)
    return [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]


def close(got: Sequence[Tensor | None], wanted: Sequence[Tensor], what: str, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the values' size; None and NaN fail."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a is not None and a.shape == b.shape, f"{what}, value {i}: {a if a is None else a.shape}, {b.shape}"
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() if b.numel() else 0.0
        assert error <= tolerance, f"{what}, value {i}: differs by {error:.1e}, allowed {tolerance:.0e}"


# ------------------------------------------------------------------------------------------ derivatives


def check_forward_mode(case: Case) -> None:
    wanted = differences(case, case.inputs, case.directions)
    close(jvp(case, case.inputs, case.directions)[1], wanted, "jvp")
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), forward_ad.dual_level():
            outputs = case(*map(forward_ad.make_dual, case.inputs, case.directions))
            close([forward_ad.unpack_dual(y).tangent for y in outputs], wanted, f"dual numbers, {mode.__name__}")


def check_first_derivatives(case: Case) -> None:
    """Against plain reverse mode, and that against differences."""
    gradient = case.gradient(*case.inputs)
    close(grad(case.scalar, case.everything)(*case.inputs), gradient, "grad", 1e-9)
    along = sum((g * v).sum() for g, v in zip(gradient, case.directions, strict=True))
    close([along], differences(case.scalar, case.inputs, case.directions), "backward")

    def in_a_plane(s: Tensor) -> Tensor:
        moved = (t + s[0] * v + s[1] * g for t, v, g in zip(case.inputs, case.directions, gradient, strict=True))
        return case.scalar(*moved)[None]

    wanted = torch.stack([along, sum(g.square().sum() for g in gradient)])[None]
    for transform in (jacfwd, jacrev):
        close([transform(in_a_plane)(torch.zeros(2, dtype=torch.float64))], [wanted], transform.__name__, 1e-9)


def check_second_derivatives(case: Case) -> None:
    """In reverse mode through the graph of the first, and forwards over a function's gradient."""
    wanted = differences(case.gradient, case.inputs, case.directions)
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    grads = torch.autograd.grad(case.scalar(*leaves), leaves, create_graph=True, materialize_grads=True)
    along = torch.stack([(g * v).sum() for g, v in zip(grads, case.directions, strict=True)]).sum()
    close(torch.autograd.grad(along, leaves, materialize_grads=True), wanted, "double backward")
    close(jvp(grad(case.scalar, case.everything), case.inputs, case.directions)[1], wanted, "jvp of grad")


def check_maps(case: Case) -> None:
    """Gradients of samples, and several inputs at once without gradients and with them; the parameters are shared."""
    samples = [case.activations, tuple(0.5 * t for t in case.activations)]
    several = [torch.stack(pair) for pair in zip(*samples, strict=True)]
    n = len(several)
    found = vmap(grad(lambda p, *sample: case.scalar(*sample, *p)), (None, *[0] * n))(case.parameters, *several)
    gradients = [case.gradient(*sample, *case.parameters) for sample in samples]
    for i in range(2):
        close([g[i] for g in found], gradients[i][n:], "gradients of a sample", 1e-9)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            leaves = [t.clone().requires_grad_(mode is torch.enable_grad) for t in several]
            outputs = vmap(lambda *sample: case(*sample, *case.parameters))(*leaves)
        for i in range(2):
            close([y[i] for y in outputs], case(*samples[i], *case.parameters), f"mapped, {mode.__name__}", 1e-9)
    total = torch.stack([(y * weights(y[0])).sum() for y in outputs]).sum()
    found = torch.autograd.grad(total, leaves, materialize_grads=True)
    for i in range(2):
        close([g[i] for g in found], gradients[i][:n], "backward of a map", 1e-9)


CHECKS = (check_forward_mode, check_first_derivatives, check_second_derivatives, check_maps)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", MIXERS)
def test_derivatives(name, check):
    check(Case(mixer(name)))


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_a_map_over_masks_and_over_offsets(name):
    """Their values cannot be looked at then."""
    layer = mixer(name)
    masks = torch.stack([Uses.mask, Uses.mask.flip(1), torch.ones_like(Uses.mask)])
    offsets = torch.tensor([[0, 2, 6], [0, 4, 6], [0, 6, 6]], dtype=torch.int32)
    for function, inputs in (
        (lambda x, mask: layer(x, attention_mask=mask)[0] * mask[..., None], (drawn(3, 2, 4, WIDTH), masks)),
        (lambda x, offsets: layer(x, cu_seqlens=offsets)[0], (drawn(3, 1, 6, WIDTH), offsets)),
    ):
        wanted = [function(*(t[i] for t in inputs)) for i in range(3)]
        close(vmap(function)(*inputs), wanted, "mapped", 1e-9)


# ------------------------------------------------------------------------------------------ tracers


def check_functionalize(case: Case) -> None:
    close(functionalize(case)(*case.inputs), case(*case.inputs), "functionalize", 1e-12)


def check_make_fx(case: Case) -> None:
    others = tuple(t + 0.1 for t in case.inputs)
    close(make_fx(case)(*case.inputs)(*others), case(*others), "make_fx", 1e-9)


def check_jit_trace(case: Case) -> None:
    others = tuple(t + 0.1 for t in case.activations)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sizes become constants, and that torch.jit is old
            checked = mode is torch.enable_grad  # which traces twice
            traced = torch.jit.trace(case.uses, case.activations, check_trace=checked)
            close([y.detach() for y in traced(*others)], case(*others, *case.parameters), f"jit, {mode.__name__}", 1e-9)


def check_fake_tensors(case: Case) -> None:
    shapes = [y.shape for y in case(*case.inputs)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t).requires_grad_() for t in case.inputs]
        with torch.no_grad():
            assert [y.shape for y in case(*fakes)] == shapes
        grads = torch.autograd.grad(case.scalar(*fakes), fakes, materialize_grads=True)
        assert [g.shape for g in grads] == [t.shape for t in fakes]


def check_meta_device(case: Case) -> None:
    shapes = [y.shape for y in case(*case.inputs)]
    uses = copy.deepcopy(case.uses).to("meta")
    uses.state = map_state(lambda t: t.to("meta"), uses.state)
    activations = [t.to("meta") for t in case.activations]
    with torch.no_grad():
        assert [(y.shape, y.device.type) for y in uses(*activations)] == [(shape, "meta") for shape in shapes]
    torch.stack([y.sum() for y in uses(*activations)]).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in uses.parameters())


TRACERS = (check_functionalize, check_make_fx, check_jit_trace, check_fake_tensors, check_meta_device)


@pytest.mark.parametrize("check", TRACERS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", MIXERS)
def test_tracers(name, check):
    check(Case(mixer(name)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention", "gau", "hyena", "rwkv"])
def test_one_graph_with_a_mask_and_with_offsets(name):
    layer = mixer(name)
    state = layer(drawn(2, 3, WIDTH))[1]
    for x, options in (
        (drawn(2, 4, WIDTH), {"attention_mask": Uses.mask}),
        (drawn(1, 6, WIDTH), {"cu_seqlens": Uses.offsets}),
    ):
        torch._dynamo.reset()
        y, after = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, state, **options)
        wanted, wanted_after = layer(x, state, **options)
        real = options.get("attention_mask", torch.ones(1, 6))[..., None]
        probe = drawn(2, WIDTH)
        close([y * real, layer.step(probe, after)[0]], [wanted * real, layer.step(probe, wanted_after)[0]], name, 1e-9)


# ------------------------------------------------------------------------------------------ what is special to some

LONG: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "chunks of RWKV": (lambda: RWKVTimeMix(4), 35),
    "chunks of retention": (lambda: Retention(4, 1), 67),
    "a window": (lambda: Attention(4, 2, window=3, positions="rotary"), 7),
}


@pytest.mark.parametrize("name", LONG)
def test_derivatives_of_long_sequences(name):
    build, length = LONG[name]
    layer = perturbed(build().double())
    x, v = drawn(1, length, 4), drawn(1, length, 4, seed=2)

    def scalar(x: Tensor) -> Tensor:
        y, _ = layer(x)
        return (y * weights(y)).sum()

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(scalar(leaf := x.clone().requires_grad_()), leaf)[0]

    close([jvp(scalar, (x,), (v,))[1]], differences(scalar, (x,), (v,)), "jvp")
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
    wanted = differences(gradient, (x,), (v,))
    close(torch.autograd.grad((first * v).sum(), leaf), wanted, "double backward")
    close([jvp(grad(scalar), (x,), (v,))[1]], wanted, "jvp of grad")


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention", "gau"])
def test_a_cache_with_room_is_not_written_into(name):
    """What transforms and tracers append stays theirs: the state is stepped from as before."""
    layer, x = mixer(name).requires_grad_(False), drawn(2, WIDTH)
    state = layer.step(x, layer(drawn(2, 3, WIDTH))[1])[1]
    assert state.cache is not None, "there is no room, and the test proves nothing"
    before = [t.clone() for t in state_tensors(state)]
    wanted = layer.step(x, copy.deepcopy(state))[0]

    def step(x: Tensor) -> Tensor:
        return layer.step(x, state)[0]

    def dual(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(step(forward_ad.make_dual(x, x))).primal

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(step, x)
    several = x[None].repeat(2, 1, 1)
    results = [vmap(step)(several)[0], jvp(step, (x,), (x,))[0], dual(x), make_fx(step)(x)(x), traced(x), step(x)]
    close(results, [wanted] * len(results), "a step", 1e-12)
    close(list(state_tensors(state)), before, "the state", 0.0)
    another = vmap(step)(torch.stack([x, -x]))
    close([another[1]], [step(-x)], "another token", 1e-12)


@torch.no_grad()
def test_tokens_past_the_end_of_hyenas_filter():
    """Refused where their number is known, NaN where it is not; padding never counts."""
    layer = HyenaFilter(2, max_length=4, emb_dim=3, d_filter=4).double()
    x = drawn(1, 6, 2)
    refused = r"the filter is defined on max_length = 4 positions, got a sequence of 6"
    for mask in (None, torch.ones(1, 6, dtype=torch.bool)):
        with pytest.raises(ValueError, match=refused):
            layer(x, attention_mask=mask)
    with pytest.raises(ValueError, match=refused):
        vmap(lambda x: layer(x)[0])(x[None])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    wanted = layer(x, attention_mask=mask)[0][:, 2:]
    close([vmap(lambda x: layer(x, attention_mask=mask)[0])(x[None])[0][:, 2:]], [wanted], "padded", 1e-12)
    mask[0, 1] = 1
    late = vmap(lambda x: layer(x, attention_mask=mask)[0])(x[None])[0, 0]
    assert late[1:5].isfinite().all() and late[5].isnan().all()


def test_absolute_positions():
    for check in (check_forward_mode, check_first_derivatives, check_maps, *TRACERS):  # linear: no second derivative
        check(Case(LearnedPositions(20, WIDTH).double()))
    layer = LearnedPositions(4, WIDTH)
    state = layer(torch.zeros(1, 3, WIDTH))[1]
    for call in (layer.step, lambda x, s: vmap(lambda x: layer.step(x, s)[0])(x[None])):
        call(torch.zeros(1, WIDTH), state)
        with pytest.raises((ValueError, IndexError)):
            call(torch.zeros(1, WIDTH), state._replace(n_seen=state.n_seen + 1))
