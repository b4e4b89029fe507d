"""Runs whose steps take only algorithms of torch that repeat bit for bit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anymamba.training import trainer
from anymamba.training.config import TrainConfig
from anymamba.training.repeating import CUBLAS, repeatable
from anymamba.training.trainer import resume, train


def settings() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_the_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    before = settings()
    with repeatable(False):
        assert settings() == before and CUBLAS not in os.environ
    with pytest.raises(ZeroDivisionError), repeatable(True):
        assert settings() == (True, False, False) and os.environ[CUBLAS] == ":4096:8"
        raise ZeroDivisionError
    assert settings() == before
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with repeatable(True):
            assert settings()[:2] == (True, False)
        assert settings()[:2] == (True, True)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_a_choice_of_the_user_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":16:8")
    with repeatable(True):
        assert os.environ[CUBLAS] == ":16:8"


@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_of_a_run_and_of_its_resumption(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    monkeypatch.setenv(CUBLAS, ":4096:8")
    noted: list[bool] = []
    batch_loss = trainer.batch_loss

    def step(*given):
        with torch.no_grad():
            noted.append(torch.are_deterministic_algorithms_enabled())
        return batch_loss(*given)

    def sample(*given):
        """Samples sum probabilities, for which torch has no such form on a GPU."""
        assert settings() == before
        return "a text"

    monkeypatch.setattr(trainer, "batch_loss", step)
    before = settings()
    options = {"steps": 2, "eval_every": 1, "sample_tokens": 5, "deterministic": deterministic}
    train(replace(config, **options), tmp_path / "run", sample=sample)
    resume(tmp_path / "run", steps=3, sample=sample)
    assert noted == [deterministic] * 3 and settings() == before
