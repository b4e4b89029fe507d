"""The flags that verbs share for device, dtype and threads, and the model that a flag names."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from anymamba.base.sizes import require_at_least

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer
    from anymamba.models.checkpoints import Checkpoint
    from anymamba.models.language_model import LanguageModel


@dataclass(frozen=True)
class Runtime:
    """Device, dtype and threads of the computation, and whether the model's files are verified."""

    device: str = "auto"
    """cpu, cuda, cuda:1, xpu, mps; auto takes the first of cuda, xpu, mps and cpu that can be used here."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights and of the computation; defaults to the stored one."""
    weights: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Pack the weights for inference, which is faster and takes less memory; they compute in float32. On a CPU and on
    CUDA, files with weights in blocks of integers are run in their blocks by default."""
    threads: int | None = None
    """CPU threads; defaults to torch's choice, the number of cores."""
    adapter: Path | None = None
    """A LoRA adapter in PEFT's format, a folder or a name on the hub, which is merged into the weights."""
    no_verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Load the model without comparing its files with their digests, about half a second less for each GB."""


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads; None changes nothing."""
    import torch

    if threads is None:
        return
    require_at_least("--threads", threads, 1)
    torch.set_num_threads(threads)


def open_model(model: Path, tokenizer: Path | None, runtime: Runtime) -> tuple[Checkpoint, Tokenizer]:
    """Open a model and its tokenizer. The weights are not loaded yet, so that a wrong flag is an error at once.

    Args:
        model: a folder (a run folder is one), a .gguf file, or a name on the hub.
        tokenizer: what names another tokenizer than the model's own.
    Raises FileNotFoundError if there is none, CheckpointError if it cannot be read, ValueError for a device or a number
        of threads that cannot be used and for a tokenizer of another model.
    """
    set_threads(runtime.threads)
    from anymamba.ops.devices import usable_device

    check_weights(runtime, usable_device(runtime.device).type)
    from anymamba.models.checkpoints import find_tokenizer, open_checkpoint

    checkpoint = open_checkpoint(model, verify=not runtime.no_verify, adapter=runtime.adapter)
    return checkpoint, find_tokenizer(checkpoint, tokenizer)


def load_model(checkpoint: Checkpoint, runtime: Runtime) -> LanguageModel:
    """Load the weights of an open model for inference. They are packed if --weights or the file says so, and on CUDA,
    where packed models step in graphs, unless --dtype is given or the model is not causal."""
    import torch

    from anymamba.models.checkpoints import load_pretrained
    from anymamba.ops.devices import usable_device
    from anymamba.ops.packed_linear import no_kernels

    device = usable_device(runtime.device)
    unasked = runtime.dtype is None and checkpoint.config.is_causal
    packed = runtime.weights or (unasked and (checkpoint.in_blocks or device.type == "cuda"))
    if packed and no_kernels(device.type) is None:
        from anymamba.models.inference import InferenceModel

        return InferenceModel.from_pretrained(checkpoint, runtime.weights, device)
    name = runtime.weights or runtime.dtype
    return load_pretrained(checkpoint, device=device, dtype=getattr(torch, name) if name else None).eval()


def check_weights(runtime: Runtime, device_type: str) -> None:
    """Raise ValueError for --weights beside --dtype, and for formats that a device cannot run."""
    if runtime.weights is not None and runtime.dtype is not None:
        raise ValueError("--weights and --dtype both choose the format of the weights; give one")
    if runtime.weights not in ("int8", "int4"):
        return
    from anymamba.ops.packed_linear import no_kernels

    if why := no_kernels(device_type):
        raise ValueError(
            f"--weights {runtime.weights} cannot run on {device_type}: {why}; take --weights bfloat16, or --device cpu"
        )


@contextmanager
def told_how_to_resume(run: Path) -> Iterator[None]:
    """When Ctrl-C or SIGTERM ends the body, add to the exception how to resume the run."""
    try:
        yield
    except KeyboardInterrupt as end:
        started = (run / "train_config.json").exists()
        raise type(end)(f"resume with: anymamba train --resume {shlex.quote(str(run))}" if started else "") from None
