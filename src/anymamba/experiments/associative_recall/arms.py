"""The systems, and their settings at each scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from anymamba.data.synthetic.recall import Recall
from anymamba.lab.experiment import Arm, Scale
from anymamba.lab.optimization import Optimization
from anymamba.models.config import ModelConfig
from anymamba.parts.options import AttentionOptions, HyenaOptions, MambaOptions

WIDE = 0.3
"""Standard deviation of the projections' initial weights at scale cpu, in every arm."""


@dataclass(frozen=True)
class System:
    """A stack of blocks."""

    label: str
    mixers: tuple[str, ...]
    """The mixer of each block."""
    d_state: int = 16
    """N of the Mamba blocks."""

    @property
    def is_hybrid(self) -> bool:
        """Whether it has both Mamba and attention."""
        return {"mamba", "attention"} <= set(self.mixers)


SYSTEMS = {
    "attention": System("attention", ("attention",) * 2),
    "mamba-n4": System("Mamba, N = 4", ("mamba",) * 2, 4),
    "mamba-n16": System("Mamba, N = 16", ("mamba",) * 2),
    "mamba-n64": System("Mamba, N = 64", ("mamba",) * 2, 64),
    "mamba-deep": System("Mamba, N = 16, 4 blocks", ("mamba",) * 4),
    "h3": System("H3 (S4D)", ("h3-s4d",) * 2),
    "hyena": System("Hyena", ("hyena",) * 2),
    "hybrid-1": System("Mamba with 1 attention", ("mamba", "attention")),
    "hybrid-2": System("Mamba with 2 attentions, 4 blocks", ("mamba", "attention") * 2),
}
MAMBA_BY_STATE = ("mamba-n4", "mamba-n16", "mamba-n64")
"""Systems that differ only in the size of the state, smallest first."""
TIME_INVARIANT = ("h3", "hyena")
SLOW = (*MAMBA_BY_STATE, "mamba-deep", "h3")
"""Systems that take more than five minutes at scale cpu; they have one seed there."""
WITHOUT_ATTENTION = {"hybrid-1": "mamba-n16", "hybrid-2": "mamba-deep"}
"""For each hybrid, the system with Mamba instead of attention."""


@dataclass(frozen=True)
class Settings:
    """The settings of an arm; with the seed, they determine its result."""

    system: str
    """A key of SYSTEMS."""
    model: ModelConfig
    tasks: tuple[Recall, ...]
    """Tasks that are learned together; the one with the fewest pairs is first. If all have one length, every batch has
    about as many queries of each; else they take turns, each with batches of about as many queries."""
    optimization: Optimization
    """Its rows are those of all tasks together, or of the first one if they take turns."""
    more_learning_rates: tuple[float, ...] = ()
    """Other learning rates that are tried one after another; the best on the validation set is used."""
    enough: float = 0.998
    """Recall on the validation set at which the training, and the search for a rate, end."""
    validation_rows: int = 240
    """Validation rows of all tasks together, mixed as in a batch."""
    test_rows: int = 256
    """Test rows of each task."""
    judge_every: int = 200
    """Steps between two evaluations on the validation set."""

    def __post_init__(self) -> None:
        if len({task.vocab_size for task in self.tasks}) != 1:
            raise ValueError("tasks that are learned together must have one vocabulary; make an arm for each")


def build_config(system: System, width: int, tasks: tuple[Recall, ...], weight_std: float | None = None) -> ModelConfig:
    """The config of a system at a width, for rows of the tasks; Hyena's filter as in its authors' synthetic tasks."""
    return ModelConfig(
        d_model=width,
        n_layers=len(system.mixers),
        vocab_size=tasks[0].vocab_size,
        mixers=system.mixers,
        weight_std=weight_std,
        mamba=MambaOptions(d_state=system.d_state),
        attention=AttentionOptions(n_heads=2, positions="rotary", d_conv=4),
        hyena=HyenaOptions(max_length=max(task.length for task in tasks), emb_dim=5, w=10.0),
    )


# The filler is 0, as in the configurations that the task's authors have published; their function's default is noise,
# which is a harder task.
PAPER_SIZES = tuple(Recall(n, length) for length, n in ((64, 4), (128, 8), (256, 16), (512, 64)))


def arms_at(scale: Scale) -> list[Arm]:
    """An arm is a system of one width that learns all numbers of pairs; at scale paper it has one size."""
    return {"toy": toy_arms, "cpu": cpu_arms, "gpu": gpu_arms, "paper": paper_arms}[scale]()


def settings_of(
    name: str, width: int, tasks: tuple[Recall, ...], how: Optimization, weight_std: float | None = None, **more: Any
) -> Settings:
    """The settings of a system."""
    return Settings(name, build_config(SYSTEMS[name], width, tasks, weight_std), tasks, how, **more)


def toy_arms() -> list[Arm]:
    """Two steps each; attention tries two rates."""
    tasks, how = (Recall(1, 16, 16), Recall(2, 16, 16)), Optimization(steps=2, batch_size=4, learning_rate=3e-3)
    sizes: dict[str, Any] = {"validation_rows": 8, "test_rows": 8, "judge_every": 1}
    arms = [Arm(name, settings_of(name, 8, tasks, how, **sizes)) for name in SYSTEMS]
    return [Arm(arms[0].name, replace(arms[0].settings, more_learning_rates=(1e-3,))), *arms[1:]]


def cpu_arms() -> list[Arm]:
    """Short rows with a small vocabulary; two (or four) blocks learn all numbers of pairs together."""
    tasks = tuple(Recall(n, 64, 64) for n in (2, 4, 8, 16))
    how = Optimization(steps=6000, batch_size=30, learning_rate=6e-3, warmup_steps=100, cosine=True)
    rates: dict[str, Any] = {"more_learning_rates": (1e-2, 3e-3)}
    seeds = {name: 1 if name in SLOW else 3 for name in SYSTEMS}
    return [Arm(name, settings_of(name, 32, tasks, how, WIDE, **rates), n) for name, n in seeds.items()]


def gpu_arms() -> list[Arm]:
    """The published sizes, in turns, and widths."""
    how = Optimization(8000, 512, learning_rate=3e-3, warmup_steps=500, cosine=True, precision="bfloat16")
    more: dict[str, Any] = {"validation_rows": 512, "judge_every": 1000}
    return [
        Arm(f"{name}-d{width}", settings_of(name, width, PAPER_SIZES, how, **more))
        for width in (64, 128, 256)
        for name in SYSTEMS
    ]


def paper_arms() -> list[Arm]:
    """The published sizes at three widths, with four rates from 1e-4 to 1e-2, equally spaced on a log scale."""
    how = Optimization(
        steps=100_000, batch_size=64, learning_rate=2.15e-3, weight_decay=0.1, warmup_steps=1000, cosine=True
    )
    return one_by_one((64, 128, 256), how, more_learning_rates=(4.64e-4, 1e-2, 1e-4))


def one_by_one(widths: tuple[int, ...], how: Optimization, more_learning_rates: tuple[float, ...]) -> list[Arm]:
    """An arm for each width, size and system, with the default initialisation of the layers."""
    more: dict[str, Any] = {"more_learning_rates": more_learning_rates, "validation_rows": 256, "judge_every": 500}
    return [
        Arm(f"{name}-d{width}-{task.n_pairs}", settings_of(name, width, (task,), how, **more))
        for width in widths
        for task in PAPER_SIZES
        for name in SYSTEMS
    ]
