"""`anymamba train`: trains a language model on a user's files, fine-tunes one, or resumes a run."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from anymamba.base.errors import one_line
from anymamba.base.schema import config_from_dict
from anymamba.cli.train_help import short_help
from anymamba.console.flags import HELP, read_flags, renamed_flags
from anymamba.console.help import flags_in, help_text
from anymamba.console.output import ShowProgress, TrainingReport, print_facts, print_json, progress_bar, told_warnings
from anymamba.console.profiling import ProfiledReport
from anymamba.console.runtime import told_how_to_resume
from anymamba.models.presets import preset
from anymamba.training.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, config_values

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer
    from anymamba.models.language_model import LanguageModel
    from anymamba.training.trainer import TrainResult

AUTO = "auto"
FULL_HELP = "--help-all"
FLAGS: dict[type, dict[str, str]] = {
    TrainConfig: {"start_from": "from"},
    DataConfig: {
        "paths": "data",
        "text_field": "text-field",
        "exclude": "exclude",
        "on_bad_row": "on-bad-row",
        "tokenizer": "tokenizer",
    },
    OptimizerConfig: {"learning_rate": "learning-rate"},
    ParallelConfig: {"dp_replicate": "dp-replicate", "dp_shard": "dp-shard", "cp": "cp"},
}
"""Fields that have a short flag in place of their path in the config file."""
REPEATABLE = ("paths", "exclude")
"""Of these the fields whose flag may be given several times."""
DNA_PRESETS = ("dna-", "caduceus-")
"""How the names of presets for DNA begin."""
DNA_DEFAULTS = {"context": 4096, "batch_size": 4}
"""What replaces the defaults of the config with such a preset."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a language model on your files in a new run folder, or resume a run.

    A run can be stopped or killed at any moment; --resume continues it as if nothing had happened.
    """

    out: Path | None = None
    """The run folder to make, such as runs/x; an existing one is never overwritten."""
    resume: Path | None = None
    """A run folder to resume; everything else comes from its own config, but for --steps and --max-minutes, with which
    also a finished run goes on, and --dp-replicate, --dp-shard and --cp."""
    config: Path | None = None
    """A .json or .toml file with the options below, such as a run's train_config.json; flags override it."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Sizes of the model: nano, tiny, small and medium for bytes, mamba-130m to mamba-2.8b, dna-1.4m, dna-7.0m and
    dna-40.7m, and those of Transformers and H3 (any other name lists them all); --model flags override them."""
    profile: Path | None = None
    """Folder for a profile of five steps: a trace for Perfetto or TensorBoard. A table of the time goes to stderr."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the result as one JSON object."""
    new_steps: tyro.conf.Suppress[int | None] = None
    """The steps that are given together with --resume."""
    by_epochs: tyro.conf.Suppress[bool] = False
    """Neither a flag nor the config file gives the steps: a length warm-up then takes as many as its epochs need."""
    new_parallel: tyro.conf.Suppress[ParallelConfig | None] = None
    """The degrees of parallelism that are given together with --resume."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: TrainConfig(device=AUTO))


@dataclass(frozen=True)
class Basis:
    """The two flags that decide the defaults of the others; they are read first."""

    config: Path | None = None
    preset: str | None = None


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba train`. Of the processes that torchrun has started only rank 0 prints."""
    if os.environ.get("RANK", "0") == "0" or os.environ.get("ANYMAMBA_DEBUG") == "1":
        run_command(arguments)
    else:
        with silence():
            run_command(arguments)


@contextmanager
def silence() -> Iterator[None]:
    """Print nothing while the body runs, also when it fails: rank 0 is told of errors, and says them.

    An error before the ranks have met is printed.
    """
    said = io.StringIO()
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(said):
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except SystemExit as end:
            if end.code:
                _say_alone(said.getvalue().strip().rpartition("\n")[2])
            raise
        except Exception as error:
            _say_alone(f"error: {one_line(error)}")
            raise SystemExit(1) from None


