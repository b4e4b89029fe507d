from __future__ import annotations

import pytest
import torch
from hash_model import HashModel

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.options import MambaOptions


@pytest.fixture
def hash_model() -> HashModel:
    return HashModel()


@pytest.fixture(scope="session")
def mamba() -> LanguageModel:
    """A small Mamba model that is far from its initialisation, so that its logits spread and depend on the past."""
    torch.manual_seed(1)
    config = ModelConfig(d_model=24, n_layers=2, vocab_size=37, tie_embeddings=False, mamba=MambaOptions(d_state=5))
    model = LanguageModel(config)
    with torch.no_grad():
        model.embedding.weight.mul_(30)
        model.head.weight.mul_(3)
        model.head.weight[37:] = 50.0
    return model
