"""Derivatives of every kind through the drop-in and transformers' models: forward mode, `torch.func`, second ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import anymamba
from anymamba.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from anymamba.compat.mamba_ssm import Mamba
from anymamba.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from anymamba.compat.mamba_ssm.ops.triton.k_activations import swiglu
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import rms_norm_fn
from anymamba.compat.mamba_ssm.ops.triton.layernorm_gated import layernorm_fn
from anymamba.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from anymamba.compat.mamba_ssm.utils.generation import InferenceParams
from anymamba.ops import dispatch

Case = tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]
BATCH, DIM, STATE, LENGTH = 2, 3, 2, 4


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def scan() -> Case:
    full, rows = (BATCH, DIM, LENGTH), (BATCH, STATE, LENGTH)

    def call(u, delta, A, B, C, D, z, bias):
        return selective_scan_fn(u, delta, -A.exp(), B, C, D, z, bias, delta_softplus=True, return_last_state=True)

    return call, random(full, full, (DIM, STATE), rows, rows, (DIM,), full, (DIM,))


def inner(level: int = 1) -> Case:
    """`mamba_inner_fn`, which checkpoints where it can."""
    rank = 2
    shapes = [(BATCH, 2 * DIM, LENGTH), (DIM, 1, 3), (DIM,), (rank + 2 * STATE, DIM), (DIM, rank), (4, DIM), (4,)]

    def call(xz, conv, conv_bias, x_proj, delta_proj, out_proj, out_bias, A, D, bias, norm):
        values = (xz, conv, conv_bias, x_proj, delta_proj, out_proj, out_bias, -A.exp(), None, None, D, bias)
        return (mamba_inner_fn(*values, checkpoint_lvl=level, b_rms_weight=norm),)

    return call, random(*shapes, (DIM, STATE), (DIM,), (DIM,), (STATE,))


def conv() -> Case:
    def call(x, weight, bias, before):
        return causal_conv1d_fn(x, weight, bias, None, before, return_final_states=True, activation="silu")

    return call, random((BATCH, DIM, LENGTH), (DIM, 3), (DIM,), (BATCH, DIM, 2))


def conv_sequences() -> Case:
    seq_idx = torch.tensor([[0, 1, 1, 1], [-1, 0, 0, 2]])
    return lambda *t: (causal_conv1d_fn(*t, seq_idx=seq_idx),), random((BATCH, DIM, LENGTH), (DIM, 3), (DIM,))


def conv_update(length: int = 1, **options: Any) -> Case:
    """Two updates in place of a copy of the state, and the state."""

    def call(x, state, weight, bias):
        state = state.clone()
        first, second = x.chunk(2, dim=-1)
        ys = [causal_conv1d_update(part, state, weight, bias, "silu", **options) for part in (first, second)]
        return *ys, state

    return call, random((BATCH, DIM, 2 * length), (BATCH + 1 if options else BATCH, DIM, 4), (DIM, 3), (DIM,))


def state_update(**options: Any) -> Case:
    def call(state, x, dt, A, B, C, D, z, bias):
        state = state.clone()
        ys = [
            selective_state_update(state, x[t], dt[t], -A.exp(), B, C, D, z, bias, dt_softplus=True, **options)
            for t in range(2)
        ]
        return *ys, state

    full, rows = (BATCH, DIM), (BATCH, STATE)
    state = (BATCH + 1 if options else BATCH, DIM, STATE)
    return call, random(state, (2, *full), (2, *full), (DIM, STATE), rows, rows, (DIM,), full, (DIM,))


def layer(run: Callable[[Mamba, Tensor], tuple[Tensor, ...]]) -> Case:
    """A function of the input and of every parameter of the layer."""
    torch.manual_seed(0)
    module = Mamba(4, d_state=STATE, d_conv=3, expand=1, layer_idx=0).double()
    names, values = zip(*module.named_parameters(), strict=True)

    class Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return run(self.layer, x)

    runner = Run()

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = {f"layer.{name}": value for name, value in zip(names, parameters, strict=True)}
        return functional_call(runner, named, (x,))

    return call, [*random((BATCH, LENGTH, 4)), *(value.detach().clone() for value in values)]


def pieces(module: Mamba, x: Tensor) -> tuple[Tensor, ...]:
    params, outputs = InferenceParams(20, BATCH), []
    for start, end in ((0, 1), (1, 2), (2, LENGTH)):
        outputs.append(module(x[:, start:end], inference_params=params))
        params.seqlen_offset = end
    return *outputs, *params.key_value_memory_dict[0]


def steps(module: Mamba, x: Tensor) -> tuple[Tensor, ...]:
    """Steps over states that are made of the input, so that transforms may change them in place."""
    states = [torch.zeros_like(x[:, 0, :1, None] * s) for s in module.allocate_inference_cache(len(x), 20)]
    return *(module.step(x[:, t : t + 1], *states)[0] for t in range(2)), *states


INDICES = torch.tensor([2, 0])
CASES: dict[str, Callable[[], Case]] = {
    "scan": scan,
    "inner": inner,
    "inner, nothing recomputed": lambda: inner(0),
    "conv": conv,
    "conv, sequences": conv_sequences,
    "conv update": conv_update,
    "conv update of two": lambda: conv_update(2),
    "conv update, circular": lambda: conv_update(cache_seqlens=torch.tensor([0, 3]), conv_state_indices=INDICES),
    "state update": state_update,
    "state update, indices": lambda: state_update(state_batch_indices=INDICES),
    "layer": lambda: layer(lambda module, x: (module(x),)),
    "layer, pieces": lambda: layer(pieces),
    "layer, steps": lambda: layer(steps),
    "norm": lambda: (lambda *t: rms_norm_fn(*t, prenorm=True), random((BATCH, 4), (4,), (4,), (BATCH, 4))),
    "gated norm": lambda: (
        lambda *t: (layernorm_fn(*t, group_size=2),),
        random((BATCH, 4), (4,), (4,), (BATCH, 4)),
    ),
    "swiglu": lambda: (lambda xy: (swiglu(xy),), random((BATCH, 8))),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def loss_of(call: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> Tensor:
    return sum(t.square().sum() for t in call(*values))


def gradients(call: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> list[Tensor]:
    """Of the plain reverse mode, with the reference's operators."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with anymamba.backend("reference"):
        found = torch.autograd.grad(loss_of(call, *leaves), leaves)
    assert all(g.abs().max() > 0 for g in found)
    return list(found)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------ forward mode


