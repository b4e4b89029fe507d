"""Log-probabilities of continuations, from packed rows in bounded memory; a context that neighbours share runs once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.ops.linear_cross_entropy.chunks import MOST_LOGITS
from anymamba.parts.state import last_states, select_rows, without_last_states

PASS_TOKENS = 4096
"""Most tokens of contexts, and of continuations, that run at once; results do not depend on it."""


class Row(NamedTuple):
    """One request for log p(continuation | context); neither is empty."""

    context: list[int]
    continuation: list[int]


class Wanted(NamedTuple):
    """A token of a continuation whose probability is needed."""

    owner: int
    """The row that it belongs to."""
    sequence: int
    """The packed sequence that predicts it."""
    position: int
    """The position in this sequence that predicts it."""
    token: int


class Scores(NamedTuple):
    """Scores of single tokens."""

    log_probabilities: NDArray[np.float64]
    """In nats."""
    greedy: NDArray[np.bool_]
    """Whether the token is the most likely one."""


def batches(rows: Sequence[Row], most_rows: int) -> Iterator[list[Row]]:
    """Cut rows into runs of neighbours for `score`.

    A run has at most most_rows rows, PASS_TOKENS tokens of contexts (a context that neighbours share counts once) and
    PASS_TOKENS tokens of continuations. A longer row is a run by itself.
    """
    batch: list[Row] = []
    n_context = n_continuation = 0
    for row in rows:
        new = 0 if batch and batch[-1].context == row.context else len(row.context)
        too_long = (new and n_context + new > PASS_TOKENS) or n_continuation + len(row.continuation) > PASS_TOKENS
        if batch and (too_long or len(batch) == most_rows):
            yield batch
            batch, n_context, n_continuation, new = [], 0, 0, len(row.context)
        batch.append(row)
        n_context += new
        n_continuation += len(row.continuation)
    if batch:
        yield batch


@torch.inference_mode()
def score(model: LanguageModel, rows: list[Row]) -> list[tuple[float, bool]]:
    """For each row, the continuation's log-probability in nats, and whether greedy decoding gives it.

    A context of a single row runs together with its continuation. A context that neighbours share runs once: it
    predicts the first token of each continuation, and the other tokens start from copies of its state.

    Raises ValueError for ids outside the vocabulary, RuntimeError if a log-probability is not finite.
    """
    trunks: list[list[int]] = []
    branches: list[list[int]] = []
    origins: list[int] = []  # the trunk of each branch
    in_trunks: list[Wanted] = []
    in_branches: list[Wanted] = []
    for context, group in groupby(enumerate(rows), key=lambda item: item[1].context):
        members = list(group)
        whole = members[0][1].continuation if len(members) == 1 else []
        for owner, (_, continuation) in members:
            in_trunk = continuation[: max(1, len(whole))]
            in_trunks += _wanted(owner, len(trunks), len(context) - 1, in_trunk)
            if len(continuation) > len(in_trunk):
                in_branches += _wanted(owner, len(branches), 0, continuation[1:])
                branches.append(continuation[:-1])
                origins.append(len(trunks))
        trunks.append(context + whole[:-1])
    with nullcontext() if branches else without_last_states():
        scores, state = _read(model, trunks, in_trunks)
    parts = [scores]
    if branches:
        forks = select_rows(state, torch.tensor(origins, device=_device(model)))
        with without_last_states():
            parts.append(_read(model, branches, in_branches, forks)[0])
    return _sums(len(rows), in_trunks + in_branches, _join(parts))


def _wanted(owner: int, sequence: int, start: int, tokens: list[int]) -> list[Wanted]:
    """The tokens that consecutive positions of a sequence predict, beginning at `start`."""
    return [Wanted(owner, sequence, start + i, token) for i, token in enumerate(tokens)]


def _read(
    model: LanguageModel, sequences: list[list[int]], wanted: list[Wanted], state: LanguageModelState | None = None
) -> tuple[Scores, LanguageModelState]:
    """Run sequences packed along one row, each from its state; returns the scores and the new states."""
    if len(sequences) == 1 and len(sequences[0]) > PASS_TOKENS:
        return _read_in_pieces(model, sequences[0], wanted, state)
    device = _device(model)
    offsets = np.cumsum([0, *map(len, sequences)])
    places = torch.tensor([int(offsets[w.sequence]) + w.position for w in wanted], dtype=torch.int64, device=device)
    tokens = torch.tensor([w.token for w in wanted], dtype=torch.int64, device=device)
    ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    _check(model, ids)
    _check(model, tokens)
    packing = None if len(sequences) == 1 else torch.tensor(offsets, dtype=torch.int32, device=device)
    x, state = model.hidden(ids[None], state, cu_seqlens=packing)
    return _scores(model, x[0, places], tokens), state


def _read_in_pieces(
    model: LanguageModel, sequence: list[int], wanted: list[Wanted], state: LanguageModelState | None
) -> tuple[Scores, LanguageModelState]:
    """`_read` for one long sequence, in pieces to save memory; `wanted` is in order of position."""
    parts = []
    for start in range(0, len(sequence), PASS_TOKENS):
        stop = start + PASS_TOKENS
        inside = [w._replace(position=w.position - start) for w in wanted if start <= w.position < stop]
        with last_states():
            scores, state = _read(model, [sequence[start:stop]], inside, state)
        parts.append(scores)
    assert state is not None, "a long sequence has pieces"
    return _join(parts), state


def _scores(model: LanguageModel, x: Float[Tensor, "n d_model"], tokens: Int[Tensor, " n"]) -> Scores:
    """Log-probabilities over all columns of the checkpoint's vocabulary, computed in parts to save memory."""
    size = max(1, MOST_LOGITS // model.config.padded_vocab_size)
    log_probabilities, greedy = [], []
    for part, ids in zip(x.split(size), tokens.split(size), strict=True):
        logits = model.logits(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probabilities.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1))
        greedy.append(logits.argmax(-1) == ids)
    return Scores(torch.cat(log_probabilities).cpu().double().numpy(), torch.cat(greedy).cpu().numpy())


def _join(parts: list[Scores]) -> Scores:
    return Scores(*map(np.concatenate, zip(*parts, strict=True)))


def _sums(n_rows: int, wanted: list[Wanted], scores: Scores) -> list[tuple[float, bool]]:
    """Sum the scores of tokens, in the order of `wanted`, for each row."""
    if not np.isfinite(scores.log_probabilities).all():
        raise RuntimeError(
            "the model's log-probabilities are not finite; its weights are broken, or their dtype overflows; try "
            "float32"
        )
    owners = [w.owner for w in wanted]
    sums, greedy = np.zeros(n_rows), np.ones(n_rows, bool)
    np.add.at(sums, owners, scores.log_probabilities)
    np.logical_and.at(greedy, owners, scores.greedy)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _check(model: LanguageModel, ids: Int[Tensor, " n"]) -> None:
    n_ids = model.config.padded_vocab_size
    if ids.numel() and int(ids.max()) >= n_ids:
        raise ValueError(
            f"the tokenizer gives the id {int(ids.max())}, outside the model's vocabulary of {n_ids}; pass the model's "
            f"own tokenizer with tokenizer=PATH"
        )


def _device(model: LanguageModel) -> torch.device:
    return model.embedding.weight.device
