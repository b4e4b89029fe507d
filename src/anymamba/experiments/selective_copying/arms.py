"""The cells of table 1, their settings at each scale, and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from anymamba.data.synthetic.copying import Copying
from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.optimization import Optimization


@dataclass(frozen=True)
class Cell:
    """A row of table 1."""

    mixer: str
    """The name of the mixer in `models/mixers.py`, which is also the name of the arm."""
    block: str
    layer: str
    paper: float
    """The paper's accuracy, with noise of 4096, 16 tokens and 400,000 steps."""
    selective: str
    """The cell with S6 in the same block, which this cell is compared with; it may be the cell itself."""


CELLS = (
    Cell("s4", "no gate", "S4", 0.183, "s6"),
    Cell("s6", "no gate", "S6", 0.970, "s6"),
    Cell("h3-s4", "H3", "S4", 0.570, "h3-s6"),
    Cell("h3-hyena-filter", "H3", "Hyena", 0.301, "h3-s6"),
    Cell("h3-s6", "H3", "S6", 0.997, "h3-s6"),
    Cell("mamba-s4", "Mamba", "S4", 0.564, "mamba"),
    Cell("mamba-hyena-filter", "Mamba", "Hyena", 0.284, "mamba"),
    Cell("mamba", "Mamba", "S6", 0.998, "mamba"),
)
CELL = {cell.mixer: cell for cell in CELLS}
CONTROLS = ("s4", "s6")
"""Cells that also learn plain copying, in arms named plain-..."""
LONG, LONG_CELLS = 4096, ("mamba", "mamba-s4")
"""The paper's noise, and the cells that also learn with it at scale gpu, in arms named long-..."""
LONG_STD = 0.3
"""Initial weights of these arms; from smaller ones the order of the tokens is not learned in time."""
CPU_CELLS = ("s4", "s6", "mamba-s4", "mamba", "h3-s6")
QUICK = ("s6",)
"""The cells of CPU_CELLS that take less than five minutes on one thread; they have three seeds, the others one."""


@dataclass(frozen=True)
class Settings:
    """The settings of an arm; with the seed, they determine its result."""

    mixer: str
    task: Copying
    optimization: Optimization
    weight_std: float | None = None
    """Standard deviation of the projections' initial weights; defaults to the initialisation of the layers."""
    d_model: int = 64
    n_layers: int = 2
    validation_rows: int = 256
    judge_every: int = 200
    """Steps between two evaluations on the validation set."""
    enough: float | None = None
    """Share of right answers on the validation set at which training ends; None means after all steps."""


BASES: dict[Scale, Settings] = {
    "toy": Settings(
        mixer="",
        task=Copying(n_noise=8, n_tokens=2),
        optimization=Optimization(steps=4, batch_size=4, learning_rate=3e-3),
        d_model=8,
        validation_rows=16,
        judge_every=2,
    ),
    "cpu": Settings(
        mixer="",
        task=Copying(n_noise=128, n_tokens=8),
        optimization=Optimization(steps=6000, batch_size=32, learning_rate=6e-3, warmup_steps=100, cosine=True),
        weight_std=0.15,
    ),
    "gpu": Settings(
        mixer="",
        task=Copying(n_noise=1024, n_tokens=16),
        optimization=Optimization(steps=5000, batch_size=128, learning_rate=3e-3, warmup_steps=200, cosine=True),
        weight_std=0.15,
        judge_every=250,
        enough=0.9995,
    ),
    "paper": Settings(
        mixer="",
        task=Copying(n_noise=4096, n_tokens=16),
        optimization=Optimization(steps=400_000, batch_size=64, learning_rate=1e-4, clip_norm=None),
        judge_every=5000,
    ),
}
"""Settings of every arm at a scale, without the mixer. The paper uses Adam, a constant rate and no clipping."""


def arms_at(scale: Scale) -> list[Arm]:
    """The cells, then the controls, then at scale gpu the cells with the paper's noise."""
    base = BASES[scale]
    plain = replace(base, task=replace(base.task, selective=False))

    def seeds(mixer: str) -> int:
        return 3 if scale == "cpu" and mixer in QUICK else 1

    cells = [c.mixer for c in CELLS if scale != "cpu" or c.mixer in CPU_CELLS]
    arms = [Arm(mixer, replace(base, mixer=mixer), seeds(mixer)) for mixer in cells]
    arms += [Arm(f"plain-{mixer}", replace(plain, mixer=mixer), seeds(mixer)) for mixer in CONTROLS]
    if scale != "gpu":
        return arms
    long = replace(base, task=replace(base.task, n_noise=LONG), weight_std=LONG_STD)
    return arms + [Arm(f"long-{mixer}", replace(long, mixer=mixer)) for mixer in LONG_CELLS]


def cell_of(arm: str) -> Cell:
    """The cell that an arm measures, whatever its task."""
    return CELL[arm.removeprefix("plain-").removeprefix("long-")]


def task_words(arm: str) -> str:
    """What an arm's task is, where it is not that of the table."""
    return "plain copying" if arm.startswith("plain-") else f"noise of {LONG:,}" if arm.startswith("long-") else ""
