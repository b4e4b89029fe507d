"""The models and the documents of each task, by scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.zero_shot import TASKS

ARCHITECTURES = ("mamba", "transformer", "h3", "hyena")
SIZES: dict[Scale, str] = {"cpu": "7m", "gpu": "7m", "paper": "130m"}
"""The size of the models, which are in the folder `models` of the data."""


@dataclass(frozen=True)
class Settings:
    """The settings of an arm; with the seed, they determine its result."""

    folder: str | None
    """The model's folder in `models`; None is a new model without training."""
    tasks: tuple[str, ...] = tuple(TASKS)
    n_documents: int | None = None
    """First documents of each task; None means all."""


def arms_at(scale: Scale) -> list[Arm]:
    """The models of one size; at scale paper the published Mamba, at scale toy a new model on tasks in the code."""
    if scale == "toy":
        return [
            Arm("one-task", Settings(None, ("lambada",))),
            Arm("two-tasks", Settings(None, ("lambada", "winogrande"))),
        ]
    if scale == "paper":
        return [Arm("mamba-130m", Settings("mamba-130m"))]
    size = SIZES[scale]
    return [Arm(f"{name}-{size}", Settings(f"{name}-{size}-seed0")) for name in ARCHITECTURES]


TOY: dict[str, list[dict[str, Any]]] = {
    "lambada": [{"text": "the cat sat on the mat"}, {"text": "a dog ran to the house"}],
    "winogrande": [
        {
            "sentence": "The cup fell off the table because _ was round.",
            "option1": "it",
            "option2": "he",
            "answer": "1",
        },
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
}
"""Documents for scale toy."""
