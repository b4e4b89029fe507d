"""`anymamba demo`: trains on Python's standard library for about three minutes, compares and generates."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from anymamba.base.files import own_folder
from anymamba.console.flags import read_flags
from anymamba.console.output import TrainingReport, print_json, progress_bar, say
from anymamba.console.runtime import told_how_to_resume
from anymamba.models.config import ModelConfig
from anymamba.training.config import DataConfig, OptimizerConfig, TrainConfig
from anymamba.training.report import Silent

if TYPE_CHECKING:
    from rich.table import Table

    from anymamba.data.table import TokenTable
    from anymamba.data.tokenizer import Tokenizer
    from anymamba.models.language_model import LanguageModel
    from anymamba.training.trainer import TrainResult

BATCH_SIZE, CONTEXT, LEARNING_RATE = 16, 64, 4e-3
PIECE = 1024  # tokens that a row reads from one file: many files in every run, however short
TOKENS = 8_000_000  # the budget; a machine that has read them stops before the time is up
PATIENCE = 1.2  # of the time asked for, if the machine becomes slower after the trial
N_EVALUATIONS = 6
TRIAL_STEPS = 12  # steps of the throw-away run that measures the speed
EVALUATED_BYTES = 250_000  # of the held-out files, so that evaluating takes seconds
PROMPT = "def "
SAMPLE_TOKENS = 400
PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class DemoOptions:
    """Train a byte-level Mamba on Python's standard library, compare it with compressors, and generate from it."""

    out: Path = Path("runs/demo")
    """Run folder; if it exists, the first free one of runs/demo-2, runs/demo-3, ... is used."""
    minutes: float = 3.0
    """About how long to train."""
    seed: int = 0
    """Seed of the initialisation, the order of the data and the sample."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object at the end instead of text."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 1e6:
            raise ValueError(f"--minutes must be above 0, got {self.minutes}")


class Size(NamedTuple):
    """A model that the demo can train."""

    model: ModelConfig
    enough: int
    """Tokens from which it is better than the smaller ones. By trial: docs/inside/runs.md."""


SIZES = (
    Size(ModelConfig(d_model=256, n_layers=3, vocab_size=257), 2_500_000),
    Size(ModelConfig(d_model=128, n_layers=2, vocab_size=257), 0),
)
"""From the largest to the smallest. A model half as wide as the last one was worse after any time."""


class Score(NamedTuple):
    """One row of the comparison."""

    name: str
    bits_per_byte: float
    note: str


class Sample(NamedTuple):
    """A generated text and the speed of generating it."""

    text: str
    tokens_per_second: float


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba demo`."""
    options = read_flags(DemoOptions, "demo", arguments)
    out = free_folder(options.out)
    if out != options.out:
        say(f"{options.out} exists and is left as it is; this run goes to {out}")
    with told_how_to_resume(out), own_folder(out, wait=0):
        result = train_on_standard_library(options, out)
    report(options, out, result)


# ------------------------------------------------------------------------------------------------- training


def train_on_standard_library(options: DemoOptions, out: Path) -> TrainResult:
    """Train the largest model that reads enough in the time asked for; short trial runs measure the speed."""
    from anymamba.training.trainer import train

    training, held_out = corpus()
    data = DataConfig(paths=tuple(training), eval_paths=tuple(held_out), piece=PIECE)
    say(f"{len(training)} files of Python's standard library to train on, {len(held_out)} held out")
    with progress_bar("training") as show, tempfile.TemporaryDirectory() as folder:

        def seconds_per_step(size: Size) -> float:
            show(0, 1, f"measuring the speed of {size.model.n_layers} layers of {size.model.d_model}")
            timer, trial = StepTimer(), plan(data, size.model, TRIAL_STEPS, options.seed)
            trial = dataclasses.replace(trial, eval_tokens=0, checkpoint_every=TRIAL_STEPS)
            train(trial, Path(folder) / f"trial-{size.model.d_model}", timer)
            return timer.seconds_per_step()

        size, steps = choose_size(options.minutes, seconds_per_step)
        config = plan(data, size.model, steps, options.seed)
        return train(dataclasses.replace(config, max_minutes=PATIENCE * options.minutes), out, TrainingReport(show))


