"""Choosing the next token: greedy, or drawn from the model's distribution after filters.

The steps, in this order, on float32 logits without the padding of the vocabulary:

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

Each filter gets the tokens that the previous one kept, renormalised. A filter also keeps tokens with exactly the same
probability as the last one it keeps, so that the result does not depend on how a sort breaks ties.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Seed = int | Sequence[int | tuple[int, int]]
"""A seed for a batch: one number, or a number or a key of two numbers for each row."""


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen. The defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Draw among the k likeliest tokens."""
    top_p: float | None = None
    """Draw among the smallest set of likeliest tokens with at least this total probability (nucleus sampling)."""
    min_p: float | None = None
    """Draw among tokens with at least this fraction of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens that occur in the prompt or the text generated
    so far (arXiv:1909.05858)."""

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(
                f"temperature must be a number of at least 0, got {self.temperature!r}; 0 is greedy, 1 changes nothing"
            )
        if self.top_k is not None and (not is_integer(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, got {self.top_k!r}; leave it out to keep all")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}; leave it out to keep all")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must lie between 0 and 1, got {self.min_p!r}; leave it out to keep all")
        if not _is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty must be a positive number, got {self.repetition_penalty!r}; 1 leaves it out"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python or numpy and not a boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class RowDraws:
    """Uniform random numbers, one per row and token; each row has a stream of its own.

    What a row draws depends only on its seed and on how many tokens it has drawn, not on the other rows, the vocabulary
    or the device. The streams are counter-based (Philox) with the key (seed, row), so no two are the same.

    Args:
        seed: one number, which gives row r the key (seed, r); or one number per row, which gives row r the key
            (seed[r], 0), the same as when it runs alone; or one key per row.
        n_rows: rows of the batch.
    """

    def __init__(self, seed: Seed, n_rows: int) -> None:
        if isinstance(seed, int | np.integer):
            keys = [(int(seed), row) for row in range(n_rows)]
        else:
            keys = [one if isinstance(one, tuple) else (one, 0) for one in seed]
        if len(keys) != n_rows:
            raise ValueError(f"seed must be one number or one per prompt, got {len(keys)} for {n_rows} prompts")
        for number in (number for key in keys for number in key):
            if not 0 <= number < 1 << 64:
                raise ValueError(f"a seed must lie between 0 and 2**64 - 1, got {number}")
        self._streams = [np.random.Generator(np.random.Philox(key=np.array(key, np.uint64))) for key in keys]
        self._ahead: list[deque[float]] = [deque() for _ in keys]  # numbers that were looked at

    def next(self, rows: Sequence[int]) -> Float[Tensor, " rows"]:
        """The next random number in [0, 1) for each of these rows."""
        return torch.tensor([self.draw(row) for row in rows], dtype=torch.float64)

    def peek(self, row: int, ahead: int) -> Float[Tensor, " one"]:
        """The number that the row will get after `ahead` others."""
        numbers = self._ahead[row]
        while len(numbers) <= ahead:
            numbers.append(self._streams[row].random())
        return torch.tensor([numbers[ahead]], dtype=torch.float64)

    def draw(self, row: int) -> float:
        """The next random number in [0, 1) of one row."""
        return self._ahead[row].popleft() if self._ahead[row] else self._streams[row].random()


def sample(
    logits: Float[Tensor, "rows vocab_size"],
    config: SamplingConfig,
    draws: Float[Tensor, " rows"] | None = None,
    seen: Bool[Tensor, "rows vocab_size"] | None = None,
) -> Int[Tensor, " rows"]:
    """Choose one token per row.

    Args:
        logits: without the padding of the vocabulary.
        config: the filters.
        draws: a number in [0, 1) per row, which picks the token from the filtered distribution; not needed for greedy.
        seen: true for ids that have occurred in the row, for the repetition penalty; None: none have.
    Returns ids. Raises ValueError if draws are needed and missing.
    """
    if config.is_greedy:
        return penalize_repetition(_wide(logits), config.repetition_penalty, seen).argmax(-1)
    if draws is None:
        raise ValueError(
            f"sampling at temperature {config.temperature} needs draws, one number in [0, 1) per row; got None"
        )
    probabilities = filter_logits(logits, config, seen).softmax(-1)
    if _is_one_row(probabilities):
        return torch.tensor([_draw(probabilities.detach().numpy()[0], draws.item())])
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # float32 sums lose probabilities of 1e-8
    cumulative = probabilities.to(exact).cumsum(-1)
    total = cumulative[:, -1:]
    target = draws.to(logits.device, exact)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # the product can round up to total
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]  # right: never picks an id of probability 0
    return chosen.clamp_(max=logits.shape[-1] - 1)  # takes effect only if logits are NaN


