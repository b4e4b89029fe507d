from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live_server import Live, live

from anymamba.data.tokenizer import load_tokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> Path:
    """A byte-level model with random weights whose logits spread, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "nano"
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257))
    with torch.no_grad():
        model.embedding.weight.mul_(40)
    model.save_pretrained(folder, load_tokenizer(None))
    return folder


@pytest.fixture(scope="session")
def server(nano, tmp_path_factory) -> Iterator[Live]:
    """A server that tests share; what they change in it must be under names of their own."""
    with live(nano, sessions=tmp_path_factory.mktemp("sessions"), packed=True) as running:
        yield running
