"""The arms of tables 6 to 10, their settings at each scale, and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.language import VOCABULARY, LanguageSettings, n_parameters, optimization, with_parameters
from anymamba.models.config import ModelConfig
from anymamba.models.presets import h3_plus_plus, transformer_plus_plus
from anymamba.parts.options import AttentionOptions, H3Options, HyenaOptions, MLPOptions, S4DOptions

MAMBA, TRANSFORMER = "mamba", "transformer"
STATES = (1, 2, 4, 8, 16)
RANKS = (1, 2, 4, 8)
LAYERS = {
    "h3": {"hyena": 10.24, "complex": 10.30, "real": 10.34, "s6": 8.95},
    "mamba": {"hyena": 10.75, "complex": 10.54, "real": 10.56, "s6": 8.69},
}
"""Perplexities of table 6 by block and inner layer."""
SELECTION = {"none": 10.93, "b": 10.15, "c": 9.98, "delta": 9.81, "all": 8.71}
"""Table 7, by what is selective."""
A_INITS = {"complex": 9.16, "constant": 8.85, "real": 8.71, "random": 8.71}
"""Table 8: -1/2 + ni, -1/2, -(n + 1), exp(N(0, 1))."""
RANK: dict[str | int, float] = {"none": 9.12, 1: 8.97, 2: 8.97, 4: 8.91, 8: 8.83, "full": 8.71}
"""Table 9, by the rank of the projection to Δ; full is d_model / 16."""
STATE = {
    "constant": dict(zip(STATES, (9.88, 9.86, 9.82, 9.82, 9.81), strict=True)),
    "selective": dict(zip(STATES, (9.73, 9.40, 9.09, 8.84, 8.71), strict=True)),
}
"""Table 10, by B and C and by N."""
TIMES_BYTES = 6
"""Times the bytes that some arms read once more, to see whether gaps grow with them."""
LONGER = (MAMBA, "mamba-real", "h3-s6", "h3-real", "selective-n1")
TIMES_RATE = (0.5, 2, 4)
"""Times the rate at which some arms learn once more, to see whether their order depends on it."""
RATED = {
    **dict.fromkeys((MAMBA, "mamba-real", "h3-s6", "h3-real"), TIMES_RATE),
    **dict.fromkeys(("selective-none", "selective-b", "selective-c", "selective-delta", "selective-n1"), (2,)),
    "constant-n1": (2,),
}
"""These arms, and how many times the rate."""


@dataclass(frozen=True)
class Base:
    """What the arms of a scale share."""

    n_layers: int
    d_model: int
    n_bytes: int
    bytes_a_step: int
    window: int
    corpus: Literal["books", "standard-library"]
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    rate: float = 4e-3
    validation_bytes: int = 1 << 19
    s4_state: int = 32
    """Real numbers of state of S4, for the parameters of S6."""
    d_filter: int = 48
    """Width of the network of Hyena's filter, likewise."""
    tries_rates: bool = False
    """Whether there are arms with other rates."""


BASES: dict[Scale, Base] = {
    "toy": Base(4, 96, 32, 16, 8, "standard-library", "float32", validation_bytes=32),
    "cpu": Base(6, 96, 2_000_000, 2048, 256, "standard-library", "float32", validation_bytes=1 << 16),
    "gpu": Base(12, 192, 10_000_000, 16384, 2048, "books", tries_rates=True),
    "paper": Base(48, 1024, 7_000_000_000, 524288, 2048, "books", rate=1.5e-3, s4_state=80, d_filter=144),
}


