"""Results that the backward pass computes again: the same bits in less memory, and off where it cannot work.

The tests run on the CPU, where layers do not recompute by themselves, and on a GPU if there is one.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import anymamba
from anymamba.layers.mamba import Mamba, MambaBlock
from anymamba.layers.s4d import S4D
from anymamba.layers.s6 import S6
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.ops import dispatch
from anymamba.ops.recomputing import recomputed
from anymamba.parts import recipes
from anymamba.parts.recipes import again
from anymamba.parts.state import state_tensors
from anymamba.runtimes import nvrtc

PLACES = ["cpu", "cuda"] if torch.cuda.is_available() and nvrtc.reason() is None else ["cpu"]
WIDTH, LENGTH = 32, 21


@pytest.fixture(params=PLACES)
def device(request, monkeypatch) -> str:
    """A device on which layers recompute."""
    monkeypatch.setattr(recipes, "DEVICES", (request.param,))
    monkeypatch.setattr(recipes, "LEAST_SIZE", 0)
    return request.param


def kept(device: str, run: Callable[[], Any], monkeypatch) -> Any:
    """The result of `run` without recomputing."""
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "DEVICES", ())
        return run()


def layer_of(make: Callable[..., nn.Module], device: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(WIDTH, **options).to(device)


def sequence(device: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, LENGTH, WIDTH, generator=generator).to(device, dtype).requires_grad_()


def gradients(layer: nn.Module, x: Tensor, autocast: bool = False, **inputs: Any) -> list[Tensor]:
    """y and the gradients of the input and the parameters, from y and the last state."""
    with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
        y, state = layer(x, **inputs)
    loss = y.float().sin().sum() + sum(t.float().cos().sum() for t in state_tensors(state) if t.is_floating_point())
    return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def mask(device: str) -> Tensor:
    return torch.arange(LENGTH, device=device) >= torch.tensor([[3], [0]], device=device)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mamba": lambda width: Mamba(width, dt_rank=5),
    "norms inside": lambda width: Mamba(width, inner_norms=True, output_norm="layernorm"),
    "constant step": lambda width: Mamba(width, selective_delta=False),
    "s6": S6,
    "block": lambda width: MambaBlock(width, S4D),
}
INPUTS: dict[str, Callable[[nn.Module, str], dict[str, Any]]] = {
    "plain": lambda layer, device: {},
    "autocast": lambda layer, device: {"autocast": True},
    "padded": lambda layer, device: {"attention_mask": mask(device)},
    "packed": lambda layer, device: {"cu_seqlens": torch.tensor([0, 5, 5, LENGTH], dtype=torch.int32, device=device)},
    "state": lambda layer, device: {"state": layer.init_state(2)},
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_gradients_have_the_same_bits(make, inputs, device, monkeypatch):
    layer = layer_of(make, device)
    given = inputs(layer, device)
    x = sequence(device, 1 if "cu_seqlens" in given else 2)
    want = kept(device, lambda: gradients(layer, x, **given), monkeypatch)
    assert same(gradients(layer, x, **given), want)


def model_results(model: LanguageModel, autocast: bool = False) -> list[Tensor]:
    device = model.embedding.weight.device
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
        loss = model.loss(ids[:, :-1], ids[:, 1:]).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def model_of(device: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(d_model=16, n_layers=4, vocab_size=40, **options), device=device)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mixers", [("mamba",), ("attention", "mlp"), ("mamba-s4d", "rwkv")], ids=str)
def test_models_have_the_same_bits(mixers, autocast, device, monkeypatch):
    model = model_of(device, mixers=mixers, norm="layernorm" if autocast else "rmsnorm")
    want = kept(device, lambda: model_results(model, autocast), monkeypatch)
    assert same(model_results(model, autocast), want)


def test_norms_of_projected_inputs_are_short_under_autocast_with_the_same_bits(device, monkeypatch):
    model = model_of(device, mixers=("mamba", "attention", "mlp"))
    seen = []
    for block in model.blocks:
        block.mixer.in_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    short = model_results(model, autocast=True)
    for layer in {type(block.mixer) for block in model.blocks}:
        monkeypatch.setattr(layer, "projects_input", False)
    assert same(model_results(model, autocast=True), short)
    assert set(seen[:4]) == {torch.bfloat16} and set(seen[4:]) == {torch.float32}


# ------------------------------------------------------------------------------------------ memory


def bytes_kept(run: Callable[[], Any], monkeypatch) -> tuple[int, int]:
    """Bytes that operations ask to keep inside `recomputing`, and bytes that are kept, each piece of memory once."""
    asked, held = {}, {}
    alive = []  # so that no address is used twice
    pack = recipes._Recipes._pack

    def note(places: dict[int, int], tensor: Tensor) -> None:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        places[storage.data_ptr()] = storage.nbytes()

    def counted(self: Any, tensor: Tensor) -> Any:
        packed = pack(self, tensor)
        note(asked, tensor)
        for t in packed.recipe.inputs if isinstance(packed, recipes._Use) else (tensor,):
            if isinstance(t, Tensor):
                note(held, t)
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(recipes._Recipes, "_pack", counted)
        run()
    return sum(asked.values()), sum(held.values())


def test_a_layer_keeps_neither_the_convolution_nor_the_step(device, monkeypatch):
    layer, x = layer_of(Mamba, device), sequence(device)
    asked, held = bytes_kept(lambda: layer(x), monkeypatch)
    of_activations = 2 * LENGTH * 2 * WIDTH * 4
    assert asked - held >= 2 * of_activations


def test_a_block_does_not_keep_its_norm_either(device, monkeypatch):
    model = model_of(device, mixers=("mlp",))
    ids = torch.zeros(2, 9, dtype=torch.int64, device=device)
    asked, held = bytes_kept(lambda: model.hidden(ids), monkeypatch)
    assert asked - held == 4 * 2 * 9 * 16 * 4


def test_each_result_is_computed_again_once(device):
    layer, x = layer_of(Mamba, device), sequence(device)
    dispatch.calls.clear()
    y, _ = layer(x)
    for n in (2, 3):  # also with a graph that is used again
        y.sum().backward(retain_graph=True)
        assert sum(k for (op, _, what), k in dispatch.calls.items() if (op, what) == ("causal_conv1d", "forward")) == n


def test_recipes_go_with_the_graph(device, monkeypatch):
    found = []
    add = recipes._Recipes.add

    def spy(self: Any, y: Tensor, *rest: Any) -> None:
        add(self, y, *rest)
        found.extend(weakref.ref(recipe) for recipe, *_ in self._found.values())

    monkeypatch.setattr(recipes._Recipes, "add", spy)
    layer, x = layer_of(Mamba, device), sequence(device)
    y, state = layer(x)
    assert any(ref() is not None for ref in found)
    del y, state
    gc.collect()
    assert found and all(ref() is None for ref in found)


# ------------------------------------------------------------------------------------------ what it must not change


@pytest.mark.parametrize("name", ["conv.weight", "dt_proj.weight", "x_proj.weight"])
def test_a_weight_that_changed_before_backward_is_an_error(name, device):
    layer, x = layer_of(Mamba, device), sequence(device)
    y, _ = layer(x)
    with torch.no_grad():
        layer.get_parameter(name).add_(1)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: .* at version \d+, expected version \d+"
    ):
        y.sum().backward()


def test_a_result_that_was_changed_is_kept(device):
    x, weight = torch.ones(3, device=device), torch.full((3,), 2.0, device=device, requires_grad=True)
    with recipes.recomputing(x):
        y = again(x * 2, torch.mul, x, 2)
        y.add_(1)
        loss = (y * weight).sum()
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [3, 3, 3]


def test_views_of_a_result_are_computed_again(device):
    x, weight = torch.arange(6.0, device=device), torch.ones(3, 2, device=device, requires_grad=True)
    with recipes.recomputing(x):
        y = again(x * 2, torch.mul, x, 2)
        loss = (y.view(2, 3).mT * weight).sum() + (y[1:3] * weight[0]).sum()
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [[2, 10], [2, 8], [4, 10]]


def test_second_derivatives_are_the_same(device, monkeypatch):
    layer = layer_of(Mamba, device).double()
    x = sequence(device, dtype=torch.float64)

    def twice() -> list[Tensor]:
        (first,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.cos().sum(), [x, *layer.parameters()], allow_unused=True))

    for a, b in zip(twice(), kept(device, twice, monkeypatch), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_backend_is_that_of_the_forward_pass(device):
    layer, x = layer_of(Mamba, device), sequence(device)
    dispatch.calls.clear()
    with anymamba.backend("reference"):
        y, _ = layer(x)
    y.sum().backward()
    assert {backend for op, backend, what in dispatch.calls if what == "forward"} == {"reference"}


@pytest.fixture
def process_group(device, tmp_path):
    place = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo" if device == "cpu" else "nccl", init_method=place, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def _sharded(layer: nn.Module) -> nn.Module:
    return fully_shard(layer, mesh=init_device_mesh(next(layer.parameters()).device.type, (1,)))


@pytest.mark.parametrize("distribute", [nn.parallel.DistributedDataParallel, _sharded])
def test_distributed_layers_have_the_same_bits(distribute, device, process_group):
    layer, x = layer_of(Mamba, device), sequence(device)
    want = gradients(layer, x)
    y, state = distribute(layer)(x)
    (y.sin().sum() + sum(t.cos().sum() for t in state)).backward()
    found = [t.grad.full_tensor() if isinstance(t.grad, DTensor) else t.grad for t in (x, *layer.parameters())]
    assert same(found, want[1:])


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: checkpoint(layer, x, use_reentrant=False)[0].sum().backward(),
        lambda layer, x: recomputed(layer, x)[0].sum().backward(),
        lambda layer, x: torch.func.grad(lambda x: layer(x)[0].sum())(x),
        lambda layer, x: torch.func.jvp(lambda x: layer(x)[0], (x,), (x,)),
        lambda layer, x: torch.no_grad()(layer)(x),
        lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x)[0].sum().backward(),
    ],
    ids=["checkpoint", "our checkpoint", "grad", "jvp", "no_grad", "compile"],
)
def test_where_it_is_off(call, device, monkeypatch):
    monkeypatch.setattr(recipes, "_Recipes", None)  # calling it would fail
    call(layer_of(Mamba, device), sequence(device).detach().requires_grad_())


@pytest.mark.parametrize(
    "context", [save_on_cpu, lambda: disable_saved_tensors_hooks("no hooks")], ids=["save_on_cpu", "disabled"]
)
def test_hooks_of_a_caller_come_first(context, device, monkeypatch):
    layer, x = layer_of(Mamba, device), sequence(device)
    want = gradients(layer, x)
    monkeypatch.setattr(recipes, "_Recipes", None)
    with context():
        assert same(gradients(layer, x), want)


def test_it_is_off_on_a_cpu_and_for_short_sequences(device, monkeypatch):
    layer, x = layer_of(Mamba, device), sequence(device)
    monkeypatch.setattr(recipes, "_Recipes", None)
    for name, value in (("DEVICES", ()), ("LEAST_SIZE", 2 * LENGTH * 2 * WIDTH + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(recipes, name, value)
            gradients(layer, x)
