"""Genomes as a corpus: splits by position, N, windows on both strands, and the same held-out bases at every length."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anymamba.data.dna import N_ID, DnaTokenizer, reverse_complement
from anymamba.experiments import load_experiment
from anymamba.experiments.dna_length.arms import BASES, settings_of
from anymamba.lab import learning
from anymamba.lab.experiment import Context
from anymamba.lab.genome_models import block_losses, measure_genomes
from anymamba.lab.genomes import (
    ARABIDOPSIS,
    HELD_OUT_UNIT,
    LONG_RUN,
    Part,
    corpus,
    find_file,
    held_out_windows,
    joined,
    read_corpus,
    synthetic_corpus,
    training_windows,
    without_long_runs,
)
from anymamba.lab.learning import batch_generator, build_model, evaluate
from anymamba.lab.optimization import Optimization
from anymamba.lab.results import as_json
from anymamba.lab.saving import SUFFIX, OutOfTime, Saving
from anymamba.models.config import ModelConfig

DATA = Path(__file__).parents[3] / "shared" / "data"
CONTEXT = Context(torch.device("cpu"), 0, lambda *told: None)
HOW = Optimization(1, 1, 1e-3)


def random_bases(n: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), n))


@pytest.fixture
def files(tmp_path):
    texts = {"a": random_bases(3000), "b": random_bases(500, 1)}
    (tmp_path / "genomes").mkdir()
    (tmp_path / "genomes" / "x.fa").write_text("".join(f">{name}\n{text}\n" for name, text in texts.items()))
    return tmp_path, texts


def test_a_sequence_is_split_by_position_and_the_buffer_is_in_neither_side(files):
    folder, texts = files
    parts = (Part("x.fa", "a", 1024, 1500), Part("x.fa", "b"))
    found, tokenizer = read_corpus((find_file(folder, "x.fa"),), parts), DnaTokenizer()
    pieces = [tokenizer.decode(piece) for piece in np.split(found.training.ids.numpy(), found.training.starts[1:])]
    assert pieces == [texts["a"][1500:], texts["b"]]
    assert tokenizer.decode(found.held_out.ids.numpy()) == texts["a"][:1025]


def test_the_split_of_the_three_species_has_buffers_and_whole_units():
    for part in ARABIDOPSIS:
        assert part.held_out % HELD_OUT_UNIT == 0
        assert not part.held_out or part.training_from - part.held_out > 800_000


def test_long_runs_of_n_are_cut_out_and_no_n_is_a_label():
    bases = np.full(100, 7, np.uint8)
    long, short = np.full(LONG_RUN, N_ID, np.uint8), np.full(LONG_RUN - 1, N_ID, np.uint8)
    pieces = without_long_runs(np.concatenate([long, bases, short, bases, long, bases]))
    assert [len(piece) for piece in pieces] == [200 + len(short), 100]
    assert [piece.tolist() for piece in without_long_runs(bases)] == [bases.tolist()]
    ids, labels = training_windows(joined(pieces), 50)(batch_generator(CONTEXT), 200)
    assert N_ID in ids and N_ID not in labels and ((labels == -100) == (labels < 7)).all()


def test_windows_are_the_text_or_its_other_strand():
    texts = [random_bases(60), random_bases(40, 1), random_bases(10, 2)]
    tokenizer = DnaTokenizer()
    make = training_windows(joined([tokenizer.encode_array(text) for text in texts]), 12)
    ids, labels = make(batch_generator(CONTEXT), 2000)
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    rows = [tokenizer.decode([*row, last]) for row, last in zip(ids.tolist(), labels[:, -1].tolist(), strict=True)]
    forward = {text[i : i + 13] for text in texts for i in range(len(text) - 12)}
    given = [row for row in rows if row in forward]
    assert 900 < len(given) < 1100 and set(given) == forward  # every start of the two long stretches occurs
    assert all(reverse_complement(row) in forward for row in rows if row not in forward)
    assert torch.equal(make(batch_generator(CONTEXT), 2000)[0], ids)
    with pytest.raises(ValueError, match="no stretch is longer than a window of 60 bases, the longest has 60"):
        training_windows(joined([tokenizer.encode_array(texts[0])]), 60)


def test_held_out_windows_have_the_same_labels_at_every_length():
    held_out = synthetic_corpus().held_out
    held_out = joined([held_out.ids.numpy(), held_out.ids.numpy()[::-1].copy()])
    flat = [held_out_windows(held_out, length)[1].flatten() for length in (8, 64, 512)]
    assert len(flat[0]) == 1024 and torch.equal(flat[0], flat[1]) and torch.equal(flat[0], flat[2])
    ids, labels = held_out_windows(held_out, 8, most=16)
    assert labels.shape == (4, 8) and torch.equal(ids[1], held_out.ids[8:16].long())
    with pytest.raises(ValueError, match="windows of 24 bases do not tile a held-out stretch of 512"):
        held_out_windows(held_out, 24)


def test_a_model_without_context_has_the_same_block_losses_at_every_length():
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=12, mixers=("mlp",)), CONTEXT)
    batches = [held_out_windows(synthetic_corpus().held_out, length) for length in (8, 64)]
    one, other = (block_losses(model, batch, 128, HOW) for batch in batches)
    assert len(one) == 4 and one == pytest.approx(other, rel=1e-5)
    counts = (batches[0][1] != -100).reshape(4, 128).sum(1).tolist()
    whole = sum(n * value for n, value in zip(counts, one, strict=True)) / sum(counts)
    assert whole == pytest.approx(evaluate(model, batches[1]).loss, rel=1e-5)


def test_long_sequences_are_evaluated_a_few_at_a_time(monkeypatch):
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=12, mixers=("mlp",)), CONTEXT)
    batch, seen, hidden = held_out_windows(synthetic_corpus().held_out, 64), [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids: seen.append(len(ids)) or hidden(ids))
    whole = evaluate(model, batch)
    monkeypatch.setattr(learning, "EVALUATED_AT_ONCE", 128)
    assert evaluate(model, batch).loss == pytest.approx(whole.loss) and seen == [8, 2, 2, 2, 2]


def test_checkpointing_changes_no_number():
    settings = settings_of(BASES["toy"], "mamba", 32, 4e-3)
    found = [measure_genomes(replace(settings, checkpointing=on), CONTEXT) for on in (False, True)]
    assert found[0]["validation_loss"] == found[1]["validation_loss"]
    assert found[0]["block_losses"] == found[1]["block_losses"]
    assert found[0]["read_bases"] == 128 and found[0]["corpus"] == synthetic_corpus().digest


@pytest.mark.parametrize(
    ("name", "arm"),
    [("dna-size", "hyena-d64-rate2"), ("great-apes", "mamba-64-rate100"), ("promoters", "cnn-rate2")],
)
def test_an_arm_that_was_interrupted_goes_on_bit_for_bit(name, arm, tmp_path):
    experiment = load_experiment(name)
    settings = next(one.settings for one in experiment.arms("toy") if one.name == arm)

    def measured(saving=None):
        torch.manual_seed(0)
        values = experiment.measure(settings, replace(CONTEXT, saving=saving))
        return {key: v for key, v in values.items() if key not in ("training_seconds", "tokens_per_second")}

    saving = Saving(tmp_path / f"{arm}-seed0{SUFFIX}", as_json(settings), deadline=0.0)
    with pytest.raises(OutOfTime):
        measured(saving)
    assert saving.path.is_file()
    assert measured(replace(saving, deadline=math.inf)) == measured()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_the_split_of_the_real_genomes_is_fixed():
    found = corpus("arabidopsis", DATA, torch.device("cpu"))
    assert len(found.training.ids) == 97_649_662 and found.digest == "1c6ffa6089d08bf3"
    assert found.held_out.lengths == (3 * HELD_OUT_UNIT + 1, 4 * HELD_OUT_UNIT + 1, 3 * HELD_OUT_UNIT + 1)
    assert found.cut == 163_050


def test_data_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"reads arabidopsis_thaliana_chr1.2bit; give the folder .* with --data"):
        corpus("arabidopsis", None, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match=r"neither .* nor a folder in it has arabidopsis_thaliana_chr1.2bit"):
        corpus("arabidopsis", tmp_path, torch.device("cpu"))
