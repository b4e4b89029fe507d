"""Writes the files of a run in a thread, while the ranks go on training.

Training waits only until the tensors are copied to host memory. Every rank writes its parts, through
torch.distributed.checkpoint; rank 0 completes the folder and gives it its name.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from anymamba.base.files import atomic_folder, own_folder
from anymamba.training.checkpoint import as_os_error, checkpoint_folder, quiet, remove_old, write_values
from anymamba.training.parallel.rows import RANDOM, random_name
from anymamba.training.parallel.watch import OtherRankError

MODELS = 2
"""Jobs that hold a whole model and wait for the disk, at most: training waits where it is slower than that."""
LEAVE = 5.0
"""Seconds that the thread has to give the folder back when a run fails. It may wait for a rank that has died."""


class Writer:
    """The thread that writes, on each rank, and on rank 0 the owner of the run's folder.

    Args:
        rank: of this process.
        device_type: where the tensors are.
    """

    def __init__(self, rank: int, device_type: str) -> None:
        self.rank, self.device_type = rank, device_type
        self._group = dist.new_group(backend="gloo")  # of its own: the main thread's collectives go on
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._buffers: dict[str, Tensor] = {}
        self._jobs: queue.Queue[tuple[Callable[[], None], bool]] = queue.Queue()
        self._done: queue.Queue[Callable[[], None]] = queue.Queue()
        self._staging = threading.Event()  # whether the buffers may be filled
        self._staging.set()
        self._room = threading.Semaphore(MODELS)
        self._error: BaseException | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            job, always = self._jobs.get()
            try:
                if always or self._error is None:
                    job()
            except BaseException as error:
                self._error = self._error or error
            finally:
                self._jobs.task_done()

    def submit(self, job: Callable[[], None], done: Callable[[], None] | None = None) -> None:
        """Run a job after those before it; `poll` then calls `done`."""

        def run() -> None:
            job()
            if done is not None:
                self._done.put(done)

        self._jobs.put((run, False))

    def write(self, job: Callable[[], None]) -> None:
        """`submit` a job that holds a whole model."""
        self._room.acquire()
        self.submit(job)
        self._jobs.put((self._room.release, True))

    def poll(self) -> None:
        """Tell of what is done. Raises the error of a job; no job after it is run."""
        with suppress(queue.Empty):
            while True:
                self._done.get_nowait()()
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until all jobs are done, and `poll`."""
        self._jobs.join()
        self.poll()

    @contextmanager
    def owning(self, run: Path) -> Iterator[None]:
        """Let the thread be the only writer of a folder while the block runs: a lock belongs to a thread."""
        owned, left = ExitStack(), threading.Event()
        self.submit(lambda: owned.enter_context(own_folder(run, wait=0)))
        self.wait()

        def leave() -> None:
            owned.close()
            left.set()

        try:
            yield
            self.wait()
        except BaseException as error:
            self._error = self._error or error  # nothing more is written
            raise
        finally:
            self._jobs.put((leave, True))
            left.wait(LEAVE)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(
        self,
        run: Path,
        step: int,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        keep: int,
        done: Callable[[], None],
    ) -> None:
        """Write a checkpoint in the thread. All ranks call it; it returns when the tensors are in host memory.

        Args:
            run, step, keep: as in `checkpoint.save_checkpoint`.
            tensors: those of this rank. A DTensor is saved in parts, another one by one of the ranks that have it.
            values: those of rank 0 are saved.
            done: called by `poll` when the checkpoint is complete.
        """
        self._staging.wait()  # for the checkpoint before this one, and not for models that are written after it
        self.poll()
        self._staging.clear()
        staged = {name: self._staged(name, tensor) for name, tensor in tensors.items()}
        if self.device_type != "cpu":
            getattr(torch, self.device_type).synchronize()
        names = {name for name in values["tensors"] if not name.startswith(RANDOM)}
        names |= {
            random_name(name, rank)
            for name in values["tensors"]
            if name.startswith(RANDOM)
            for rank in range(dist.get_world_size())
        }
        values = {**values, "tensors": sorted(names)}
        self.submit(lambda: self._save(run, step, staged, values, keep), done)
        self._jobs.put((self._staging.set, True))

    def _staged(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in host memory."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            pinned = local.device.type == "cuda"
            buffer = self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned)
        buffer.copy_(local.detach(), non_blocking=True)
        if not isinstance(tensor, DTensor):
            return buffer
        mesh = self._on_host(tensor.device_mesh)
        return DTensor.from_local(
            buffer, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _on_host(self, mesh: DeviceMesh) -> DeviceMesh:
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._meshes[mesh]

    def _save(self, run: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], keep: int) -> None:
        try:
            if self.rank:
                folder = self._told()
                self._require_seen(folder)
                self._write(folder, tensors)
                self._told()
            else:
                self._save_as_first(run, step, tensors, values)
                remove_old(run, keep)
        except BaseException as error:
            raise as_os_error(error, run) from error

    def _save_as_first(self, run: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        target = checkpoint_folder(run, step)
        others_wait = True
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(target, replace=True) as temporary:
                temporary.mkdir()
                self._tell(temporary.absolute())
                others_wait = False
                self._require_seen(temporary)
                self._write(temporary, tensors)  # an error here is raised on all ranks
                others_wait = True
                write_values(temporary, values)
            self._tell(target)
        except BaseException:
            if others_wait:
                self._tell(None)
            raise

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        with quiet():
            storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=storage, process_group=self._group)

    def _require_seen(self, folder: Path) -> None:
        """Raise ValueError on all ranks if one does not see the folder that rank 0 has made: its part would be lost."""
        seen: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(seen, folder.is_dir(), group=self._group)
        if not all(seen):
            rank = seen.index(False)
            raise ValueError(
                f"rank {rank} does not see {folder.absolute()}, where all ranks write the checkpoint; give a run "
                "folder on a disk that all machines share (--out)"
            )

    def _tell(self, folder: Path | None) -> None:
        """Rank 0: where the others write next; None if it has failed."""
        dist.broadcast_object_list([folder], 0, group=self._group)

    def _told(self) -> Path:
        box: list[Path | None] = [None]
        dist.broadcast_object_list(box, 0, group=self._group)
        if box[0] is None:
            raise OtherRankError("rank 0 could not write the checkpoint")
        return box[0]
