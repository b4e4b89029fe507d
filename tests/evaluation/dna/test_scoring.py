"""Scores of variants against the log-likelihood of whole windows; masked scores against a loop."""

from __future__ import annotations

import pytest
import torch

from anymamba.data.dna import DnaTokenizer, Genome, reverse_complement
from anymamba.data.dna.vcf import Variant
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.evaluation.dna import score

COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)


def nats(model, text: str) -> float:
    """-log p of a text after its first base; N is not counted."""
    ids = torch.tensor([DnaTokenizer().encode(text)])
    log_p = torch.log_softmax(model(ids[:, :-1]).logits, -1).gather(-1, ids[:, 1:, None])[0, :, 0]
    return -log_p[ids[0, 1:] != 11].sum().item()


def whole_windows(model, genome: Genome, variant: Variant, context: int) -> list[tuple[float, float]]:
    """The score of each allele on both strands, from the likelihoods of whole windows."""
    end = variant.start + len(variant.ref)
    before = genome.fetch(variant.name, max(0, variant.start - context), variant.start)
    after = genome.fetch(variant.name, end, min(genome.lengths[variant.name], end + context))
    reference = before + variant.ref + after
    found = []
    for alt in variant.alts:
        other = before + alt + after
        plus = nats(model, reference) - nats(model, other)
        minus = nats(model, reverse_complement(reference)) - nats(model, reverse_complement(other))
        found.append((plus, minus))
    return found


def variants_of(genome: Genome) -> list[Variant]:
    """Substitutions, insertions, deletions, several alleles, near the ends, in lower case, and beside N."""
    places = [(3, 1), (60, 1), (90, 3), (110, 2), (196, 4), (206, 1), (297, 2)]
    made = []
    for start, size in places:
        ref = genome.fetch("chr1", start, start + size).upper()
        others = ["ACGT"["ACGT".index(ref[0]) - 1] + ref[1:], ref[0] + "GATTACA" + ref[1:], ref[:1]]
        made.append(Variant("chr1", start, ref, tuple(alt for alt in others if alt != ref)))
    made.append(Variant("chr2", 20, "", ("AC",)))
    made.append(Variant("chr2", 20, genome.fetch("chr2", 20, 22), ("",)))
    return made


@torch.no_grad()
@pytest.mark.parametrize(("mixers", "batch_size"), [(("mamba",), 1), (("mamba", "attention"), 4)])
def test_a_score_is_the_difference_of_the_windows_likelihoods(genome, tokenizer, model_of, mixers, batch_size):
    model, variants = model_of(*mixers), variants_of(genome)
    found = list(score(model, tokenizer, genome, variants, context=30, batch_size=batch_size))
    assert len(found) == len(variants)
    for variant, scores in zip(variants, found, strict=True):
        for got, (plus, minus) in zip(scores, whole_windows(model, genome, variant, 30), strict=True):
            assert got.plus == pytest.approx(plus, abs=1e-9), variant
            assert got.minus == pytest.approx(minus, abs=1e-9), variant
            assert got.score == pytest.approx((plus + minus) / 2, abs=1e-9)


@torch.no_grad()
def test_the_bases_before_are_read_once_for_all_alleles(genome, tokenizer, model_of, monkeypatch):
    model, read = model_of("mamba"), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest, **o: read.append(ids.numel()) or hidden(ids, *rest, **o))
    ref = genome.fetch("chr1", 60, 61)
    others = tuple(base for base in "ACGT" if base != ref)
    list(score(model, tokenizer, genome, [Variant("chr1", 60, ref, others)], context=50))
    assert read == [2 * 50, 2 * 4 * 50]


@torch.no_grad()
def test_a_strand_without_context_is_left_out(genome, tokenizer, model_of):
    model = model_of("mamba")
    ref = genome.fetch("chr2", 0, 1)
    alt = "A" if ref != "A" else "C"
    ((first,),) = score(model, tokenizer, genome, [Variant("chr2", 0, ref, (alt,))])
    assert first.plus is None and first.score == first.minus is not None
    last = genome.fetch("chr2", 39, 40)
    ((end,),) = score(model, tokenizer, genome, [Variant("chr2", 39, last, ("A" if last != "A" else "C",))])
    assert end.minus is None and end.score == end.plus is not None


@torch.no_grad()
def test_lower_case_stays_lower_for_tokenizers_that_keep_it(genome, model_of):
    """Else a model would prefer REF for its case only."""
    model = model_of("mamba")
    ref = genome.fetch("chr1", 110, 111)
    assert ref.islower()
    alt = "A" if ref != "a" else "C"
    window = [genome.fetch("chr1", 90, 110), genome.fetch("chr1", 111, 131)]
    seen = []

    class Keeping(DnaTokenizer):
        def encode_batch(self, texts):
            seen.extend(texts)
            return super().encode_batch(texts)

    list(score(model, Keeping("keep"), genome, [Variant("chr1", 110, ref.upper(), (alt,))], context=20))
    assert alt.lower() + window[1] in seen and ref + window[1] in seen


@torch.no_grad()
@pytest.mark.parametrize("complement", [(), COMPLEMENT])
def test_masked_scores(genome, tokenizer, model_of, complement):
    model = model_of("bimamba", complement=complement)
    variants = variants_of(genome)[:-2]
    found = list(score(model, tokenizer, genome, variants, context=30, batch_size=3))
    for variant, scores in zip(variants, found, strict=True):
        end = variant.start + len(variant.ref)
        before = genome.fetch("chr1", max(0, variant.start - 30), variant.start)
        after = genome.fetch("chr1", end, min(300, end + 30))
        for alt, got in zip(variant.alts, scores, strict=True):
            if len(alt) != len(variant.ref):
                assert got == (None, None, None)
                continue
            strands = []
            for flip in (str, reverse_complement):
                text = [before, variant.ref, after]
                left, ref, right = text if flip is str else [flip(part) for part in text[::-1]]
                ids = torch.tensor([tokenizer.encode(left) + [3] * len(ref) + tokenizer.encode(right)])
                log_p = torch.log_softmax(model(ids).logits, -1)[0, len(left) : len(left) + len(ref)]
                pair = [torch.tensor(tokenizer.encode(flip(bases))) for bases in (alt, variant.ref)]
                a, b = (log_p.gather(1, one[:, None]).sum().item() for one in pair)
                strands.append(a - b)
            assert (got.plus, got.minus) == pytest.approx(tuple(strands), abs=1e-9)
            assert got.score == pytest.approx(sum(strands) / 2, abs=1e-9)


def test_refusals(genome, tokenizer, model_of):
    variant = Variant("chr2", 3, "A" if genome.fetch("chr2", 3, 4) != "A" else "C", ("G",))
    with pytest.raises(ValueError, match=r"REF of chr2:4 is ., and .* has .; is it another assembly"):
        list(score(model_of("mamba"), tokenizer, genome, [variant]))
    with pytest.raises(ValueError, match="the model is not causal, so it is scored with masks"):
        list(score(model_of("bimamba"), tokenizer, genome, [], masked=False))
    with pytest.raises(ValueError, match="the model a vocabulary of 12"):
        list(score(model_of("mamba"), ByteTokenizer(), genome, []))
