"""Trains one arm and tests it at many lengths."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymamba.data.synthetic.induction import InductionSequences, induction_batch, induction_sequences
from anymamba.experiments.induction_heads.arms import Settings
from anymamba.lab.experiment import Context
from anymamba.lab.language import training_flops
from anymamba.lab.learning import batch_generator, build_model, fixed_set, learn
from anymamba.models.language_model import LanguageModel

TEST_SEED = 1 << 31
"""The length is added to it. Far from every training and validation seed; arms with the same placement share tests."""


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """The values of `learn_growing`; `tests`: for each length the sequences, the correct ones and the seconds; and
    `flops_per_token`, the operations of a training step at the training length."""
    model = build_model(settings.model, context)
    learned = learn_growing(model, settings, context)
    tests = ask_at_all_lengths(model, settings, context)
    return {**learned, "tests": tests, "flops_per_token": training_flops(settings.model, settings.train_length)}


def learn_growing(model: LanguageModel, settings: Settings, context: Context) -> dict[str, Any]:
    """Train at the shorter lengths, if any, then in several rounds at the training length.

    Returns the values of `learn` for the last round, but with the steps, seconds and curve of all rounds, and `stages`,
    the length and the steps of each round.
    """
    lengths = (*settings.lengths_before, *[settings.train_length] * settings.cycles)
    generator = batch_generator(context)
    stages = []
    for number, length in enumerate(lengths):
        saving = context.saving if len(lengths) == 1 else context.saving and context.saving.part(f"round{number}")
        stages.append(learn_at(model, length, settings, replace(context, saving=saving), generator))
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
    """Train one round at a length on the next rows of the generator; returns the values of `learn`."""
    make = partial(induction_batch, length=length, n_tokens=settings.n_tokens, placement=settings.placement)
    validation = fixed_set(make, settings.validation_rows, context.device)
    is_before, how = length < settings.train_length, settings.optimization
    if is_before:
        how = settings.optimization_before or how
    return learn(
        model,
        how,
        make,
        validation,
        context,
        every=settings.judge_every,
        enough=lambda score: is_before and score.sequences >= settings.grow_at,
        perfect_in_a_row=None if is_before else settings.perfect_in_a_row,
        generator=generator,
        resumable=True,
    )


def ask_at_all_lengths(model: LanguageModel, settings: Settings, context: Context) -> list[dict[str, Any]]:
    """Run the test at each length, shortest first."""
    total = sum(length * settings.rows_at(length) for length in settings.test_lengths)
    done, results = 0, []
    for length in settings.test_lengths:
        rows, start = settings.rows_at(length), time.perf_counter()
        context.progress(done, total, f"testing length {length:,}")
        right = count_right(model, settings, length, context.device)
        seconds = time.perf_counter() - start
        results.append({"length": length, "sequences": rows, "right": right, "seconds": round(seconds, 2)})
        done += rows * length
    context.progress(total, total, "tested all lengths")
    return results


def count_right(model: LanguageModel, settings: Settings, length: int, device: torch.device) -> int:
    """How many test sequences of a length the model answers correctly."""
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
    """The most likely id after each whole sequence; the model reads about `tokens` tokens at a time.

    If the state of the model does not grow, all sequences run as one batch, in pieces with the state carried, so the
    memory is the same at every length. Other models (attention, Hyena) read a few whole sequences at a time, at least
    one.
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
