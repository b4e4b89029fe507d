"""Training on genomes that Python has opened."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from anymamba.base.errors import CheckpointError, DataWarning
from anymamba.data.dna import Genome, Interval
from anymamba.models.language_model import LanguageModel
from anymamba.training.config import TrainConfig
from anymamba.training.trainer import read_config, resume, train
from tests.training.dna_runs import cut_back, lines, with_data


@pytest.fixture
def config(dna_config: TrainConfig) -> TrainConfig:
    return dna_config


@pytest.mark.parametrize("kind", ["pyfaidx", "mapping", "intervals"])
def test_genomes_that_are_given(config, fasta, tmp_path, kind):
    """The run is that of their file, and goes on with them; without them an error names the way out."""
    if kind == "pyfaidx":
        genomes = [pytest.importorskip("pyfaidx").Fasta(str(fasta))]
    else:
        with Genome.open(fasta) as genome:
            letters = {name: genome.fetch(name, 0, n) for name, n in genome.lengths.items()}
        whole = [Interval(name, 0, len(text)) for name, text in letters.items()]
        genomes = [letters if kind == "mapping" else (Genome.open(letters), whole)]
    of_file, run = tmp_path / "file", tmp_path / "run"
    train(config, of_file)
    given = with_data(config, paths=())
    train(given, run, genomes=genomes)
    assert lines(run) == lines(of_file) and not read_config(run).carry_state
    cut_back(run, 4)
    with pytest.raises(ValueError, match=r"no training data.*resume\(run, genomes=\.\.\.\)"):
        resume(run)
    resume(run, genomes=genomes)
    assert lines(run) == lines(of_file)
    a, b = (LanguageModel.from_pretrained(folder).state_dict() for folder in (run, of_file))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(CheckpointError, match="data"):
        resume(run, steps=7, genomes=[{"chr1": "ACGT" * 500}])
    with pytest.raises(ValueError, match=r"genomes are given, and data\.paths"):
        train(config, tmp_path / "both", genomes=genomes)


SEQUENCE = {"chr1": "ACGT" * 500}


@pytest.mark.parametrize(
    ("genomes", "error", "match"),
    [
        ([(SEQUENCE, ["chr1:0-100"])], TypeError, "a pair in genomes must be of a genome and its intervals"),
        ([{"chr1": "ACGT"}], ValueError, "no interval to train on has 64 bases"),
        ([], ValueError, "genomes is empty"),
        (SEQUENCE, TypeError, "genomes must be a list"),
        ("genome.fa", TypeError, "genomes must be a list"),
        ([(SEQUENCE, [Interval("chr1", 0, 2001)])], ValueError, "chr1:0-2,001 is no interval of .* has 2,000 bases"),
        ([(SEQUENCE, [Interval("chr1", -5, 100)])], ValueError, "chr1:-5-100 is no interval"),
        ([(SEQUENCE, [Interval("chr1", 100, 5)])], ValueError, "chr1:100-5 is no interval"),
        ([(SEQUENCE, [Interval("chr2", 0, 100)])], ValueError, "has no sequence 'chr2'"),
    ],
)
def test_what_is_given_must_be_genomes(config, tmp_path, genomes, error, match):
    with pytest.raises(error, match=match):
        train(with_data(config, paths=()), tmp_path / "run", genomes=genomes)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_intervals_of_a_table_and_names_that_are_numbers(config, tmp_path):
    letters = "".join(random.Random(0).choices("ACGT", k=2000))
    given = Interval("1", np.int64(0), np.int64(1900))  # type: ignore[arg-type]
    train(with_data(config, paths=()), tmp_path / "run", genomes=[({1: letters}, [given])])
    assert len(lines(tmp_path / "run")) >= 5


@pytest.mark.parametrize("labels", [("train", "valid"), ("", "")])
def test_bases_of_given_intervals_that_are_held_out_too(config, tmp_path, labels):
    letters = {"chr1": "".join(random.Random(0).choices("ACGT", k=3000))}
    intervals = [
        Interval("chr1", start, start + 2000, label=label) for start, label in zip((0, 1000), labels, strict=True)
    ]
    config = with_data(config, paths=(), held_out_fraction=0.3)
    with pytest.warns(DataWarning, match="bases are in intervals to train on and in held-out ones"):
        train(config, tmp_path / "run", genomes=[(letters, [interval]) for interval in intervals])