def _is_one_row(values: Tensor) -> bool:
    """Whether numpy can take a tensor's one row. It gives the same bits as torch in less time: a call of torch takes
    longer than the arithmetic."""
    return values.is_cpu and values.ndim == 2 and len(values) == 1 and values.dtype in (torch.float32, torch.float64)


def _draw(probabilities: Float[np.ndarray, " vocab_size"], draw: float) -> int:
    """What `sample` does with one row's filtered probabilities."""
    cumulative = probabilities.astype(np.float64).cumsum()
    total = float(cumulative[-1])
    target = min(draw * total, math.nextafter(total, 0.0))
    return min(int(cumulative.searchsorted(target, side="right")), len(cumulative) - 1)


def filter_logits(
    logits: Float[Tensor, "rows vocab_size"],
    config: SamplingConfig,
    seen: Bool[Tensor, "rows vocab_size"] | None = None,
) -> Float[Tensor, "rows vocab_size"]:
    """Logits of the distribution that tokens are drawn from, in float32; -inf for tokens that a filter removes.

    Raises ValueError for temperature 0, which has no distribution.
    """
    if config.is_greedy:
        raise ValueError("temperature 0 takes the likeliest token and has no distribution; give one above 0")
    x = penalize_repetition(_wide(logits), config.repetition_penalty, seen)
    if config.temperature != 1:
        x = (
            x - x.amax(-1, keepdim=True)
        ) / config.temperature  # subtract the maximum first: small temperatures would overflow
    if config.top_k is not None:
        x = keep_top_k(x, config.top_k)
    if config.top_p is not None:
        x = keep_top_p(x, config.top_p)
    if config.min_p is not None:
        x = keep_min_p(x, config.min_p)
    return x


def penalize_repetition(
    logits: Float[Tensor, "rows vocab_size"], penalty: float, seen: Bool[Tensor, "rows vocab_size"] | None
) -> Float[Tensor, "rows vocab_size"]:
    """Divide the positive and multiply the negative logits of seen tokens by the penalty."""
    if penalty == 1 or seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Tensor, "rows vocab_size"], k: int) -> Float[Tensor, "rows vocab_size"]:
    """Keep the k largest logits, and all that equal the k-th."""
    if k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Float[Tensor, "rows vocab_size"], p: float) -> Float[Tensor, "rows vocab_size"]:
    """Keep the smallest set of likeliest tokens with a total probability of at least p, and ties with the last."""
    if p == 1:
        return logits
    if logits.is_cpu and logits.dtype in (torch.float32, torch.float64):
        return _keep_top_p_by_rows(logits, p)
    ordered = logits.sort(dim=-1, descending=True).values
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the total probability of all likelier tokens
    last = (before < p).sum(-1, keepdim=True).clamp(min=1) - 1
    return logits.masked_fill(logits < ordered.gather(-1, last), -math.inf)


def _keep_top_p_by_rows(logits: Float[Tensor, "rows vocab_size"], p: float) -> Float[Tensor, "rows vocab_size"]:
    """The same by numpy. Tokens below (1 - p) / vocab_size are left out of the sort: all likelier ones make up p."""
    probabilities = logits.detach().softmax(-1).numpy()
    thresholds = np.zeros((len(probabilities), 1), probabilities.dtype)
    for row, share in enumerate(probabilities):
        ordered = np.sort(share[share >= (1 - p) / share.size])[::-1]
        before = ordered.cumsum() - ordered
        n_kept = max(1, int(np.count_nonzero(before < ordered.dtype.type(p))))
        thresholds[row] = ordered[n_kept - 1] if ordered.size else 0  # NaN has nothing to order
    return logits.masked_fill(torch.from_numpy(probabilities < thresholds), -math.inf)


def keep_min_p(logits: Float[Tensor, "rows vocab_size"], share: float) -> Float[Tensor, "rows vocab_size"]:
    """Keep tokens with at least this fraction of the likeliest token's probability."""
    if share == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(share), -math.inf)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
