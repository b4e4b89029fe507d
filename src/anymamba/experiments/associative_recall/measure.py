"""Trains a system on rows of all its tasks, in one batch or in turns, and evaluates it on each."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from anymamba.data.synthetic.recall import FILLER, NO_LABEL, Recall, recall_batch
from anymamba.experiments.associative_recall.arms import Settings
from anymamba.lab.experiment import Context
from anymamba.lab.language import training_flops
from anymamba.lab.learning import Batch, Source, build_model, evaluate, finite, fixed_set, learn
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import state_bytes

TEST_SEED = (1 << 32) - 2
"""Far from the training seeds, and different from that of the validation set."""


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """Train at each learning rate; returns the values of `learn` for the best rate, and

    `tests`, the score of each task on its test rows; `state_bytes`, the bytes of state of one sequence after a row;
    `learning_rate`, the best rate; `sweep`, [rate, recall on the validation set] for each rate that was tried;
    `flops_per_token`, the operations of a training step.
    Each rate's training is saved in a part of its own, also when it has ended, so that an interrupted search goes on.
    """
    tried: list[tuple[dict[str, Any], LanguageModel]] = []
    sweep: list[list[float]] = []
    for rate in (settings.optimization.learning_rate, *settings.more_learning_rates):
        torch.manual_seed(context.seed)  # every rate starts from the same weights
        model = build_model(settings.model, context)
        saving = context.saving and context.saving.part(f"rate{len(tried)}")
        tried.append((learn_at_rate(model, rate, settings, replace(context, saving=saving)), model))
        sweep.append([rate, tried[-1][0]["accuracy"]])
        if sweep[-1][1] >= settings.enough:
            break
    best = max(range(len(sweep)), key=lambda i: sweep[i][1])
    learned, model = tried[best]
    tests = [test_values(model, task, settings, context) for task in settings.tasks]
    size = bytes_after_a_row(model, max(settings.tasks, key=lambda task: task.length), context)
    return {
        **learned,
        "tests": tests,
        "state_bytes": size,
        "learning_rate": sweep[best][0],
        "sweep": sweep,
        "flops_per_token": flops_per_token(settings),
    }


def flops_per_token(settings: Settings) -> float:
    """The operations of a training step for a token, in the mean over the tokens of all sources."""
    found = total = 0.0
    for task, source in zip(settings.tasks, sources(settings), strict=False):
        labels = 1.0 if source.labels_a_row is None else source.labels_a_row / task.length
        tokens = source.rows * task.length
        found, total = found + tokens * training_flops(settings.model, task.length, labels), total + tokens
    return found / total


def learn_at_rate(model: LanguageModel, rate: float, settings: Settings, context: Context) -> dict[str, Any]:
    """Train at one learning rate; returns the values of `learn`."""
    return learn(
        model,
        replace(settings.optimization, learning_rate=rate),
        sources(settings),
        fixed_set(partial(mixed_batch, settings.tasks), settings.validation_rows, context.device),
        context,
        every=settings.judge_every,
        enough=lambda score: score.tokens >= settings.enough,
        resumable=True,
    )


def sources(settings: Settings) -> list[Source]:
    """One source of mixed batches where all rows have one length; else one of each task, with as many queries.

    `batch_size` counts the rows of the first task, which has the fewest pairs. Raises ValueError if it is too small.
    """
    first, rows = settings.tasks[0], settings.optimization.batch_size
    if len(settings.tasks) > 1 and len({task.length for task in settings.tasks}) == 1:
        return [Source(partial(mixed_batch, settings.tasks), rows)]
    counts = [rows * first.n_pairs // task.n_pairs for task in settings.tasks]
    if min(counts) < 1:
        raise ValueError(f"batch_size must give the task with the most pairs a row, got {rows}; raise it")
    return [
        Source(partial(recall_batch, task), count, task.n_pairs)
        for task, count in zip(settings.tasks, counts, strict=True)
    ]


def mixed_batch(tasks: tuple[Recall, ...], generator: torch.Generator, rows: int) -> Batch:
    """A batch of all tasks, one after another, with about as many queries of each; the last task gets the rest.

    Shorter rows are filled up behind their end, which changes nothing before it.
    """
    shares = [1 / task.n_pairs for task in tasks]
    counts = [max(1, round(rows * share / sum(shares))) for share in shares[:-1]]
    counts.append(rows - sum(counts))
    if counts[-1] < 1:
        raise ValueError(f"batch_size must give each of {len(tasks)} tasks a row, got {rows}; raise it")
    parts = [recall_batch(task, generator, count) for task, count in zip(tasks, counts, strict=True)]
    more = [max(task.length for task in tasks) - task.length for task in tasks]
    return (
        torch.cat([F.pad(ids, (0, n), value=FILLER) for (ids, _), n in zip(parts, more, strict=True)]),
        torch.cat([F.pad(labels, (0, n), value=NO_LABEL) for (_, labels), n in zip(parts, more, strict=True)]),
    )


def test_values(model: LanguageModel, task: Recall, settings: Settings, context: Context) -> dict[str, Any]:
    """The task and the model's score on its test rows; a loss that is not finite is None."""
    rows = fixed_set(partial(recall_batch, task), settings.test_rows, context.device, TEST_SEED)
    score = asdict(evaluate(model, rows))
    return {**asdict(task), **score, "loss": finite(score["loss"])}


@torch.no_grad()
def bytes_after_a_row(model: LanguageModel, task: Recall, context: Context) -> int:
    """The bytes of all tensors of the state that a model has for one sequence after a row of the task."""
    ids, _ = fixed_set(partial(recall_batch, task), 1, context.device, TEST_SEED)
    return state_bytes(model.hidden(ids)[1])
