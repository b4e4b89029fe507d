"""Trains one arm at one length and asks it at many."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymamba.data.synthetic.induction import InductionSequences, induction_batch, induction_sequences
from anymamba.experiments.induction_heads.arms import Settings
from anymamba.lab.experiment import Context
from anymamba.lab.learning import Score, build_model, fixed_set, learn
from anymamba.models.language_model import LanguageModel

TEST_SEED = 1 << 31
"""Plus the length. Far from every training and validation seed: arms of one placement are asked the same."""


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """What `learn_growing` returns of an arm, and `tests`: for each length the sequences, those right, the seconds."""
    model = build_model(settings.model, context)
    learned = learn_growing(model, settings, context)
    return {**learned, "tests": ask_at_all_lengths(model, settings, context)}


def learn_growing(model: LanguageModel, settings: Settings, context: Context) -> dict[str, Any]:
    """Train at the shorter lengths, if there are any, then round after round at the training length.

    Returns what `learn` does of the last round, with the steps, seconds and curve of all, and `stages`: the length and
    the steps of each.
    """
    lengths = (*settings.lengths_before, *[settings.train_length] * settings.cycles)
    generator = torch.Generator().manual_seed(context.seed)
    stages = [learn_at(model, length, settings, context, generator) for length in lengths]
    curve, before = [], 0
    for stage in stages:
        curve += [[before + step, *rest] for step, *rest in stage["curve"]]
        before += stage["steps"]
    return {
        **stages[-1],
        "steps": before,
        "training_seconds": round(sum(stage["training_seconds"] for stage in stages), 1),
        "curve": curve,
        "stages": [[length, stage["steps"]] for length, stage in zip(lengths, stages, strict=True)],
    }


def learn_at(
    model: LanguageModel, length: int, settings: Settings, context: Context, generator: torch.Generator
) -> dict[str, Any]:
    """What `learn` returns of one round at a length, on the next rows of the generator."""
    make = partial(induction_batch, length=length, n_tokens=settings.n_tokens, placement=settings.placement)
    validation = fixed_set(make, settings.validation_rows, context.device)
    how, enough = settings.optimization, perfect_in_a_row(settings.perfect_in_a_row)
    if length < settings.train_length:
        how, enough = settings.optimization_before or how, lambda score: score.sequences >= settings.grow_at
    return learn(model, how, make, validation, context, every=settings.judge_every, enough=enough, generator=generator)


def perfect_in_a_row(wanted: int | None) -> Callable[[Score], bool]:
    """Says that it is enough when that many judgements one after another were without a mistake; None: never."""
    in_a_row = 0

    def enough(score: Score) -> bool:
        nonlocal in_a_row
        in_a_row = in_a_row + 1 if score.sequences == 1 else 0
        return wanted is not None and in_a_row >= wanted

    return enough


def ask_at_all_lengths(model: LanguageModel, settings: Settings, context: Context) -> list[dict[str, Any]]:
    """The test at each length, shortest first."""
    total = sum(length * settings.rows_at(length) for length in settings.test_lengths)
    done, results = 0, []
    for length in settings.test_lengths:
        rows, start = settings.rows_at(length), time.perf_counter()
        context.progress(done, total, f"asked at length {length:,}")
        right = count_right(model, settings, length, context.device)
        seconds = time.perf_counter() - start
        results.append({"length": length, "sequences": rows, "right": right, "seconds": round(seconds, 2)})
        done += rows * length
    context.progress(total, total, "asked at all lengths")
    return results


def count_right(model: LanguageModel, settings: Settings, length: int, device: torch.device) -> int:
    """How many of the test sequences of a length the model answers."""
    sequences = induction_sequences(
        torch.Generator().manual_seed(TEST_SEED + length),
        settings.rows_at(length),
        length,
        n_tokens=settings.n_tokens,
        placement=settings.placement,
    )
    answers = last_predictions(model, sequences, settings.test_tokens, device)
    return int((answers == sequences.answers).sum())


@torch.no_grad()
def last_predictions(model: LanguageModel, sequences: InductionSequences, tokens: int, device: torch.device) -> Tensor:
    """The likeliest id after each whole sequence, about `tokens` tokens at a time.

    A model whose state does not grow reads all sequences side by side, piece by piece with the state carried, in the
    same memory at every length. Others (attention, Hyena) read a few whole sequences at a time, at least one.
    """
    model.eval()
    if model.grows:
        (ids,) = sequences.chunks(sequences.length)
        parts = ids.split(max(1, tokens // sequences.length))
        last = torch.cat([model.hidden(part.to(device))[0][:, -1] for part in parts])
    else:
        state = None
        for ids in sequences.chunks(max(1, tokens // len(sequences.first))):
            x, state = model.hidden(ids.to(device), state)
            last = x[:, -1]
    return model.logits(last)[:, : model.config.vocab_size].argmax(-1).cpu()
