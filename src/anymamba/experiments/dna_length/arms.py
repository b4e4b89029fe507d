"""The lengths of figure 5, right, at each scale."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.genome_models import GenomeSettings, config_of
from anymamba.lab.genomes import CorpusName
from anymamba.lab.language import optimization

ARCHITECTURES = ("mamba", "hyena")


@dataclass(frozen=True)
class Base:
    """What the arms of a scale share."""

    n_layers: int
    """Mamba blocks."""
    d_model: int
    lengths: tuple[int, ...]
    """Bases of a row, shortest first; rates are tried at the first."""
    rates: dict[str, tuple[float, ...]]
    n_bases: int
    """Bases to learn from."""
    bases_a_step: int
    longest: int | None = None
    """Length of the demonstration: Mamba alone, a row a step."""
    corpus: CorpusName = "arabidopsis"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    block: int = 1 << 17
    held_out: int | None = None
    again: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Rates that are tried at the length `again_at`, too, by architecture: does the best of the shortest hold there?"""
    again_at: int = 1 << 16


RATES: dict[str, tuple[float, ...]] = {"mamba": (2e-3, 4e-3, 8e-3), "hyena": (1e-3, 2e-3, 4e-3)}
"""The paper has 8e-3 for Mamba and 1e-3 for Hyena, in 20,000 steps of 2^24 bases."""
GPU = Base(
    12,
    128,
    (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 17),
    RATES,
    1 << 26,
    1 << 17,
    longest=1 << 20,
    again={"mamba": (2e-3, 4e-3), "hyena": (1e-3, 2e-3)},
)
BASES: dict[Scale, Base] = {
    "toy": Base(
        4,
        64,
        (8, 16, 32),
        dict.fromkeys(ARCHITECTURES, (0.002, 0.004)),
        128,
        32,
        64,
        "synthetic",
        "float32",
        block=64,
    ),
    "cpu": Base(
        4,
        48,
        (1 << 8, 1 << 10, 1 << 12),
        dict.fromkeys(ARCHITECTURES, (4e-3, 8e-3)),
        1 << 20,
        1 << 12,
        1 << 14,
        "arabidopsis",
        "float32",
        block=1 << 14,
        held_out=1 << 16,
    ),
    "gpu": GPU,
    "paper": replace(
        GPU,
        lengths=tuple(1 << n for n in range(10, 21, 2)),
        n_bases=20_000 << 24,
        bases_a_step=1 << 24,
        longest=None,
        again={},
    ),
}


def settings_of(base: Base, architecture: str, length: int, rate: float) -> GenomeSettings:
    """The settings of an architecture at a length and a rate."""
    rows = max(1, base.bases_a_step // length)
    steps = base.n_bases // (rows * length)
    return GenomeSettings(
        config_of(architecture, base.n_layers, base.d_model, length),
        optimization(steps, rows, rate, base.precision),
        length,
        base.corpus,
        judge_every=max(1, steps // 2),
        block=base.block,
        held_out=base.held_out,
        checkpointing=length == base.longest,
    )


def sweep(base: Base, architecture: str) -> dict[str, float]:
    """The rates of an architecture that are tried, by arm."""
    return _by_arm(f"{architecture}-{base.lengths[0]}", base.rates[architecture])


def sweep_again(base: Base, architecture: str) -> dict[str, float]:
    """The rates that are tried at a longer length, by arm."""
    return _by_arm(f"{architecture}-{base.again_at}", base.again.get(architecture, ()))


def _by_arm(name: str, rates: tuple[float, ...]) -> dict[str, float]:
    return {f"{name}-rate{round(1e3 * rate)}": rate for rate in rates}


def arms_at(scale: Scale) -> list[Arm]:
    """The rates at the shortest length, then the longer ones at the best rate, the demonstration, and the rates at a
    longer length."""
    base = BASES[scale]
    arms = []
    for name in ARCHITECTURES:
        shortest = base.lengths[0]
        arms += [Arm(arm, settings_of(base, name, shortest, rate)) for arm, rate in sweep(base, name).items()]
    pairs = [(name, length) for length in base.lengths[1:] for name in ARCHITECTURES]
    if base.longest is not None:
        pairs.append(("mamba", base.longest))
    for name, length in pairs:
        settings = settings_of(base, name, length, base.rates[name][0])
        arms.append(Arm(f"{name}-{length}", replace(settings, rate_of=tuple(sweep(base, name)))))
    for name in base.again:
        tried = sweep_again(base, name)
        arms += [Arm(arm, settings_of(base, name, base.again_at, rate)) for arm, rate in tried.items()]
    return arms
