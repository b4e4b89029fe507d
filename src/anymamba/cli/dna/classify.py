"""`anymamba dna classify train|eval|predict`: classifiers of sequences."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from anymamba.cli.dna.inputs import lines_to, require_new, tell_skipped
from anymamba.console.flags import read_flags
from anymamba.console.output import print_facts, print_json, progress_bar, say, told_warnings
from anymamba.console.runtime import set_threads
from anymamba.evaluation.dna.classifier_config import ClassifierTraining

if TYPE_CHECKING:
    from anymamba.data.dna.labelled import Labelled
    from anymamba.evaluation.dna.splits import FrozenSplit


@dataclass(frozen=True)
class Where:
    """Device and threads of the computation."""

    device: str = "auto"
    """cpu, cuda, cuda:1, xpu, mps; auto takes the first of cuda, xpu, mps and cpu that can be used here."""
    threads: int | None = None
    """CPU threads; defaults to torch's choice, the number of cores."""


@dataclass(frozen=True)
class Data:
    """Labelled sequences."""

    data: Path
    """A .csv or .tsv with columns seq and label, a folder train/<class>/*.txt and test/<class>/*.txt (as Genomic
    Benchmarks has it), or FASTA with label=... in its headers."""
    label_field: str = "label"
    """The column of the labels, or the word before "=" in FASTA headers."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a record without a sequence or a label, or with letters that DNA does not have."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a classifier of sequences for each of several seeds, and measure them on test sequences.

    The data is split once, by hashes of the sequences; split.json keeps the split. A run that was stopped goes on with
    the seeds that it lacks when the command is repeated.
    """

    data: tyro.conf.OmitArgPrefixes[Data]
    out: Path
    """The folder of the run."""
    model: str | None = None
    """Folder of a model of DNA (a run folder is one), or a name on the Hugging Face hub."""
    preset: str | None = None
    """Sizes of a new model with random weights, in place of --model."""
    split_file: Path | None = None
    """A frozen split: used if the file exists, else written; defaults to the run's own."""
    valid: float = 0.1
    """Share of the sequences that choose the epoch or the penalty."""
    test: float = 0.2
    """Share of the sequences to measure on; not used if the data has a split test."""
    split_seed: int = 0
    """Seed of the split."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""
    training: tyro.conf.OmitArgPrefixes[ClassifierTraining] = field(default_factory=ClassifierTraining)
    where: tyro.conf.OmitArgPrefixes[Where] = field(default_factory=Where)


@dataclass(frozen=True)
class EvalOptions:
    """Measure the classifiers of a run on labelled sequences: accuracy, MCC and AUROC, with intervals over seeds."""

    run: Path
    """The folder of the run."""
    data: tyro.conf.OmitArgPrefixes[Data]
    split: Literal["all", "train", "valid", "test"] = "all"
    """Which of the run's splits of the same data to measure on; all takes the sequences as they are."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""
    where: tyro.conf.OmitArgPrefixes[Where] = field(default_factory=Where)


