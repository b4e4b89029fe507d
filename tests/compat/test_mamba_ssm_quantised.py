"""The drop-in's layers and models after other libraries have replaced, wrapped or hooked their modules."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.compat.mamba_ssm import Mamba, MambaLMHeadModel
from anymamba.compat.mamba_ssm.models.config_mamba import MambaConfig
from anymamba.compat.mamba_ssm.utils.generation import InferenceParams, update_graph_cache


class IntegerLinear(nn.Linear):
    """As bitsandbytes' layers: integers under the name `weight`, in a shape of their own where two share a byte."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        levels = (linear.weight.detach() / self.scale).round().to(torch.int8)
        stored = levels if bits == 8 else (levels + 8).to(torch.uint8).flatten()[:, None]
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bits, self.bias = bits, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        levels = self.weight.float() if self.bits == 8 else self.weight.float() - 8
        weight = levels.view(self.out_features, self.in_features) * self.scale
        return F.linear(x, weight.to(x.dtype), self.bias)


class ScaledWeight(Tensor):
    """As torchao's weights: a subclass that is floating point outside and integers inside."""

    @staticmethod
    def __new__(cls, levels: Tensor, scale: Tensor) -> ScaledWeight:
        return Tensor._make_wrapper_subclass(cls, levels.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, levels: Tensor, scale: Tensor) -> None:
        self.levels, self.scale = levels, scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = (*args, None)[:3]
            return F.linear(x, weight.levels.to(weight.scale.dtype) * weight.scale, bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a quantised weight")


def integers(model: nn.Module, bits: int) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, IntegerLinear(child, bits))
    return model


def scaled(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            levels = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(ScaledWeight(levels, scale), requires_grad=False)
    return model


def dynamic(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop these kinds, but programs have them
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)


KINDS = {
    "dynamic int8": (lambda model: dynamic(model, torch.qint8), 0.1),
    "dynamic float16": (lambda model: dynamic(model, torch.float16), 0.01),
    "8 bits": (lambda model: integers(model, 8), 0.1),
    "4 bits": (lambda model: integers(model, 4), 0.8),
    "subclass": (scaled, 0.1),
}
every_kind = pytest.mark.parametrize(("quantise", "error"), KINDS.values(), ids=KINDS)


@pytest.fixture
def model() -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=29, d_intermediate=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@every_kind
def test_a_quantised_model_runs(model, quantise, error):
    """The whole, pieces with a cache, and generation; near the model that it was made of."""
    changed = quantise(copy.deepcopy(model))
    ids = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, exact = changed(ids).logits, model(ids).logits
        assert 0 < (whole - exact).norm() < error * exact.norm()
        params, pieces = InferenceParams(20, 2), []
        for start, end in ((0, 5), (5, 6), (6, 9)):
            pieces.append(changed(ids[:, start:end], inference_params=params).logits)
            params.seqlen_offset = end
    # integers of activations are scaled by whole calls in torch's dynamic kind
    tolerance = 0.1 if quantise is KINDS["dynamic int8"][0] else 1e-5
    assert (torch.cat(pieces, dim=1) - whole).norm() < tolerance * whole.norm()
    for states in changed.allocate_inference_cache(2, 20).values():
        assert {state.dtype for state in states} == {torch.float32}
    new = changed.generate(ids, max_length=14)
    assert new.shape == (2, 14) and torch.equal(changed.generate(ids, max_length=14, cg=True), new)


@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "subclass"])
def test_a_quantised_layer_trains_what_is_left(kind):
    """Gradients of the parameters that are not quantised, through two calls of a cache."""
    holder = nn.ModuleDict({"mixer": Mamba(16, layer_idx=0)})
    layer = KINDS[kind][0](holder)["mixer"]
    params = InferenceParams(20, 2)
    first = layer(torch.randn(2, 5, 16), inference_params=params)
    params.seqlen_offset = 5
    second = layer(torch.randn(2, 1, 16), inference_params=params)
    (first.sum() + second.sum()).backward()
    assert layer.A_log.grad.any() and layer.conv1d.weight.grad.any() and layer.D.grad.any()


def test_dtypes_of_the_states():
    """As before where the weights say them; the convolution's for a step whose weight does not."""
    narrow = Mamba(16, dtype=torch.bfloat16)
    assert [s.dtype for s in narrow.allocate_inference_cache(1, 4)] == [torch.bfloat16] * 2
    narrow.dt_proj.float()
    assert [s.dtype for s in narrow.allocate_inference_cache(1, 4)] == [torch.bfloat16, torch.float32]
    narrow.dt_proj = IntegerLinear(narrow.dt_proj, 8)
    assert [s.dtype for s in narrow.allocate_inference_cache(1, 4)] == [torch.bfloat16] * 2
    assert [s.dtype for s in narrow.allocate_inference_cache(1, 4, dtype=torch.float64)] == [torch.float64] * 2
    assert [s.device.type for s in Mamba(16, device="meta").allocate_inference_cache(1, 4)] == ["meta"] * 2


def test_the_cache_of_a_model_of_integers_alone():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    model.bias = None
    assert update_graph_cache(model, None, 1, 1, 4).dtype == torch.float32


# ------------------------------------------------------------------------------------------ wrapped and hooked modules


class ConvAdapter(nn.Module):
    """A convolution and a learned change of it, as adapters wrap one."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.base, self.change = conv, copy.deepcopy(conv)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.change(x)


def test_an_adapter_around_the_convolution_takes_effect():
    layer = Mamba(16, layer_idx=0)
    x = torch.randn(2, 7, 16)
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        merged.conv1d.weight.mul_(2)
        merged.conv1d.bias.mul_(2)
    layer.conv1d = ConvAdapter(layer.conv1d)
    torch.testing.assert_close(layer(x), merged(x))
    params = InferenceParams(20, 2)
    pieces = []
    for start, end in ((0, 2), (2, 3), (3, 7)):
        pieces.append(layer(x[:, start:end], inference_params=params))
        params.seqlen_offset = end
    whole = torch.cat(pieces, dim=1)
    torch.testing.assert_close(whole, merged(x), atol=1e-5, rtol=1e-5)
    whole.sum().backward()
    assert layer.conv1d.change.weight.grad.any()


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"])
def test_hooks_of_modules_run(name):
    """A hook that doubles what its module gives, and the same as a forward that was put in."""
    layer, x = Mamba(16), torch.randn(2, 5, 16)
    plain, module = layer(x), getattr(layer, name)
    hook = module.register_forward_hook(lambda module, inputs, output: 2 * output)
    doubled = layer(x)
    assert not torch.allclose(doubled, plain)
    hook.remove()
    assert torch.equal(layer(x), plain)
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(layer(x), doubled)


def test_a_step_without_bias():
    layer = Mamba(16)
    layer.dt_proj = nn.Linear(1, 32, bias=False)
    assert layer(torch.randn(1, 3, 16)).shape == (1, 3, 16)
