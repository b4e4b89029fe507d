"""Generating with many rows, and the memory of a training step."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymamba.experiments.speed.arms import BatchSettings
from anymamba.experiments.speed.timing import FULL, in_memory, recorded, seconds_of
from anymamba.lab.experiment import Context
from anymamba.models.language_model import LanguageModel
from anymamba.ops import dispatch
from anymamba.parts.state import without_last_states


def measure_batches(settings: BatchSettings, context: Context) -> dict[str, Any]:
    """For each model `throughput`, tokens a second of all rows with the prompt in the time, and `memory`, the peak of a
    training step in GiB on a GPU; or why it is missing."""
    device, dtype = context.device, getattr(torch, settings.dtype)
    throughput, memory, parameters = {}, {}, {}
    for name, config in (("mamba", settings.mamba), ("transformer", settings.transformer)):
        context.progress(0, 1, f"{name}: {settings.batch} rows")
        model = LanguageModel(config, dtype=dtype).to(device)
        parameters[name] = model.n_parameters()
        measured = in_memory(partial(seconds_of_generating, model, settings, device))
        seconds, is_recorded = measured or (None, False)
        total = settings.batch * settings.tokens
        throughput[name] = {
            "tokens_per_second": None if seconds is None else total / seconds,
            "missing": FULL if seconds is None else None,
            "recorded": is_recorded,
        }
        memory[name] = training_memory(model, settings, device)
        del model
        gc.collect()
    return {
        "throughput": throughput,
        "memory": memory,
        "parameters": parameters,
        "backend": dispatch.resolve("selective_scan", device.type, None),
    }


@torch.no_grad()
def seconds_of_generating(model: LanguageModel, settings: BatchSettings, device: torch.device) -> tuple[float, bool]:
    """The faster of two times of reading the prompts and generating the most likely tokens, and whether it was a replay
    of a CUDA graph."""
    ids = random_ids(model, settings.batch, settings.prompt)

    def generate() -> None:
        out = model(ids, num_last_logits=1)
        token, state = out.logits[:, -1].argmax(-1), out.state
        for _ in range(settings.tokens - 1):
            out = model.step(token, state)
            token, state = out.logits.argmax(-1), out.state

    replay = recorded(generate, device)
    return min(seconds_of(replay or generate, 1, device) for _ in range(2)), replay is not None


def training_memory(model: LanguageModel, settings: BatchSettings, device: torch.device) -> float | None:
    """The peak GiB of a step with AdamW in float32 and products in bfloat16; None without a GPU, with more rows than
    the paper's, or if memory is full."""
    if device.type != "cuda" or settings.batch > settings.most_trained:
        return None
    model.float()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)

    def step() -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids, labels = (random_ids(model, settings.batch, settings.prompt) for _ in range(2))
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16), without_last_states():
                out = model.loss(ids, labels)
            (out.loss / out.n_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated(device) / 2**30

    return in_memory(step)


def random_ids(model: LanguageModel, batch: int, length: int) -> Tensor:
    """Token ids (batch, length)."""
    return torch.randint(model.config.vocab_size, (batch, length)).to(model.embedding.weight.device)
