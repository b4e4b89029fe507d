"""A run from its beginning to its end, and the files that it writes."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anymamba.data.tokenizer import load_tokenizer
from anymamba.models.checkpoints import CheckpointError
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.mixers import MIXERS, growing_mixers
from anymamba.training import clock, trainer
from anymamba.training.checkpoint import checkpoint_folder, checkpoints
from anymamba.training.config import TrainConfig
from anymamba.training.metrics import read_metrics
from anymamba.training.trainer import Silent, read_config, resume, train


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    files = checkpoint_folder(run, step).glob("*.safetensors")
    return {name: t for file in files for name, t in load_file(file).items()}


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(run)]


def assert_same_run(a: Path, b: Path, step: int) -> None:
    left, right = tensors(a, step), tensors(b, step)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert timeless(a) == timeless(b)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


class StopAt(Silent):
    """Raises in the middle of a run, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step:
            raise RuntimeError("crash")


def test_a_run_leaves_a_model_a_config_metrics_events_and_a_plot(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(config, run)
    assert result.steps == 12 and result.tokens == 12 * 3 * 32 and result.skipped == 0
    assert LanguageModel.from_pretrained(run).n_parameters() == result.n_parameters
    assert read_config(run).steps == 12
    kinds = [(line["kind"], line["step"]) for line in read_metrics(run)]
    assert [step for kind, step in kinds if kind == "train"] == list(range(1, 13))
    assert [step for kind, step in kinds if kind == "eval"] == [4, 8, 12]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    assert [path.name for path in checkpoints(run)] == ["step-00000010", "step-00000012"]
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".metadata", ".distcp")]


def test_the_carried_states_of_all_bounded_layers_are_resumed(config: TrainConfig, tmp_path: Path) -> None:
    names = [name for name in MIXERS if not growing_mixers(ModelConfig(n_layers=1, mixers=(name,)))]
    model = replace(config.model, n_layers=len(names), mixers=tuple(names), weight_std=0.02)
    config = replace(config, model=model, steps=4, eval_every=100, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="crash"):
        train(config, tmp_path / "run", StopAt(3))
    assert resume(tmp_path / "run").steps == 4
    train(config, tmp_path / "straight")
    assert_same_run(tmp_path / "run", tmp_path / "straight", 4)


def test_a_run_from_before_kernels_had_a_rate_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    run, model = tmp_path / "run", replace(config.model, mixers=("mamba", "s4d"))
    with pytest.raises(RuntimeError, match="crash"):
        train(replace(config, model=model, checkpoint_every=4), run, StopAt(6))
    values = json.loads((run / "train_config.json").read_text())
    del values["optimizer"]["kernel_learning_rate"]
    (run / "train_config.json").write_text(json.dumps(values))
    assert resume(run).steps == 12
    assert read_config(run).optimizer.kernel_learning_rate == 1e-3
    train(replace(config, model=model, checkpoint_every=4), tmp_path / "straight")
    assert_same_run(run, tmp_path / "straight", 12)


