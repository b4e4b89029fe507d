"""Training on DNA: what is read and held out, runs that are resumed, and what is refused."""

from __future__ import annotations

import random
import shutil
import struct
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from anymamba.base.errors import CheckpointError, DataWarning
from anymamba.data.dna import DnaTokenizer, Genome, Interval, reverse_complement_ids
from anymamba.data.tokenizer import ByteTokenizer, load_tokenizer
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import PRESETS
from anymamba.training.config import GenomeConfig, TrainConfig
from anymamba.training.data import held_out_batches, open_data, run_tokenizer, training_batches
from anymamba.training.genome_splits import held_out_ends, without
from anymamba.training.genomes import GenomeData
from anymamba.training.length_warmup import steps_of_epochs
from anymamba.training.metrics import read_metrics
from anymamba.training.trainer import read_config, resume, train
from tests.training.dna_runs import cut_back, lines, with_data

A, N = 7, 11


@pytest.fixture
def config(dna_config: TrainConfig) -> TrainConfig:
    return dna_config


def opened(config: TrainConfig) -> tuple[GenomeData, GenomeData | None]:
    training, held_out = open_data(config, run_tokenizer(config))
    assert isinstance(training, GenomeData)
    return training, held_out


def test_batches(config, fasta):
    """Each base is a token that predicts the next one of its window; N is an input and no label."""
    config = with_data(config, genome=GenomeConfig(max_unknown=1.0), held_out_fraction=0.0)
    training, held_out = opened(config)
    assert held_out is None and training.n_tokens == training.n_bytes == 5740
    n_unknown = 0
    with Genome.open(fasta) as genome:
        known = DnaTokenizer().encode_array(genome.fetch("chr1", 0, 5040)).tolist()
    text = bytes(known)
    for batch in islice(training_batches(training, config, None, None), 60):
        assert batch.input_ids.shape == batch.labels.shape == (2, 64)
        assert batch.cu_seqlens.tolist() == [0, 64, 128] and not batch.carried.any()
        assert (batch.labels[:, -1] == -100).all()
        following = batch.input_ids[:, 1:]
        assert torch.equal(batch.labels[:, :-1], torch.where(following == N, -100, following))
        n_unknown += int((following == N).sum())
        for row in batch.input_ids.tolist():
            assert bytes(row) in text or bytes(reverse_complement_ids(row).tolist()) in text
    assert n_unknown


def test_kept_case_and_one_strand(config, fasta):
    config = with_data(config, genome=GenomeConfig(case="keep", reverse_complement=False))
    assert run_tokenizer(config).vocab_size == 16
    training, _ = opened(config)
    batch = next(training_batches(training, config, None, None))
    assert (batch.input_ids > N).any()
    with Genome.open(fasta) as genome:
        text = DnaTokenizer("keep").encode_array(genome.fetch("chr1", 0, 5040)).tobytes()
    assert bytes(batch.input_ids[0].tolist()) in text


def test_each_process_gets_its_rows(config):
    training, _ = opened(config)
    whole = islice(training_batches(training, config, None, None), 5)
    parts = [islice(training_batches(training, config, None, None, rank=r, world_size=2), 5) for r in (0, 1)]
    for batch, *mine in zip(whole, *parts, strict=True):
        assert torch.equal(batch.input_ids, torch.cat([part.input_ids for part in mine]))
        assert all(part.position == batch.position for part in mine)
        assert mine[0].cu_seqlens.tolist() == [0, 64]
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 processes, got 2"):
        next(training_batches(training, config, None, None, rank=0, world_size=4))


def test_held_out_batches_are_the_same_at_every_call_and_end(config):
    _, held_out = opened(config)
    assert held_out is not None
    first, second = (list(held_out_batches(held_out, replace(config, eval_tokens=10**6), None)) for _ in range(2))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
    assert sum(len(batch.input_ids) for batch in first) == held_out.n_windows(64)
    few = list(held_out_batches(held_out, replace(config, eval_tokens=64), None))
    assert [len(batch.input_ids) for batch in few] == [1]


# ------------------------------------------------------------------------------------------ what is held out


def test_the_ends_of_long_intervals_are_held_out(config):
    training, held_out = opened(config)
    (_, kept), (_, out) = training.sources[0], held_out.sources[0]
    assert out == [Interval("chr1", 4940, 5040), Interval("chr2", 636, 700)]
    assert kept == [Interval("chr1", 0, 4940), Interval("chr2", 0, 636)]


