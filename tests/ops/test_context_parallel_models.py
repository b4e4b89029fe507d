"""Layers and models on parts of sequences that are spread over processes: losses and gradients of one process."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scan_cases import offsets
from torch import Tensor

from anymamba import LanguageModel, ModelConfig
from anymamba.layers import Mamba
from anymamba.models.classifier import ClassifierConfig, SequenceClassifier
from anymamba.models.mixers import MIXERS
from anymamba.parallel import context_parallel
from anymamba.parts.options import AttentionOptions, MambaOptions

TOLERANCE = 1e-10
VOCABULARY = 11
SMALL = MambaOptions(d_state=3, dt_rank=2)


def config(*mixers: str, mamba: MambaOptions = SMALL, **attention: Any) -> ModelConfig:
    options = AttentionOptions(n_heads=2, **attention)
    sizes: dict[str, Any] = {"d_model": 8, "n_layers": len(mixers), "vocab_size": VOCABULARY}
    return ModelConfig(mixers=mixers, mamba=mamba, attention=options, **sizes)


def built(of: ModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(of).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def own(tokens: Tensor, lengths: list[int], rank: int) -> Tensor:
    """A rank's part along the length."""
    start = sum(lengths[:rank])
    return tokens[:, start : start + lengths[rank]]


def summed(x: Tensor, group: Any) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def check_model(group: Any, of: ModelConfig, cases: list[dict[str, Any]]) -> None:
    """The loss and the gradients of all parameters."""
    rank = group.rank()
    for case in cases:
        lengths = case["lengths"]
        generator = torch.Generator().manual_seed(5)
        batch = 1 if "documents" in case else 2
        ids, labels = (torch.randint(VOCABULARY, (batch, sum(lengths)), generator=generator) for _ in range(2))
        labels[:, ::5] = -100
        mask = torch.rand(ids.shape, generator=generator) > 0.4 if case.get("padded") else None
        if mask is not None:
            labels[~mask] = -100
        packed = {"cu_seqlens": offsets(case["documents"])} if batch == 1 else {}
        model = built(of)
        model.activation_checkpointing = case.get("checkpointing", False)
        want = model.loss(ids, labels, attention_mask=mask, **packed)
        want.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        more = packed if mask is None else {"attention_mask": own(mask, lengths, rank)}
        with context_parallel(group, lengths if case.get("given") else None):
            got = model.loss(own(ids, lengths, rank), own(labels, lengths, rank), **more)
        got.loss.backward()
        assert summed(got.n_tokens, group) == want.n_tokens
        errors = {"loss": (summed(got.loss, group) / want.loss - 1).abs().item()}
        for name, parameter in model.named_parameters():
            total = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, group)
            errors[name] = ((total - grads[name]).abs().max() / grads[name].abs().max().clamp(min=1e-3)).item()
        assert max(errors.values()) < TOLERANCE, (case, {k: e for k, e in errors.items() if e >= TOLERANCE})


def cases_of(n: int, *, padded: bool) -> list[dict[str, Any]]:
    """Rows and packed documents in parts of n ranks."""
    choose = random.Random(n)
    uneven = [choose.choice((0, 1, 2, 9, 13)) for _ in range(n - 1)] + [6]
    cases: list[dict[str, Any]] = [
        {"lengths": [7] * n, "given": True},
        {"lengths": uneven, "checkpointing": True},
        {"lengths": [6, *[0] * (n - 1)]},
        {"lengths": [5] * n, "documents": [5 * n - 9, 2, 0, 7]},
        {"lengths": uneven, "documents": [1, sum(uneven) - 4, 3], "checkpointing": True, "given": True},
    ]
    return cases + [{"lengths": lengths, "padded": True} for lengths in ([6] * n, uneven) if padded]


COMPLEX = MambaOptions(d_state=2, dt_rank=2, A_init="s4d-lin", b_discretization="zoh", inner_norms=True)
MODELS = {
    "mamba": config("mamba", "mamba"),
    "absolute": config("mamba", "s6", positions="absolute", max_positions=200),
    "complex": config("mamba", "mlp", mamba=COMPLEX),
}
HYBRIDS = {
    "rotary": config("mamba", "attention", "mlp", positions="rotary", n_kv_heads=1, d_conv=3),
    "xpos": config("attention", "mamba", positions="xpos", window=4),
    "none": config("mamba", "attention", positions="none"),
}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_models(ranks, n, name):
    """Uneven and empty parts, packed documents and padding, with and without checkpointing."""
    ranks.run(n, check_model, MODELS[name], cases_of(n, padded=True))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids(ranks, n, name):
    """Attention gathers the keys and values of all parts."""
    ranks.run(n, check_model, HYBRIDS[name], cases_of(n, padded=False))


