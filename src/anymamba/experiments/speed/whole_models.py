"""Whole models: reading a prompt, a training step, and generating one token after a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymamba.experiments.speed.arms import ModelSettings
from anymamba.experiments.speed.timing import (
    Call,
    Candidate,
    Timing,
    as_values,
    compare,
    recorded,
    seconds_of,
    take_turns,
)
from anymamba.lab.experiment import Context
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.ops import dispatch
from anymamba.parts.state import without_last_states

NUMBERS_A_BLOCK = {"cuda": 12}
OTHERWISE = 24
"""Upper bounds of the numbers that a block holds per token and unit of width, while it runs or for its backward pass,
which computes norms and convolutions again on an NVIDIA GPU."""
EXPONENTS = {"mamba": 1.0, "transformer": 2.0}


def measure_models(settings: ModelSettings, context: Context) -> dict[str, Any]:
    """Measure both models in the three passes at a context; times of decoding are seconds per token."""
    device, dtype = context.device, getattr(torch, settings.dtype)
    configs = {"mamba": settings.mamba, "transformer": settings.transformer}
    models = {name: LanguageModel(config, dtype=dtype).to(device) for name, config in configs.items()}
    with torch.no_grad():  # caches are appended to in place
        found, prompts = compare(candidates(models, prompt_of), settings.context, settings.limits, context)
        decoding = {name: Timing(None, 0, timing.missing) for name, timing in found.items()}
        decoding |= decoding_times(prompts, settings, context)
    del prompts  # frees the states
    training, _ = compare(candidates(models, training_step_of), settings.context, settings.limits, context)
    times = {"prefill": as_values(found), "training": as_values(training), "decoding": as_values(decoding)}
    return {
        "times": times,
        "parameters": {name: model.n_parameters() for name, model in models.items()},
        "backend": dispatch.resolve("selective_scan", device.type, None),
    }


def decoding_times(prompts: dict[str, Any], settings: ModelSettings, context: Context) -> dict[str, Timing]:
    """Seconds per token after the prompts, which have been read."""
    tokens = {name: Tokens(prompt, settings.tokens) for name, prompt in prompts.items()}
    replays = {name: recorded(own.write, context.device, own.begin) for name, own in tokens.items()}
    turns: dict[str, Callable[[], float]] = {name: partial(own.turn, replays[name]) for name, own in tokens.items()}
    found = take_turns(turns, settings.limits, context)
    return {name: replace(timing, recorded=replays[name] is not None) for name, timing in found.items()}


def candidates(models: dict[str, LanguageModel], make: Callable[[LanguageModel, int], Call]) -> dict[str, Candidate]:
    """A candidate for each model in one pass."""
    training = make is training_step_of
    return {
        name: Candidate(partial(make, model), partial(model_bytes, model, training=training), EXPONENTS[name])
        for name, model in models.items()
    }


def model_bytes(model: LanguageModel, length: int, training: bool) -> int:
    """Estimate the memory of a pass over a row: weights, and activations of all blocks, or of one and caches."""
    config: ModelConfig = model.config
    size, numbers = model.embedding.weight.itemsize, NUMBERS_A_BLOCK.get(model.embedding.weight.device.type, OTHERWISE)
    a_block = numbers * length * config.d_model * size
    caches = 2 * config.n_layers * length * config.d_model * size
    passes = a_block * config.n_layers if training else a_block + caches
    return passes + (2 if training else 1) * model.n_parameters() * size


class Prompt:
    """Reads a prompt each time it is called and keeps the state after it."""

    def __init__(self, model: LanguageModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.state: LanguageModelState | None = None

    def __call__(self) -> None:
        self.state = None
        self.state = self.model(self.ids, num_last_logits=1).state


def prompt_of(model: LanguageModel, length: int) -> Prompt:
    """A model and a random prompt."""
    return Prompt(model, random_ids(model, length))


def training_step_of(model: LanguageModel, length: int) -> Call:
    """Forward and backward over a row of random tokens."""
    ids, labels = random_ids(model, length), random_ids(model, length)

    def step() -> None:
        with torch.enable_grad(), without_last_states():
            model.loss(ids, labels).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def random_ids(model: LanguageModel, length: int) -> Tensor:
    """Token ids (1, length)."""
    return torch.randint(model.config.vocab_size, (1, length)).to(model.embedding.weight.device)


class Tokens:
    """Generates so many tokens after a prompt.

    Every turn starts from the state after the prompt, so the context always has the stated length. The first token is
    not timed: it copies the cache into one with spare room, and the others are appended in place.
    """

    def __init__(self, prompt: Prompt, count: int) -> None:
        self.prompt, self.count = prompt, count
        self.ids = random_ids(prompt.model, count + 1)[0]

    def begin(self) -> LanguageModelState:
        """The state after the first token."""
        assert self.prompt.state is not None
        return self.prompt.model.step(self.ids[:1], self.prompt.state).state

    def write(self, state: LanguageModelState) -> LanguageModelState:
        """The state after the others."""
        for i in range(1, self.count + 1):
            state = self.prompt.model.step(self.ids[i : i + 1], state).state
        return state

    def turn(self, replay: Call | None) -> float:
        """Seconds per token."""
        call = replay or partial(self.write, self.begin())
        return seconds_of(call, 1, self.ids.device) / self.count
