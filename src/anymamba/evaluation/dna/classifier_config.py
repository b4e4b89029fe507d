"""The configuration of a classifier's training. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anymamba.base.sizes import require_at_least, require_positive

Method = Literal["finetune", "probe"]
Strands = Literal["one", "both"]


@dataclass(frozen=True)
class ClassifierTraining:
    """How classifiers are trained, one for each seed."""

    method: Method = "finetune"
    """finetune trains the whole model; probe a linear map of its vectors, each seed on another bootstrap sample."""
    pooling: Literal["mean", "last"] = "mean"
    """What the head reads: the mean over all bases, or the vector of the last one."""
    strands: Strands = "one"
    """both: train on either strand at random, and average the logits of both strands."""
    epochs: int = 10
    """Passes over the training sequences (finetune)."""
    batch_size: int = 32
    """Sequences that are read at once."""
    learning_rate: float = 1e-3
    """Peak learning rate, after a warm-up of a tenth of the steps; it falls to a hundredth by a cosine (finetune)."""
    weight_decay: float = 0.1
    """Weight decay of matrices (finetune)."""
    seeds: int = 3
    """Number of classifiers, of the seeds 0, 1, and so on."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "seeds"):
            require_at_least(name, getattr(self, name), 1)
        require_positive("learning_rate", self.learning_rate)
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
