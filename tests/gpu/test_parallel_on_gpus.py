"""Sharded models on two GPUs with NCCL, ours and those that accelerate shards."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.processes import ROOT, environment, torchrun

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, found {torch.cuda.device_count()}"
)


def found_by(module: str, *words: str, size: int = 2) -> dict[str, Any]:
    """The last JSON line that a module prints under torchrun."""
    command = torchrun(size, "-m", module, *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def test_sharded_models_are_those_of_one_gpu() -> None:
    found = found_by("tests.training.parallel.on_gpus")
    assert found.pop("param_dtype changes") == []
    assert found.pop("checkpoint differs") == []
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_shards_a_wrapped_model(precision: str) -> None:
    pytest.importorskip("accelerate")
    one = found_by("tests.compat.fsdp2", precision, size=1)
    two = found_by("tests.compat.fsdp2", precision)
    assert two["sharded"] > 0
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-2 if precision == "bf16" else 1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trainer_shards_a_wrapped_model(precision: str, tmp_path: Path) -> None:
    """Its losses are those of one GPU; checkpoints, resumed runs and saved models hold the weights of all ranks."""
    pytest.importorskip("accelerate")
    one = found_by("tests.compat.fsdp2_trainer", precision, str(tmp_path / "one"), size=1)
    two = found_by("tests.compat.fsdp2_trainer", precision, str(tmp_path / "two"))
    assert two["sharded"] > 0 == one["sharded"]
    assert one["evaluated"] < one["losses"][0] - 0.3
    close = {"rel": 2e-2 if precision == "bf16" else 1e-3}
    assert two["losses"] == pytest.approx(one["losses"], **close)
    assert two["evaluated"] == pytest.approx(one["evaluated"], **close)
    assert two["resumed differ"] == two["saved differ"] == []