def _say_alone(line: str) -> None:
    """Print a line of this rank if rank 0 cannot be told of it."""
    from anymamba.training.parallel.watch import is_watched

    if line and not is_watched():
        os.write(2, f"rank {os.environ.get('RANK')}: {line}\n".encode())


def run_command(arguments: Sequence[str]) -> None:
    """Train or resume, and print the result."""
    if HELP & set(arguments):
        print(short_help(flags_in(help_text(read_options))))
        return
    options = read_options(["--help"] if FULL_HELP in arguments else arguments)
    run = options.resume or options.out
    assert run is not None, "read_options requires one of them"
    with (
        told_how_to_resume(run),
        progress_bar("training") as show,
        told_warnings(),
        make_report(options, show) as report,
    ):
        result = run_training(options, report)
    if options.json:
        print_json(dataclasses.asdict(result))
    else:
        print_facts(readable(result))


def read_options(arguments: Sequence[str]) -> TrainOptions:
    """The options: those of the config file, overridden by flags.

    Raises ValueError for flags that exclude each other and FileNotFoundError if the config file does not exist.
    """
    basis = read_basis(arguments)
    values = {} if basis.config is None else read_config_file(basis.config)
    start, in_file = default_config(basis, values)
    default = TrainOptions(train=start)
    options = read_flags(TrainOptions, "train", arguments, default, renamed_flags(FLAGS, REPEATABLE))
    if options.resume is not None:
        default_steps, parallel = TrainConfig().steps, options.train.parallel
        longer = dataclasses.replace(options.train, steps=default_steps, max_minutes=None, parallel=ParallelConfig())
        if dataclasses.replace(options, resume=None, profile=None, json=False, train=longer) != TrainOptions():
            raise ValueError(
                f"--resume {options.resume} uses the run's own config, but for --steps, --max-minutes, --dp-replicate, "
                "--dp-shard and --cp; leave the other flags out"
            )
        degrees = any(is_given(f"--{flag}", arguments) for flag in FLAGS[ParallelConfig].values())
        return dataclasses.replace(
            options,
            new_steps=options.train.steps if is_given("--steps", arguments) else None,
            new_parallel=parallel if degrees else None,
        )
    if options.out is None:
        raise ValueError("no run folder; name a new one with --out, such as --out runs/x, or resume one with --resume")
    by_epochs = "steps" not in values and not is_given("--steps", arguments)
    return dataclasses.replace(options, by_epochs=by_epochs, train=complete(options, in_file))


def is_given(flag: str, arguments: Sequence[str]) -> bool:
    """Whether a flag is among the arguments, where its value may be the default; _ stands for - as for all flags."""
    return any(word.partition("=")[0].replace("_", "-") == flag for word in arguments)


def read_basis(arguments: Sequence[str]) -> Basis:
    """The values of --config and --preset; all other arguments are skipped."""
    if {"-h", "--help"} & set(arguments):
        return Basis()
    found: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config", "--preset"):
            found[name[2:]] = value if equals else next(words, "")
    config = found.get("config")
    return Basis(Path(config) if config else None, found.get("preset") or None)


def default_config(basis: Basis, in_file: dict[str, Any]) -> tuple[TrainConfig, DataConfig]:
    """The defaults of the flags (the file's values, with the preset's model and shape), and the file's data.

    The defaults lack the values of repeatable flags, which would add to them instead of replacing them.
    """
    values = {"device": AUTO} | (DNA_DEFAULTS if is_for_dna(basis.preset) else {}) | in_file
    config = config_from_dict(TrainConfig, values, "" if basis.config is None else str(basis.config))
    if basis.preset is not None:
        config = dataclasses.replace(config, model=preset(basis.preset))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, paths=(), exclude=())), config.data


def is_for_dna(name: str | None) -> bool:
    """Whether a preset is one for DNA."""
    return name is not None and name.lower().startswith(DNA_PRESETS)