@every_case
def test_forward_mode_agrees_with_finite_differences(case):
    call, tensors = case()
    gradcheck(
        call, [t.requires_grad_() for t in tensors], check_forward_ad=True, check_backward_ad=True, fast_mode=True
    )


@every_case
def test_a_jvp_is_the_transpose_of_the_gradient(case):
    call, tensors = case()
    tangents = [torch.randn_like(t) for t in tensors]
    _, got = jvp(lambda *values: loss_of(call, *values), tuple(tensors), tuple(tangents))
    close(got, sum((g * t).sum() for g, t in zip(gradients(call, tensors), tangents, strict=True)))
    assert got.abs() > 1e-3


@every_case
def test_dual_numbers_leave_a_tangent_on_every_output(case):
    call, tensors = case()
    for mode in (torch.enable_grad, torch.no_grad):
        with forward_ad.dual_level(), mode():
            outputs = call(*(forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors))
            tangents = [forward_ad.unpack_dual(t).tangent for t in outputs]
            assert all(t is not None and t.abs().max() > 0 for t in tangents)


# ------------------------------------------------------------------------------------------ torch.func


@every_case
def test_gradients_of_torch_func(case):
    call, tensors = case()
    places = tuple(range(len(tensors)))
    close(list(grad(lambda *values: loss_of(call, *values), argnums=places)(*tensors)), gradients(call, tensors))


@every_case
def test_jacobians(case):
    """In reverse mode and in forward mode, of the first tensor."""
    call, (first, *others) = case()

    def outputs(first: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in call(first, *others)])

    reverse = jacrev(outputs)(first)
    close(jacfwd(outputs)(first), reverse)
    assert reverse.abs().max() > 0


@every_case
def test_gradients_per_sample(case):
    """vmap(grad) over copies that differ, against one after the other."""
    call, tensors = case()
    samples = tuple(torch.stack([t, 0.5 * t, t + 0.1]) for t in tensors)
    places = tuple(range(len(tensors)))
    gradient = grad(lambda *values: loss_of(call, *values), argnums=places)
    found = vmap(gradient)(*samples)
    for i in range(3):
        close([g[i] for g in found], gradients(call, [s[i] for s in samples]))


# ------------------------------------------------------------------------------------------ second derivatives


