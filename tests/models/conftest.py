"""Models for the tests of checkpoints: moved away from their initialisation, A_log included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from anymamba import LanguageModel, ModelConfig


def build_moved(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def moved() -> Callable[..., LanguageModel]:
    """Builds a model from a config (and a dtype, a seed)."""
    return build_moved
