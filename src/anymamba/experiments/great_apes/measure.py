"""Measures an arm: pretraining, fine-tuning, or the baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anymamba.data.dna import DnaTokenizer
from anymamba.experiments.great_apes.arms import BaselineSettings, FinetuneSettings, PretrainSettings
from anymamba.experiments.great_apes.genomes import SPECIES, Loci, loci, slices, training_windows
from anymamba.experiments.great_apes.sixmers import fitted, frequencies
from anymamba.lab.classifiers import Classes, Classifier
from anymamba.lab.experiment import Context
from anymamba.lab.language import best_rate
from anymamba.lab.learning import EVALUATED_AT_ONCE, batch_generator, build_model, learn
from anymamba.lab.optimization import Optimization, autocast
from anymamba.lab.saving import SUFFIX
from anymamba.models.language_model import LanguageModel

Settings = PretrainSettings | FinetuneSettings | BaselineSettings


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """Measure an arm once."""
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    if isinstance(settings, PretrainSettings):
        return pretrain(settings, context)
    return finetune(settings, context) if isinstance(settings, FinetuneSettings) else baseline(settings, context)


def pretrain(settings: PretrainSettings, context: Context) -> dict[str, Any]:
    """Train a model of the next base. Returns the values of `learn`, the rate, and the bases that were read."""
    training = slices(settings.source, context.data, "train", context.device)
    valid = loci_of(settings, "valid", context, settings.window)
    model, how = build_model(settings.model, context), settings.optimization
    values = learn(
        model,
        how,
        training_windows(training, settings.window, None),
        (valid.ids[:, :-1], valid.ids[:, 1:]),
        context,
        every=settings.judge_every,
        resumable=True,
    )
    if settings.keep and context.saving is not None:
        model.save_pretrained(folder_of(context, context.saving.path.name.removesuffix(SUFFIX)), DnaTokenizer())
    return {**values, **what_was_read(settings, values)}


def finetune(settings: FinetuneSettings, context: Context) -> dict[str, Any]:
    """Train a model of the species. Returns the values of `learn` on the valid loci, the rate, the bases that were
    read, and `answers_at` the test loci."""
    how = settings.optimization
    if settings.rate_of:
        how = replace(how, learning_rate=best_rate(settings.rate_of, context))
    training = slices(settings.source, context.data, "train", context.device)
    valid, test = (loci_of(settings, split, context) for split in ("valid", "test"))
    body = build_model(settings.model, context) if settings.start is None else started(settings.start, context)
    model = Classifier(body, Classes(len(SPECIES), settings.asked)).to(context.device)
    labels = valid.species.new_full((len(valid.species), settings.window // settings.asked), -100)
    labels[:, -1] = valid.species
    values = learn(
        model,
        how,
        training_windows(training, settings.window, settings.asked),
        (valid.ids, labels),
        context,
        every=settings.judge_every,
        resumable=True,
    )
    read = what_was_read(settings, values) | {"learning_rate": how.learning_rate}
    return {**values, **read, **answers_at(test, species_said(model, test.ids, how))}


def baseline(settings: BaselineSettings, context: Context) -> dict[str, Any]:
    """Fit the regression. Returns the penalty, the loss on the valid loci, and `answers_at` the test loci."""
    training = slices(settings.source, context.data, "train", context.device)
    make = training_windows(training, settings.window, settings.window, flips=False)
    generator, features, labels = batch_generator(context), [], []
    rows = max(1, EVALUATED_AT_ONCE // settings.window)
    for start in range(0, settings.n_windows, rows):
        ids, species = make(generator, min(rows, settings.n_windows - start))
        features.append(frequencies(ids))
        labels.append(species[:, -1])
        context.progress(start, settings.n_windows, "counting 6-mers")
    valid, test = (loci_of(settings, split, context) for split in ("valid", "test"))
    fit = fitted(
        (torch.cat(features), torch.cat(labels)), (counted(valid.ids), valid.species), settings.penalties, len(SPECIES)
    )
    said = fit.scores(counted(test.ids)).argmax(-1)[:, None]
    return {"penalty": fit.penalty, "validation_loss": fit.loss, **answers_at(test, said)}


def counted(ids: Tensor) -> Tensor:
    """The 6-mers of many windows, some at a time."""
    return torch.cat([frequencies(part) for part in ids.split(max(1, EVALUATED_AT_ONCE // ids.shape[1]))])


def loci_of(settings: Settings, split: Any, context: Context, window: int | None = None) -> Loci:
    """The loci of a split, in windows of the settings' length."""
    found = slices(settings.source, context.data, split, context.device)
    return loci(found, window or settings.window, settings.longest, settings.most_loci)


@torch.no_grad()
def species_said(model: Classifier, ids: Tensor, how: Optimization) -> Tensor:
    """(windows, asked) the most likely species at each position at which it is asked."""
    model.eval()
    said = []
    for part in ids.split(max(1, min(64, EVALUATED_AT_ONCE // ids.shape[1]))):
        with autocast(how, ids.device):
            said.append(model.probabilities(part).argmax(-1))
    return torch.cat(said)


def answers_at(test: Loci, said: Tensor) -> dict[str, Any]:
    """What was said of the test windows, judged at their last position.

    Returns `loci`, a list of [correct answers, answers] for each locus; `confusion`, the answers by the true species
    and the one that was said; and `by_context`, the accuracy after each position at which the species was asked.
    """
    right = said == test.species[:, None]
    n, k = int(test.locus.max()) + 1, len(SPECIES)
    per_locus = np.stack([np.bincount(test.locus.cpu(), w, n) for w in (right[:, -1].cpu(), None)], 1).astype(int)
    pairs = (test.species * k + said[:, -1]).cpu()
    return {
        "loci": per_locus.tolist(),
        "confusion": np.bincount(pairs, minlength=k * k).reshape(k, k).tolist(),
        "by_context": right.double().mean(0).tolist(),
    }


def what_was_read(settings: PretrainSettings | FinetuneSettings, values: dict[str, Any]) -> dict[str, Any]:
    """The rate, and the bases that a training read."""
    how = settings.optimization
    return {"learning_rate": how.learning_rate, "read_bases": values["steps"] * how.batch_size * settings.window}


def started(arm: str, context: Context) -> LanguageModel:
    """The model that another arm has left with the same seed.

    Raises ValueError if the results have no folder, FileNotFoundError if the arm is not measured.
    """
    folder = folder_of(context, f"{arm}-seed{context.seed}")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"this arm begins from the model {folder}, which does not exist; run the arm {arm} first"
        )
    return LanguageModel.from_pretrained(folder, device=context.device, dtype=torch.float32)


def folder_of(context: Context, name: str) -> Path:
    """A folder beside the results."""
    if context.saving is None:
        raise ValueError("this arm needs the folder of the results, where the pretrained model is")
    return context.saving.path.with_name(name)
