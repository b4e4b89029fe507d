"""The arms, their settings at each scale, and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from anymamba.data.synthetic.induction import Placement
from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.optimization import Optimization
from anymamba.models.config import ModelConfig
from anymamba.parts.options import AttentionOptions, H3Options, HyenaOptions, MambaOptions, S4DOptions


@dataclass(frozen=True)
class Published:
    """A row of table 11 of the paper."""

    label: str
    parameters: str
    accuracy: tuple[float, ...]
    """In percent, at 2^6, 2^7, ...; the paper's check mark is 100."""


PAPER = {
    "attention-absolute": Published("attention, absolute", "137K", (100, 99.6, 100, 58.6, 26.6, 18.8, 9.8, 10.9, 7.8)),
    "attention-rotary": Published("attention, rotary", "137K", (100, 100, 100, 83.6, 31.3, 18.4, 8.6, 9.0, 5.5)),
    "attention-xpos": Published("attention, xPos", "137K", (100, 100, 100, 99.6, 67.6, 25.4, 7.0, 9.0, 7.8)),
    "h3": Published("H3", "153K", (100, 100, 100, 80.9, 39.5, 23.8, 14.8, 8.2, 5.9, 6.6, 8.2, 4.7, 8.2, 6.3, 7.4)),
    "hyena": Published("Hyena", "69M", (97.7, 100, 100, 100, 44.1, 12.5, 6.6, 5.1, 7.0, 5.9, 6.6, 6.6, 5.9, 6.3, 9.8)),
    "mamba": Published("Mamba", "74K", (100,) * 15),
}
"""Table 11 by system; the test lengths of attention are limited by memory."""
PAPER_FIRST = 6
"""The accuracies in the paper begin at length 2^6."""


@dataclass(frozen=True)
class Settings:
    """The settings of an arm; with the seed, they determine its result."""

    system: str
    """The row in table 11."""
    placement: Placement
    """Placement of the first trigger, in training, validation and tests."""
    model: ModelConfig
    optimization: Optimization
    test_lengths: tuple[int, ...]
    train_length: int = 256
    cycles: int = 1
    """Rounds of training at the training length. Each starts with a new Adam and the initial rate; the model stays."""
    lengths_before: tuple[int, ...] = ()
    """Shorter lengths that training begins with, one round each. The paper has none."""
    optimization_before: Optimization | None = None
    """The optimization at the shorter lengths; defaults to that at the training length."""
    grow_at: float = 0.95
    """Accuracy on the validation set of a shorter length at which training goes on to the next length."""
    n_tokens: int = 16
    """Ordinary tokens; the trigger is one more id."""
    validation_rows: int = 256
    judge_every: int = 500
    """Steps between two evaluations on the validation set."""
    perfect_in_a_row: int | None = 5
    """Training ends after this many evaluations in a row without a mistake; None means after all steps."""
    test_rows: int = 256
    long_rows: int = 16
    """Test sequences at lengths above long_beyond."""
    long_beyond: int = 1 << 14
    test_tokens: int = 1 << 16
    """Tokens that a test reads at once; a model whose state grows always reads whole sequences."""

    def rows_at(self, length: int) -> int:
        """Test sequences at a length."""
        return self.test_rows if length <= self.long_beyond else self.long_rows


def powers(first: int, last: int) -> tuple[int, ...]:
    """2^first, ..., 2^last."""
    return tuple(1 << i for i in range(first, last + 1))


N_TOKENS = 16
LONGEST, LONGEST_ATTENTION = 20, 14

RESTARTS = Optimization(steps=500, batch_size=8, learning_rate=5e-3, cosine=True, clip_norm=None, eps=1e-16)
"""One of many rounds of Mamba at scale cpu (warm restarts, arXiv:1608.03983). The epsilon is below the gradients at a
loss of 1e-7."""
BEFORE = replace(RESTARTS, steps=5000, learning_rate=2e-3, cosine=False)
"""A round at a shorter length, which ends as soon as that length is learned."""
WIDE, SMALLEST_STEP = 0.1, 1e-5
"""Mamba at scale cpu. WIDE is the standard deviation of the projections' weights: with smaller ones the skip D u
outweighs the contribution of the state. With SMALLEST_STEP, the smallest initial step, some channels of a new model
remember far beyond the training length."""


def mamba(width: int = 64) -> ModelConfig:
    """Two Mamba blocks as published."""
    return ModelConfig(d_model=width, n_layers=2, vocab_size=N_TOKENS + 1)


def attention(positions: str, longest: int, width: int = 128, heads: int = 8) -> ModelConfig:
    """Two attention blocks without MLPs, with LayerNorm, biases and an untied head: 137K parameters as in the paper."""
    options = AttentionOptions(n_heads=heads, positions=positions, max_positions=longest, bias=True)  # type: ignore[arg-type]
    return replace(mamba(width), mixers=("attention",), norm="layernorm", tie_embeddings=False, attention=options)


