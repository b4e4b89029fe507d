"""A small genome, and small models of DNA with random weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anymamba.data.dna import DnaTokenizer, Genome
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.options import MambaOptions

COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)


def letters(n: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=n))


@pytest.fixture(scope="session")
def genome_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences: chr1 with lower case and some N, chr2 a short one."""
    one = letters(300, 1)
    one = one[:100] + one[100:140].lower() + one[140:200] + "NNNNN" + one[205:]
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text(f">chr1 first\n{one}\n>chr2\n{letters(40, 2)}\n")
    return path


@pytest.fixture
def genome(genome_file: Path, tmp_path: Path) -> Iterator[Genome]:
    with Genome.open(genome_file, cache_dir=tmp_path / "cache") as opened:
        yield opened


@pytest.fixture
def tokenizer() -> DnaTokenizer:
    return DnaTokenizer()


@pytest.fixture
def model_of() -> Callable[..., LanguageModel]:
    def make(*mixers: str, complement: tuple[int, ...] = (), **options) -> LanguageModel:
        torch.manual_seed(0)
        config = ModelConfig(
            d_model=16,
            n_layers=max(2, len(mixers)),
            vocab_size=12,
            pad_vocab_multiple=16,
            mixers=mixers,
            mamba=MambaOptions(d_state=4),
            complement=complement,
            **options,
        )
        model = LanguageModel(config).double().eval()
        with torch.no_grad():
            model.embedding.weight.mul_(20)  # so that the context matters
        return model

    return make
