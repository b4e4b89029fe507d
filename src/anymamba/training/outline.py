"""What a run is about to do: its parameters, tokens, device and memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from anymamba.models.language_model import LanguageModel
from anymamba.training.config import TrainConfig
from anymamba.training.data import TrainingData
from anymamba.training.genomes import GenomeData

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Outline:
    """What a run is about to do."""

    n_parameters: int
    n_trained: int
    """Those of them that are trained: with LoRA the adapters only."""
    training_tokens: int
    """Tokens of the training documents."""
    held_out_tokens: int
    """Tokens of the held-out documents."""
    step: int
    """Steps that are done; 0 for a new run."""
    steps: int
    """Steps in all."""
    tokens_per_step: int
    device: str
    threads: int
    """CPU threads."""
    needed_bytes: int
    """Memory for weights, gradients and the optimizer; activations come on top of it."""
    free_bytes: int | None
    """Memory that the device has left; None if it is not known."""
    unit: str = "byte"
    """What a loss in bits is of: a byte of text, or a base of DNA."""
    notes: tuple[str, ...] = ()
    """What was found and skipped in the data, one line each."""

    @property
    def tokens(self) -> int:
        """Tokens that the rest of the run reads."""
        return (self.steps - self.step) * self.tokens_per_step


def outline(
    config: TrainConfig, model: LanguageModel, training: TrainingData, held_out: TrainingData | None, step: int
) -> Outline:
    """The outline of a run that has done `step` steps."""
    device = model.embedding.weight.device
    notes: tuple[str, ...] = ()
    if isinstance(training, GenomeData):
        notes = training.run_notes(config, held_out if isinstance(held_out, GenomeData) else None)
    return Outline(
        n_parameters=model.n_parameters(),
        n_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        training_tokens=training.n_tokens,
        held_out_tokens=0 if held_out is None else held_out.n_tokens,
        step=step,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        device=str(device),
        threads=torch.get_num_threads(),
        needed_bytes=training_bytes(model),
        free_bytes=free_bytes(device),
        unit=unit_of(training),
        notes=notes,
    )


def unit_of(training: TrainingData) -> str:
    """What a loss in bits is of."""
    return "base" if isinstance(training, GenomeData) else "byte"


def training_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, their gradients and AdamW's two moments; of a sharded model those of this process.
    Activations come on top of them."""
    bytes_ = 0
    for parameter in model.parameters():
        copies = 2 + ADAM_MOMENTS if parameter.requires_grad else 1
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        bytes_ += copies * own.numel() * own.element_size()
    return bytes_


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be used on a device; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    found = [line.split() for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    return 1024 * int(found[0][1]) if found else None


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that this process has used so far: on a GPU its tensors, else all of it; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