def test_of_short_intervals_a_hash_decides_and_overlaps_are_cut():
    g = Genome.open({"a": "A" * 100_000})
    intervals = [Interval("a", 50 * i, 50 * i + 100, "+-"[i % 2]) for i in range(1900)]
    (kept,), (out,) = held_out_ends([(g, intervals)], 0.1, 64)
    assert 120 < len(out[1]) < 260
    covered = {i for interval in out[1] for i in range(interval.start, interval.end)}
    assert not any(covered.intersection(range(i.start, i.end)) for i in kept[1])
    assert held_out_ends([(g, intervals)], 0.1, 64)[1] == [out]


def test_parts_outside():
    whole = [Interval("a", 10, 50, "-", "x"), Interval("b", 0, 5)]
    assert without(whole, []) == whole
    removed = [
        Interval("a", 0, 12),
        Interval("a", 20, 30),
        Interval("a", 25, 35),
        Interval("a", 49, 80),
        Interval("c", 0, 9),
    ]
    assert without(whole, removed) == [
        Interval("a", 12, 20, "-", "x"),
        Interval("a", 35, 49, "-", "x"),
        Interval("b", 0, 5),
    ]
    assert without(whole, [Interval("a", 0, 99), Interval("b", 0, 5, "-")]) == []


def test_labels_of_a_bed_file_are_splits(config, fasta, tmp_path):
    bed = tmp_path / "splits.bed"
    bed.write_text("chr1\t0\t2000\ttrain\nchr1\t2000\t2500\tvalid\nchr1\t2600\t2900\ttest\nchr2\t0\t300\tTraining\n")
    training, held_out = opened(with_data(config, paths=(str(fasta), str(bed))))
    assert [i[:3] for i in training.sources[0][1]] == [("chr1", 0, 2000), ("chr2", 0, 300)]
    assert [i[:3] for i in held_out.sources[0][1]] == [("chr1", 2000, 2500)]
    assert "splits by the labels of the BED files: 2 train, 1 valid, 1 test; test is not read" in training.notes


def test_splits_without_one_to_train_on(config, fasta, tmp_path):
    bed = tmp_path / "splits.bed"
    bed.write_text("chr1\t0\t2000\tvalid\nchr1\t2600\t2900\ttest\n")
    with pytest.raises(
        ValueError, match="no interval to train on: the labels of the BED files are 0 train, 1 valid, 1 test; "
    ):
        opened(with_data(config, paths=(str(fasta), str(bed))))


def test_intervals_without_a_window_are_counted(config, fasta, tmp_path):
    bed = tmp_path / "splits.bed"
    rows = ("0\t2000\ttrain", "2000\t2063\ttrain", "2100\t2200\tvalid", "2300\t2301\tvalid", "2400\t2463\tvalid")
    bed.write_text("".join(f"chr1\t{row}\n" for row in rows))
    config = with_data(config, paths=(str(fasta), str(bed)))
    training, held_out = opened(config)
    notes = training.run_notes(config, held_out)
    assert "1 intervals to train on are shorter than 64 bases and have no window" in notes
    assert "2 held-out intervals are shorter than 64 bases and have no window" in notes


def test_intervals_with_windows_in_the_first_stages_only(config, fasta, tmp_path):
    bed = tmp_path / "splits.bed"
    bed.write_text("".join(f"chr1\t{row}\ttrain\n" for row in ("0\t2000", "2000\t2015", "2100\t2163", "2200\t2216")))
    config = with_data(config, paths=(str(fasta), str(bed)))
    config = replace(config, length_warmup=True, length_warmup_start=16, steps=1000)
    training, _ = opened(config)
    notes = training.run_notes(config, None)
    assert "1 intervals to train on are shorter than 16 bases and have no window" in notes
    assert "2 intervals to train on are shorter than 64 bases and have windows only in stages of shorter ones" in notes
    assert not any("shorter than 64 bases and have no window" in note for note in notes)


