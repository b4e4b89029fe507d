"""Brings the processes of a run together, and ends them together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from anymamba.training.config import TrainConfig
from anymamba.training.parallel.agreement import flat_values, require_equal
from anymamba.training.parallel.launch import Launch, read_launch
from anymamba.training.parallel.meeting import job, meet
from anymamba.training.parallel.mesh import degrees
from anymamba.training.parallel.processes import Processes
from anymamba.training.parallel.several import SeveralProcesses
from anymamba.training.parallel.watch import Watch

TIMEOUT = timedelta(minutes=30)
"""How long a collective may take: reading the data, which rank 0 of each machine does first, is the longest wait."""


@contextmanager
def processes_of(config: TrainConfig, run: Path, command: str) -> Iterator[Processes]:
    """The processes of a run while the block runs. If one fails, all end, and rank 0 says why.

    Args:
        command: what they are about to do, which all must agree on.
    Raises ValueError if the degrees of parallelism do not fit them, or if a machine has too few devices.
    """
    launch = read_launch()
    if launch.world_size == 1:
        degrees(config.parallel, 1)
        yield Processes(launch, config)
        return
    way_out = f"resume the run with the same torchrun command and --resume {run}"
    with ExitStack() as stack:
        with _ended_by_sigterm():
            launch = stack.enter_context(_process_group(launch, torch.device(config.device).type))
            watch = Watch(launch.rank, launch.world_size, launch.host, way_out)
        stack.enter_context(watch.ending_together())
        require_equal("commands", {"command": command, "run": str(run)})
        require_equal("configs", flat_values(config))
        yield SeveralProcesses(launch, config)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process at once while the ranks look for one another, which no Python handler could.

    If a rank dies before it is watched, torchrun sends the signal to the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _process_group(launch: Launch, kind: str) -> Iterator[Launch]:
    """torch's process group, unless the caller has made it; the launch with what is known of its job."""
    if kind == "cuda" and launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
    if dist.is_initialized():
        if "cpu" not in str(dist.get_backend_config()):
            raise ValueError(
                f"the process group must reduce tensors of the CPU, too, got {dist.get_backend_config()}; make it with "
                'init_process_group("cpu:gloo,cuda:nccl")'
            )
        yield launch
        return
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    ours = dist.PrefixStore("anymamba", store)
    # torchrun's store outlives a restart, with the addresses of the processes before it
    store = dist.PrefixStore(meet(ours, rank, size), ours)
    name, begun = job(ours) if rank == 0 else ("", False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield launch._replace(job=name, begun=begun)
    except BaseException:
        raise  # other ranks may be gone, and destroying the group would wait for them
    else:
        dist.destroy_process_group()
