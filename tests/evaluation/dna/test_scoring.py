"""Scores of variants against the log-likelihood of whole windows; masked scores against a loop."""

from __future__ import annotations

import json

import pytest
import torch

from anymamba.base.errors import DataWarning
from anymamba.data.dna import DnaTokenizer, Genome, Interval, reverse_complement
from anymamba.data.dna.vcf import Variant
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.evaluation.dna import embed, score, trained_with_masks
from anymamba.models.checkpoints import open_checkpoint
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

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


@torch.no_grad()
def test_names_with_and_without_chr(genome, tokenizer, model_of):
    ref = genome.fetch("chr2", 9, 10)
    variants = [Variant(name, 9, ref, ("A" if ref != "A" else "C",)) for name in ("chr2", "2")]
    with pytest.warns(DataWarning, match="names with and without chr are taken as the same sequence"):
        first, second = score(model_of("mamba"), tokenizer, genome, variants, context=10)
    assert first == second
    with pytest.raises(ValueError, match=r"has no sequence 'chr9'"):
        list(score(model_of("mamba"), tokenizer, genome, [variants[0]._replace(name="chr9")]))


@pytest.mark.parametrize("mixer", ["mamba", "bimamba"])
@pytest.mark.parametrize(
    ("ref", "alts", "bad"), [(None, ("N",), "N"), (None, ("A", "C", "aEc"), "aEc"), ("R", ("A",), "R")]
)
def test_letters_that_are_no_bases_are_refused(genome, tokenizer, model_of, mixer, ref, alts, bad):
    variant = Variant("chr2", 9, ref or genome.fetch("chr2", 9, 10), alts)
    with pytest.raises(ValueError, match=f"the allele '{bad}' of chr2:10 has letters other than A, C, G and T"):
        list(score(model_of(mixer), tokenizer, genome, [variant]))


@torch.no_grad()
def test_u_is_read_as_t(tmp_path, genome, tokenizer, model_of):
    text = genome.fetch("chr2", 0, 40)
    (tmp_path / "rna.fa").write_text(f">chr2\n{text.replace('T', 'U')}\n")
    at = text.index("T", 5)
    with Genome.open(tmp_path / "rna.fa", cache_dir=tmp_path / "cache") as rna:
        variants = [Variant("chr2", at, ref, ("C",)) for ref in ("T", "U", "u")]
        found = list(score(model_of("mamba"), tokenizer, rna, variants))
    assert found == list(score(model_of("mamba"), tokenizer, genome, variants))
    assert found[0] == found[1] == found[2]


def test_how_a_model_was_trained(tmp_path, tokenizer, model_of):
    """A run folder says so, and so do the folders in it."""
    run = tmp_path / "run"
    for folder in (run, run / "best"):
        model_of("mamba").save_pretrained(folder, tokenizer)
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    for objective, masked in (("mlm", True), ("causal", False), ("other", None)):
        (run / "train_config.json").write_text(json.dumps({"objective": objective}))
        for folder in (run, run / "best", checkpoint, str(run)):
            assert trained_with_masks(folder) is masked, folder
        assert trained_with_masks(open_checkpoint(run / "best")) is masked
    (run / "train_config.json").unlink()
    assert trained_with_masks(run) is trained_with_masks(run / "best") is None


class Folding:
    """A tokenizer of DNA that is not ours: one token a base, and all other letters are unknown."""

    name, vocab_size, eos_id, fingerprint = "hub", 7, None, "hub"

    def encode(self, text):
        return ["ACGTN".find(letter) + 1 for letter in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def test_a_model_of_text_is_refused(genome, tokenizer):
    """A vocabulary that is large enough does not make a model of bytes one of DNA."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257)).eval()
    ref = genome.fetch("chr2", 9, 10)
    variants = [Variant("chr2", 9, ref, ("A" if ref != "A" else "C",))]
    for ask in (
        lambda tokenizer: score(model, tokenizer, genome, variants),
        lambda tokenizer: embed(model, tokenizer, genome, [Interval("chr2", 0, 9)]),
    ):
        with pytest.raises(ValueError, match=r"the tokenizer bytes is one of text, not of DNA.*--data genome\.fa"):
            list(ask(ByteTokenizer()))
        assert len(list(ask(Folding()))) == len(list(ask(tokenizer))) == 1


def test_refusals(genome, tokenizer, model_of):
    variant = Variant("chr2", 3, "A" if genome.fetch("chr2", 3, 4) != "A" else "C", ("G",))
    with pytest.raises(ValueError, match=r"REF of chr2:4 is ., and .* has .; is it another assembly"):
        list(score(model_of("mamba"), tokenizer, genome, [variant]))
    with pytest.raises(ValueError, match="the model is not causal, so it is scored with masks"):
        list(score(model_of("bimamba"), tokenizer, genome, [], masked=False))
    with pytest.raises(ValueError, match="the model a vocabulary of 12"):
        list(score(model_of("mamba"), ByteTokenizer(), genome, []))
