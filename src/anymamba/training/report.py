"""What a run reports while it trains, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from anymamba.training.outline import Outline


class Report(Protocol):
    """Receives what happens during a run."""

    def on_tables(self, done: int, total: int | None) -> None:
        """Bytes of the data read so far."""

    def on_start(self, outline: Outline) -> None:
        """Before the first step of this process."""

    def on_step(self, metrics: dict[str, Any]) -> None:
        """After every step: step, steps, bits_per_byte, tokens_per_second, seconds_left, skipped."""

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """After an evaluation on held-out documents."""

    def on_sample(self, step: int, text: str) -> None:
        """A text that the model has written after a step."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """After a checkpoint."""


class Silent:
    """A report that says nothing."""

    def on_tables(self, done: int, total: int | None) -> None: ...

    def on_start(self, outline: Outline) -> None: ...

    def on_step(self, metrics: dict[str, Any]) -> None: ...

    def on_evaluation(self, metrics: dict[str, Any]) -> None: ...

    def on_sample(self, step: int, text: str) -> None: ...

    def on_checkpoint(self, step: int, folder: Path) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    run: str
    steps: int
    tokens: int
    """Tokens read since the first step of the run."""
    tokens_per_second: float
    """Speed of this process, without evaluations and checkpoints."""
    bits_per_byte: float | None
    """Training loss of the last recorded step."""
    held_out_bits_per_byte: float | None
    skipped: int
    """Steps skipped for a non-finite loss or gradient."""
    n_parameters: int
    best_step: int | None = None
    """The step with the lowest held-out loss; its model is in the folder `best` of the run."""
    best_held_out_bits_per_byte: float | None = None
    unit: str = "byte"
    """What these bits are of: a byte of text, or a base of DNA, which is a byte of FASTA."""
    dropped_windows: int | None = None
    """Windows of DNA to train on that were dropped for their N; None for text."""
    dropped_held_out_windows: int | None = None
    """Held-out windows of DNA that each evaluation drops for their N; None for text and without evaluations."""
    notes: tuple[str, ...] = ()
    """What this process found in the data while it read it, one line each."""