@every_case
def test_second_derivatives_agree_with_finite_differences(case):
    call, tensors = case()
    gradgradcheck(call, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("name", ["scan", "conv", "state update", "conv update", "layer"])
def test_a_hessian(name):
    """Forward over reverse mode against reverse over reverse."""
    call, (first, *others) = CASES[name]()
    loss = lambda first: loss_of(call, first, *others)  # noqa: E731
    close(hessian(loss)(first), jacrev(jacrev(loss))(first))


# ------------------------------------------------------------------------------------------ states and backends


@pytest.mark.parametrize("transform", [grad, vmap], ids=["grad", "vmap"])
def test_a_state_from_outside_a_transform_is_refused(transform):
    """torch cannot change it in place inside, and says so; nothing is wrong without a word."""
    state, conv_state = torch.zeros(BATCH, DIM, STATE), torch.zeros(BATCH, DIM, 3)
    x, B, weight = torch.randn(4, BATCH, DIM), torch.randn(BATCH, STATE), torch.randn(DIM, 3)
    A = -torch.rand(DIM, STATE)
    for update in (
        lambda x: selective_state_update(state, x, x, A, B, B).sum(),
        lambda x: causal_conv1d_update(x, conv_state, weight).sum(),
    ):
        with pytest.raises(RuntimeError, match=r"inplace|in-place|mutate"):
            transform(update)(x[0] if transform is grad else x)
    assert not state.any() and not conv_state.any()


def test_a_backend_is_insisted_on_for_the_drop_in():
    module = Mamba(8)
    for name in ("portable", "reference"):
        dispatch.calls.clear()
        with anymamba.backend(name):
            module(torch.randn(1, 4, 8)).sum().backward()
            module.step(torch.randn(1, 1, 8), *module.allocate_inference_cache(1, 1))
        assert {backend for _, backend, _ in dispatch.calls} == {name}


# ------------------------------------------------------------------------------------------ transformers

TRANSFORMERS = """
import json, logging, torch, transformers
from torch.func import functional_call, grad, jvp, vmap
import anymamba.compat
from anymamba.ops import dispatch

logging.getLogger("transformers").setLevel(logging.ERROR)
torch.manual_seed(0)
sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
ids = torch.randint(20, (3, 7))
tangents = {name: torch.randn_like(value) for name, value in parameters.items()}
name = "backbone.layers.0.mixer.in_proj.weight"

def loss(parameters, ids):
    return functional_call(model, parameters, (ids,), {"use_cache": False}).logits.square().mean()

def flat(tree):
    return torch.cat([tree[key].flatten() for key in sorted(tree)])

def steps(parameters):
    out = functional_call(model, parameters, (ids,), {"use_cache": True})
    key = next(k for k in out.keys() if k != "logits")
    after = functional_call(model, parameters, (ids[:, :1],), {"use_cache": True, key.replace("_params", ""): out[key]})
    return after.logits.square().mean()

def second():
    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    first = torch.autograd.grad(loss(leaves, ids), leaves[name], create_graph=True)[0]
    found = torch.autograd.grad(first.square().sum(), [leaves[k] for k in sorted(leaves)])
    return torch.cat([g.flatten() for g in found])

def measure():
    found = {}
    for mode in (model.train, model.eval):
        mode()
        kind = "train" if model.training else "eval"
        found[f"jvp {kind}"] = jvp(lambda p: loss(p, ids), (parameters,), (tangents,))[1][None]
        found[f"grad {kind}"] = flat(grad(loss)(parameters, ids))
        found[f"per sample {kind}"] = flat(vmap(grad(loss), in_dims=(None, 0))(parameters, ids[:, None]))
        found[f"second {kind}"] = second()
    found["jvp steps"] = jvp(steps, (parameters,), (tangents,))[1][None]
    return found

before = measure()
anymamba.compat.activate()
dispatch.calls.clear()
after = measure()
assert any(op == "selective_scan" for op, *_ in dispatch.calls), dispatch.calls
error = {k: ((after[k] - v).norm() / v.norm()).item() for k, v in before.items()}
print(json.dumps({"error": error, "size": {k: v.norm().item() for k, v in before.items()}}))
"""


def test_models_of_transformers():
    """Each derivative of its Mamba before and after activate(), in training and not, and through a step."""
    pytest.importorskip("transformers", reason="the extra 'test' installs transformers")
    result = subprocess.run([sys.executable, "-c", TRANSFORMERS], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(found["error"]) == 9 and all(size > 1e-6 for size in found["size"].values()), found
    assert all(error < 1e-4 for error in found["error"].values()), found
