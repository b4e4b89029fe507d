"""A small corpus and a config that trains on it within a second."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from anymamba.models.config import ModelConfig
from anymamba.parts.options import MambaOptions
from anymamba.training.config import DataConfig, OptimizerConfig, TrainConfig

WORDS = ["def", "return", "import", "class", "self", "for", "in", "if", "else", "while", "lambda", "yield", "with"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents, some longer than the context and some shorter, one of them empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    draw = random.Random(0)
    for i in range(40):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.choice((2, 5, 40, 120))))
        (folder / f"{i:02}.txt").write_text(text)
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> TrainConfig:
    """Twelve steps of a very small model."""
    return TrainConfig(
        data=DataConfig(paths=(str(corpus),), held_out_fraction=0.2, cache_dir=str(tmp_path / "cache")),
        model=ModelConfig(d_model=16, n_layers=2, vocab_size=257, mamba=MambaOptions(d_state=4)),
        optimizer=OptimizerConfig(warmup_steps=3),
        steps=12,
        batch_size=3,
        context=32,
        log_every=1,
        eval_every=4,
        eval_tokens=500,
        checkpoint_every=5,
        threads=1,
    )


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no loss.png, which takes longer than the steps of these models."""
    monkeypatch.setattr("anymamba.training.trainer.plot_loss", lambda run: None)


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """Two sequences with repeats in lower case and N."""
    draw = random.Random(0)
    path = tmp_path / "genome.fa"
    one = "".join(draw.choices("ACGTacgt", k=5000))
    path.write_text(f">chr1\n{one[:3000]}{'N' * 40}{one[3000:]}\n>chr2\n{one[:700]}\n")
    return path


@pytest.fixture
def dna_config(fasta: Path, tmp_path: Path) -> TrainConfig:
    data = DataConfig(paths=(str(fasta),), cache_dir=str(tmp_path / "cache"))
    model = ModelConfig(d_model=8, n_layers=1, vocab_size=12, mamba=MambaOptions(d_state=4))
    return TrainConfig(
        data=data,
        model=model,
        steps=5,
        batch_size=2,
        context=64,
        log=(),
        log_every=1,
        eval_every=4,
        eval_tokens=128,
        checkpoint_every=4,
        keep_checkpoints=9,
        threads=1,
    )
