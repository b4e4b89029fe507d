"""Lengths, sizes and limits at each scale, and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from anymamba.lab.experiment import Arm, Scale
from anymamba.models.config import ModelConfig
from anymamba.models.presets import preset, transformer_plus_plus

PAPER: dict[int, tuple[float | None, float | None, float | None, float]] = {
    1 << 9: (0.066, 0.120, 1.40, 0.040),
    1 << 10: (0.060, 0.147, 2.44, 0.060),
    1 << 11: (0.108, 0.248, 4.58, 0.110),
    1 << 12: (0.327, 0.602, 9.03, 0.226),
    1 << 13: (1.04, 1.17, 18.4, 0.445),
    1 << 14: (3.91, 2.76, 38.0, 1.07),
    1 << 15: (15.0, 5.65, 78.5, 2.11),
    1 << 16: (59.1, 12.3, 158, 4.25),
    1 << 17: (242, 29.0, 300, 8.50),
    1 << 18: (1022, 55.2, None, 17.1),
    1 << 19: (4213, None, None, 34.6),
}
"""Figure 8, left, in ms by length: attention, convolution, unfused and fused scan (A100, D 1024, N 16, bfloat16)."""

PAPER_THROUGHPUT: dict[str, tuple[int | None, ...]] = {
    "mamba": (140, 247, 441, 744, 1089, 1445, 1688, 1814),
    "transformer": (79, 132, 199, 265, 323, 364, None, None),
}
"""Figure 8, right: tokens a second with 1, 2, 4, ... 128 rows, of Mamba-1.4B and a Transformer of 1.3B."""
PAPER_MEMORY = {"mamba": (4.8, 5.8, 7.3, 12.3, 23.1, 38.2), "transformer": (4.6, 5.2, 6.9, 11.5, 20.7, 34.5)}
"""Table 15: GB of a training step of 125M parameters with 1, 2, 4, ... 32 rows of 2,048."""
OPERATORS = ("attention", "convolution", "unfused", "scan")
"""The operators in the order of the columns of PAPER."""
PASSES = ("prefill", "training", "decoding")
MODELS = ("mamba", "transformer")


@dataclass(frozen=True)
class Limits:
    """Limits on the time and the memory of a measurement."""

    call_seconds: float
    """A candidate is skipped if one call is estimated to take longer."""
    memory_bytes: int
    """A candidate is skipped if it is estimated to need more memory."""
    candidate_seconds: float
    """The turns of a candidate end after this time in all, but not before least_turns."""
    most_turns: int
    """Most turns of a candidate."""
    least_turns: int = 2
    """Fewest turns of a candidate."""
    turn_seconds: float = 0.005
    """A turn has enough calls to take about this long."""
    seconds_before: float = 0.1
    """Warm-up of each candidate before its turns begin: clocks rise, caches and pools fill."""


@dataclass(frozen=True)
class OperatorSettings:
    """The settings of the operators at a length."""

    length: int
    width: int
    """Channels of every operator; attention has width / d_head heads."""
    dtype: Literal["float32", "bfloat16"]
    limits: Limits
    d_state: int = 16
    d_head: int = 64


@dataclass(frozen=True)
class ModelSettings:
    """The settings of the models at a context."""

    context: int
    mamba: ModelConfig
    transformer: ModelConfig
    dtype: Literal["float32", "bfloat16"]
    limits: Limits
    tokens: int = 16
    """Tokens generated in a turn, after the context."""


@dataclass(frozen=True)
class BatchSettings:
    """The settings of generating with a number of rows, and of the memory of a training step."""

    batch: int
    mamba: ModelConfig
    transformer: ModelConfig
    dtype: Literal["float32", "bfloat16"]
    limits: Limits
    prompt: int = 2048
    """Tokens of each row that are read first, which is part of the time; also the length in training."""
    tokens: int = 128
    """Tokens that each row generates."""
    most_trained: int = 32
    """Most rows of a training step; the paper measured no more."""


@dataclass(frozen=True)
class Sizes:
    """The settings at a scale; lengths are powers of two, from the first to the last exponent."""

    operators: OperatorSettings
    lengths: tuple[int, int]
    models: ModelSettings
    contexts: tuple[int, int]
    seeds: int = 1
    large: ModelSettings | None = None
    """Larger models, at the same contexts; None measures none."""
    batches: BatchSettings | None = None
    """Generating by number of rows; None measures none."""
    rows: tuple[int, int] = (0, 7)
    """Exponents of the first and the last number of rows."""


GIB = 1 << 30
TOY = Limits(
    call_seconds=1.0, memory_bytes=GIB, candidate_seconds=0.01, most_turns=2, turn_seconds=1e-4, seconds_before=0
)
CPU = Limits(call_seconds=60.0, memory_bytes=6 * GIB, candidate_seconds=1.5, most_turns=15)
GPU = Limits(call_seconds=10.0, memory_bytes=64 * GIB, candidate_seconds=1.0, most_turns=20, turn_seconds=0.01)

SCALES: dict[Scale, Sizes] = {
    "toy": Sizes(
        OperatorSettings(0, 16, "float32", TOY, d_state=4, d_head=8),
        (5, 7),
        ModelSettings(
            0,
            ModelConfig(d_model=16, n_layers=2, vocab_size=32),
            transformer_plus_plus(1, 16, 2, vocab_size=32),
            "float32",
            TOY,
            tokens=2,
        ),
        (4, 6),
        batches=BatchSettings(
            0,
            ModelConfig(d_model=16, n_layers=2, vocab_size=32),
            transformer_plus_plus(1, 16, 2, vocab_size=32),
            "float32",
            TOY,
            prompt=4,
            tokens=2,
        ),
        rows=(0, 1),
    ),
    "cpu": Sizes(
        OperatorSettings(0, 256, "float32", CPU),
        (9, 17),
        ModelSettings(
            0,
            ModelConfig(d_model=256, n_layers=4, vocab_size=257),
            transformer_plus_plus(2, 256, 4, vocab_size=257),
            "float32",
            CPU,
        ),
        (7, 15),
        seeds=3,
    ),
    "gpu": Sizes(
        OperatorSettings(0, 1024, "bfloat16", GPU),
        (9, 19),
        ModelSettings(0, preset("mamba-130m"), preset("transformer++-125m"), "bfloat16", GPU),
        (7, 15),
        large=ModelSettings(0, preset("mamba-370m"), preset("transformer++-350m"), "bfloat16", GPU),
        batches=BatchSettings(0, preset("mamba-130m"), preset("transformer++-125m"), "bfloat16", GPU),
    ),
    "paper": Sizes(
        OperatorSettings(0, 1024, "bfloat16", GPU),
        (9, 19),
        ModelSettings(0, preset("mamba-1.4b"), preset("transformer++-1.3b"), "bfloat16", GPU),
        (7, 15),
        batches=BatchSettings(0, preset("mamba-1.4b"), preset("transformer++-1.3b"), "bfloat16", GPU),
    ),
}
"""A layer of Transformer++ is two blocks, attention and MLP, with about the parameters of two Mamba blocks."""


def arms_at(scale: Scale) -> list[Arm]:
    """An arm for each length of the operators, each context of the models, and each number of rows."""
    sizes = SCALES[scale]
    kinds: dict[str, list[Any]] = {
        "operators": [replace(sizes.operators, length=length) for length in powers(*sizes.lengths)],
        "models": [replace(sizes.models, context=context) for context in powers(*sizes.contexts)],
    }
    if sizes.large is not None:
        kinds["large"] = [replace(sizes.large, context=context) for context in powers(*sizes.contexts)]
    if sizes.batches is not None:
        kinds["rows"] = [replace(sizes.batches, batch=batch) for batch in powers(*sizes.rows)]
    return [Arm(f"{kind}-{size_of(own)}", own, sizes.seeds) for kind, several in kinds.items() for own in several]


def size_of(settings: OperatorSettings | ModelSettings | BatchSettings) -> int:
    """The length, the context or the number of rows."""
    if isinstance(settings, OperatorSettings):
        return settings.length
    return settings.context if isinstance(settings, ModelSettings) else settings.batch


def powers(first: int, last: int) -> list[int]:
    """2^first, ..., 2^last."""
    return [1 << i for i in range(first, last + 1)]
