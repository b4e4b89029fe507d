"""Models for inference: the same function as the language model, whatever packs its weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import anymamba
from anymamba import MambaOptions, ModelConfig, SamplingConfig, generate
from anymamba.generation.beam import beam_search
from anymamba.models.inference import InferenceModel, packing
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import WEIGHTS, format_table
from anymamba.ops.packed_linear import unpack
from anymamba.parts.state import map_state

PLAIN = ModelConfig(d_model=64, n_layers=2, vocab_size=61)
CONFIGS = {
    "tied": PLAIN,
    "untied, biases": replace(PLAIN, tie_embeddings=False, mamba=MambaOptions(bias=True, conv_bias=False)),
    "inner norms": replace(PLAIN, mamba=MambaOptions(inner_norms=True), norm="layernorm"),
    "constant": replace(PLAIN, mamba=MambaOptions(selective_delta=False, selective_B=False, b_discretization="zoh")),
    "complex": replace(PLAIN, mamba=MambaOptions(A_init="s4d-lin")),
    "hybrid": replace(PLAIN, n_layers=4, mixers=("mamba", "mlp"), attention_layers=(2,)),
    "others": replace(PLAIN, n_layers=5, mixers=("rwkv", "rwkv-channel", "h3-s4d", "hyena", "gau")),
}
ERROR = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.05, "int4": 0.5}
"""Largest root mean square of the error of logits, in units of their standard deviation, in these small models."""


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square of the difference, relative to the standard deviation."""
    return ((found - wanted).pow(2).mean().sqrt() / wanted.std()).item()


def with_values_of(packed: InferenceModel) -> LanguageModel:
    """A language model whose weights are what the packed ones stand for."""
    model = LanguageModel(packed.config).eval()
    values = {name: unpack(weight) for name, weight in packed.packed_weights().items()}
    model.load_state_dict(values | dict(packed.named_parameters()))
    return model


@pytest.mark.parametrize(
    ("name", "weights"),
    [("tied", weights) for weights in WEIGHTS]
    + [(name, weights) for name in CONFIGS if name != "tied" for weights in ("float32", "int4")],
)
@torch.no_grad()
def test_the_same_function(moved, name, weights):
    """Against a language model with the packed values: reading, stepping, the loss. int8 activations add an error."""
    packed = moved(CONFIGS[name]).for_inference(weights)
    model, ids = with_values_of(packed), torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(0))
    wanted, allowed = model(ids), 0.05 if weights.startswith("int") else ERROR[weights]
    found = packed(ids)
    assert found.logits.dtype == torch.float32 and error(found.logits, wanted.logits) < allowed
    state = packed.init_state(2)
    for t in range(ids.shape[1]):
        logits, state = packed.step(ids[:, t], state)
        assert error(logits, wanted.logits[:, t]) < allowed, t
    loss = packed.loss(ids[:, :-1], ids[:, 1:]).loss
    assert abs(loss / model.loss(ids[:, :-1], ids[:, 1:]).loss - 1) < allowed


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_near_the_model_that_it_was_made_from(moved, weights):
    model = moved(PLAIN)
    ids = torch.randint(61, (2, 40))
    packed = model.for_inference(weights)
    assert error(packed(ids).logits, model(ids).logits) < ERROR[weights]
    assert packed.n_parameters() == model.n_parameters()


