"""The architectures, their sizes at each scale, and the order in which they are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.language import VOCABULARY, LanguageSettings, n_parameters, optimization, with_parameters
from anymamba.models.config import ModelConfig
from anymamba.models.presets import h3_plus_plus, transformer_plus_plus
from anymamba.parts.options import HyenaOptions

ARCHITECTURES = ("mamba", "transformer", "h3", "hyena")
LARGEST = ("mamba", "transformer")
"""The architectures that are measured at the largest size and with long rows."""
SWEPT = 1
"""Index of the size at which rates are tried."""


@dataclass(frozen=True)
class Size:
    """A size of all architectures; n_layers is the number of Mamba blocks."""

    name: str
    n_layers: int
    d_model: int
    n_bytes: int
    """Bytes to learn from."""
    bytes_a_step: int
    keep: bool = False
    """Save the models of this size."""


@dataclass(frozen=True)
class Base:
    """What the arms of a scale share."""

    sizes: tuple[Size, ...]
    """Smallest first. The last has the architectures of LARGEST only."""
    rates: dict[str, tuple[float, ...]]
    """The rates that are tried, by architecture."""
    window: int
    long_window: int
    """Length of the rows of a second measurement of the sizes between the smallest and the largest."""
    corpus: Literal["books", "standard-library"]
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    validation_bytes: int = 1 << 19
    seeds: int = 2
    """Seeds of the two smallest sizes."""


RATES: dict[str, tuple[float, ...]] = {
    "mamba": (2e-3, 4e-3, 8e-3),
    **dict.fromkeys(ARCHITECTURES[1:], (1e-3, 2e-3, 4e-3)),
}
TOY_SIZES = tuple(Size(f"d{width}", 4, width, 64, 32) for width in (96, 112, 128, 144))
CPU_SIZES = (
    Size("160k", 4, 72, 240_000, 1024),
    Size("360k", 6, 96, 540_000, 1024),
    Size("800k", 8, 120, 1_200_000, 2048),
    Size("1600k", 10, 152, 2_400_000, 4096),
)
GPU_SIZES = (
    Size("1m", 10, 128, 24_000_000, 32768),
    Size("3m", 12, 192, 61_000_000, 32768),
    Size("7m", 16, 256, 142_000_000, 65536, True),
    Size("19m", 20, 384, 388_000_000, 131072),
)
PAPER_SIZES = (
    Size("125m", 24, 768, 2_500_000_000, 524288),
    Size("350m", 48, 1024, 7_000_000_000, 524288),
    Size("760m", 48, 1536, 15_000_000_000, 524288),
    Size("1300m", 48, 2048, 26_000_000_000, 524288),
)
BASES: dict[Scale, Base] = {
    "toy": Base(
        TOY_SIZES,
        dict.fromkeys(ARCHITECTURES, (0.002, 0.004)),
        16,
        32,
        "standard-library",
        "float32",
        validation_bytes=64,
        seeds=1,
    ),
    "cpu": Base(CPU_SIZES, RATES, 256, 1024, "standard-library", "float32", validation_bytes=1 << 16, seeds=1),
    "gpu": Base(GPU_SIZES, RATES, 2048, 8192, "books"),
    "paper": Base(PAPER_SIZES, RATES, 2048, 8192, "books"),
}


def config_of(architecture: str, size: Size, window: int) -> ModelConfig:
    """The model of an architecture with the parameters of Mamba at that size."""
    mamba = ModelConfig(d_model=size.d_model, n_layers=size.n_layers, vocab_size=VOCABULARY)
    if architecture == "mamba":
        return mamba
    layers, d_model = size.n_layers // 2, size.d_model
    if architecture == "transformer":
        config = transformer_plus_plus(layers, d_model, max(1, d_model // 64), VOCABULARY)
    else:
        config = replace(h3_plus_plus(layers, d_model), vocab_size=VOCABULARY)
    if architecture == "hyena":
        config = replace(config, mixers=("hyena", "mlp"), hyena=HyenaOptions(max_length=window))
    return with_parameters(config, n_parameters(mamba))


def settings_of(base: Base, architecture: str, size: Size, rate: float, window: int | None = None) -> LanguageSettings:
    """The settings of an architecture at a size and a rate."""
    window = window or base.window
    rows, steps = max(1, size.bytes_a_step // window), size.n_bytes // size.bytes_a_step
    return LanguageSettings(
        config_of(architecture, size, window),
        optimization(steps, rows, rate, base.precision),
        window,
        base.corpus,
        validation_rows=max(1, base.validation_bytes // window),
        judge_every=max(1, steps // 6),
    )


def sweep_names(base: Base, architecture: str) -> tuple[str, ...]:
    """The names of the arms that try the rates of an architecture."""
    size = base.sizes[SWEPT].name
    return tuple(f"{architecture}-{size}-rate{round(1e3 * rate)}" for rate in base.rates[architecture])


def arms_at(scale: Scale) -> list[Arm]:
    """The rates, the sizes from the smallest, a second seed of the swept size, then long rows.

    At the swept size the first seed is that of the best rate, which is measured already.
    """
    base = BASES[scale]
    swept, arms = base.sizes[SWEPT], []
    for name in ARCHITECTURES:
        for arm, rate in zip(sweep_names(base, name), base.rates[name], strict=True):
            arms.append(Arm(arm, settings_of(base, name, swept, rate)))
    for size in base.sizes:
        for name in LARGEST if size is base.sizes[-1] else ARCHITECTURES:
            if size is not swept:
                arms.append(best_arm(base, name, size))
    if base.seeds > 1:
        arms += [best_arm(base, name, swept, seed_offset=1) for name in ARCHITECTURES]
    return arms + [best_arm(base, name, size, base.long_window) for size in base.sizes[1:-1] for name in LARGEST]


def best_arm(base: Base, name: str, size: Size, window: int | None = None, seed_offset: int = 0) -> Arm:
    """An arm at the best rate of its architecture."""
    settings = replace(
        settings_of(base, name, size, base.rates[name][0], window),
        rate_of=sweep_names(base, name),
        seed_offset=seed_offset,
        keep=size.keep and window is None,
    )
    suffix = "" if window is None else f"-rows-of-{window}"
    return Arm(f"{name}-{size.name}{suffix}", settings, base.seeds if size is base.sizes[0] else 1)
