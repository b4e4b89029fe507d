"""Reverse-complement equivariance: the result for a reverse complement is the reverse complement of the result."""

from __future__ import annotations

import pytest
import torch
from contract import close

from anymamba import LanguageModel, ModelConfig, preset
from anymamba.layers import BiMamba, Mamba, SequenceLayer, SharedStrands, StrandEmbedding, StrandHead
from anymamba.models.classifier import ClassifierConfig, SequenceClassifier
from anymamba.parts.options import MambaOptions
from anymamba.parts.strands import both_strands, complement_table, in_rows, reversed_strands, side_by_side

COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)
"""Of the ids of HyenaDNA: A 7, C 8, G 9, T 10; the others are their own."""
TABLE = complement_table(COMPLEMENT, 16, torch.device("cpu"))
OPTIONS = MambaOptions(d_state=4)
MIXERS = (("bimamba",), ("mamba",), ("mamba", "mlp", "bimamba"))


def reverse_complement(ids):
    return TABLE[ids.flip(1)]


def bases(batch: int, length: int, seed: int = 1):
    return torch.randint(7, 12, (batch, length), generator=torch.Generator().manual_seed(seed))


def model_of(*mixers: str, **options) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=8,
        n_layers=max(2, len(mixers)),
        vocab_size=12,
        pad_vocab_multiple=16,
        mixers=mixers,
        mamba=OPTIONS,
        complement=COMPLEMENT,
        **options,
    )
    return LanguageModel(config).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("inner", [lambda: Mamba(6, d_state=4), lambda: BiMamba(6, OPTIONS)], ids=["mamba", "bimamba"])
def test_layers_are_equivariant(inner):
    torch.manual_seed(0)
    embedding, layer, head = StrandEmbedding(16, 6, COMPLEMENT), SharedStrands(inner()), StrandHead(16, 6, COMPLEMENT)
    for module in (embedding, layer, head):
        module.double().eval()
    for length in (1, 2, 7, 33):
        ids = bases(2, length)
        x = embedding(ids)
        close(embedding(reverse_complement(ids)), reversed_strands(x), "embedding", 0.0)
        y = layer(x)
        close(layer(reversed_strands(x)), reversed_strands(y), "layer", 1e-14)
        logits = head(y)
        close(head(reversed_strands(y)), logits.flip(1)[..., TABLE], "head", 1e-14)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = layer(x, cu_seqlens=offsets)
    close(packed, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1), "packed")


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_equivariant(mixers, tied):
    model = model_of(*mixers, tie_embeddings=tied)
    for length in (1, 2, 7, 33):
        ids = bases(2, length)
        logits, hidden = model(ids).logits, model.hidden(ids)[0]
        close(model(reverse_complement(ids)).logits, logits.flip(1)[..., TABLE], f"length {length}, logits", 1e-13)
        close(model.hidden(reverse_complement(ids))[0], reversed_strands(hidden), f"length {length}, hidden", 1e-13)


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS, ids=str)
def test_padding_and_packing_change_nothing(mixers):
    model = model_of(*mixers)
    parts = [bases(1, 6), bases(1, 3, seed=2)]
    alone = torch.cat([model(part).logits[0] for part in parts])
    packed = torch.cat(parts, 1)
    offsets = torch.tensor([0, 6, 9], dtype=torch.int32)
    close(model(packed, cu_seqlens=offsets).logits[0], alone, "packed")
    padded = torch.cat([parts[0], torch.cat([torch.zeros(1, 3, dtype=torch.int64), parts[1]], 1)])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :3] = False
    close(model(padded, attention_mask=mask).logits[mask], alone, "padded")
    labels = bases(1, 9, seed=3)
    out = model.loss(packed, labels, cu_seqlens=offsets)
    expected = torch.nn.functional.cross_entropy(alone, labels[0], reduction="sum")
    close(out.loss, expected, "loss")


