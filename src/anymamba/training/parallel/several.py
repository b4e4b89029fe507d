"""The processes that torchrun has started, as the trainer sees them: mesh, sharded model, rows, and a writer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anymamba.data.batches import Batch
from anymamba.training.checkpoint import Empty, checkpoint_folder
from anymamba.training.config import TrainConfig
from anymamba.training.parallel.agreement import require_equal
from anymamba.training.parallel.launch import Launch
from anymamba.training.parallel.mesh import (
    context_group,
    data_mesh,
    degrees,
    make_mesh,
    require_splittable,
    require_splittable_layers,
)
from anymamba.training.parallel.processes import Processes, ValueT
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
from anymamba.training.parallel.writer import Writer


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
        self._make: Callable[[], Any] | None = None

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
        require_equal(what, values)

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
        self._make = make
        return model

    def loss(self, model: Any) -> Callable[..., Any]:
        return model.loss if self.group is None else spread_loss(model.loss, self.group)

    def whole(self, model: Any) -> Any:
        tensors = whole_tensors(model)
        if tensors is None:
            return None
        assert self._make is not None, "the model has been spread"
        whole = self._make()  # a new one: those before it may still be written
        whole.load_state_dict(tensors, assign=True)
        return whole

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
        self._writer.write(job)

    def poll(self) -> None:
        self._writer.poll()

    def written(self) -> None:
        self._writer.wait()

    def empty(self, model: nn.Module) -> Empty | None:
        return empty_parts(model, self.rows_mesh)

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return local_rows(tensors, self.rank, self.config.seed)
