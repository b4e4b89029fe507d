"""The arms and their settings at each scale."""

from __future__ import annotations

from dataclasses import dataclass

from anymamba.data.synthetic.copying import Copying
from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.optimization import Optimization
from anymamba.models.config import ModelConfig
from anymamba.parts.options import MambaOptions

SELECTIVE: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "B": frozenset({"B"}),
    "C": frozenset({"C"}),
    "delta": frozenset({"delta"}),
    "all": frozenset({"delta", "B", "C"}),
}
"""Rows of table 7: which of Δ, B and C depend on the input."""
WIDE = 0.15
"""Standard deviation of the projections' initial weights at scale cpu, in every arm."""


@dataclass(frozen=True)
class Settings:
    """The settings of an arm; with the seed, they determine its result."""

    model: ModelConfig
    optimization: Optimization
    copying: Copying
    validation_rows: int = 256
    judge_every: int = 200
    """Steps between two evaluations on the validation set."""


@dataclass(frozen=True)
class Base:
    """What the arms of a scale share."""

    task: Copying
    steps: int
    batch_size: int
    rate: float
    warmup_steps: int
    judge_every: int
    width: int = 64
    validation_rows: int = 256
    seeds: int = 1
    weight_std: float | None = None


BASES: dict[Scale, Base] = {
    "toy": Base(Copying(8, 2), 2, 4, 3e-3, 0, 1, width=16, validation_rows=8),
    "cpu": Base(Copying(64, 8), 4000, 32, 3e-3, 100, 500, seeds=3, weight_std=WIDE),
    "gpu": Base(Copying(1024, 16), 20_000, 64, 1e-3, 200, 1000),
    "paper": Base(Copying(4096, 16), 400_000, 64, 1e-4, 1000, 10_000),
}


def arms_at(scale: Scale) -> list[Arm]:
    """Table 7 on selective copying."""
    base = BASES[scale]
    return [Arm(f"copying-{name}", settings_of(base, name), base.seeds) for name in SELECTIVE]


def settings_of(base: Base, selective: str) -> Settings:
    """Two blocks of width 64, as in the paper's task; narrower at scale toy."""
    chosen = SELECTIVE[selective]
    options = MambaOptions(selective_delta="delta" in chosen, selective_B="B" in chosen, selective_C="C" in chosen)
    model = ModelConfig(
        d_model=base.width, n_layers=2, vocab_size=base.task.alphabet, mamba=options, weight_std=base.weight_std
    )
    how = Optimization(base.steps, base.batch_size, base.rate, warmup_steps=base.warmup_steps, cosine=True)
    return Settings(model, how, base.task, base.validation_rows, base.judge_every)
