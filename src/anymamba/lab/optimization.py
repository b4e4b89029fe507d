"""How an arm is optimised: AdamW, its schedule, and the step that is repeated."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.lab.classifiers import Classifier
from anymamba.models.language_model import LanguageModel, LossOutput
from anymamba.parts.state import without_last_states
from anymamba.training import optimizer as adamw
from anymamba.training.config import OptimizerConfig

Batch = tuple[Tensor, Tensor]
"""Token ids (rows, length) and labels (rows, length), for a classifier (rows, asked); -100 is not counted."""
WARM_UP = 3
"""Steps on a GPU before one is recorded: kernels are compiled and libraries choose their algorithms."""


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up, then a constant rate or half a cosine down to `final_rate`."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 0
    cosine: bool = False
    clip_norm: float | None = 1.0
    kernel_learning_rate: float = 1e-3
    """Largest rate of the parameters of time-invariant kernels (S4, S4D, Hyena's filter)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    """Added to the root of the second moment. Gradients far below it have almost no effect. If the solution should keep
    improving after the loss is near 0, a smaller epsilon is needed."""
    final_rate: float = 0.0
    """Rate of the last step of a cosine, for all parameters."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the matrix products under autocast; weights and states stay float32."""


def build_optimizer(model: LanguageModel | Classifier, how: Optimization) -> torch.optim.AdamW:
    """AdamW with the same parameter groups as in training.

    On a GPU its rates are tensors, so that a recorded step follows the schedule.
    """
    config = OptimizerConfig(
        learning_rate=how.learning_rate,
        kernel_learning_rate=how.kernel_learning_rate,
        min_learning_rate=0.0,
        betas=how.betas,
        eps=how.eps,
        weight_decay=how.weight_decay,
    )
    optimizer = adamw.build_optimizer(model, config)
    device = model.embedding.weight.device
    if device.type == "cuda":
        for group in optimizer.param_groups:
            group |= {"lr": torch.tensor(group["lr"], device=device), "capturable": True}
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, how: Optimization, step: int) -> None:
    """Set the learning rates of a step; steps count from 1."""
    for group in optimizer.param_groups:
        peak = how.learning_rate if group["rate"] == 1.0 else how.kernel_learning_rate
        rate = rate_at(how, peak, step)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def rate_at(how: Optimization, peak: float, step: int) -> float:
    """The rate of a step for parameters with this peak."""
    if how.warmup_steps and step <= how.warmup_steps:
        return peak * step / how.warmup_steps
    if not how.cosine:
        return peak
    done = (step - how.warmup_steps) / max(1, how.steps - how.warmup_steps)
    last = min(how.final_rate, peak)
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * done))


class TrainingStep:
    """Takes steps of the optimiser.

    On an NVIDIA GPU a step of each shape of batches is recorded in a CUDA graph after WARM_UP such steps, and replayed
    from then on. A small model spends most of its time on launching kernels otherwise. A replayed step computes what
    a plain one does.
    """

    def __init__(self, model: LanguageModel | Classifier, how: Optimization) -> None:
        self.model, self.how = model, how
        self.optimizer = build_optimizer(model, how)
        self.device = model.embedding.weight.device
        self.not_recorded: str | None = None if self.device.type == "cuda" else "it is no NVIDIA GPU"
        """Why steps are not replayed from a graph; None if they are."""
        self._recorded: dict[tuple[torch.Size, int | None], Recorded] = {}
        self._plain_steps: Counter[tuple[torch.Size, int | None]] = Counter()

    def __call__(self, batch: Batch, step: int, labels_a_row: int | None = None) -> Tensor:
        """Take the step with this number, counted from 1; it does not wait for the GPU.

        Args:
            labels_a_row: the most labels of a row; then other positions get no logits, which saves most of the time of
                a small model with a large vocabulary. None: all positions get them.
        Returns the loss before the step, in nats per label, on the device.
        """
        set_rates(self.optimizer, self.how, step)
        shape = batch[0].shape, labels_a_row
        if self.not_recorded is None and shape not in self._recorded and self._plain_steps[shape] >= WARM_UP:
            self._record(batch, labels_a_row)
        if shape in self._recorded:
            return self._recorded[shape].replay(batch)
        self._plain_steps[shape] += 1
        take = self._take if self.not_recorded else self._on_own_stream
        return take(batch, labels_a_row)

    def _take(self, batch: Batch, labels_a_row: int | None) -> Tensor:
        with autocast(self.how, self.device), without_last_states():
            out = self.model.loss(*batch) if labels_a_row is None else loss_at_labels(self.model, *batch, labels_a_row)
        loss = out.loss / out.n_tokens
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.how.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.how.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def _on_own_stream(self, batch: Batch, labels_a_row: int | None) -> Tensor:
        """A plain step on the stream of the recording: memory of the warm-up belongs to it."""
        here, own = torch.cuda.current_stream(self.device), self._stream
        own.wait_stream(here)
        with torch.cuda.stream(own):
            loss = self._take(batch, labels_a_row)
        here.wait_stream(own)
        return loss

    @property
    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self, "_own_stream"):
            self._own_stream = torch.cuda.Stream(self.device)
        return self._own_stream

    def _record(self, batch: Batch, labels_a_row: int | None) -> None:
        """Record a step without taking it; if that fails, plain steps go on and `not_recorded` says why."""
        own = batch[0].clone(), batch[1].clone()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                loss = self._take(own, labels_a_row)
        except RuntimeError as error:
            self.not_recorded = str(error).splitlines()[0]
            self._recorded.clear()
            torch.cuda.synchronize(self.device)
            return
        self._recorded[batch[0].shape, labels_a_row] = Recorded(graph, own, loss)


@dataclass(frozen=True)
class Recorded:
    """A step in a CUDA graph, with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: Tensor

    def replay(self, batch: Batch) -> Tensor:
        """Take the step on a batch; returns the loss."""
        for own, given in zip(self.batch, batch, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.loss.clone()


def loss_at_labels(model: LanguageModel | Classifier, ids: Tensor, labels: Tensor, count: int) -> LossOutput:
    """The loss of a model whose rows have at most `count` labels, with logits of so many positions of a row.

    Which positions these are does not change a shape, so a GPU need not be waited for.
    """
    places = (labels != -100).int().topk(count, dim=1).indices
    x = model.hidden(ids)[0]
    logits = model.logits(x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))).float()
    wanted = labels.gather(1, places)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    return LossOutput(loss, (wanted != -100).sum(), None)  # type: ignore[arg-type]


def autocast(how: Optimization, device: torch.device) -> torch.autocast:
    """The precision of the products; each step converts the weights once."""
    return torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bfloat16")
