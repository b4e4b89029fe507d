"""What torchrun tells a process: how many there are, which one it is, and whether they have been restarted."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from anymamba.base.files import write_json

LAUNCH = "launch.json"
"""The file of a run that names the launcher of the processes that write it."""


class Launch(NamedTuple):
    """The processes of a run, and this one among them."""

    rank: int
    world_size: int
    local_rank: int
    """The rank among the processes of this machine."""
    local_world_size: int
    host: str
    """The machine of rank 0."""
    restarts: int
    """How often torchrun has started the processes of this machine again."""
    job: str = ""
    """What torchrun's store names the job; nothing if it is not known."""
    begun: bool = False
    """Whether other processes of the job have been here before."""


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The variables that torchrun sets; one process without them."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Launch(0, 1, 0, 1, "localhost", 0)
    size = int(environment["WORLD_SIZE"])
    return Launch(
        rank=int(environment["RANK"]),
        world_size=size,
        local_rank=int(environment.get("LOCAL_RANK", 0)),
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        host=environment.get("MASTER_ADDR", "localhost"),
        restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )


def note_launch(run: Path, launch: Launch) -> None:
    """Note in a run's folder which launcher has started the processes that write it."""
    if launch.world_size > 1:
        write_json(run / LAUNCH, {"job": launch.job, "launcher": _launcher()})


def is_restarted(run: Path, launch: Launch) -> bool:
    """Whether the launcher of this process began the run and has started the processes again since then.

    A command that names the folder of an older run is started again, too. That run must not be resumed.
    """
    try:
        noted = json.loads((run / LAUNCH).read_text(encoding="utf-8"))
        if launch.job:
            return launch.begun and noted["job"] == launch.job
        return launch.restarts > 0 and noted["launcher"] == _launcher()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _launcher() -> dict[str, str | int]:
    """The parent process, which is torchrun's agent."""
    return {"host": socket.gethostname(), "process": os.getppid(), "run": os.environ.get("TORCHELASTIC_RUN_ID", "")}
