"""The lengths, the models and the baseline, with their settings at each scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anymamba.experiments.great_apes.genomes import Source
from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.language import optimization
from anymamba.lab.optimization import Optimization
from anymamba.models.config import ModelConfig
from anymamba.models.presets import dna

PRETRAINED = "pretrain"
"""The arm whose model the others begin from."""


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of the model of the next base."""

    model: ModelConfig
    optimization: Optimization
    window: int
    source: Source
    longest: int
    """Bases of a locus."""
    most_loci: int | None
    judge_every: int
    keep: bool
    """Save the model beside the results."""


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a model of the species."""

    model: ModelConfig
    optimization: Optimization
    window: int
    asked: int
    """In training the species is asked after every so many bases; it is judged at the last."""
    source: Source
    longest: int
    most_loci: int | None
    judge_every: int
    start: str | None
    """The arm whose model this one begins from; None means random weights."""
    rate_of: tuple[str, ...] = ()
    """Arms that tried rates; the best one's replaces that of the optimization."""


@dataclass(frozen=True)
class BaselineSettings:
    """Settings of the logistic regression on 6-mers."""

    window: int
    source: Source
    longest: int
    most_loci: int | None
    n_windows: int
    """Windows to fit, of all species."""
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Weights of the squared norm; the one with the lowest loss on the valid windows is used."""


@dataclass(frozen=True)
class Base:
    """What the arms of a scale share."""

    n_layers: int
    d_model: int
    lengths: tuple[int, ...]
    """Shortest first. The last is the size of a locus."""
    swept: int
    """The length at which rates are tried."""
    rates: tuple[float, ...]
    asked: int
    bases_a_step: int
    pretrain_length: int
    pretrain_steps: int
    steps: int
    n_windows: int
    """Most windows that the baseline is fitted on."""
    source: Source = "apes"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    pretrain_rate: float = 4e-3
    most_loci: int | None = None


LENGTHS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)
BASES: dict[Scale, Base] = {
    "toy": Base(4, 16, (32, 64), 64, (1e-3, 4e-3), 16, 128, 32, 2, 4, 64, "synthetic", "float32"),
    "cpu": Base(
        4,
        48,
        (1 << 8, 1 << 10, 1 << 12),
        1 << 10,
        (5e-4, 2e-3),
        1 << 8,
        1 << 12,
        1 << 10,
        400,
        400,
        4096,
        precision="float32",
        most_loci=32,
    ),
    "gpu": Base(12, 128, LENGTHS, 1 << 14, (5e-4, 2e-3), 1 << 10, 1 << 17, 1 << 14, 1000, 1500, 32768),
    "paper": Base(12, 128, LENGTHS, 1 << 14, (5e-5, 1e-4, 2e-4), 1 << 10, 1 << 22, 1 << 14, 20_000, 10_240, 32768),
}


def sweep(base: Base) -> dict[str, float]:
    """The rates that are tried, by arm."""
    return {f"mamba-{base.swept}-rate{round(1e5 * rate)}": rate for rate in base.rates}


def finetune(base: Base, length: int, rate: float, rate_of: tuple[str, ...] = ()) -> FinetuneSettings:
    """The settings of the model of the species at a length."""
    return FinetuneSettings(
        dna(base.n_layers, base.d_model),
        optimization(base.steps, max(1, base.bases_a_step // length), rate, base.precision),
        length,
        base.asked,
        base.source,
        base.lengths[-1],
        base.most_loci,
        max(1, base.steps // 4),
        None if base.source == "synthetic" else PRETRAINED,
        rate_of,
    )


def pretraining(base: Base) -> PretrainSettings:
    """The settings of the model of the next base."""
    return PretrainSettings(
        dna(base.n_layers, base.d_model),
        optimization(
            base.pretrain_steps, base.bases_a_step // base.pretrain_length, base.pretrain_rate, base.precision
        ),
        base.pretrain_length,
        base.source,
        base.lengths[-1],
        base.most_loci,
        max(1, base.pretrain_steps // 4),
        keep=base.source != "synthetic",
    )


def arms_at(scale: Scale) -> list[Arm]:
    """The pretraining, the rates at one length, the other lengths at the best rate, and the baseline."""
    base = BASES[scale]
    arms = [Arm(PRETRAINED, pretraining(base))]
    arms += [Arm(arm, finetune(base, base.swept, rate)) for arm, rate in sweep(base).items()]
    for length in base.lengths:
        if length != base.swept:
            arms.append(Arm(f"mamba-{length}", finetune(base, length, base.rates[0], tuple(sweep(base)))))
    for length in base.lengths:
        n_windows = min(base.n_windows, max(64, (1 << 28) // length))
        settings = BaselineSettings(length, base.source, base.lengths[-1], base.most_loci, n_windows)
        arms.append(Arm(f"sixmers-{length}", settings))
    return arms
