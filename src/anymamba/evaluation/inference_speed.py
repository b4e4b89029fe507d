"""How fast a model reads and generates, and the limits that the memory and the arithmetic of this machine set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.base.sizes import require_sizes
from anymamba.kernels.packed_linear.formats import READ_ONLY
from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel
from anymamba.ops.packed_linear import pack, packed_linear
from anymamba.parts.state import state_bytes

READ_BYTES = 1 << 29
"""Bytes that are read to measure the bandwidth: more than caches hold."""
PRODUCT, PRODUCT_OF_GPU = (512, 1024, 4096), (8192, 4096, 8192)
"""Rows, inputs and outputs of the product whose rate is measured."""
LEAST_SECONDS, MOST_REPEATS = 1.0, 200
"""A figure is the median of at least this time, or of this many repeats."""
LEAST_LIMIT_SECONDS = 0.4
"""The same for a limit of the machine."""


@dataclass(frozen=True)
class Limits:
    """What a device can do, a CPU with the threads that torch has."""

    bytes_per_second: float
    """Read from memory; on a GPU read and written by a copy."""
    operations_per_second: float
    """Of the fastest product of many rows, a multiply-add counted as two."""
    fastest_product: str
    """Its kind: torch in a dtype, or packed in a format."""


@dataclass(frozen=True)
class Speed:
    """One measured figure."""

    what: Literal["read", "generate"]
    """A prompt, or a token for each row."""
    rows: int
    """Tokens that pass through the model at once: those of the prompt, or one for each row."""
    tokens_per_second: float


def measure_speed(model: LanguageModel, batches: Sequence[int] = (1,), prompt: int = 512) -> list[Speed]:
    """Time a model: reading one prompt, and generating with each number of rows.

    Args:
        model: a language model; the ids are random.
        batches: numbers of rows that generate at once.
        prompt: tokens of the prompt.
    Raises ValueError for sizes below 1.
    """
    require_sizes(prompt=prompt, batch=min(batches, default=0))
    device = device_of(model)
    ids = torch.randint(model.config.vocab_size, (1, prompt), device=device)
    with torch.inference_mode():
        found = [Speed("read", prompt, prompt / _median_seconds(lambda: model(ids, num_last_logits=1), device))]
        for batch in batches:
            found.append(Speed("generate", batch, batch / _median_seconds(_token(model, batch), device)))
    return found


def speed_limit(model: LanguageModel, limits: Limits, speed: Speed) -> float:
    """Tokens per second that the machine's limits allow in place of a measured figure: bytes of weights and states over
    the bandwidth, or the operations of the products over their rate, whichever takes longer. States count once on a
    CPU, whose caches hold some, and twice on a GPU: read and written."""
    states = speed.rows * state_bytes(model.init_state(1)) if speed.what == "generate" else 0
    states *= 1 if device_of(model).type == "cpu" else 2
    seconds = (_read_bytes(model, speed.rows) + states) / limits.bytes_per_second
    products = 2 * speed.rows * _matrix_elements(model) / limits.operations_per_second
    return speed.rows / max(seconds, products)


def measure_limits(formats: Sequence[str] = (), device: torch.device | None = None) -> Limits:
    """Measure the bandwidth, and the rate of products in float32 and bfloat16.

    Args:
        formats: packed formats whose products of many rows are measured as well; on a CPU only, as a GPU multiplies
            many rows in bfloat16.
        device: defaults to the CPU.
    """
    device = device or torch.device("cpu")
    rows, n_in, n_out = PRODUCT if device.type == "cpu" else PRODUCT_OF_GPU
    x, weight = torch.randn(rows, n_in, device=device), torch.randn(n_out, n_in, device=device)
    products: dict[str, Callable[[], Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        products[f"torch {str(dtype).removeprefix('torch.')}"] = partial(F.linear, x.to(dtype), weight.to(dtype))
    for format in dict.fromkeys(formats if device.type == "cpu" else ()):
        if format not in READ_ONLY:
            products[f"packed {format}"] = partial(packed_linear, x, pack(weight, format))
    with torch.inference_mode():
        seconds = {name: _median_seconds(run, device, LEAST_LIMIT_SECONDS) for name, run in products.items()}
        fastest = min(seconds, key=lambda name: seconds[name])
        bandwidth = READ_BYTES / _median_seconds(_reader(device), device, LEAST_LIMIT_SECONDS)
    return Limits(bandwidth, 2 * rows * n_in * n_out / seconds[fastest], fastest)


def device_of(model: LanguageModel) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of a model's weights."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _reader(device: torch.device) -> Callable[[], object]:
    """Moves READ_BYTES; on a GPU half of them are written, as a sum would not be bound by the memory alone."""
    if device.type == "cpu":
        memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        return memory.sum
    memory = torch.ones(READ_BYTES // 16, dtype=torch.int64, device=device)
    return partial(torch.empty_like(memory).copy_, memory)


def _token(model: LanguageModel, batch: int) -> Callable[[], None]:
    """A step of `batch` rows that continues from the last one."""
    ids, state = torch.randint(model.config.vocab_size, (batch,)).to(device_of(model)), model.init_state(batch)
    reuse = {"reuse_state": True} if isinstance(model, InferenceModel) else {}

    def step() -> None:
        nonlocal state
        state = model.step(ids, state, **reuse).state

    return step


def _matrix_elements(model: LanguageModel) -> int:
    """Multiply-adds of a token's products; the embedding's table counts only if it is the head, too."""
    total = model.n_parameters()
    return total if model.head is None else total - model.config.padded_vocab_size * model.config.d_model


def _read_bytes(model: LanguageModel, rows: int) -> int:
    """Bytes of weights that a step reads: all of them, or of an embedding that is not the head a row for each token."""
    if model.head is None:
        return weight_bytes(model)
    table = sum(t.nbytes for t in (*model.embedding.parameters(), *model.embedding.buffers()))
    return weight_bytes(model) - table + rows * table // model.config.padded_vocab_size


def _median_seconds(run: Callable[[], object], device: torch.device, least: float | None = None) -> float:
    """Seconds of a call, until the device is done."""
    wait = partial(getattr(torch, device.type).synchronize, device)  # for a CPU it does nothing
    run()  # warms up
    wait()
    least = LEAST_SECONDS if least is None else least
    times: list[float] = []
    while (sum(times) < least and len(times) < MOST_REPEATS) or len(times) < 3:
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