def test_valid_is_not_read_where_eval_paths_are_given(config, fasta, tmp_path):
    splits, other = tmp_path / "splits.bed", tmp_path / "w.bed"
    splits.write_text("chr1\t0\t2000\ttrain\nchr1\t2000\t2500\tvalid\nchr1\t2600\t2900\ttest\n")
    other.write_text("chr2\t0\t300\n")
    training, held_out = opened(with_data(config, paths=(str(fasta), str(splits)), eval_paths=(str(other),)))
    assert [i[:3] for i in held_out.sources[0][1]] == [("chr2", 0, 300)]
    told = "splits by the labels of the BED files: 1 train, 1 valid, 1 test; test is not read, nor is valid: "
    assert f"{told}what eval_paths names (--data.eval-paths) is held out" in training.notes


@pytest.mark.parametrize("kind", ["packed", "indexed", ".2bit"])
def test_epochs_of_a_length_warm_up_are_of_the_windows_that_remain(config, tmp_path, kind):
    """4,096 bases and 8,192 N: two epochs are two passes over the bases, whatever the format."""
    letters = "".join(random.Random(1).choices("ACGT", k=4096)) + "N" * 8192
    path = tmp_path / ("half.2bit" if kind == ".2bit" else "half.fa")
    record = struct.pack("<6I", 12288, 1, 4096, 8192, 0, 0) + random.Random(2).randbytes(3072)
    two_bit = struct.pack("<4I", 0x1A412743, 0, 1, 0) + b"\1a" + struct.pack("<I", 22) + record
    path.write_bytes(two_bit if kind == ".2bit" else f">a\n{letters}\n".encode())
    if kind == "indexed":
        Path(f"{path}.fai").write_text("a\t12288\t3\t12288\t12289\n")
    config = with_data(config, paths=(str(path),), held_out_fraction=0.0)
    config = replace(config, context=256, batch_size=2, length_warmup=True, length_warmup_start=64, steps=100)
    training, _ = opened(config)
    assert [training.n_windows(length) for length in (64, 128, 256)] == [64, 32, 16]
    assert steps_of_epochs(config, training.n_windows) == 3 * 16
    notes = training.run_notes(config, None)
    assert (
        "length warm-up: 8 x 64 for 16 steps, 4 x 128 for 16 steps, then 2 x 256; windows that the first epoch "
        "keeps, the others have too many N: 64 of 192, 32 of 96, 16 of 48"
    ) in notes
    seen = [batch.input_ids for batch in islice(training_batches(training, config, None, None), 16)]
    assert sum(ids.numel() for ids in seen) == 2 * 4096


@pytest.mark.parametrize("split", ["train", "valid", "test", "Validation"])
@pytest.mark.parametrize("other", ["gene", ""])
def test_names_of_splits_and_other_labels(config, fasta, tmp_path, split, other):
    """What is labelled valid or test is never trained on."""
    bed = tmp_path / "mixed.bed"
    bed.write_text(f"chr1\t0\t2000\t{other}\nchr1\t2600\t2900\t{split}\nchr2\t0\t300\t{other}\n")
    words = f"are names of splits, such as '{split}', and others, such as '{other}'; give all intervals one of train"
    with pytest.raises(ValueError, match=words):
        opened(with_data(config, paths=(str(fasta), str(bed))))


def test_a_genome_with_splits_beside_one_without(config, fasta, tmp_path):
    """Nothing with the label test is ever read."""
    bed, other = tmp_path / "splits.bed", tmp_path / "other.fa"
    bed.write_text("chr1\t0\t2000\ttrain\nchr1\t2600\t2900\ttest\n")
    other.write_text(">x\n" + "ACGT" * 50)
    mixed = with_data(config, paths=(str(fasta), str(bed), str(other)), eval_paths=(str(other),))
    with pytest.warns(DataWarning, match="200 bases are in intervals to train on and in held-out ones"):
        training, held_out = opened(mixed)
    assert [i[:3] for _, intervals in training.sources for i in intervals] == [("chr1", 0, 2000), ("x", 0, 200)]
    assert held_out.n_tokens == 200
    bed.write_text("chr1\t0\t2000\ttrain\nchr1\t2600\t2900\tgene\n")
    with pytest.raises(ValueError, match="are names of splits, such as 'train', and others, such as 'gene'"):
        opened(mixed)


