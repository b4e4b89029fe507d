"""The architectures and sizes of figure 5, left, at each scale."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.genome_models import GenomeSettings, config_of
from anymamba.lab.genomes import CorpusName
from anymamba.lab.language import optimization

ARCHITECTURES = ("mamba", "hyena", "transformer")


@dataclass(frozen=True)
class Size:
    """A size of all architectures; n_layers is the number of Mamba blocks."""

    name: str
    n_layers: int
    d_model: int


@dataclass(frozen=True)
class Base:
    """What the arms of a scale share."""

    sizes: tuple[Size, ...]
    """Smallest first; rates are tried at the first, which has a second seed."""
    rates: dict[str, tuple[float, ...]]
    """The rates that are tried, by architecture."""
    window: int
    n_bases: int
    """Bases to learn from."""
    bases_a_step: int
    corpus: CorpusName = "arabidopsis"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    block: int = 1 << 17
    held_out: int | None = None
    seeds: int = 2
    """Seeds of the smallest size."""
    again: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Rates that are tried at the largest size, too, by architecture: does the best one of the smallest hold there?"""
    longer: int = 1
    """Times the bases that the architectures of `again` read once more at the largest size."""


RATES: dict[str, tuple[float, ...]] = {
    "mamba": (2e-3, 4e-3, 8e-3),
    **dict.fromkeys(ARCHITECTURES[1:], (1e-3, 2e-3, 4e-3)),
}
"""The paper tries 1, 2, 4 and 8e-3; its best are 8e-3 for Mamba and 2e-3 for the others."""
SIZES = (Size("1400k", 12, 128), Size("3500k", 14, 192), Size("7000k", 16, 256))
"""Three of the paper's seven."""
BASES: dict[Scale, Base] = {
    "toy": Base(
        (Size("d64", 4, 64), Size("d80", 4, 80)),
        dict.fromkeys(ARCHITECTURES, (0.002, 0.004)),
        16,
        64,
        32,
        "synthetic",
        "float32",
        block=64,
        seeds=1,
    ),
    "cpu": Base(
        (Size("80k", 4, 48), Size("150k", 6, 56), Size("340k", 8, 72)),
        dict.fromkeys(ARCHITECTURES, (4e-3, 8e-3)),
        1024,
        1 << 20,
        4096,
        "arabidopsis",
        "float32",
        block=1 << 13,
        held_out=1 << 16,
        seeds=1,
    ),
    "gpu": Base(SIZES, RATES, 1024, 1 << 26, 1 << 16, again=dict.fromkeys(("mamba", "hyena"), (1e-3, 4e-3)), longer=4),
    "paper": Base(
        (Size("250k", 8, 64), Size("700k", 10, 96), *SIZES, Size("19300k", 20, 384), Size("40700k", 24, 512)),
        RATES,
        1024,
        10_000 << 20,
        1 << 20,
    ),
}


def settings_of(base: Base, architecture: str, size: Size, rate: float) -> GenomeSettings:
    """The settings of an architecture at a size and a rate."""
    steps = base.n_bases // base.bases_a_step
    return GenomeSettings(
        config_of(architecture, size.n_layers, size.d_model, base.window),
        optimization(steps, base.bases_a_step // base.window, rate, base.precision),
        base.window,
        base.corpus,
        judge_every=max(1, steps // 2),
        block=base.block,
        held_out=base.held_out,
    )


def sweep(base: Base, architecture: str) -> dict[str, float]:
    """The rates of an architecture that are tried, by arm."""
    return _by_arm(f"{architecture}-{base.sizes[0].name}", base.rates[architecture])


def sweep_again(base: Base, architecture: str) -> dict[str, float]:
    """The rates that are tried at the largest size, by arm."""
    return _by_arm(f"{architecture}-{base.sizes[-1].name}", base.again.get(architecture, ()))


def _by_arm(name: str, rates: tuple[float, ...]) -> dict[str, float]:
    return {f"{name}-rate{round(1e3 * rate)}": rate for rate in rates}


def arms_at(scale: Scale) -> list[Arm]:
    """The rates at the smallest size, its second seed, the larger sizes at the best rate; then what is tried at the
    largest."""
    base = BASES[scale]
    smallest, arms = base.sizes[0], []
    for name in ARCHITECTURES:
        arms += [Arm(arm, settings_of(base, name, smallest, rate)) for arm, rate in sweep(base, name).items()]
    for size in base.sizes:
        for name in ARCHITECTURES:
            if size is not smallest or base.seeds > 1:
                settings = replace(
                    settings_of(base, name, size, base.rates[name][0]),
                    rate_of=tuple(sweep(base, name)),
                    seed_offset=1 if size is smallest else 0,
                )
                arms.append(Arm(f"{name}-{size.name}", settings))
    largest = base.sizes[-1]
    for name in base.again:
        arms += [Arm(arm, settings_of(base, name, largest, rate)) for arm, rate in sweep_again(base, name).items()]
        settings = settings_of(replace(base, n_bases=base.longer * base.n_bases), name, largest, base.rates[name][0])
        arms.append(Arm(f"{name}-{largest.name}-longer", replace(settings, rate_of=tuple(sweep(base, name)))))
    return arms
