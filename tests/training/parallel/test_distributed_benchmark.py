"""The benchmark of several GPUs: no part has the memory of those before it, and what was measured is kept."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distributed
from tests.training.parallel.ranks import free_port


class Model:
    """Refers to itself, as a sharded model does."""

    def __init__(self) -> None:
        self.itself = self


def test_a_part_begins_without_the_models_of_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    models: list[weakref.ref] = []

    def part(here: Any) -> dict[str, Any]:
        left = sum(model() is not None for model in models)
        models.append(weakref.ref(Model()))
        return {"left": left}

    gc.disable()
    try:
        distributed.work({"first": part, "second": part}, ["first", "second"], tmp_path / "found.json")
    finally:
        gc.enable()
    assert json.loads((tmp_path / "found.json").read_text()) == {"first": {"left": 0}, "second": {"left": 0}}


def test_what_one_gpu_found_is_kept_if_two_do_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def launched(size: int, parts: list[str]) -> dict[str, Any]:
        if size == 2:
            raise KeyboardInterrupt
        return {"row": {"length": 1}}

    monkeypatch.setattr(distributed, "launched", launched)
    monkeypatch.setattr(sys, "argv", ["distributed", "--json", str(tmp_path / "found.json"), "--gpus", "1", "2"])
    with pytest.raises(KeyboardInterrupt):
        distributed.main()
    assert json.loads((tmp_path / "found.json").read_text()) == {"1": {"row": {"length": 1}}}


@pytest.mark.parametrize("second", [{"longest": {"length": 1}}, {}], ids=["fits", "does not fit either"])
def test_the_longest_row_is_tried_once_more_in_less_memory(monkeypatch, second: dict[str, Any]) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        found = second if "--again" in command else {"row": {"length": 2}}
        Path(command[command.index("--worker") + 1]).write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert distributed.launched(2, ["row", "longest"]) == {"row": {"length": 2}} | second
    assert [command[command.index("--parts") + 1 :] for command in commands] == [
        ["row", "longest"],
        ["longest", "--again"],
    ]
    assert distributed.LOWER < distributed.LIMIT