@dataclass(frozen=True)
class PredictOptions:
    """Classify sequences: a TSV with the class and the probabilities, which are means over the run's seeds."""

    run: Path
    """The folder of the run."""
    data: tyro.conf.OmitArgPrefixes[Data]
    out: Path | None = None
    """A new .tsv file; defaults to stdout."""
    where: tyro.conf.OmitArgPrefixes[Where] = field(default_factory=Where)


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba dna classify`."""
    arguments = list(arguments)
    if arguments == ["--help-all"]:
        for run in VERBS.values():
            with suppress(SystemExit):  # each help ends with it
                run(["--help"])
        return
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: anymamba dna classify {{{','.join(VERBS)}}} [OPTIONS]; each has --help")
        return
    if not arguments or arguments[0] not in VERBS:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1) if arguments else []
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(VERBS)}"
        raise ValueError(f"name what to do: anymamba dna classify {'|'.join(VERBS)}; {hint}")
    with told_warnings():
        VERBS[arguments[0]](arguments[1:])


def train(arguments: Sequence[str]) -> None:
    """Run `anymamba dna classify train`."""
    options = read_flags(TrainOptions, "dna classify train", arguments)
    if (options.model is None) == (options.preset is None):
        raise ValueError("name a model with --model, or sizes of a new one with --preset, and not both")
    data = read(options.data)
    split = frozen_split(options, data)
    device = device_named(options.where)
    from anymamba.evaluation.dna.classifier_runs import Source, train_run

    source = Source(options.model, options.preset)
    with progress_bar("training") as show:
        results = train_run(
            options.out, data, split, source, options.training, device, show, split_file=options.split_file
        )
    if options.json:
        print_json({"run": str(options.out), **results})
        return
    counts = ", ".join(f"{results['n_' + name]:,} {name}" for name in ("train", "valid", "test"))
    print_facts({"run": str(options.out), "sequences": counts, **readable(results["test"])})


def frozen_split(options: TrainOptions, data: Labelled) -> FrozenSplit:
    """The split of a file that exists, or a new one."""
    from anymamba.evaluation.dna.splits import FrozenSplit, make_split, n_shared

    if options.split_file is not None and options.split_file.exists():
        split = FrozenSplit.load(options.split_file)
    else:
        split = make_split(data.sequences, seed=options.split_seed, valid=options.valid, test=options.test)
    shared = n_shared(split.parts(data.sequences))
    if shared:
        say(f"{options.data.data}: {shared:,} test sequences are also in train, perhaps on the other strand")
    return split


def evaluate(arguments: Sequence[str]) -> None:
    """Run `anymamba dna classify eval`."""
    options = read_flags(EvalOptions, "dna classify eval", arguments)
    from anymamba.evaluation.dna.classifier_runs import ClassifierRun

    run = ClassifierRun(options.run)
    sequences = read(options.data).sequences
    if options.split != "all":
        sequences = run.split.parts(sequences)[options.split]
    else:
        known = run.split.n_trained(sequences, run.classes)
        if known:
            say(f"{options.data.data}: the run was trained on {known:,} of these {len(sequences):,} sequences")
    with progress_bar("evaluating") as show:
        result = run.measure(sequences, device_named(options.where), show)
    if options.json:
        print_json({"run": str(options.run), "split": options.split, **result})
    else:
        print_facts({"sequences": f"{result['n']:,}", **readable(result)})


def predict(arguments: Sequence[str]) -> None:
    """Run `anymamba dna classify predict`."""
    options = read_flags(PredictOptions, "dna classify predict", arguments)
    require_new(options.out, (".tsv",))
    from anymamba.evaluation.dna.classifier_runs import ClassifierRun

    run = ClassifierRun(options.run)
    sequences = read(options.data, need_labels=False).sequences
    with progress_bar("classifying") as show:
        found = run.probabilities([one.text for one in sequences], device_named(options.where), show).mean(0)
    with lines_to(options.out) as stream:
        print("name", "class", *(f"p_{label}" for label in run.classes), sep="\t", file=stream)
        for one, row in zip(sequences, found, strict=True):
            print(one.name, run.classes[int(row.argmax())], *(f"{p:.6f}" for p in row), sep="\t", file=stream)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"train": train, "eval": evaluate, "predict": predict}


def read(options: Data, need_labels: bool = True) -> Labelled:
    """The sequences; what was skipped goes to stderr."""
    from anymamba.data.dna.labelled import read_labelled
    from anymamba.data.dna.letters import others_in_words

    data = read_labelled(
        options.data, label_field=options.label_field, need_labels=need_labels, on_bad_row=options.on_bad_row
    )
    tell_skipped(options.data, data.skipped)
    if others := data.others:
        say(f"{options.data}: {others_in_words(others)}")
    return data


def device_named(where: Where) -> Any:
    """The device of the flags, after the number of threads is set."""
    set_threads(where.threads)
    from anymamba.ops.devices import usable_device

    return usable_device(where.device)


def readable(metrics: dict[str, Any]) -> dict[str, str]:
    """Accuracy, MCC and AUROC, one line each."""
    lines = {}
    for name, label in (("accuracy", "accuracy"), ("mcc", "MCC"), ("auroc", "AUROC")):
        found = metrics[name]
        if found is None:
            lines[label] = "not defined: the labels are of one class"
        elif found["low"] is None:
            lines[label] = f"{found['mean']:.4f} (one seed)"
        else:
            lines[label] = f"{found['mean']:.4f} (95 % {found['low']:.4f} to {found['high']:.4f}, {found['n']} seeds)"
    return lines