def test_it_learns(config: TrainConfig, tmp_path: Path) -> None:
    fast = replace(config.optimizer, learning_rate=2e-2)
    train(replace(config, steps=60, eval_every=1000, checkpoint_every=1000, optimizer=fast), tmp_path / "run")
    losses = [line["bits_per_byte"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert losses[0] > 7.5 and losses[-1] < 5.0


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_for_bit(config: TrainConfig, tmp_path: Path, workers: int) -> None:
    train(config, tmp_path / "straight")
    with_workers = replace(config, data=replace(config.data, workers=workers))
    for step in (3, 8, 11):  # before the first checkpoint, between, after the last
        try:
            if step == 3:
                train(with_workers, tmp_path / "broken", StopAt(step))
            else:
                resume(tmp_path / "broken", StopAt(step))
        except RuntimeError as error:
            assert str(error) == "crash"
    resume(tmp_path / "broken")
    assert_same_run(tmp_path / "straight", tmp_path / "broken", 12)


def test_resuming_a_finished_run_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    before = timeless(tmp_path / "run"), tensors(tmp_path / "run", 12)
    resume(tmp_path / "run")
    assert timeless(tmp_path / "run") == before[0]
    assert all(torch.equal(before[1][k], v) for k, v in tensors(tmp_path / "run", 12).items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_effect_after_a_checkpoint(config: TrainConfig, tmp_path: Path, number: int) -> None:
    class Send(Silent):
        def on_step(self, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 7:
                os.kill(os.getpid(), number)

    class Arrived(Exception):
        pass

    def handler(*_: object) -> None:
        raise Arrived

    before = signal.signal(number, handler)
    try:
        with pytest.raises(Arrived):
            train(config, tmp_path / "run", Send())
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000007"
    train(config, tmp_path / "straight")
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "straight", tmp_path / "run", 12)


def test_accumulation_is_one_big_batch(config: TrainConfig, tmp_path: Path) -> None:
    """One step over four batches with the mean over all their labels; one lane, so that the documents are the same."""
    one = replace(config, steps=1, batch_size=1, context=32, accumulation=4, carry_state=True)
    big = replace(config, steps=1, batch_size=1, context=128, accumulation=1)
    train(one, tmp_path / "one")
    train(big, tmp_path / "big")
    first, second = (read_metrics(tmp_path / name)[0] for name in ("one", "big"))
    assert first["tokens"] == second["tokens"]
    assert first["nats_per_token"] == pytest.approx(second["nats_per_token"], rel=1e-5)


def test_carried_state_makes_chunks_of_a_document_one(config: TrainConfig, tmp_path: Path) -> None:
    """With a frozen model the loss of a long document is the same in pieces with carried state, and not without."""
    frozen = replace(
        config,
        steps=4,
        eval_every=100,
        optimizer=replace(config.optimizer, learning_rate=1e-12, min_learning_rate=0.0, weight_decay=0.0),
    )
    losses = {}
    for name, options in {
        "carried": {"context": 16, "carry_state": True},
        "dropped": {"context": 16, "carry_state": False},
        "whole": {"context": 64, "steps": 1},
    }.items():
        train(replace(frozen, batch_size=1, **options), tmp_path / name)
        lines = [line for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        losses[name] = sum(line["nats_per_token"] for line in lines) / len(lines)
    assert losses["carried"] == pytest.approx(losses["whole"], rel=1e-6)
    assert abs(losses["dropped"] - losses["whole"]) > 1e-5


def test_bfloat16_autocast_and_activation_checkpointing(config: TrainConfig, tmp_path: Path) -> None:
    for name, options in {
        "plain": {},
        "bfloat16": {"precision": "bfloat16"},
        "checkpointing": {"activation_checkpointing": True},
    }.items():
        train(replace(config, **options), tmp_path / name)
    final = {
        name: [line["nats_per_token"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"][-1]
        for name in ("plain", "bfloat16", "checkpointing")
    }
    assert final["checkpointing"] == pytest.approx(final["plain"], rel=1e-5)
    assert final["bfloat16"] == pytest.approx(final["plain"], rel=2e-2) and final["bfloat16"] != final["plain"]


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(config: TrainConfig, tmp_path: Path) -> None:
    short = replace(config, steps=4)
    train(short, tmp_path / "plain")
    train(replace(short, compile=True), tmp_path / "compiled")
    plain, compiled = (
        [line["nats_per_token"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        for name in ("plain", "compiled")
    )
    assert compiled == pytest.approx(plain, rel=1e-4)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of some steps NaN."""
    calls = iter(range(1, 1000))
    original = trainer.batch_loss

    def poisoned(*arguments: Any) -> Any:
        nats, count, state = original(*arguments)
        return (nats * math.nan if next(calls) in steps else nats), count, state

    monkeypatch.setattr(trainer, "batch_loss", poisoned)


def test_a_nonfinite_step_is_skipped_and_counted(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3, 4, 9})
    result = train(config, tmp_path / "run")
    assert result.skipped == 3
    assert all(bool(t.isfinite().all()) for t in tensors(tmp_path / "run", 12).values() if t.is_floating_point())
    line = next(line for line in read_metrics(tmp_path / "run") if line["step"] == 3)
    assert line["nats_per_token"] is None and line["skipped"] == 1
    json.dumps(line, allow_nan=False)


def test_too_many_nonfinite_steps_in_a_row_are_fatal(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(7, 100)))
    with pytest.raises(RuntimeError, match="not finite in 3 steps in a row, the last is step 9"):
        train(replace(config, max_nonfinite=3), tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000005"


def test_fine_tuning_starts_from_given_weights_with_a_new_optimizer(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "base")
    tuned = replace(
        config,
        start_from=str(tmp_path / "base"),
        steps=1,
        optimizer=replace(config.optimizer, learning_rate=1e-12, min_learning_rate=0.0),
    )
    train(tuned, tmp_path / "tuned")
    base, result = (LanguageModel.from_pretrained(tmp_path / name) for name in ("base", "tuned"))
    assert result.config == base.config
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(base.parameters(), result.parameters(), strict=True))
    step = next(v for k, v in tensors(tmp_path / "tuned", 1).items() if k.endswith(".step"))
    assert step == 1


def test_fine_tuning_a_foreign_model_without_a_tokenizer_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """Its vocabulary is not bytes. A byte model needs no tokenizer file, with or without an id that ends documents."""
    for vocab_size in (300, 257, 256):
        LanguageModel(replace(config.model, vocab_size=vocab_size)).save_pretrained(tmp_path / f"m{vocab_size}")
    foreign = replace(config, start_from=str(tmp_path / "m300"), steps=1)
    with pytest.raises(FileNotFoundError, match="m300 has no tokenizer that can be read, and its vocabulary of 300"):
        train(foreign, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for vocab_size in (257, 256):
        result = train(
            replace(config, start_from=str(tmp_path / f"m{vocab_size}"), steps=1), tmp_path / f"run{vocab_size}"
        )
        assert result.steps == 1
        assert load_tokenizer(tmp_path / f"run{vocab_size}").vocab_size == vocab_size
        resume(tmp_path / f"run{vocab_size}")


def test_an_existing_folder_is_never_overwritten(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="--resume"):
        train(config, run)
    assert [path.name for path in run.iterdir()] == ["precious.txt"]
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        resume(run)


def test_changed_data_is_refused(config: TrainConfig, corpus: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    for i in range(30):
        (corpus / f"more{i}.txt").write_text("another document")
    with pytest.raises(CheckpointError, match="training data has changed"):
        resume(tmp_path / "run")


def test_a_planted_pickle_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run)
    (checkpoints(run)[-1] / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="pickle"):
        resume(run)


def test_a_run_without_a_checkpoint_begins_anew(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "straight")

    class Crash(Silent):
        def on_checkpoint(self, step: int, folder: Path) -> None:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(config, tmp_path / "run", Crash())
    for path in checkpoints(tmp_path / "run"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "straight", tmp_path / "run", 12)


def test_time_ends_a_run_with_a_decayed_rate_and_a_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(0.0, 1.0)  # each look at the clock takes a second
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    timed = replace(config, steps=10**6, max_minutes=0.3, log_every=1)
    result = train(timed, tmp_path / "run")
    assert 10 < result.steps < 20
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{result.steps:08d}"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert rates[-1] < 0.2 * max(rates)
    assert resume(tmp_path / "run").steps == result.steps, "its time is up"


def test_steps_that_fit_into_the_time_end_as_without_a_limit(config: TrainConfig, tmp_path: Path) -> None:
    limited = replace(config, max_minutes=60.0)
    assert train(limited, tmp_path / "a").bits_per_byte == train(config, tmp_path / "b").bits_per_byte
