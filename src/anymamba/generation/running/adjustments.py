"""What changes one answer's logits before its next token is chosen: biases, penalties by count, and masks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor, Future

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from anymamba.generation.requests import TokenMask


class Adjustments:
    """The changes for one answer.

    Args:
        bias: added to the logits of ids.
        frequency, presence: subtracted from the logits of ids in the answer, once for each time, and once.
        mask: which tokens may come next; None: all.
        workers: run the mask while the model runs.
    """

    def __init__(
        self, bias: Mapping[int, float], frequency: float, presence: float, mask: TokenMask | None, workers: Executor
    ) -> None:
        self._frequency, self._presence = frequency, presence
        self._biased = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._counts: Counter[int] = Counter()
        self._mask, self._workers = mask, workers
        self._allowed: Future[Bool[np.ndarray, " ids"]] | None = None
        if mask is not None:
            self._allowed = workers.submit(mask.allowed)

    def push(self, token: int) -> None:
        """Take note of a new token, and begin to work on the next mask."""
        if self._frequency or self._presence:
            self._counts[token] += 1
        if self._mask is not None:
            self._allowed = self._workers.submit(_advanced, self._mask, token)

    def apply(self, logits: Float[Tensor, " n_ids"]) -> bool:
        """Change the logits in place. Returns false if no token may come next."""
        device = logits.device
        if len(self._biased):
            logits.index_add_(0, self._biased.to(device), self._bias.to(device))
        if self._counts:
            ids = torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=device)
            logits.index_add_(0, ids, counts * -self._frequency - self._presence)
        if self._allowed is None:
            return True
        allowed = np.zeros(len(logits), bool)
        found = self._allowed.result()[: len(logits)]
        allowed[: len(found)] = found
        logits.masked_fill_(~torch.from_numpy(allowed).to(device), -math.inf)
        return bool(allowed.any())


def _advanced(mask: TokenMask, token: int) -> Bool[np.ndarray, " ids"]:
    mask.accept(token)
    return mask.allowed()