def h3(width: int = 128) -> ModelConfig:
    """Two H3 blocks without MLPs."""
    return replace(
        mamba(width), mixers=("h3-s4d",), norm="layernorm", h3=H3Options(d_head=1), s4d=S4DOptions(d_state=64)
    )


def hyena(longest: int, width: int = 128) -> ModelConfig:
    """Two Hyena blocks without MLPs; the filter is defined up to the longest test."""
    return replace(mamba(width), mixers=("hyena",), norm="layernorm", hyena=HyenaOptions(max_length=longest))


def arms_at(scale: Scale) -> list[Arm]:
    """Mamba with both placements, then the other systems; attention is tested up to the length that memory allows."""
    return {"toy": toy_arms, "cpu": cpu_arms, "gpu": gpu_arms, "paper": paper_arms}[scale]()


def mamba_arms(base: Settings, seeds: int = 1) -> list[Arm]:
    """Mamba with both placements of the trigger."""
    first, anywhere = replace(base, placement="first-ten"), replace(base, placement="uniform")
    return [Arm("mamba-first-ten", first, seeds), Arm("mamba-uniform", anywhere, seeds)]


def toy_arms() -> list[Arm]:
    """A few steps at length 16, to test the code."""
    base = Settings(
        "mamba",
        "uniform",
        mamba(8),
        Optimization(steps=4, batch_size=4, learning_rate=1e-3),
        powers(3, 6),
        train_length=16,
        cycles=2,
        lengths_before=(8,),
        validation_rows=16,
        judge_every=2,
        test_rows=8,
        long_rows=2,
        long_beyond=32,
        test_tokens=64,
    )
    others = {"attention-rotary": attention("rotary", 32, 8, 2), "h3": h3(8), "hyena": hyena(64, 8)}
    arms = [Arm(name, replace(base, system=name, model=model)) for name, model in others.items()]
    arms[0] = Arm(arms[0].name, replace(arms[0].settings, test_lengths=powers(3, 5)))
    return mamba_arms(base) + arms


def cpu_arms() -> list[Arm]:
    """Mamba in short rounds, with a wider range of initial weights and steps; rotary attention up to 2^12."""
    base = Settings(
        "mamba",
        "uniform",
        replace(mamba(), weight_std=WIDE, mamba=MambaOptions(dt_min=SMALLEST_STEP, dt_init_floor=SMALLEST_STEP / 10)),
        RESTARTS,
        powers(6, LONGEST),
        cycles=30,
        lengths_before=(32, 64, 128),
        optimization_before=BEFORE,
        judge_every=250,
        perfect_in_a_row=None,
    )
    rotary = replace(
        base,
        system="attention-rotary",
        model=attention("rotary", 1 << 12),
        optimization=Optimization(steps=10_000, batch_size=8, learning_rate=5e-4, warmup_steps=200),
        optimization_before=None,
        cycles=1,
        perfect_in_a_row=10,
        test_lengths=powers(6, 12),
    )
    return [*mamba_arms(base), Arm("attention-rotary", rotary)]


def gpu_arms() -> list[Arm]:
    """All systems at the paper's learning rates, with larger batches and fewer steps; quick ones with three seeds."""
    steps = {"mamba": 20_000, "attention": 50_000, "h3": 20_000, "hyena": 20_000}
    return all_arms(batch_size=64, steps=steps, seeds={"attention": 3, "hyena": 3})


def paper_arms() -> list[Arm]:
    """The published settings: batches of 8, and all steps of table 11."""
    steps = {"mamba": 204_800, "attention-absolute": 204_800, "attention": 409_600, "h3": 81_920, "hyena": 81_920}
    return all_arms(batch_size=8, steps=steps, perfect_in_a_row=None)


def all_arms(
    batch_size: int, steps: dict[str, int], seeds: dict[str, int] | None = None, perfect_in_a_row: int | None = 5
) -> list[Arm]:
    """Mamba with both placements at rate 1e-3, the other systems with uniform triggers at 2e-4; constant rates."""
    optimization = Optimization(steps["mamba"], batch_size, learning_rate=1e-3, clip_norm=None)
    base = Settings(
        "mamba",
        "uniform",
        mamba(),
        optimization,
        powers(6, LONGEST),
        judge_every=1000,
        perfect_in_a_row=perfect_in_a_row,
        test_tokens=1 << 20,
    )
    others = {
        **{f"attention-{p}": attention(p, 1 << LONGEST_ATTENTION) for p in ("absolute", "rotary", "xpos")},
        "h3": h3(),
        "hyena": hyena(1 << LONGEST),
    }
    arms = mamba_arms(base)
    for system, model in others.items():
        family = system.partition("-")[0]
        n = steps.get(system) or steps[family]
        own = replace(optimization, steps=n, learning_rate=2e-4, kernel_learning_rate=2e-4)
        longest = LONGEST_ATTENTION if family == "attention" else LONGEST
        settings = replace(base, system=system, model=model, optimization=own, test_lengths=powers(6, longest))
        arms.append(Arm(system, settings, (seeds or {}).get(family, 1)))
    return arms
