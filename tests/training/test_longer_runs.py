"""Runs that go on for longer, the best model, samples, and what a run says at its start."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import StopAt, assert_same_run, tensors

from anymamba.cli.train import write_sample
from anymamba.models.checkpoints import convert, find_tokenizer, load_pretrained, open_checkpoint
from anymamba.models.language_model import LanguageModel
from anymamba.training import clock
from anymamba.training.checkpoint import checkpoint_folder, checkpoints
from anymamba.training.config import TrainConfig
from anymamba.training.metrics import read_metrics
from anymamba.training.outline import Outline
from anymamba.training.report import Silent
from anymamba.training.trainer import read_config, resume, train

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, log=())


def constant(config: TrainConfig) -> TrainConfig:
    """Without a schedule, so that the number of steps changes nothing before the end."""
    rates = replace(config.optimizer, learning_rate=2e-3, min_learning_rate=2e-3)
    return replace(config, optimizer=rates, checkpoint_every=4)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- more steps


def test_a_finished_run_goes_on_as_if_it_had_never_ended(config, tmp_path):
    config = constant(config)
    train(replace(config, steps=8), tmp_path / "run")
    assert resume(tmp_path / "run", steps=12).steps == 12
    train(config, tmp_path / "straight")
    assert_same_run(tmp_path / "run", tmp_path / "straight", 12)
    assert read_config(tmp_path / "run") == read_config(tmp_path / "straight")


def test_a_run_from_before_these_options_goes_on(config, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(config, tmp_path / "run", StopAt(7))
    (checkpoint,) = checkpoints(tmp_path / "run")[-1:]
    for path, names in (
        (
            tmp_path / "run" / "train_config.json",
            ("lora", "lora_targets", "lora_alpha", "log", "sample_tokens", "keep_best"),
        ),
        (checkpoint / "state.json", ("base", "best_step", "best_bits_per_byte")),
    ):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in values.items() if name not in names}))
    (checkpoint / "anymamba_manifest.json").unlink()
    result = resume(tmp_path / "run")
    train(config, tmp_path / "straight")
    assert_same_run(tmp_path / "run", tmp_path / "straight", 12)
    assert result.best_step in (8, 12)


def test_the_rate_follows_the_schedule_of_the_longer_run(config, tmp_path):
    train(replace(config, steps=8), tmp_path / "run")
    resume(tmp_path / "run", steps=12)
    train(config, tmp_path / "straight")

    def rates(run: Path) -> dict[int, float]:
        return {line["step"]: line["learning_rate"] for line in read_metrics(run) if line["kind"] == "train"}

    longer, straight = rates(tmp_path / "run"), rates(tmp_path / "straight")
    assert all(longer[step] == straight[step] for step in range(9, 13)) and longer[8] < straight[8]


def test_steps_that_are_done_and_time_that_is_used_are_refused(config, tmp_path, monkeypatch):
    train(replace(config, steps=4), tmp_path / "run")
    before = (tmp_path / "run" / "train_config.json").read_bytes()
    for steps in (3, 4):
        with pytest.raises(ValueError, match=f"has done 4 steps; give more than that with --steps, got {steps}"):
            resume(tmp_path / "run", steps=steps)
    seconds = itertools.count(0.0, 0.5)  # each look at the clock takes half a second
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    done = train(replace(config, steps=100_000, max_minutes=0.05), tmp_path / "timed").steps
    with pytest.raises(ValueError, match=r"has used its 0\.05 minutes; give more than that with --max-minutes"):
        resume(tmp_path / "timed", steps=200_000)
    assert (tmp_path / "run" / "train_config.json").read_bytes() == before
    assert resume(tmp_path / "timed", steps=done + 2, max_minutes=60).steps == done + 2


# ------------------------------------------------------------------------------------------------- the best model


def held_out(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    values = iter(losses)
    monkeypatch.setattr("anymamba.training.trainer.held_out_nats", lambda *_, **__: next(values))


def test_the_model_with_the_lowest_held_out_loss_is_kept(config, tmp_path, monkeypatch):
    held_out(monkeypatch, [3.0, 2.0, 2.5])
    every = replace(config, checkpoint_every=4, keep_checkpoints=9)
    result = train(every, tmp_path / "run")
    assert result.best_step == 8 and result.best_held_out_bits_per_byte < result.held_out_bits_per_byte
    best = LanguageModel.from_pretrained(tmp_path / "run" / "best")
    assert same_weights(best, load_pretrained(checkpoint_folder(tmp_path / "run", 8)))
    assert not same_weights(best, LanguageModel.from_pretrained(tmp_path / "run"))


def test_a_run_that_was_killed_finds_the_same_best_model(config, tmp_path):
    train(config, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="crash"):
        train(config, tmp_path / "run", StopAt(9))
    result = resume(tmp_path / "run")
    files = [tmp_path / name / "best" / "model.safetensors" for name in ("run", "straight")]
    assert files[0].read_bytes() == files[1].read_bytes() and result.best_step is not None


def test_no_best_model_where_none_is_wanted_or_measured(config, tmp_path):
    train(replace(config, steps=4, keep_best=False), tmp_path / "a")
    train(replace(config, steps=4, data=replace(config.data, held_out_fraction=0)), tmp_path / "b")
    assert not (tmp_path / "a" / "best").exists() and not (tmp_path / "b" / "best").exists()
    assert_same_weights_as(config, tmp_path / "a", tmp_path / "c")


def assert_same_weights_as(config: TrainConfig, run: Path, other: Path) -> None:
    train(replace(config, steps=4), other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_a_run_is_a_model(config, tmp_path):
    run = tmp_path / "run"
    train(replace(config, checkpoint_every=4, keep_checkpoints=9), run)
    last, middle = checkpoint_folder(run, 12), checkpoint_folder(run, 4)
    assert same_weights(LanguageModel.from_pretrained(last), LanguageModel.from_pretrained(run))
    model = LanguageModel.from_pretrained(middle)
    stored = tensors(run, 4)
    assert all(torch.equal(p, stored[f"model.{name}"]) for name, p in model.named_parameters())
    assert find_tokenizer(open_checkpoint(middle)).eos_id == find_tokenizer(run).eos_id
    convert(middle, tmp_path / "converted", "hf")
    assert same_weights(LanguageModel.from_pretrained(tmp_path / "converted"), model)
    assert (tmp_path / "converted" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["eos_token_id"] == 256


def test_a_checkpoint_can_be_fine_tuned(config, tmp_path):
    train(replace(config, steps=4), tmp_path / "run")
    (checkpoint,) = checkpoints(tmp_path / "run")[-1:]
    assert train(replace(config, start_from=str(checkpoint), steps=1), tmp_path / "tuned").steps == 1


def test_a_checkpoint_outside_its_run_says_where_it_belongs(config, tmp_path):
    train(replace(config, steps=2), tmp_path / "run")
    moved = tmp_path / "moved" / "step"
    moved.parent.mkdir()
    checkpoint_folder(tmp_path / "run", 2).rename(moved)
    with pytest.raises(FileNotFoundError, match=r"has no train_config\.json; leave it in the run's folder"):
        LanguageModel.from_pretrained(moved)


# ------------------------------------------------------------------------------------------------- samples, outline


class Listener(Silent):
    def __init__(self) -> None:
        self.samples: list[tuple[int, str]] = []
        self.outlines: list[Outline] = []

    def on_sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))

    def on_start(self, outline: Outline) -> None:
        self.outlines.append(outline)


def test_samples_are_told_and_change_nothing(config, tmp_path):
    told = Listener()
    train(config, tmp_path / "run", told, write_sample)
    train(config, tmp_path / "silent")
    assert_same_run(tmp_path / "run", tmp_path / "silent", 12)
    assert [step for step, _ in told.samples] == [4, 8, 12] and all(text for _, text in told.samples)
    again = Listener()
    resume(tmp_path / "silent", again, write_sample, steps=13)
    assert [step for step, _ in again.samples] == [13]


def test_no_samples_where_none_are_wanted(config, tmp_path):
    told = Listener()
    train(replace(config, steps=4, sample_tokens=0), tmp_path / "run", told, write_sample)
    assert told.samples == []


def test_the_outline(config, tmp_path):
    told: Any = Listener()
    result = train(replace(config, steps=4), tmp_path / "run", told)
    (outline,) = told.outlines
    assert outline.n_parameters == outline.n_trained == result.n_parameters
    assert (outline.step, outline.steps, outline.tokens) == (0, 4, result.tokens)
    assert outline.needed_bytes == 16 * result.n_parameters and outline.training_tokens > outline.held_out_tokens > 0
    assert outline.device == "cpu" and outline.threads == 1
    resume(tmp_path / "run", told, steps=6)
    assert (told.outlines[1].step, told.outlines[1].tokens) == (4, 2 * config.tokens_per_step)
