"""A run of classifiers: one for each seed in a folder, with the split and the results, and what reads it again.

runs/c/run.json split.json results.json      config, classes; the frozen split; metrics with intervals
runs/c/seed-0/                                      a SequenceClassifier with its tokenizer and its results
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anymamba.base.errors import FORMAT_VERSION, require_format_version
from anymamba.base.files import contents, own_folder, write_json
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.data.dna import DnaTokenizer
from anymamba.data.dna.labelled import Labelled
from anymamba.data.dna.labelled import Sequence as Record
from anymamba.data.tokenizer import Tokenizer, load_tokenizer
from anymamba.evaluation.dna.classifier_config import ClassifierTraining
from anymamba.evaluation.dna.classifying import predict, train_classifier
from anymamba.evaluation.dna.metrics import METRICS, classification_metrics, interval
from anymamba.evaluation.dna.sequences import require_bases
from anymamba.evaluation.dna.splits import FrozenSplit
from anymamba.models.checkpoints import Checkpoint, find_tokenizer, load_pretrained, open_checkpoint
from anymamba.models.classifier import SequenceClassifier
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset

VERSION = 1
RUN, SPLIT, RESULTS, RESULT = "run.json", "split.json", "results.json", "result.json"
Progress = Callable[[int, int, str], None]


class Source(NamedTuple):
    """Where the weights of a classifier's model come from."""

    model: str | None = None
    """A folder or a name on the hub."""
    preset: str | None = None
    """The name of a preset, for random weights."""


def train_run(
    out: Path,
    data: Labelled,
    split: FrozenSplit,
    source: Source,
    config: ClassifierTraining,
    device: torch.device,
    progress: Progress = lambda done, total, text: None,
    *,
    split_file: Path | None = None,
) -> dict[str, Any]:
    """Train a classifier for each seed and measure each on the test sequences; return what results.json holds.

    A folder with the same config, split and source goes on with the seeds that it lacks; one without a trained seed is
    taken over. Nothing is written before data and source are checked.

    Args:
        split_file: gets the split, too, if there is no such file.
    Raises FileExistsError if the folder holds something else, ValueError for data of one class or another split, and
    what `open_source` raises.
    """
    parts, classes = split.parts(data.sequences), data.classes
    if len(classes) < 2:
        raise ValueError(f"all sequences have the label {classes[0]!r}; give two classes or more")
    identity = {
        FORMAT_VERSION: VERSION,
        "classes": classes,
        "split": split.digest,
        "source": dict(source._asdict()),
        "training": config_to_dict(config),
    }
    lacking = [seed for seed in range(config.seeds) if not (out / f"seed-{seed}" / RESULT).is_file()]
    opened = open_source(source) if lacking else None
    with own_folder(out, wait=0):
        _require_same(out, identity)
        if split_file is not None and not split_file.exists():
            split.save(split_file)
        write_json(out / RUN, identity)
        split.save(out / SPLIT)
        for seed in lacking:
            assert opened is not None, "the source is open if a seed lacks"
            folder = out / f"seed-{seed}"
            _train_seed(folder, parts, classes, opened, config, seed, device, progress)
        results = _summary(out, config.seeds) | {"n_" + name: len(some) for name, some in parts.items()}
        write_json(out / RESULTS, results)
    return results


def _require_same(out: Path, identity: dict[str, Any]) -> None:
    """Raise FileExistsError unless a folder is empty, of the same run, or of a run without a trained seed."""
    if not contents(out):
        return
    before = json.loads((out / RUN).read_text(encoding="utf-8")) if (out / RUN).is_file() else None
    if before is None:
        raise FileExistsError(f"{out} exists and is no run of classifiers; choose another folder (--out)")
    changed = [name for name in identity if before.get(name) != identity[name]]
    if changed and any(out.glob(f"seed-*/{RESULT}")):
        raise FileExistsError(
            f"{out} holds a run with another {changed[0]}; choose another folder (--out), or repeat its options"
        )


