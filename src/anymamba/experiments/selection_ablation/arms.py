"""The arms, their settings at each scale, and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

from anymamba.data.synthetic.copying import Copying
from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.optimization import Optimization
from anymamba.models.config import ModelConfig
from anymamba.models.presets import transformer_plus_plus
from anymamba.parts.options import MambaOptions

SELECTIVE: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "B": frozenset({"B"}),
    "C": frozenset({"C"}),
    "delta": frozenset({"delta"}),
    "all": frozenset({"delta", "B", "C"}),
}
"""Rows of table 7: which of Δ, B and C depend on the input."""
PAPER_7 = {"none": 10.93, "B": 10.15, "C": 9.98, "delta": 9.81, "all": 8.71}
"""Perplexities of table 7."""
STATES = (1, 2, 4, 8, 16)
PAPER_10 = {
    "constant": {1: 9.88, 2: 9.86, 4: 9.82, 8: 9.82, 16: 9.81},
    "selective": {1: 9.73, 2: 9.40, 4: 9.09, 8: 8.84, 16: 8.71},
}
"""Perplexities of table 10 by B and C and by N; Δ is selective in all."""
KINDS = {"constant": "delta", "selective": "all"}
"""The row of SELECTIVE for each half of table 10."""
TRANSFORMER = "transformer"
WIDE = 0.15
"""Standard deviation of the projections' initial weights in selective copying at scale cpu, in every arm."""


def paper_gap(above: float, below: float) -> float:
    """The difference of two perplexities in nats."""
    return log(above / below)


@dataclass(frozen=True)
class Settings:
    """The settings of an arm; with the seed, they determine its result."""

    model: ModelConfig
    optimization: Optimization
    copying: Copying | None = None
    """The copying task; None for the language model."""
    window: int = 256
    """Bytes in a window of the language model."""
    validation_rows: int = 256
    judge_every: int = 200
    """Steps between two evaluations on the validation set."""


def mamba(d_model: int, n_layers: int, vocab_size: int, selective: str, d_state: int = 16) -> ModelConfig:
    """Mamba in which only some of Δ, B and C are selective."""
    chosen = SELECTIVE[selective]
    options = MambaOptions(
        d_state=d_state, selective_delta="delta" in chosen, selective_B="B" in chosen, selective_C="C" in chosen
    )
    return ModelConfig(d_model=d_model, n_layers=n_layers, vocab_size=vocab_size, mamba=options)


PLACEHOLDER = ModelConfig(d_model=8, n_layers=2, vocab_size=8)
"""Stands for the model in the settings that all arms of a task share."""


@dataclass(frozen=True)
class Base:
    """The settings that the arms of a scale share."""

    copying: Settings
    language: Settings
    width: int
    n_layers: int
    """Blocks of the Mamba language models; the Transformer++ has half as many layers of attention and MLP."""
    n_heads: int
    seeds: int = 1
    copying_std: float | None = None
    """`weight_std` of the models of selective copying."""


def language_settings(steps: int, batch_size: int, rate: float, window: int, rows: int, every: int) -> Settings:
    """Settings of the language model; a tenth of the steps is warm-up, as in the paper."""
    how = Optimization(steps, batch_size, rate, 0.1, warmup_steps=steps // 10, cosine=True, betas=(0.9, 0.95))
    return Settings(PLACEHOLDER, how, window=window, validation_rows=rows, judge_every=every)


def copying_settings(task: Copying, steps: int, batch_size: int, rate: float, warmup: int, every: int) -> Settings:
    """Settings of selective copying."""
    how = Optimization(steps, batch_size, rate, warmup_steps=warmup, cosine=True)
    return Settings(PLACEHOLDER, how, task, judge_every=every)


def base_at(scale: Scale) -> Base:
    """The shared settings at a scale."""
    if scale == "toy":
        copying = replace(copying_settings(Copying(8, 2), 2, 4, 3e-3, 0, 1), validation_rows=8)
        return Base(copying, language_settings(2, 2, 3e-3, 16, 4, 1), width=16, n_layers=2, n_heads=2)
    if scale == "cpu":
        copying = copying_settings(Copying(64, 8), 4000, 32, 3e-3, 100, 500)
        language = language_settings(3000, 4, 1e-2, 256, 256, 600)
        return Base(copying, language, width=64, n_layers=4, n_heads=2, seeds=3, copying_std=WIDE)
    copying = copying_settings(Copying(1024, 16), 20_000, 64, 1e-3, 200, 1000)
    if scale == "gpu":
        return Base(copying, language_settings(6000, 16, 2e-3, 1024, 512, 500), width=384, n_layers=12, n_heads=6)
    copying = copying_settings(Copying(4096, 16), 400_000, 64, 1e-4, 1000, 10_000)
    return Base(copying, language_settings(13_500, 256, 1.5e-3, 2048, 512, 1000), width=1024, n_layers=48, n_heads=16)


def arms_at(scale: Scale) -> list[Arm]:
    """Table 7 on selective copying, then both tables on the language model, then the Transformer++."""
    base = base_at(scale)
    arms = [Arm(f"copying-{name}", copying_arm(base, name), base.seeds) for name in SELECTIVE]
    arms += [Arm(f"lm-{name}-n16", language_arm(base, name, 16), base.seeds) for name in SELECTIVE]
    smaller = [(kind, n) for kind in KINDS.values() for n in STATES[:-1]]
    arms += [Arm(f"lm-{name}-n{n}", language_arm(base, name, n), base.seeds) for name, n in smaller]
    return [*arms, Arm(f"lm-{TRANSFORMER}", replace(base.language, model=transformer(base)), base.seeds)]


def copying_arm(base: Base, selective: str) -> Settings:
    """Two blocks of width 64, as in the paper's task; narrower at scale toy."""
    assert base.copying.copying is not None
    model = mamba(min(64, base.width), 2, base.copying.copying.alphabet, selective)
    return replace(base.copying, model=replace(model, weight_std=base.copying_std))


def language_arm(base: Base, selective: str, d_state: int) -> Settings:
    """A Mamba language model with the sizes of the scale."""
    return replace(base.language, model=mamba(base.width, base.n_layers, 256, selective, d_state))


def transformer(base: Base) -> ModelConfig:
    """Transformer++ with MLPs so wide that it has about the parameters of the Mamba with everything selective.

    A layer of attention and MLP has 4 D^2 + 3 D H parameters, and corresponds to two blocks of Mamba.
    """
    config = transformer_plus_plus(base.n_layers // 2, base.width, base.n_heads, vocab_size=256)
    d, inner, rank = base.width, 2 * base.width, -(-base.width // 16)
    block = 3 * d * inner + inner * (2 * rank + 3 * 16 + 7)
    hidden = round((2 * block - 4 * d * d) / (3 * d))
    return replace(config, mlp=replace(config.mlp, d_hidden=hidden))
