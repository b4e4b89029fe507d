"""How verbs print: results as one JSON object or as lines of name and value, progress on stderr."""

from __future__ import annotations

import json
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from anymamba.training.outline import Outline

PLAIN_INTERVAL = 10.0  # seconds between lines where stderr is not a terminal
SETTLED = 5  # steps after which the speed and the memory of a run are shown


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of stdout."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    if printable(text, sys.stdout) != text:  # the terminal lacks a character, or a file's name is not UTF-8
        text = json.dumps(values, allow_nan=False)
    print(text)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values, aligned."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(printable(f"{name:<{width}}  {value}", sys.stdout))


def printable(text: str, stream: TextIO) -> str:
    """A text with escapes for what a stream cannot show, such as bytes in the name of a file that are not UTF-8."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """Print a line to stderr. Where its reader is gone, the line is lost and the command goes on."""
    with suppress(BrokenPipeError):
        print(printable(text, sys.stderr), file=sys.stderr, flush=True)


@contextmanager
def told_warnings() -> Iterator[None]:
    """Print warnings of the body in one line each, without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {' '.join(str(message).split())}")
        yield


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(n_bytes: int) -> str:
    """Bytes as 12.3 MB or 1.23 GB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


class ShowProgress(Protocol):
    """Shows progress: the amount done, the total (None if unknown), and a text beside the bar."""

    def __call__(self, done: float, total: float | None, text: str = "") -> None: ...


@contextmanager
def progress_bar(label: str) -> Iterator[ShowProgress]:
    """A progress bar on stderr while the body runs; if stderr is not a terminal, a line every few seconds."""
    if not sys.stderr.isatty():
        yield PlainProgress(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(label, total=None, text="")

        def show(done: float, total: float | None, text: str = "") -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield show


class PlainProgress:
    """Progress as lines: the first report, the last, and one every few seconds between."""

    def __init__(self, label: str, interval: float = PLAIN_INTERVAL) -> None:
        self.label, self.interval, self.next_time, self.said = label, interval, 0.0, ""

    def __call__(self, done: float, total: float | None, text: str = "") -> None:
        finished = total is not None and done >= total
        if time.monotonic() < self.next_time and not finished:
            return
        self.next_time = time.monotonic() + self.interval
        share = f" {100 * done / total:.0f}%" if total else ""
        line = f"{self.label}{share} {text}".rstrip()
        if not finished or line != self.said:  # what comes after the end may be nothing new
            say(line)
        self.said = line


class TrainingReport:
    """Shows what `training.trainer.train` reports as progress."""

    def __init__(self, show: ShowProgress) -> None:
        self.show = show
        self.outline: Outline | None = None
        self.unit = "byte"

    def on_tables(self, done: int, total: int | None) -> None:
        """Bytes of the data read so far."""
        self.show(done, total, "reading the data")

    def on_start(self, outline: Outline) -> None:
        """Before the first step."""
        self.outline, self.unit = outline, outline.unit
        for line in outline_lines(outline):
            say(line)

    def on_step(self, metrics: dict[str, Any]) -> None:
        """After every step."""
        if self.outline is not None and metrics["step"] == self.outline.step + SETTLED:
            self._tell_time_and_memory(metrics, self.outline)
        loss = metrics["bits_per_byte"]
        words = [
            f"step {metrics['step']:,}/{metrics['steps']:,}",
            "loss not finite" if loss is None else f"{loss:.3f} bits per {self.unit}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"{clock(metrics['seconds_left'])} left",
        ]
        if metrics["skipped"]:
            words.append(f"{metrics['skipped']} skipped")
        self.show(metrics["step"], metrics["steps"], ", ".join(words))

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """After an evaluation on held-out documents."""
        say(f"step {metrics['step']:,}: held-out {metrics['bits_per_byte']:.3f} bits per {self.unit}")

    def on_sample(self, step: int, text: str) -> None:
        """A text that the model has written."""
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        say(f"step {step:,}: a sample\n{textwrap.indent(shown, '    ')}")

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """After a checkpoint."""

    def _tell_time_and_memory(self, metrics: dict[str, Any], outline: Outline) -> None:
        import torch

        from anymamba.training.outline import peak_bytes

        peak = peak_bytes(torch.device(outline.device))
        memory = "" if peak is None else f"; memory: {size(peak)} at most so far"
        say(f"time: about {clock(metrics['seconds_left'])} left, evaluations not counted{memory}")


def outline_lines(outline: Outline) -> list[str]:
    """What a run is about to do, one line for each of model, data, run and device."""
    model = f"model: {outline.n_parameters:,} parameters"
    if outline.n_trained != outline.n_parameters:
        model += f", of which {outline.n_trained:,} are trained"
    held_out = f"{outline.held_out_tokens:,} held out" if outline.held_out_tokens else "nothing held out"
    done = f", {outline.step:,} of them done" if outline.step else ""
    share = outline.tokens / max(1, outline.training_tokens)
    device = outline.device if outline.device != "cpu" else f"cpu with {outline.threads} threads"
    memory = f"{size(outline.needed_bytes)} for weights, gradients and optimizer, and activations"
    if outline.free_bytes is not None:
        memory += f"; {size(outline.free_bytes)} are free"
        if outline.needed_bytes > outline.free_bytes:
            memory += ", which is too little"
    return [
        model,
        f"data: {outline.training_tokens:,} tokens to train on, {held_out}",
        *outline.notes,
        f"run: {outline.steps:,} steps of {outline.tokens_per_step:,} tokens{done}; "
        f"reads {outline.tokens:,} tokens, {share:.2g} times the data",
        f"device: {device}; memory: {memory}",
    ]