def _train_seed(
    folder: Path,
    parts: dict[Any, list[Record]],
    classes: list[str],
    source: OpenSource,
    config: ClassifierTraining,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> None:
    backbone, tokenizer = source.backbone(device, seed), source.tokenizer
    index = {label: k for k, label in enumerate(classes)}
    texts = {name: [one.text for one in some] for name, some in parts.items()}
    labels = {name: np.array([index[str(one.label)] for one in some], np.int64) for name, some in parts.items()}
    classifier = train_classifier(
        backbone,
        tokenizer,
        (texts["train"], labels["train"]),
        (texts["valid"], labels["valid"]),
        len(classes),
        config,
        seed,
        lambda done, total: progress(done, total, f"seed {seed}"),
    )
    found = {
        name: classification_metrics(predict(classifier, tokenizer, texts[name], config), labels[name])
        for name in ("valid", "test")
    }
    classifier.save_pretrained(folder)
    tokenizer.save(folder)
    write_json(folder / RESULT, {"seed": seed, **found})


class OpenSource(NamedTuple):
    """A source that was checked. The weights are not loaded yet."""

    config: ModelConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None
    """Where the weights are; None for random ones."""

    def backbone(self, device: torch.device, seed: int) -> LanguageModel:
        """A new model; the seed draws random weights."""
        if self.checkpoint is not None:
            return load_pretrained(self.checkpoint, device=device, dtype=torch.float32)
        torch.manual_seed(seed)
        return LanguageModel(self.config, device=device)


def open_source(source: Source) -> OpenSource:
    """Open a model and its tokenizer, or make them for a preset.

    Raises FileNotFoundError if there is no such model, CheckpointError if it cannot be read, ValueError for an unknown
    preset and for a tokenizer that is not one of DNA.
    """
    if source.model is not None:
        checkpoint = open_checkpoint(source.model)
        opened = OpenSource(checkpoint.config, find_tokenizer(checkpoint), checkpoint)
    else:
        assert source.preset is not None, "a source has a model or a preset"
        tokenizer = DnaTokenizer()
        config = dataclasses.replace(preset(source.preset), vocab_size=tokenizer.vocab_size)
        opened = OpenSource(config, tokenizer, None)
    require_bases(opened.tokenizer, opened.config)
    return opened


def _summary(out: Path, seeds: int) -> dict[str, Any]:
    """The metrics of all seeds with intervals."""
    each = [json.loads((out / f"seed-{seed}" / RESULT).read_text(encoding="utf-8")) for seed in range(seeds)]
    return {split: summary([one[split] for one in each]) for split in ("valid", "test")} | {"seeds": each}


def summary(each: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    """The mean of each metric over seeds and its 95 % interval; None for a metric that is not defined."""
    found: dict[str, Any] = {}
    for name in METRICS:
        values = [one[name] for one in each]
        known = [value for value in values if value is not None]
        found[name] = interval(known)._asdict() if known and len(known) == len(values) else None
    return found


class ClassifierRun:
    """The trained classifiers of a run.

    Args:
        folder: that `train_run` wrote.
    Raises FileNotFoundError if it is none or has no trained seed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / RUN).is_file():
            raise FileNotFoundError(
                f"{folder} is not a run of classifiers: it has no {RUN}; make one with anymamba dna classify train"
            )
        values = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        require_format_version(values, VERSION, self.folder / RUN)
        self.classes: list[str] = values["classes"]
        self.config = config_from_dict(ClassifierTraining, values["training"])
        self.seeds = [s for s in range(self.config.seeds) if (self.folder / f"seed-{s}" / RESULT).is_file()]
        if not self.seeds:
            raise FileNotFoundError(f"{folder} has no trained classifier yet; run anymamba dna classify train again")

    @property
    def split(self) -> FrozenSplit:
        """The frozen split."""
        return FrozenSplit.load(self.folder / SPLIT)

    def probabilities(
        self, texts: Sequence[str], device: torch.device, progress: Progress = lambda done, total, text: None
    ) -> NDArray[np.float64]:
        """(n_seeds, n, n_classes): the probabilities that each classifier gives."""
        found = []
        for seed in self.seeds:
            folder = self.folder / f"seed-{seed}"
            classifier = SequenceClassifier.from_pretrained(folder, device=device).eval()
            told = f"seed {seed}"
            found.append(
                predict(
                    classifier,
                    load_tokenizer(folder),
                    texts,
                    self.config,
                    lambda done, total, told=told: progress(done, total, told),  # type: ignore[misc]
                )
            )
        return np.stack(found)

    def measure(
        self, records: Sequence[Record], device: torch.device, progress: Progress = lambda done, total, text: None
    ) -> dict[str, Any]:
        """The metrics on labelled sequences, over seeds. Raises ValueError for a label that is none of the classes."""
        index = {label: k for k, label in enumerate(self.classes)}
        unknown = sorted({str(one.label) for one in records if one.label not in index})
        if unknown:
            raise ValueError(
                f"the label {unknown[0]!r} is none of the classes {', '.join(self.classes)}; correct it, or choose "
                "another column (--label-field)"
            )
        labels = np.array([index[str(one.label)] for one in records], np.int64)
        found = self.probabilities([one.text for one in records], device, progress)
        each = [classification_metrics(one, labels) for one in found]
        return {**summary(each), "n": len(records), "seeds": each}