def choose_size(minutes: float, seconds_per_step: Callable[[Size], float]) -> tuple[Size, int]:
    """The largest size that reads enough tokens in the time, and its number of steps; else the smallest one."""
    for size in SIZES:
        steps = affordable_steps(minutes, seconds_per_step(size))
        if steps * BATCH_SIZE * CONTEXT >= size.enough:
            break
    return size, steps


class StepTimer(Silent):
    """A report that only records when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Note when a step ended."""
        self.times.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """The median time between steps; the slow first steps do not change it."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times))


def corpus() -> tuple[list[str], list[str]]:
    """The files to train on and those held out, by a hash of their names."""
    from anymamba.data.stdlib_corpus import is_held_out, standard_library_files

    files = [str(file) for file in standard_library_files()]
    return [f for f in files if not is_held_out(f)], [f for f in files if is_held_out(f)]


def plan(data: DataConfig, model: ModelConfig, steps: int, seed: int) -> TrainConfig:
    """The config of a run of this many steps."""
    rate = OptimizerConfig(
        learning_rate=LEARNING_RATE, min_learning_rate=LEARNING_RATE / 20, warmup_steps=max(1, steps // 20)
    )
    return TrainConfig(
        data=data,
        model=model,
        optimizer=rate,
        steps=steps,
        batch_size=BATCH_SIZE,
        context=CONTEXT,
        seed=seed,
        eval_every=max(1, steps // N_EVALUATIONS),
        eval_tokens=20_000,
        checkpoint_every=max(1, steps // 3),
    )


def free_folder(wanted: Path) -> Path:
    """The folder if it does not exist yet, else the first free one of wanted-2, wanted-3, ..."""
    folder, number = wanted, 2
    while folder.exists():
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return folder


def affordable_steps(minutes: float, seconds_per_step: float) -> int:
    """The steps that fit into the time and the budget of tokens, in whole evaluation intervals; at least two."""
    steps = max(2, min(int(60 * minutes / seconds_per_step), TOKENS // (BATCH_SIZE * CONTEXT)))
    return steps - steps % N_EVALUATIONS if steps > N_EVALUATIONS else steps


# ------------------------------------------------------------------------------------------------- results


def report(options: DemoOptions, out: Path, result: TrainResult) -> None:
    """Compare the model with compressors, generate a sample, and print the results."""
    from anymamba.data.tokenizer import load_tokenizer
    from anymamba.models.language_model import LanguageModel
    from anymamba.ops import dispatch

    model, tokenizer = LanguageModel.from_pretrained(out).eval(), load_tokenizer(out)
    scores, counted = compare(model, tokenizer, result.tokens)
    prefill = prefill_speed(model)
    sample = print_sample(model, tokenizer, options.seed, silent=options.json)
    speeds = {
        "training": result.tokens_per_second,
        f"prefill ({PREFILL_TOKENS:,} tokens)": prefill,
        "decoding": sample.tokens_per_second,
    }
    ran = backends_that_ran(dispatch.calls)
    if options.json:
        values = {"scores": [score._asdict() for score in scores], "winner": winner(scores).name, "counted": counted}
        print_json(dataclasses.asdict(result) | values | {"speeds": speeds, "backends": ran, "sample": sample.text})
        return
    print_tables(scores, counted, speeds, ran)
    print(f"\nThe run is in {out}. Generate more: anymamba generate --model {out} --prompt 'class '")


def compare(model: LanguageModel, tokenizer: Tokenizer, tokens_read: int) -> tuple[list[Score], str]:
    """Scores of the model, the order-3 byte model, zlib and xz on the same held-out bytes, and what these bytes are."""
    from anymamba.data.table import build_token_table
    from anymamba.evaluation.byte_models import OrderKByteModel, xz_bits_per_byte, zlib_bits_per_byte
    from anymamba.evaluation.perplexity import evaluate

    training, held_out = (build_token_table(paths, tokenizer) for paths in corpus())
    chosen = choose_documents(held_out.byte_lengths.tolist(), EVALUATED_BYTES)
    table = held_out.select(chosen)
    documents = texts(table)
    with progress_bar("evaluating") as show:
        result = evaluate(model, table, tokenizer.eos_id, progress=lambda d, n: show(d, n, f"{d:,} of {n:,} bytes"))
    assert result.bits_per_byte is not None and result.n_bytes == sum(map(len, documents))
    order_3 = OrderKByteModel(iter(texts(training)))
    megabytes = f"{order_3.n_training_bytes / 1e6:.1f} MB"
    scores = [
        Score("Mamba", result.bits_per_byte, f"read {tokens_read / 1e6:.2f} MB of the training files"),
        Score("order-3 byte model", order_3.bits_per_byte(documents), f"trained on all {megabytes} of the same files"),
        Score("zlib -9", zlib_bits_per_byte(documents), "the held-out files as one stream"),
        Score("xz -9e", xz_bits_per_byte(documents), "the held-out files as one stream"),
    ]
    return scores, f"{table.n_documents} of {held_out.n_documents} held-out files, {result.n_bytes:,} bytes"


def choose_documents(sizes: Sequence[int], limit: int) -> list[int]:
    """Indices of documents with at most `limit` bytes in all, in a fixed shuffled order; at least one document."""
    order = list(range(len(sizes)))
    random.Random(0).shuffle(order)
    chosen, total = [], 0
    for i in order:
        if total + sizes[i] <= limit:
            chosen.append(i)
            total += sizes[i]
    return chosen or order[:1]


def texts(table: TokenTable) -> list[bytes]:
    """The bytes of each document in a table whose tokens are bytes."""
    return [table.read(i, 0, length).astype("uint8").tobytes() for i, length in enumerate(table.lengths.tolist())]


def prefill_speed(model: LanguageModel) -> float:
    """Tokens per second of reading a prompt; the better of two passes."""
    import torch

    ids = torch.randint(0, 256, (1, PREFILL_TOKENS))
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            model(ids, num_last_logits=1)
            seconds.append(time.perf_counter() - start)
    return PREFILL_TOKENS / min(seconds)


def print_sample(model: LanguageModel, tokenizer: Tokenizer, seed: int, *, silent: bool) -> Sample:
    """Stream a continuation of PROMPT to stdout."""
    from anymamba.generation.generate import stream_text
    from anymamba.generation.sampling import SamplingConfig

    sampling = SamplingConfig(temperature=0.7, top_p=0.95)
    steps = stream_text(model, tokenizer, PROMPT, max_new_tokens=SAMPLE_TOKENS, sampling=sampling, seed=seed)
    pieces = [PROMPT]
    write = (lambda text: None) if silent else (lambda text: print(text, end="", flush=True))
    write(f"\nA sample after {PROMPT!r}:\n\n{PROMPT}")
    start = time.perf_counter()
    for piece in steps:
        pieces.append(piece)
        write(piece)
    seconds = time.perf_counter() - start
    write("\n\n")
    return Sample("".join(pieces), len(steps.ids) / seconds)


def winner(scores: Sequence[Score]) -> Score:
    """The score with the fewest bits per byte; the first one if several are equal."""
    return min(scores, key=lambda score: score.bits_per_byte)


def backends_that_ran(calls: dict[tuple[str, str, str], int]) -> list[str]:
    """One line for each op and backend that ran, with the number of calls."""
    pairs = sorted({(op, backend) for op, backend, _ in calls})
    return [
        f"{op}: {backend} ("
        + ", ".join(f"{n:,} {what}" for (o, b, what), n in sorted(calls.items()) if (o, b) == (op, backend))
        + ")"
        for op, backend in pairs
    ]


def print_tables(scores: Sequence[Score], counted: str, speeds: dict[str, float], ran: Sequence[str]) -> None:
    """Print the comparison and the speeds."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    console.print(score_table(scores, counted))
    console.print(f"The winner is {winner(scores).name}.\n")
    console.print(speed_table(speeds))
    for line in ran:
        console.print(f"backend of {line}")


def score_table(scores: Sequence[Score], counted: str) -> Table:
    """The comparison as a table; the best row is marked."""
    from rich.table import Table

    best = winner(scores)
    table = Table("", "bits per byte", "", title=f"On {counted}", title_justify="left", title_style="")
    for score in scores:
        name = f"{score.name} *" if score is best else score.name
        table.add_row(name, f"{score.bits_per_byte:.3f}", score.note, style="bold" if score is best else "")
    return table


def speed_table(speeds: dict[str, float]) -> Table:
    """The speeds as a table, in tokens per second."""
    from rich.table import Table

    table = Table("", "tokens per second")
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:,.0f}")
    return table
