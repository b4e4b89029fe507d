"""Runs on several GPUs that lose ranks: torchrun starts them again, with the same bits, and fewer GPUs go on."""

from __future__ import annotations

import random
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from anymamba.training.checkpoint import checkpoints, load_checkpoint
from anymamba.training.metrics import read_metrics
from tests.gpu.processes import ROOT, environment, torchrun

GPUS = torch.cuda.device_count()
STEPS, MORE, KILLS = 240, 20, 10

pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, found {GPUS}")


def started(size: int, *words: str | Path, restarts: int = 0) -> subprocess.Popen[bytes]:
    how = [f"--max-restarts={restarts}", "--monitor-interval=0.2", "-m", "anymamba", "train"]
    return subprocess.Popen(torchrun(size, *how, *map(str, words)), env=environment(), cwd=ROOT)


def flags(text: Path, run: Path) -> list[str | Path]:
    model = ["--model.d-model", "256", "--model.n-layers", "4", "--precision", "bfloat16", "--device", "cuda"]
    length = ["--batch-size", "8", "--context", "512", "--steps", str(STEPS), "--checkpoint-every", "5"]
    return ["--data", text, "--out", run, *model, *length, "--eval-every", "1000", "--sample-tokens", "0"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """The modules of the standard library in one file."""
    path = tmp_path / "text.txt"
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    path.write_text("".join(module.read_text(errors="replace") for module in modules))
    return path


def ranks_of(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that torchrun has started, without the helpers that they start themselves."""
    return [p for p in psutil.Process(job.pid).children() if "train" in p.cmdline()]


def kills(job: subprocess.Popen[bytes], run: Path, seed: int) -> Iterator[int]:
    """Kill a random rank at a random moment after each new checkpoint; yields the step of that checkpoint."""
    draw = random.Random(seed)
    for _ in range(KILLS):
        before = checkpoints(run)[-1:]
        while checkpoints(run)[-1:] == before or not checkpoints(run):
            assert job.poll() is None, "the run ended before all kills"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        draw.choice(ranks_of(job)).send_signal(signal.SIGKILL)
        yield int(checkpoints(run)[-1].name.split("-")[1])


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["nats_per_token"] for line in read_metrics(run) if line["kind"] == "train"}


def test_ten_kills_and_equal_bits_then_half_of_the_gpus(text: Path, tmp_path: Path) -> None:
    want, got = tmp_path / "straight", tmp_path / "killed"
    assert started(GPUS, *flags(text, want)).wait(300) == 0
    job = started(GPUS, *flags(text, got), restarts=KILLS)
    killed_after = list(kills(job, got, seed=0))
    assert job.wait(300) == 0 and len(killed_after) == KILLS
    print(f"{GPUS} GPUs, killed after the checkpoints of steps {killed_after}")
    [tensors, values], [want_tensors, want_values] = (load_checkpoint(checkpoints(run)[-1]) for run in (got, want))
    assert values["step"] == want_values["step"] == STEPS and values["position"] == want_values["position"]
    assert [name for name in want_tensors if not torch.equal(tensors[name], want_tensors[name])] == []
    assert losses(got) == losses(want)
    assert (got / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()

    assert started(GPUS // 2, "--resume", got, "--steps", str(STEPS + MORE)).wait(300) == 0
    assert started(GPUS, "--resume", want, "--steps", str(STEPS + MORE)).wait(300) == 0
    assert losses(got) == pytest.approx(losses(want), rel=1e-2)
    assert max(losses(got)) == STEPS + MORE
