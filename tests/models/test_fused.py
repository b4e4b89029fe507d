"""Fused norms and losses of a model: the same numbers as modules that are called one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anymamba import LanguageModel, ModelConfig
from anymamba.ops import dispatch
from anymamba.parts.bare import is_bare
from anymamba.parts.norm import LayerNorm, RMSNorm, norm_of_sum


def build(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 3, "vocab_size": 40}
    return LanguageModel(ModelConfig(**sizes | options))


def results(model: LanguageModel) -> list[Tensor]:
    """Loss, logits of a step, and gradients."""
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model.loss(ids[:, :-1], ids[:, 1:]).loss
    step = model.step(ids[:, 0], model.init_state(2)).logits
    return [loss, step, *torch.autograd.grad(loss, list(model.parameters()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_modules_with_hooks_are_called_and_give_the_same_bits(norm, residual_in_fp32, tie):
    options = {"norm": norm, "residual_in_fp32": residual_in_fp32, "tie_embeddings": tie}
    want, model, called = results(build(**options)), build(**options), []
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm) or module is model.head:
            module.register_forward_pre_hook(lambda module, _: called.append(module))
    assert same(results(model), want)
    assert len(called) == 2 * 4 + (0 if tie else 2)


def test_recomputed_blocks_give_the_same_bits():
    model = build()
    want = results(model)
    model.activation_checkpointing = True
    assert same(results(model), want)


def test_a_norm_of_another_class_is_called_with_the_sum():
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x, residual = torch.randn(2, 3), torch.randn(2, 3)
    y, total = norm_of_sum(Twice(), x, residual)
    assert torch.equal(total, residual + x) and torch.equal(y, 2 * total)
    assert norm_of_sum(nn.Identity(), None, residual)[1] is residual


def test_one_op_a_block_and_one_for_the_loss():
    model = build()
    dispatch.calls.clear()
    model.loss(*torch.randint(40, (2, 1, 5)))
    counted = {op: n for (op, _, what), n in dispatch.calls.items() if what == "forward"}
    assert counted["add_norm"] == 4 and counted["linear_cross_entropy"] == 1


def test_which_modules_are_bare():
    class Adapted(nn.Linear):
        pass

    class Shard(torch.Tensor):
        pass

    plain, hooked, replaced, sharded = (nn.Linear(2, 2) for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = plain.forward
    sharded.weight = nn.Parameter(sharded.weight.detach().as_subclass(Shard))
    assert is_bare(plain, nn.Linear)
    assert not any(is_bare(module, nn.Linear) for module in (hooked, replaced, sharded, Adapted(2, 2), nn.Identity()))