def read_config_file(path: Path) -> dict[str, Any]:
    """The values of a JSON or TOML file."""
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"--config must name a .json or .toml file, got {path}")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a table of keys and values, got {type(values).__name__}")
    return config_values(values, path)


def complete(options: TrainOptions, in_file: DataConfig) -> TrainConfig:
    """The config with the file's values of repeatable flags that are not given, and with a device."""
    config = options.train
    paths, exclude = config.data.paths or in_file.paths, config.data.exclude or in_file.exclude
    data = dataclasses.replace(config.data, paths=paths, exclude=exclude)
    if not data.paths:
        raise ValueError("no training data; name files, folders or globs with --data PATH...")
    if config.start_from is not None and config.model != TrainConfig().model:
        raise ValueError("--from takes the model's sizes from its weights; leave --preset and --model flags out")
    from anymamba.ops.devices import usable_device

    return dataclasses.replace(config, data=data, device=str(usable_device(config.device)))


@contextmanager
def make_report(options: TrainOptions, show: ShowProgress) -> Iterator[TrainingReport]:
    """What shows the progress of the run, and profiles it if that is wanted."""
    if options.profile is None:
        yield TrainingReport(show)
        return
    report = ProfiledReport(show, options.profile)
    try:
        yield report
    finally:
        report.close()


def run_training(options: TrainOptions, report: TrainingReport) -> TrainResult:
    """Train or resume. Raises ValueError for a preset of DNA with text."""
    from anymamba.data.dna import are_genomes
    from anymamba.data.documents import GENOME_SUFFIXES
    from anymamba.training.trainer import resume, train

    if is_for_dna(options.preset) and not are_genomes(options.train.data.paths):
        raise ValueError(
            f"the preset {options.preset} is for DNA, and the data is text; name FASTA or .2bit files with --data, "
            f"whose names end with {', '.join(GENOME_SUFFIXES)}"
        )
    if options.resume is not None:
        minutes = options.train.max_minutes
        return resume(
            options.resume,
            report,
            write_sample,
            steps=options.new_steps,
            max_minutes=minutes,
            parallel=options.new_parallel,
        )
    assert options.out is not None
    return train(options.train, options.out, report, write_sample, by_epochs=options.by_epochs)


def write_sample(model: LanguageModel, tokenizer: Tokenizer, config: TrainConfig) -> str:
    """A text that the model of a run writes by itself; the same model writes the same text."""
    from anymamba.data.dna import DnaTokenizer
    from anymamba.generation.generate import generate

    before = "A" if isinstance(tokenizer, DnaTokenizer) else "\n"
    start = [tokenizer.eos_id] if tokenizer.eos_id is not None else list(tokenizer.encode(before)) or [0]
    output = generate(model, [start], tokenizer, max_new_tokens=config.sample_tokens, seed=config.seed)
    return (output.texts or [""])[0]


def readable(result: TrainResult) -> dict[str, str]:
    """The result, one line each."""
    lines = {
        "run": result.run,
        "steps": f"{result.steps:,}",
        "tokens": f"{result.tokens:,} at {result.tokens_per_second:,.0f} a second",
        "parameters": f"{result.n_parameters:,}",
    }
    for name, value in (("training", result.bits_per_byte), ("held-out", result.held_out_bits_per_byte)):
        if value is not None:
            lines[f"{name} loss"] = f"{value:.3f} bits per {result.unit}"
    if result.best_step is not None:
        best = f"{result.best_held_out_bits_per_byte:.3f} bits per {result.unit}"
        lines["best held-out"] = f"{best} at step {result.best_step:,}"
    dropped, held_out = result.dropped_windows or 0, result.dropped_held_out_windows or 0
    if dropped or held_out:
        drawn = f"{dropped:,} windows to train on (each time that one is drawn)"
        lines["dropped"] = f"{drawn} and {held_out:,} held-out ones with too many N"
    if result.notes:
        lines["found"] = "; ".join(result.notes)
    if result.skipped:
        lines["skipped"] = f"{result.skipped} steps with a loss or gradient that was not finite"
    return lines