def test_it_is_a_copy(moved):
    model = moved(PLAIN)
    packed, ids = model.for_inference("float32"), torch.tensor([[1, 2]])
    before = packed(ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(packed(ids).logits, before)


def test_which_tensor_has_which_format():
    """Shapes of mamba-130m: 48 columns of dt_proj are no multiple of a block; all others are one of 256."""
    config = ModelConfig(d_model=768, n_layers=1, vocab_size=8, tie_embeddings=False)
    table = {kind: format_table(config, kind) for kind in (*WEIGHTS, "q4_k", "q6_k")}
    rows = {
        "embedding.weight": ("q8_0", "q6_k", "q6_k", "q6_k"),
        "head.weight": ("q8_0", "q6_k", "q6_k", "q6_k"),
        "blocks.0.mixer.in_proj.weight": ("q8_0", "q4_0", "q4_k", "q6_k"),
        "blocks.0.mixer.out_proj.weight": ("q8_0", "q4_0", "q4_k", "q6_k"),
        "blocks.0.mixer.x_proj.weight": ("q8_0", "q8_0", "q8_0", "q8_0"),
        "blocks.0.mixer.dt_proj.weight": ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    }
    for name, formats in rows.items():
        assert tuple(table[kind][name] for kind in ("int8", "int4", "q4_k", "q6_k")) == formats, name
        assert table["float32"][name] == "float32" and table["bfloat16"][name] == "bfloat16"
    assert all(set(found) == set(rows) for found in table.values())
    odd = format_table(replace(config, d_model=96, tie_embeddings=True), "int4")
    assert odd["embedding.weight"] == "q8_0" and odd["blocks.0.mixer.in_proj.weight"] == "q4_0"
    assert format_table(replace(config, d_model=96), "q4_k")["blocks.0.mixer.in_proj.weight"] == "q4_0"
    with pytest.raises(ValueError, match="weights must be one of float32, bfloat16, int8, int4, got 'int3'"):
        format_table(config, "int3")


@torch.no_grad()
def test_generation_and_beams_take_it(moved):
    model = moved(PLAIN)
    packed, prompts = model.for_inference("float32"), [[1, 2, 3], [4]]
    greedy = SamplingConfig(temperature=0)
    assert (
        generate(packed, prompts, max_new_tokens=8, sampling=greedy).ids
        == generate(model, prompts, max_new_tokens=8, sampling=greedy).ids
    )
    found, wanted = (beam_search(m, prompts, num_beams=3, max_new_tokens=5) for m in (packed, model))
    assert [row[0].ids for row in found] == [row[0].ids for row in wanted]


def test_random_weights_have_the_sizes_of_the_preset():
    config = replace(CONFIGS["hybrid"], tie_embeddings=False)
    packed = InferenceModel.random(config, "int4")
    assert packed.weight_formats == format_table(config, "int4")
    assert packed.n_parameters() == LanguageModel(config, device="meta").n_parameters()
    assert packed(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_random_matrices_are_packed_some_rows_at_a_time(monkeypatch):
    most, sizes, pack = 1 << 12, list[int](), packing.pack
    monkeypatch.setattr(packing, "AT_ONCE", most)
    monkeypatch.setattr(packing, "pack", lambda matrix, format: sizes.append(matrix.numel()) or pack(matrix, format))
    packed = InferenceModel.random(CONFIGS["untied, biases"], "int8")
    assert max(sizes) <= most < sum(sizes) == sum(w.n_out * w.n_in for w in packed.packed_weights().values())


@torch.no_grad()
def test_a_step_may_reuse_the_state(moved):
    """The value of the state that comes back does not depend on it; without it the given state stays as it is."""
    packed, ids = moved(PLAIN).for_inference("int8"), torch.tensor([3, 5])
    start = packed.step(ids, packed.init_state(2)).state
    kept = copy.deepcopy(start)
    plain = packed.step(ids, start)
    for one, two in zip(start.layers, kept.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    reused = packed.step(ids, kept, reuse_state=True)
    assert torch.equal(plain.logits, reused.logits)
    for one, two in zip(plain.state.layers, reused.state.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ------------------------------------------------------------------------------------------ how it runs


def test_the_report_says_how_blocks_run(moved):
    assert {block.native for block in moved(PLAIN).for_inference("int8").report()} == {True}
    report = moved(CONFIGS["hybrid"]).for_inference("int8").report()
    assert [block.mixer for block in report] == ["mamba", "mlp", "attention", "mlp"]
    assert not any(block.native for block in report) and all(block.reason for block in report)
    assert all(block.native for block in moved(PLAIN).for_inference(invariant=True).report())


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_invariance(moved, weights):
    """A row's logits have the same bits alone, in a batch, in pieces, token by token, padded and packed."""
    packed = moved(replace(PLAIN, n_layers=3)).for_inference(weights, invariant=True)
    ids = torch.randint(61, (5, 67))
    wanted = torch.cat([packed(row[None]).logits for row in ids])
    assert torch.equal(packed(ids).logits, wanted)
    for cut in (1, 31, 64):
        first = packed(ids[:, :cut])
        rest = packed(ids[:, cut:], first.state)
        assert torch.equal(torch.cat([first.logits, rest.logits], 1), wanted)
    state = packed.init_state(3)
    for t in range(ids.shape[1]):
        logits, state = packed.step(ids[:3, t], state)
        assert torch.equal(logits, wanted[:3, t]), t
    mask = torch.ones(2, 67, dtype=torch.bool)
    mask[0, :20] = False
    padded = packed(torch.cat([ids[:1, :20], ids[:1, :47]], 1).expand(2, -1), attention_mask=mask)
    assert torch.equal(padded.logits[0, 20:], wanted[0, :47])
    offsets = torch.tensor([0, 67, 134], dtype=torch.int32)
    assert torch.equal(packed(ids[:2].reshape(1, -1), cu_seqlens=offsets).logits, wanted[:2].reshape(1, 134, -1))
    last = packed(ids[:2].reshape(1, -1), cu_seqlens=offsets, num_last_logits=70)
    assert torch.equal(last.logits, wanted[:2].reshape(1, 134, -1)[:, -70:])
    assert torch.equal(last.state.layers[1].ssm, packed(ids[:2]).state.layers[1].ssm)
    mask[0, 30:] = False
    padded = packed(ids[:2], attention_mask=mask, num_last_logits=40)
    assert torch.equal(padded.logits[0, :3], packed(ids[:1, 20:30]).logits[0, -3:])
    assert torch.equal(padded.state.layers[1].conv[0], packed(ids[:1, 20:30]).state.layers[1].conv[0])
    assert torch.equal(padded.logits[1], wanted[1, -40:])


@torch.no_grad()
def test_invariance_block_by_block(moved):
    """The same where the compiled step cannot be used."""
    packed, ids = moved(PLAIN).for_inference("int8", invariant=True), torch.randint(61, (2, 20))
    packed._native = {-1: "for this test"}
    wanted, state = packed(ids).logits, packed.init_state(1)
    for t in range(20):
        logits, state = packed.step(ids[:1, t], state)
        assert torch.equal(logits, wanted[:1, t])


@torch.no_grad()
def test_a_few_tokens_are_read_as_steps_are(moved):
    """They have the same bits, and more tokens are read block by block."""
    packed, ids = moved(PLAIN).for_inference("int8"), torch.randint(61, (1, 65))
    wanted = packed.step(ids[:, 0], packed.init_state(1)).logits
    assert torch.equal(packed(ids[:, :64]).logits[:, 0], wanted)
    assert not torch.equal(packed(ids).logits[:, 0], wanted)
    masked = packed(ids[:, :8], attention_mask=torch.ones(1, 8)).logits
    torch.testing.assert_close(masked, packed(ids[:, :8]).logits, rtol=0, atol=0.1)


@torch.no_grad()
def test_invariance_keeps_the_errors(moved):
    packed, ids = moved(PLAIN).for_inference(invariant=True), torch.randint(61, (2, 20))
    with pytest.raises(ValueError, match="num_last_logits must be at least 0"):
        packed(ids, num_last_logits=-1)
    with pytest.raises(ValueError, match="attention_mask"):
        packed(ids, attention_mask=torch.ones(2, 19))
    assert packed(ids[:, :0]).logits.shape == (2, 0, 64)


@pytest.mark.parametrize(
    ("name", "why"), [("hybrid", "its mixers attention, mlp"), ("complex", "complex A runs in plain PyTorch")]
)
def test_invariance_that_is_not_there(moved, name, why):
    with pytest.raises(ValueError, match=f"invariant=True is not possible for this model: {why}"):
        moved(CONFIGS[name]).for_inference(invariant=True)
    narrow = ModelConfig(d_model=4, n_layers=1, vocab_size=8)
    with pytest.raises(ValueError, match=r"so few channels \(d_inner=8\) is cut in time; leave it out"):
        LanguageModel(narrow).for_inference(invariant=True)


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.requires_grad_])
def test_invariance_with_a_state_of_another_kind(moved, change):
    packed, ids = moved(PLAIN).for_inference("int8", invariant=True), torch.randint(61, (2, 12))
    state = map_state(lambda t: change(t.detach().clone()), packed(ids[:, :4]).state)
    wanted, first = packed(ids[:, 4:], state), packed(ids[:, 4:7], state)
    logits, after = [first.logits], first.state
    for t in range(7, 12):
        output = packed.step(ids[:, t], after)
        logits, after = [*logits, output.logits[:, None]], output.state
    assert torch.equal(torch.cat(logits, 1), wanted.logits)


def test_invariance_with_another_backend(moved):
    packed = moved(PLAIN).for_inference("int8", invariant=True)
    with (
        anymamba.backend("reference"),
        pytest.raises(ValueError, match="needs the backend cpu, and reference was asked"),
    ):
        packed(torch.tensor([[1, 2]]))


# ------------------------------------------------------------------------------------------ what it is not


def test_it_cannot_be_trained(moved):
    packed = moved(PLAIN).for_inference("int8")
    with pytest.raises(RuntimeError, match=r"cannot be trained.*train the LanguageModel.*call for_inference again"):
        packed.train()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        packed.requires_grad_()
    assert not packed.eval().training and not any(p.requires_grad for p in packed.parameters())


def test_it_is_not_packed_again(moved):
    packed = moved(PLAIN).for_inference("int8")
    with pytest.raises(ValueError, match=r"packed already; .* InferenceModel.from_pretrained\(path, weights=...\)"):
        packed.for_inference("int4")
    with pytest.raises(ValueError, match="weights must be one of float32, bfloat16, int8, int4, got None"):
        moved(PLAIN).for_inference(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device 'foo' cannot be used here"):
        moved(PLAIN).for_inference(device="foo")


def test_arguments_of_other_types(moved):
    packed = moved(PLAIN).for_inference()
    for model in (packed, moved(PLAIN)):
        with pytest.raises(
            TypeError, match=r"token ids must be int64 or int32, got torch.uint8; convert .* \.long\(\)"
        ):
            model(torch.ones(1, 2, dtype=torch.uint8))
        with pytest.raises(TypeError, match=r"step needs a LanguageModelState, got NoneType; .* init_state\(batch\)"):
            model.step(torch.tensor([1]), None)


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.double, torch.nn.Module.bfloat16])
def test_its_dtype_stays(moved, change):
    packed, ids = moved(PLAIN).for_inference("int8"), torch.tensor([[1, 2]])
    wanted = packed(ids).logits
    with pytest.raises(TypeError, match=r"computes in float32.*for_inference\(weights=...\)"):
        change(packed)
    assert torch.equal(packed.to("cpu")(ids).logits, wanted)


def test_a_copy_of_it_works(moved):
    packed, ids = moved(PLAIN).for_inference("int4"), torch.tensor([2])
    wanted = packed.step(ids, packed.init_state(1)).logits
    twin = copy.deepcopy(packed)
    del packed
    assert torch.equal(twin.step(ids, twin.init_state(1)).logits, wanted)


def test_ids_outside_the_vocabulary(moved):
    packed = moved(PLAIN).for_inference("int8")
    for bad in (-1, 64):
        with pytest.raises(IndexError, match=f"token id {bad} is outside the embedding's rows, 0 to 63"):
            packed(torch.tensor([[bad]]))
        with pytest.raises(IndexError):
            packed.step(torch.tensor([bad]), packed.init_state(1))


def test_steps_keep_what_blocks_derive_from_their_weights(moved, monkeypatch):
    model = moved(replace(PLAIN, mixers=("s4d",))).for_inference("int8")
    kernels = [module for module in model.modules() if hasattr(module, "discretise")]
    discretise, calls = type(kernels[0]).discretise, []
    monkeypatch.setattr(type(kernels[0]), "discretise", lambda self: (calls.append(self), discretise(self))[1])
    ids = torch.tensor([3, 4])
    with torch.inference_mode():
        state = model.step(ids, model.init_state(2)).state
        model.step(ids, state)
    assert len(calls) == len(kernels), "once for each block"
    with torch.no_grad():
        state = model.step(ids, model.init_state(2)).state
    layer = state.layers[0]
    layer.h.requires_grad_()
    model.step(ids, state).logits.sum().backward()  # what inference mode has made cannot be saved for this
    assert layer.h.grad.abs().sum() > 0
