"""The processes of a run, as the trainer sees them. Here for one process, which has little to do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anymamba.base.files import own_folder
from anymamba.data.batches import Batch
from anymamba.training.checkpoint import Empty, save_checkpoint
from anymamba.training.config import TrainConfig
from anymamba.training.parallel.launch import Launch

ValueT = TypeVar("ValueT")


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