def arms_at(scale: Scale) -> list[Arm]:
    """Mamba and Transformer++, the tables in the order of what they show, and arms with more bytes or other rates."""
    base = BASES[scale]
    rows, validation_rows = max(1, base.bytes_a_step // base.window), max(1, base.validation_bytes // base.window)
    models = configs(base)

    def arm(name: str, config: ModelConfig, times_bytes: int = 1, times_rate: float = 1) -> Arm:
        steps = times_bytes * base.n_bytes // base.bytes_a_step
        how = optimization(steps, rows, times_rate * base.rate, base.precision)
        return Arm(name, LanguageSettings(config, how, base.window, base.corpus, validation_rows, max(1, steps // 4)))

    return [
        *(arm(name, config) for name, config in models.items()),
        *(arm(longer(name), models[name], TIMES_BYTES) for name in LONGER),
        *(arm(at_rate(n, t), models[n], times_rate=t) for n in RATED for t in RATED[n] if base.tries_rates),
    ]


def configs(base: Base) -> dict[str, ModelConfig]:
    """The model of each arm."""
    mamba = ModelConfig(d_model=base.d_model, n_layers=base.n_layers, vocab_size=VOCABULARY)

    def changed(**options: Any) -> ModelConfig:
        return replace(mamba, mamba=replace(mamba.mamba, **options))

    constant, wanted = {"selective_B": False, "selective_C": False}, n_parameters(mamba)
    transformer = transformer_plus_plus(base.n_layers // 2, base.d_model, max(1, base.d_model // 64), VOCABULARY)
    found = {MAMBA: mamba, TRANSFORMER: with_parameters(transformer, wanted), **layer_configs(base, mamba)}
    found |= {
        "selective-none": changed(selective_delta=False, **constant),
        "selective-b": changed(selective_delta=False, selective_C=False),
        "selective-c": changed(selective_delta=False, selective_B=False),
        "selective-delta": changed(**constant),
    }
    found |= {f"selective-n{n}": changed(d_state=n) for n in STATES[:-1]}
    found |= {f"constant-n{n}": changed(d_state=n, **constant) for n in STATES[:-1]}
    found |= {
        "a-complex": changed(A_init="s4d-lin"),
        "a-constant": changed(A_init="constant"),
        "a-random": changed(A_init="random"),
        "rank-none": changed(selective_delta=False),
    }
    return found | {f"rank-{rank}": changed(dt_rank=rank) for rank in RANKS}


def layer_configs(base: Base, mamba: ModelConfig) -> dict[str, ModelConfig]:
    """Table 6: other inner layers in both blocks, and Mamba with MLPs or attention in between."""
    filters = HyenaOptions(max_length=base.window, d_filter=base.d_filter)
    inner: dict[str, tuple[str, dict[str, Any]]] = {
        "complex": ("s4d", {"s4d": S4DOptions(d_state=base.s4_state, init="s4d-lin")}),
        "real": ("s4d", {"s4d": S4DOptions(d_state=base.s4_state, init="s4d-real")}),
        "hyena": ("hyena-filter", {"hyena": filters}),
        "s6": ("s6", {}),
    }
    h3 = replace(h3_plus_plus(base.n_layers // 2, base.d_model), vocab_size=VOCABULARY, h3=H3Options(bias=False))
    wanted = n_parameters(mamba)
    found = {}
    for name, (layer, options) in inner.items():
        found[f"h3-{name}"] = with_parameters(replace(h3, mixers=(f"h3-{layer}", "mlp"), **options), wanted)
        if name != "s6":
            found[f"mamba-{name}"] = replace(mamba, mixers=(f"mamba-{layer}",), **options)
    between = replace(mamba, mixers=("mamba", "mlp"), mlp=MLPOptions())
    heads = AttentionOptions(n_heads=max(1, base.d_model // 64))
    attention = replace(mamba, mixers=("mamba", "attention"), attention=heads)
    depths = [replace(attention, n_layers=n) for n in range(base.n_layers, 2 * base.n_layers)]
    return {
        **found,
        "mamba-mlp": with_parameters(between, wanted),
        "mamba-attention": min(depths, key=lambda config: abs(n_parameters(config) - wanted)),
    }


def longer(arm: str) -> str:
    """The arm that reads TIMES_BYTES times as many bytes."""
    return f"{arm}-longer"


def at_rate(arm: str, times: float) -> str:
    """The arm that learns at so many times the rate; its name has percent."""
    return f"{arm}-rate-{100 * times:.0f}"


def is_in_tables(arm: str) -> bool:
    """Whether an arm has the bytes and the rate of the tables."""
    return arm not in {longer(a) for a in LONGER} | {at_rate(a, times) for a in RATED for times in TIMES_RATE}


def arm_of(block: str, layer: str) -> str:
    """The arm of a cell of table 6."""
    return MAMBA if (block, layer) == ("mamba", "s6") else f"{block}-{layer}"


def arm_of_selection(name: str) -> str:
    """The arm of a row of table 7."""
    return MAMBA if name == "all" else f"selective-{name}"


def arm_of_state(kind: str, n: int) -> str:
    """The arm of a cell of table 10; with 16 states they are rows of table 7."""
    if n == STATES[-1]:
        return {"selective": MAMBA, "constant": "selective-delta"}[kind]
    return f"{kind}-n{n}"


def arm_of_a(name: str) -> str:
    """The arm of a row of table 8."""
    return MAMBA if name == "real" else f"a-{name}"


def arm_of_rank(rank: str | int) -> str:
    """The arm of a row of table 9."""
    return MAMBA if rank == "full" else f"rank-{rank}"