@torch.no_grad()
def test_the_model_is_the_layers():
    """Both compute one function: embedding, a pre-norm block, norm, head."""
    model = model_of("bimamba")
    embedding, head = StrandEmbedding(16, 8, COMPLEMENT).double(), StrandHead(16, 8, COMPLEMENT).double()
    embedding.weight, head.weight = model.embedding.weight, model.embedding.weight

    def normed(norm, x):
        return torch.cat([norm(half) for half in x.chunk(2, dim=-1)], -1)

    ids = bases(2, 11)
    x = embedding(ids)
    for block in model.blocks:
        x = x + SharedStrands(block.mixer)(normed(block.norm, x))
    close(model(ids).logits, head(normed(model.norm, x)), "logits", 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_classifier_gives_both_strands_the_same_answer(pooling):
    model = model_of("mamba")
    classifier = SequenceClassifier(model, ClassifierConfig(3, pooling=pooling)).double().eval()
    ids, mask = bases(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    logits = classifier(ids, attention_mask=mask)
    close(classifier(reverse_complement(ids), attention_mask=mask.flip(1)), logits, "the other strand", 1e-13)
    close(classifier(ids[1:, :6]), logits[1:], "without padding", 1e-13)
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_a_model_over_both_strands_has_no_state_and_no_step():
    for model in (model_of("mamba"), model_of("bimamba")):
        assert not model.config.is_causal
        for call in (
            lambda model=model: model.init_state(1),
            lambda model=model: model.step(bases(1, 1)[0], model(bases(1, 3)).state),
            lambda model=model: model(bases(1, 3), model(bases(1, 3)).state),
            lambda model=model: model.for_inference(),
        ):
            with pytest.raises(ValueError, match=r"reads both strands .* use a causal model"):
                call()


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS, ids=str)
def test_saved_and_loaded(mixers, tmp_path):
    model = model_of(*mixers).float()
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(bases(2, 9)).logits, model(bases(2, 9)).logits)


def test_other_readers_refuse_a_model_that_is_not_causal():
    from anymamba.data.dna import DnaTokenizer
    from anymamba.evaluation.perplexity import evaluate
    from anymamba.generation.generate import generate

    model = model_of("bimamba").float()
    with pytest.raises(ValueError, match="reads both strands has no state and cannot generate"):
        generate(model, [[7, 8]], DnaTokenizer(), max_new_tokens=1)
    with pytest.raises(ValueError, match="the model is not causal"):
        evaluate(model, None, None)


def test_the_complement_of_the_presets_is_the_tokenizers():
    from anymamba.data.dna import COMPLEMENT_IDS
    from anymamba.models.presets import DNA_COMPLEMENT

    assert tuple(COMPLEMENT_IDS[:12].tolist()) == DNA_COMPLEMENT == COMPLEMENT


@pytest.mark.parametrize("name", ["caduceus-ps-1.9m", "caduceus-ps-7.7m", "caduceus-ph-7.7m"])
def test_presets_have_the_published_sizes(name):
    """7.73 million, as the published models of 16 layers say; strands have no parameters of their own."""
    n_parameters = LanguageModel(preset(name), device="meta").n_parameters()
    assert n_parameters == {"1.9m": 1_934_592, "7.7m": 7_725_312}[name.split("-")[-1]]


@pytest.mark.parametrize(("complement", "words"), [((1, 2, 0), "got 1 for id 0"), ((5,), "got 5 for id 0")])
def test_a_complement_that_is_none(complement, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(vocab_size=12, complement=complement)
    with pytest.raises(ValueError, match="at most one entry for each of 12 ids, got 13"):
        ModelConfig(vocab_size=12, complement=tuple(range(13)))


def test_strands_in_rows_and_side_by_side():
    ids = bases(2, 5)
    assert torch.equal(both_strands(ids, TABLE)[2:], reverse_complement(ids))
    x = torch.randn(2, 5, 6)
    assert torch.equal(side_by_side(in_rows(x)), x)
    assert torch.equal(reversed_strands(reversed_strands(x)), x)


def test_every_sequence_layer_says_whether_it_is_causal():
    from anymamba.models.config import NOT_CAUSAL
    from anymamba.models.mixers import BIDIRECTIONAL, MIXERS, build_mixer

    config = ModelConfig(d_model=16, n_layers=1, vocab_size=12)
    assert set(BIDIRECTIONAL) == set(NOT_CAUSAL)
    for name in MIXERS | BIDIRECTIONAL:
        layer: SequenceLayer = build_mixer(name, config, 0, {"device": "meta"})
        assert layer.is_causal == (name not in NOT_CAUSAL)
