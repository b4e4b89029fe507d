"""Training state on disk: tensors through torch.distributed.checkpoint's safetensors storage, the rest as JSON.

A checkpoint is a folder `step-00001000`. It is written under a temporary name, flushed to disk and renamed, so a folder
with the final name is complete. Nothing is unpickled; a pickle among the files is an error.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from anymamba.base import manifest
from anymamba.base.errors import FORMAT_VERSION, CheckpointError, require_format_version
from anymamba.base.files import atomic_folder, remove_folder
from anymamba.training.config import VERSION

FOLDER, STATE = "checkpoints", "state.json"
NAME = re.compile(r"step-(\d{8,})")
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".distcp", ".metadata", ".ckpt")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(run: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and delete all but the `keep` newest.

    Raises OSError (a full disk); the earlier checkpoints are untouched then, and no partial one remains.
    """
    target = checkpoint_folder(run, step)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target, replace=True) as temporary:  # it exists where a run was killed after writing it
            temporary.mkdir()
            with quiet():
                dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(temporary)), no_dist=True)
            write_values(temporary, values)
    except BaseException as error:
        raise as_os_error(error, run) from error
    remove_old(run, keep)
    return target


def write_values(folder: Path, values: dict[str, Any]) -> None:
    """Complete a checkpoint's folder, which has its tensors: its values, and the digests of its files."""
    state = {FORMAT_VERSION: VERSION, **values}
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    manifest.write(folder)


def remove_old(run: Path, keep: int) -> None:
    """Delete all checkpoints of a run but the `keep` newest."""
    for path in checkpoints(run)[:-keep]:
        remove_folder(path)


def check_files(folder: Path) -> None:
    """Raise CheckpointError if a file of a checkpoint is a pickle or is not the one that was written."""
    refuse_pickles(folder)
    manifest.check(folder, _way_out(folder))


Empty = Callable[[str, torch.Size, torch.dtype], Tensor]


def load_checkpoint(
    folder: Path, empty: Empty | None = None, *, checked: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values of a checkpoint.

    Args:
        empty: makes the tensor into which one of the checkpoint is read, from its name, its size and its dtype, such as
            a DTensor, which gets its part only. Defaults to whole tensors on the CPU.
        checked: whether `check_files` has been called, which one process does for all.
    Raises CheckpointError if a file is a pickle, is broken, is missing, or has a newer format version.
    """
    if not checked:
        check_files(folder)
    way_out = _way_out(folder)
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it must be a table of keys and values, got {type(values).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read ({error}); {way_out}") from error
    require_format_version(values, VERSION, folder / STATE)
    make = empty or (lambda name, size, dtype: torch.empty(size, dtype=dtype))
    try:
        reader = HuggingFaceStorageReader(str(folder))
        with quiet():
            stored = reader.read_metadata().state_dict_metadata
            tensors = {
                name: make(name, entry.size, entry.properties.dtype)  # type: ignore[union-attr]
                for name, entry in stored.items()
            }
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (SafetensorError, CheckpointException, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tensors of {folder} are truncated or corrupt ({error}); {way_out}") from error
    missing = set(values.get("tensors", ())) ^ set(tensors)
    if missing:
        raise CheckpointError(f"the tensors of {folder} are not those listed in its {STATE}: {min(missing)}; {way_out}")
    return tensors, values


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError if a file in a run's folder has the suffix of a pickle."""
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(PICKLES):
            raise CheckpointError(f"{path} is a pickle, which could run code when read; a run holds none: delete it")


def _way_out(folder: Path) -> str:
    return f"delete {folder} to go on from the checkpoint before it"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of torch.distributed.checkpoint about running in one process."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def as_os_error(error: BaseException, run: Path) -> BaseException:
    """An OSError with the way out for a failure of the disk, which DCP wraps; any other error as it is."""
    causes = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    for cause, _ in causes:
        if isinstance(cause, (OSError, SafetensorError)):
            words = getattr(cause, "strerror", None) or str(cause)
            return OSError(
                getattr(cause, "errno", None) or 5,
                f"the checkpoint could not be written ({words}); the earlier ones are complete: make room, then resume",
                str(run),
            )
    return error
