"""Runs of the command line on one GPU: bytes, evaluations, samples, and the same bits again and after a resumption."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from anymamba.training.checkpoint import checkpoints
from tests.gpu.processes import ROOT, environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

MODELS = {
    "mamba": [],
    "attention": ["--model.mixers", "mamba", "attention", "--model.attention.n-heads", "4", "--no-carry-state"],
}


def train(*words: str | Path) -> None:
    command = [sys.executable, "-m", "anymamba", "train", *map(str, words)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_has_the_same_bits_again_and_after_a_resumption(name, tmp_path):
    """Batches of 32,768 bytes: with fewer torch's gradient of an embedding would have one order, too."""
    text = tmp_path / "text.txt"
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text.write_text("".join(module.read_text(errors="replace") for module in modules))
    flags = [
        "--data",
        text,
        "--model.d-model",
        "128",
        "--model.n-layers",
        "2",
        *MODELS[name],
        "--precision",
        "bfloat16",
    ]
    flags += ["--deterministic"] * (name == "attention")
    flags += ["--device", "cuda", "--batch-size", "16", "--context", "2048", "--steps", "6", "--eval-every", "2"]
    flags += ["--checkpoint-every", "3", "--eval-tokens", "5000", "--sample-tokens", "8"]
    for run in ("one", "two"):
        train(*flags, "--out", tmp_path / run)
    kept = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == kept
    shutil.rmtree(checkpoints(tmp_path / "two")[-1])
    (tmp_path / "two" / "model.safetensors").unlink()
    train("--resume", tmp_path / "two")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == kept