def test_held_out_windows_that_are_dropped_are_counted(config, tmp_path):
    """Eight windows are held out; the first, the last and those between them alike."""
    path = tmp_path / "n.fa"
    held_out = "".join("N" * 64 if i in (0, 2, 3, 7) else "ACGT" * 16 for i in range(8))
    path.write_text(">a\n" + "ACGT" * 512 + held_out + "\n")
    config = replace(with_data(config, paths=(str(path),), held_out_fraction=0.2), eval_tokens=10**6, steps=1)
    training, data = opened(config)
    assert data.count_held_out(config) == (4, 4) and data.n_dropped == 4
    assert sum(len(batch.input_ids) for batch in held_out_batches(data, config, None)) == 4
    assert "4 held-out windows have too many N and are dropped" in training.run_notes(config, data)
    assert train(config, tmp_path / "run").dropped_held_out_windows == 4
    _, data = opened(replace(config, eval_tokens=64))
    assert data.n_dropped == 1, "an evaluation reads the first two windows, and drops one of them"
    assert train(replace(config, eval_tokens=0), tmp_path / "none").dropped_held_out_windows is None


def test_held_out_stretches_of_N_are_none(config, tmp_path):
    path = tmp_path / "n.fa"
    path.write_text(">a\n" + "ACGT" * 500 + "N" * 100 + "\n")
    with pytest.warns(DataWarning, match=r"without N is left for it \(1 windows have too many N\)"):
        _, held_out = opened(with_data(config, paths=(str(path),)))
    assert held_out is None


def test_files_to_evaluate_on(config, fasta, tmp_path):
    bed, other = tmp_path / "valid.bed", tmp_path / "other.fa"
    bed.write_text("chr1\t4000\t5000\nchr9\t0\t5\n")
    other.write_text(">x\n" + "ACGT" * 50)
    with pytest.warns(DataWarning, match="1,000 bases are in intervals to train on and in held-out ones"):
        training, held_out = opened(with_data(config, eval_paths=(str(bed),)))
    assert held_out.sources[0][1] == [Interval("chr1", 4000, 5000)]
    assert f"{bed}: skipped intervals of sequences that the genome does not have: 1" in training.notes
    _, held_out = opened(with_data(config, eval_paths=(str(other),)))
    assert held_out.n_tokens == 200


def test_nothing_to_hold_out(config, fasta, tmp_path):
    bed = tmp_path / "a.bed"
    bed.write_text("chr1\t0\t70\n")
    with pytest.warns(
        DataWarning, match="nothing is held out, so there is no evaluation: no stretch of 64 bases without N is left"
    ):
        _, held_out = opened(with_data(config, paths=(str(fasta), str(bed)), held_out_fraction=1e-9))
    assert held_out is None


# ------------------------------------------------------------------------------------------ runs


class Said:
    """A report that keeps the outline."""

    outline = None

    def __getattr__(self, name):
        return lambda *arguments: None

    def on_start(self, outline):
        self.outline = outline


def test_a_run(config, fasta, tmp_path):
    report = Said()
    result = train(config, tmp_path / "run", report)
    assert result.unit == "base" and result.steps == 5 and result.tokens == 5 * 128
    assert result.held_out_bits_per_byte == pytest.approx(
        read_metrics(tmp_path / "run")[-1]["nats_per_token"] * 1.4427, rel=1e-3
    )
    assert report.outline.unit == "base"
    assert report.outline.notes == (
        "DNA: 2 intervals; both strands, upper and lower case are one, windows with more than 10% of N are dropped, "
        "other N are not predicted",
        f"{fasta}: 40 N",
    )
    assert isinstance(load_tokenizer(tmp_path / "run"), DnaTokenizer)
    assert not read_config(tmp_path / "run").carry_state, "windows do not continue each other"
    model = LanguageModel.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == 12 and model.config.padded_vocab_size == 16