def check_autocast(group: Any, of: ModelConfig) -> None:
    """In bfloat16 the loss of the parts is that of one process, within its rounding; also of very short parts."""
    model = built(of).float()
    for lengths in ([10] * group.size(), [2, *[1] * (group.size() - 1)]):
        ids = torch.randint(VOCABULARY, (2, sum(lengths)), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            want = model.loss(ids, ids).loss
            with context_parallel(group):
                part = own(ids, lengths, group.rank())
                got = model.loss(part, part).loss
        got.backward()
        torch.testing.assert_close(summed(got, group), want.detach(), rtol=1e-2, atol=0)


def test_autocast(ranks):
    ranks.run(2, check_autocast, HYBRIDS["rotary"])


def check_compiled_blocks(group: Any, of: ModelConfig) -> None:
    """Blocks are traced whole, once for each kind of block, not once a call."""
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    part = own(ids, [6, 6], group.rank())
    found = []
    for is_compiled in (False, True):
        model = built(of)
        for block in model.blocks if is_compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            model.zero_grad()
            with context_parallel(group):
                loss = model.loss(part, part).loss
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=TOLERANCE, atol=TOLERANCE)


def test_compiled_blocks(ranks):
    ranks.run(2, check_compiled_blocks, HYBRIDS["none"])


def check_states(group: Any) -> None:
    """A given state, and the state that is returned, of a layer on rows, packed documents and padded rows."""
    torch.manual_seed(0)
    layer, lengths, rank = Mamba(4, d_state=3).double(), [3, 1, 0, 4], group.rank()
    for documents, padded in ((None, False), ([2, 4, 0, 2], False), (None, True)):
        n = 2 if documents is None else len(documents)
        x = torch.randn(1 if documents else 2, sum(lengths), 4, dtype=torch.float64)
        state = layer(torch.randn(n, 5, 4, dtype=torch.float64))[1]
        state = type(state)(*(t.detach() for t in state))
        more: dict[str, Any] = {} if documents is None else {"cu_seqlens": offsets(documents)}
        mask = torch.rand(x.shape[:2]) > 0.5 if padded else None
        y, after = layer(x, state, attention_mask=mask, **more)
        with context_parallel(group):
            mine = None if mask is None else own(mask, lengths, rank)
            part, ends = layer(own(x, lengths, rank), state, attention_mask=mine, **more)
        want = own(y, lengths, rank)
        if mine is not None:
            part, want = part[mine], want[mine]
        torch.testing.assert_close(part, want, rtol=TOLERANCE, atol=TOLERANCE)
        for got, whole in zip(ends, after, strict=True):
            torch.testing.assert_close(summed(got, group), whole.detach(), rtol=TOLERANCE, atol=TOLERANCE)


def test_states(ranks):
    """Returned states are zero where a sequence does not end, so that their sum is the state of one process."""
    ranks.run(4, check_states)


# ------------------------------------------------------------------------------------------ refusals


def refusals(group: Any) -> dict[str, str]:
    """What each mixer says to a part of a sequence; "" if it runs."""
    found = {}
    ids = torch.zeros(1, 8, dtype=torch.int64)
    for name in MIXERS:
        model = LanguageModel(config(name))
        with context_parallel(group):
            try:
                model.loss(ids, ids)
                found[name] = ""
            except ValueError as error:
                found[name] = str(error)
    return found


def test_layers_that_need_whole_sequences_refuse_by_name(ranks):
    runs = {"mamba", "s6", "attention", "mlp"}
    names = {"hyena": "Hyena", "hyena-filter": "HyenaFilter", "mamba-s4d": "S4D", "s4": "S4", "rwkv": "RWKVTimeMix"}
    for said in ranks.run(2, refusals):
        assert {name for name, message in said.items() if not message} == runs
        for name, layer in names.items():
            assert said[name].startswith(f"{layer} needs whole sequences, but context_parallel gives it parts"), said


def mistakes(group: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model = LanguageModel(config("attention"))
    with context_parallel(group):
        with pytest.raises(ValueError, match="takes no state and no padding, got an attention_mask"):
            model.loss(ids, ids, attention_mask=torch.ones(1, 4))
        with pytest.raises(ValueError, match="takes no state and no padding, got a state"):
            model.loss(ids, ids, model.init_state(1))
        with pytest.raises(ValueError, match="a classifier pools whole sequences"):
            SequenceClassifier(config("mamba"), ClassifierConfig(n_outputs=2))(ids)
    wanted = f"the tokens of each of the 2 ranks, 4 on rank {group.rank()}, got \\(5, 5\\)"
    with context_parallel(group, [5, 5]), pytest.raises(ValueError, match=wanted):
        model.loss(ids, ids)


def test_mistakes(ranks):
    ranks.run(2, mistakes)


def of_one(group: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model = LanguageModel(config("hyena"))
    with context_parallel(group):
        assert torch.equal(model.loss(ids, ids).loss, model.loss(ids, ids).loss)


def test_a_group_of_one_changes_nothing(ranks):
    ranks.run(1, of_one)
