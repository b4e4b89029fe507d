"""A recurrent model whose logits are exact functions of all tokens so far: mistakes with order, chunks or rows show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn


class HashState(NamedTuple):
    layers: tuple[torch.Tensor, ...]


class Output(NamedTuple):
    logits: torch.Tensor
    state: HashState


class HashModel(nn.Module):
    """h = (31 h + id + 1) mod 9973; logits = table[h]. By default the padded ids have the largest logits of all."""

    def __init__(
        self, vocab_size: int = 13, padded: int = 16, seed: int = 0, scale: float = 2.0, padding: float = 1e4
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, padded_vocab_size=padded)
        table = torch.randn(9973, padded, generator=torch.Generator().manual_seed(seed)) * scale
        table[:, vocab_size:] = padding
        self.table = nn.Parameter(table)
        self.calls: list[tuple[int, int]] = []  # (rows, length) of each call

    def init_state(self, batch: int) -> HashState:
        return HashState((torch.zeros(batch, 1, dtype=torch.int64),))

    def forward(self, input_ids, state=None, *, attention_mask=None, num_last_logits=None) -> Output:
        self.calls.append(tuple(input_ids.shape))
        (h,) = (self.init_state(len(input_ids)) if state is None else state).layers
        h, hashes = h[:, 0], []
        for t in range(input_ids.shape[1]):
            new = (31 * h + input_ids[:, t] + 1) % 9973
            h = new if attention_mask is None else torch.where(attention_mask[:, t].bool(), new, h)
            hashes.append(h)
        kept = input_ids.shape[1] if num_last_logits is None else num_last_logits
        logits = self.table[torch.stack(hashes, 1)[:, input_ids.shape[1] - kept :]]
        return Output(logits, HashState((h[:, None],)))

    def step(self, token_ids, state) -> Output:
        self.calls.append((len(token_ids), 1))
        h = (31 * state.layers[0][:, 0] + token_ids + 1) % 9973
        return Output(self.table[h], HashState((h[:, None],)))

    def next_log_probabilities(self, ids: list[int], *, with_padding: bool = False) -> torch.Tensor:
        """Log-probabilities of the token after these ids, computed one by one; the padding may count."""
        h = 0
        for token in ids:
            h = (31 * h + token + 1) % 9973
        n_columns = self.config.padded_vocab_size if with_padding else self.config.vocab_size
        return self.table[h, :n_columns].detach().log_softmax(-1)[: self.config.vocab_size]