def test_a_length_warm_up_is_resumed_bit_for_bit_at_any_stage(config, tmp_path):
    """Steps 1 to 3 are of 16 tokens, 4 to 6 of 32, and then of 64; a step has two batches."""
    config = replace(
        with_data(config, genome=GenomeConfig(max_unknown=0.0)),
        steps=8,
        accumulation=2,
        length_warmup=True,
        length_warmup_start=16,
        length_warmup_epochs=0.13,
        checkpoint_every=1,
        eval_every=100,
    )
    training, _ = opened(config)
    shapes = [tuple(b.input_ids.shape) for b in islice(training_batches(training, config, None, None), 16)]
    assert shapes == [(8, 16)] * 6 + [(4, 32)] * 6 + [(2, 64)] * 4
    straight = tmp_path / "straight"
    result = train(config, straight)
    assert result.dropped_windows
    weights = LanguageModel.from_pretrained(straight).state_dict()
    for step in (2, 3, 7):
        run = tmp_path / f"from-{step}"
        shutil.copytree(straight, run)
        cut_back(run, step)
        assert resume(run).dropped_windows == result.dropped_windows
        assert lines(straight) == lines(run)
        resumed = LanguageModel.from_pretrained(run).state_dict()
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.parametrize("by_epochs", [True, False])
def test_steps_of_a_length_warm_up(config, tmp_path, by_epochs):
    """Epochs at each length, or an error that leaves nothing."""
    config = replace(config, length_warmup=True, length_warmup_start=16, length_warmup_epochs=0.13, accumulation=2)
    report, run = Said(), tmp_path / "run"
    if not by_epochs:
        with pytest.raises(ValueError, match="the length warm-up takes 6 steps before it reaches 64 tokens"):
            train(config, run)
        assert not run.exists()
        return
    result = train(config, run, report, by_epochs=True)
    assert result.steps == read_config(run).steps == 9
    assert "no --steps: 9, which are 0.13 epochs at each length, 64 included" in report.outline.notes
    cut_back(run, 4)
    assert resume(run).steps == 9


def test_steps_of_a_run_without_a_length_warm_up(config, tmp_path):
    assert train(config, tmp_path / "run", by_epochs=True).steps == config.steps


def test_a_run_is_not_resumed_with_other_intervals(config, fasta, tmp_path):
    bed = tmp_path / "a.bed"
    bed.write_text("chr1\t0\t3000\n")
    config = with_data(config, paths=(str(fasta), str(bed)))
    train(config, tmp_path / "run")
    cut_back(tmp_path / "run", 4)
    bed.write_text("chr1\t0\t2990\n")
    with pytest.raises(CheckpointError, match="the training data has changed"):
        resume(tmp_path / "run")
    bed.write_text("chr1\t10\t3010\n")
    with pytest.raises((CheckpointError, ValueError), match=r"changed|of other intervals"):
        resume(tmp_path / "run")


def test_a_model_of_dna_is_trained_on(config, tmp_path):
    train(config, tmp_path / "first")
    result = train(replace(config, start_from=str(tmp_path / "first"), steps=2), tmp_path / "second")
    assert result.steps == 2 and isinstance(load_tokenizer(tmp_path / "second"), DnaTokenizer)


# ------------------------------------------------------------------------------------------ refusals


def test_what_does_not_go_together(config, fasta, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("words")
    ByteTokenizer().save(tmp_path / "bytes")
    DnaTokenizer("keep").save(tmp_path / "kept")
    cases = {
        "is DNA and .* is text": with_data(config, paths=(str(fasta), str(text))),
        "text_field is for text, and the data is DNA": with_data(config, text_field="body"),
        "piece is for text": with_data(config, piece=100),
        "workers is for text": with_data(config, workers=1),
        "the data is DNA and the tokenizer bytes is for text": with_data(config, tokenizer=str(tmp_path / "bytes")),
        "options of data.genome are for DNA": with_data(config, paths=(str(text),), genome=GenomeConfig(case="keep")),
        "length_warmup and": replace(with_data(config, paths=(str(text),)), length_warmup=True, length_warmup_start=32),
        "no interval to train on has 8,192 bases": replace(config, context=8192),
    }
    for words, wrong in cases.items():
        with pytest.raises(ValueError, match=words):
            train(wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    kept = with_data(config, tokenizer=str(tmp_path / "kept"))
    assert run_tokenizer(kept).vocab_size == 16
    with pytest.raises(ValueError, match="max_unknown must be a share"):
        GenomeConfig(max_unknown=-1)


# ------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    ("name", "n_parameters"), [("dna-1.4m", 1_401_472), ("dna-7.0m", 7_012_608), ("dna-40.7m", 40_694_272)]
)
def test_presets_have_the_papers_parameters(name, n_parameters):
    model = LanguageModel(PRESETS[name], device="meta")
    assert model.n_parameters() == n_parameters
    assert f"{n_parameters / 1e6:.1f}m" == name.removeprefix("dna-")
    assert model.embedding.weight.shape[0] == 16
