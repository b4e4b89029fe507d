"""The three models and their rates at each scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from anymamba.experiments.promoters.data import Source
from anymamba.lab.classifiers import Classes, Classifier, ConvOptions
from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.genome_models import config_of
from anymamba.lab.language import n_parameters, optimization
from anymamba.lab.optimization import Optimization
from anymamba.models.config import ModelConfig

ARCHITECTURES = ("cnn", "hyena", "mamba")


@dataclass(frozen=True)
class PromoterSettings:
    """The settings of an arm; with the seed, they determine its result."""

    model: ModelConfig | ConvOptions
    optimization: Optimization
    source: Source
    judge_every: int


@dataclass(frozen=True)
class Base:
    """What the arms of a scale share."""

    n_layers: int
    """Mamba blocks."""
    d_model: int
    steps: int
    batch_size: int
    rates: dict[str, tuple[float, ...]]
    length: int = 251
    """Bases of a sequence."""
    source: Source = "promoters"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    seeds: int = 3


RATES: dict[str, tuple[float, ...]] = dict.fromkeys(ARCHITECTURES, (1e-3, 4e-3))
BASES: dict[Scale, Base] = {
    "toy": Base(4, 32, 4, 8, dict.fromkeys(ARCHITECTURES, (2e-3,)), 32, "synthetic", "float32", 1),
    "cpu": Base(4, 48, 600, 32, RATES, precision="float32", seeds=1),
    "gpu": Base(8, 128, 1500, 128, RATES),
    "paper": Base(8, 128, 1500, 128, RATES, seeds=5),
}


def model_of(base: Base, architecture: str) -> ModelConfig | ConvOptions:
    """The model of an architecture, with about as many parameters as Mamba."""
    if architecture != "cnn":
        return config_of(architecture, base.n_layers, base.d_model, base.length)
    wanted = n_parameters(config_of("mamba", base.n_layers, base.d_model, base.length))
    sizes = [ConvOptions(channels) for channels in range(16, 513, 8)]
    return min(sizes, key=lambda options: abs(n_weights(options) - wanted))


def n_weights(options: ConvOptions) -> int:
    """The parameters of the convolutional classifier."""
    per_layer = options.width * options.channels**2 + 3 * options.channels
    return options.vocab_size * options.channels + options.n_layers * per_layer


def arms_of(base: Base, architecture: str) -> dict[str, float]:
    """The arms of an architecture and their rates."""
    return {f"{architecture}-rate{round(1e3 * rate)}": rate for rate in base.rates[architecture]}


def arms_at(scale: Scale) -> list[Arm]:
    """Every architecture at every rate."""
    base = BASES[scale]
    how = optimization(base.steps, base.batch_size, 1.0, base.precision)
    return [
        Arm(
            arm,
            PromoterSettings(
                model_of(base, name), replace(how, learning_rate=rate), base.source, max(1, base.steps // 4)
            ),
            base.seeds,
        )
        for name in ARCHITECTURES
        for arm, rate in arms_of(base, name).items()
    ]


def build(settings: PromoterSettings) -> Classifier:
    """The classifier of an arm: the head reads the mean over all positions."""
    return Classifier(settings.model, Classes(2, "mean"))
