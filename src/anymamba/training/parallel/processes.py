"""The processes of a run, as the trainer sees them: one, or those that torchrun has started."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from anymamba.base.files import own_folder
from anymamba.data.batches import Batch
from anymamba.training.checkpoint import Empty, checkpoint_folder, save_checkpoint
from anymamba.training.config import TrainConfig
from anymamba.training.parallel.launch import Launch, read_launch
from anymamba.training.parallel.mesh import (
    context_group,
    data_mesh,
    degrees,
    make_mesh,
    require_splittable,
    require_splittable_layers,
)
from anymamba.training.parallel.rows import empty_parts, local_rows, rows_of_all, rows_of_batch
from anymamba.training.parallel.sharding import (
    clip_gradients,
    copy_from_first_rank,
    parallelize,
    reduce_gradients,
    sum_over_ranks,
    whole_tensors,
)
from anymamba.training.parallel.spread import spread_loss
from anymamba.training.parallel.watch import Watch
from anymamba.training.parallel.writer import Writer

ValueT = TypeVar("ValueT")
TIMEOUT = timedelta(minutes=30)
"""How long a collective may take: reading the data, which rank 0 of each machine does first, is the longest wait."""


@contextmanager
def processes_of(config: TrainConfig, run: Path) -> Iterator[Processes]:
    """The processes of a run while the block runs. If one fails, all end, and rank 0 says why.

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
            stack.enter_context(_process_group(launch, torch.device(config.device).type))
            watch = Watch(launch.rank, launch.world_size, launch.host, way_out)
        stack.enter_context(watch.ending_together())
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
def _process_group(launch: Launch, kind: str) -> Iterator[None]:
    """torch's process group, unless the caller has made it."""
    if kind == "cuda" and launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
    if dist.is_initialized():
        if "cpu" not in str(dist.get_backend_config()):
            raise ValueError(
                f"the process group must reduce tensors of the CPU, too, got {dist.get_backend_config()}; make it with "
                'init_process_group("cpu:gloo,cuda:nccl")'
            )
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives a restart, with the addresses of the processes before it
    store = dist.PrefixStore(f"anymamba-{launch.restarts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
    except BaseException:
        raise  # other ranks may be gone, and destroying the group would wait for them
    else:
        dist.destroy_process_group()


class Processes:
    """The processes of a run. This class is for one process; its methods do what is left to do then."""

    def __init__(self, launch: Launch, config: TrainConfig) -> None:
        self.launch, self.config = launch, config
        self.rank, self.size = launch.rank, launch.world_size
        self.dp_rank, self.dp_size, self.cp_size = 0, 1, 1
        self.device = config.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and reports."""
        return self.rank == 0

    def owning(self, run: Path) -> AbstractContextManager[None]:
        """Be the only writer of the run's folder while the block runs."""
        return own_folder(run, wait=0)

    # ----------------------------------------------------------------------------------------------- agreement

    def from_first(self, compute: Callable[[], ValueT]) -> ValueT:
        """What rank 0 computes, on all ranks."""
        return compute()

    def in_turn(self, compute: Callable[[], ValueT]) -> ValueT:
        """Compute on all ranks, on the first of each machine before the others, which find what it has cached."""
        return compute()

    def require_equal(self, what: str, values: dict[str, Any]) -> None:
        """Raise ValueError, naming what differs, unless all ranks have the same values."""

    def sums(self, *values: float) -> list[float]:
        """The sums of numbers over all ranks."""
        return list(values)

    def largest(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        return value

    # ----------------------------------------------------------------------------------------------- the model

    def rows_of(self, batch: Batch) -> Batch:
        """The rows of a whole batch that this rank takes."""
        return batch

    def spread(self, source: Any, make: Callable[[], Any]) -> Any:
        """The model of this rank.

        Args:
            source: the whole model; on rank 0 only.
            make: makes the model on the meta device.
        """
        return source

    def loss(self, model: Any) -> Callable[..., Any]:
        """The loss of a batch's rows, of which each rank has its part."""
        return torch.compile(model.loss) if self.config.compile else model.loss

    def whole(self, model: Any) -> Any:
        """The whole model, to be saved or sampled from; None on other ranks than the first."""
        return model

    def reduce_gradients(self, model: nn.Module, wanted: bool) -> None:
        """Whether the next backward pass adds up gradients over ranks."""

    def clip(self, model: nn.Module, largest: float) -> float:
        """Clip the gradient; return its norm over all ranks."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest).item()

    # ----------------------------------------------------------------------------------------------- files

    def save(
        self,
        run: Path,
        step: int,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        keep: int,
        done: Callable[[Path], None],
    ) -> None:
        """Save a checkpoint as `save_checkpoint` does, and call `done` with its folder when it is complete.

        Args:
            tensors: those of this rank's snapshot.
        """
        done(save_checkpoint(run, step, tensors, values, keep))

    def write(self, job: Callable[[], None]) -> None:
        """Run a function that writes files into the run's folder, after those before it."""
        job()

    def poll(self) -> None:
        """Tell of what has been written. Raises the error of a write that failed."""

    def written(self) -> None:
        """Wait until everything is written, and `poll`."""

    def empty(self, model: nn.Module) -> Empty | None:
        """What makes the tensors into which a checkpoint is read; None for whole tensors."""
        return None

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint, read into those of `empty`, as this rank restores them."""
        return tensors


class SeveralProcesses(Processes):
    """The processes that torchrun has started."""

    def __init__(self, launch: Launch, config: TrainConfig) -> None:
        super().__init__(launch, config)
        sizes = degrees(config.parallel, self.size)
        require_splittable(config, sizes)
        kind = torch.device(config.device).type
        if kind == "cuda" and launch.local_world_size > torch.cuda.device_count():
            raise ValueError(
                f"this machine has {torch.cuda.device_count()} GPUs for {launch.local_world_size} processes; start as "
                "many as it has GPUs (torchrun --nproc-per-node)"
            )
        self.device = f"{kind}:{launch.local_rank}" if kind == "cuda" else config.device
        self.mesh = make_mesh(sizes, kind)
        self.rows_mesh = data_mesh(self.mesh)
        self.group = context_group(self.mesh)
        self.dp_size, self.cp_size = sizes.dp_replicate * sizes.dp_shard, sizes.cp
        self.dp_rank = self.rank // sizes.cp
        self._writer = Writer(self.rank, kind)
        self._whole: Any = None

    def owning(self, run: Path) -> AbstractContextManager[None]:
        return self._writer.owning(run) if self.is_first else nullcontext()

    def from_first(self, compute: Callable[[], ValueT]) -> ValueT:
        box: list[Any] = [compute() if self.is_first else None]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def in_turn(self, compute: Callable[[], ValueT]) -> ValueT:
        first = self.launch.local_rank == 0
        value = compute() if first else None
        self.sums(0.0)
        return value if first else compute()  # type: ignore[return-value]

    def require_equal(self, what: str, values: dict[str, Any]) -> None:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, values)
        for rank, others in enumerate(everyone):
            for name in sorted(values.keys() | others.keys()):
                if others.get(name) != everyone[0].get(name):
                    raise ValueError(
                        f"the ranks have different {what}: {name} is {everyone[0].get(name)} on rank 0 and "
                        f"{others.get(name)} on rank {rank}; start all of them with the same command and files"
                    )

    def sums(self, *values: float) -> list[float]:
        return sum_over_ranks(*values)

    def largest(self, value: float) -> float:
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def rows_of(self, batch: Batch) -> Batch:
        return rows_of_batch(batch, self.dp_rank, self.dp_size)

    def spread(self, source: Any, make: Callable[[], Any]) -> Any:
        config, model = self.config, make()
        if self.group is not None:
            require_splittable_layers(model, config.carries_state)
        parallelize(
            model,
            self.mesh,
            param_dtype=torch.bfloat16 if config.precision == "bfloat16" else None,
            compile=config.compile,
        )
        copy_from_first_rank(model, source)
        self._whole = make() if self.is_first else None
        return model

    def loss(self, model: Any) -> Callable[..., Any]:
        return model.loss if self.group is None else spread_loss(model.loss, self.group)

    def whole(self, model: Any) -> Any:
        tensors = whole_tensors(model)
        if tensors is not None:
            self._whole.load_state_dict(tensors, assign=True)
        return self._whole

    def reduce_gradients(self, model: nn.Module, wanted: bool) -> None:
        reduce_gradients(model, wanted)

    def clip(self, model: nn.Module, largest: float) -> float:
        return clip_gradients(model, largest)

    def save(
        self,
        run: Path,
        step: int,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        keep: int,
        done: Callable[[Path], None],
    ) -> None:
        tensors = rows_of_all(tensors, self.rows_mesh, self.rank)
        self._writer.save(run, step, tensors, values, keep, lambda: done(checkpoint_folder(run, step)))

    def write(self, job: Callable[[], None]) -> None:
        self._writer.submit(job)

    def poll(self) -> None:
        self._writer.poll()

    def written(self) -> None:
        self._writer.wait()

    def empty(self, model: nn.Module) -> Empty | None:
        return empty_parts(model, self.rows_mesh)

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return local_rows(tensors, self.rank, self.config.seed)
