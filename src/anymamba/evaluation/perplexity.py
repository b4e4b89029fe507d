"""Bits per byte, nats per token and perplexity of a language model over documents of any length, in constant memory.

The documents are concatenated and cut into passes of equal size. Short documents are packed into one pass, each with a
state of its own. A document that continues in the next pass carries its state into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anymamba.base.sizes import require_sizes
from anymamba.data.table import TokenTable
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import concatenate_rows, select_rows, state_bytes

STATE_BYTES = 1 << 28
"""Most bytes of states in memory; bounds the number of documents in a pass."""


@dataclass(frozen=True)
class EvaluationResult:
    """The loss of a model on documents, and what was counted. End-of-document labels are never counted."""

    nats: float
    """Sum of -log p over the counted tokens."""
    n_tokens: int
    """Number of tokens counted."""
    n_bytes: int | None
    """Number of bytes of the counted tokens; None if it is not known."""
    n_documents: int
    """Number of documents with counted tokens."""
    counts_first_tokens: bool
    """Whether the first token of each document is counted. It is predicted from the end-of-document id and cannot be
    counted without such an id."""

    @property
    def nats_per_token(self) -> float:
        """Mean of -log p."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the text, comparable between tokenizers; None if the number of bytes is not known."""
        return None if self.n_bytes is None else self.nats / math.log(2) / self.n_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields and the measures, for JSON."""
        measures = {name: getattr(self, name) for name in ("bits_per_byte", "nats_per_token", "perplexity")}
        return {**measures, **asdict(self), "counts_end_of_document": False}

    def summary(self) -> str:
        """The measures and what was counted, in one line."""
        bits = "" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits per byte, "
        size = "" if self.n_bytes is None else f", {self.n_bytes:,} bytes"
        first = "first tokens included" if self.counts_first_tokens else "the first token of each document not counted"
        documents = "1 document" if self.n_documents == 1 else f"{self.n_documents:,} documents"
        return (
            f"{bits}{self.nats_per_token:.4f} nats per token, perplexity {self.perplexity:.2f} over {documents}, "
            f"{self.n_tokens:,} tokens{size} ({first}, ends of documents not counted)"
        )


def evaluate(
    model: LanguageModel,
    table: TokenTable,
    eos_id: int | None,
    *,
    chunk: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measure a model on documents, each read from its beginning with carried state.

    Args:
        model: a language model.
        table: documents as tokens.
        eos_id: the id that documents begin and end with, from which the first token is predicted. None: the first token
            of each document is not counted, and the number of bytes of the counted ones is not known.
        chunk: tokens processed at once, for documents of any length; the result does not depend on it.
        progress: called with the tokens done and the tokens in all.
    Returns the sum of -log p in float64 and what was counted.
    Raises ValueError if there is nothing to count, an id is outside the vocabulary or the model is not causal,
        RuntimeError if the model's loss is not finite.
    """
    require_sizes(chunk=chunk)
    if not model.config.is_causal:
        raise ValueError(
            "the model is not causal: it has seen the tokens that it would predict; evaluate a causal model"
        )
    if eos_id is not None and not 0 <= eos_id < model.config.vocab_size:
        raise ValueError(f"eos_id must be an id of the vocabulary of {model.config.vocab_size}, got {eos_id}")
    skipped = 0 if eos_id is not None else 1
    counted = np.maximum(np.asarray(table.lengths, np.int64) - skipped, 0)
    n_tokens = int(counted.sum())
    if n_tokens == 0:
        needed = "at least one token" if eos_id is not None else "two tokens or more, as there is no eos_id"
        raise ValueError(f"nothing to count in {table.n_documents} documents; a document needs {needed}")
    nats, done, state = 0.0, 0, None
    with torch.inference_mode():
        most_documents = max(1, STATE_BYTES // max(1, state_bytes(model.init_state(1))))
        for spans in _passes(counted, chunk, most_documents):
            loss, state = _run(model, table, spans, eos_id, state)
            nats += loss
            done += sum(span.stop - span.start for span in spans)
            if progress is not None:
                progress(done, n_tokens)
    n_bytes = table.n_bytes if eos_id is not None else None
    return EvaluationResult(nats, n_tokens, n_bytes, int((counted > 0).sum()), eos_id is not None)


class _Span(NamedTuple):
    """Counted tokens [start, stop) of a document, processed in one pass."""

    document: int
    start: int
    stop: int
    is_last: bool
    """Whether the document ends with this span."""


def _passes(counted: NDArray[np.int64], size: int, most_documents: int) -> Iterator[list[_Span]]:
    """Cut the concatenated documents into passes of `size` tokens and at most `most_documents` documents."""
    spans: list[_Span] = []
    room = size
    for document in np.flatnonzero(counted):
        start, length = 0, int(counted[document])
        while start < length:
            stop = min(length, start + room)
            spans.append(_Span(int(document), start, stop, stop == length))
            room -= stop - start
            start = stop
            if room == 0 or len(spans) == most_documents:
                yield spans
                spans, room = [], size
    if spans:
        yield spans


def _run(
    model: LanguageModel,
    table: TokenTable,
    spans: list[_Span],
    eos_id: int | None,
    carried: LanguageModelState | None,
) -> tuple[float, LanguageModelState | None]:
    """The loss of one pass in nats, and the state of its last document if that continues in the next pass."""
    device = next(model.parameters()).device
    pairs = [_inputs_and_labels(table, span, eos_id) for span in spans]
    arrays = [np.concatenate(rows) for rows in zip(*pairs, strict=True)]
    if max(map(np.max, arrays)) >= model.config.vocab_size or min(map(np.min, arrays)) < 0:
        raise ValueError(_outside(model.config.vocab_size, table, spans))
    inputs, labels = (torch.from_numpy(array).to(device)[None] for array in arrays)
    offsets = np.cumsum([0, *(span.stop - span.start for span in spans)])
    state = carried
    if carried is not None and len(spans) > 1:
        state = concatenate_rows([carried, model.init_state(len(spans) - 1)])
    cu_seqlens = None if len(spans) == 1 else torch.from_numpy(offsets.astype(np.int32)).to(device)
    output = model.loss(inputs, labels, state, cu_seqlens=cu_seqlens)
    loss = float(output.loss)
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the loss is {loss} from document {spans[0].document} ({table.names[spans[0].document]}) on; the model's "
            f"weights are broken, or their dtype overflows (float32 does not)"
        )
    if spans[-1].is_last:
        return loss, None
    return loss, select_rows(output.state, torch.tensor([len(spans) - 1], device=device))


def _inputs_and_labels(
    table: TokenTable, span: _Span, eos_id: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The token before each token to predict, and those tokens. The end-of-document id comes before the first token."""
    if eos_id is None:
        tokens = table.read(span.document, span.start, span.stop + 1).astype(np.int64)
        return tokens[:-1], tokens[1:]
    tokens = table.read(span.document, max(0, span.start - 1), span.stop).astype(np.int64)
    if span.start == 0:
        tokens = np.concatenate([np.array([eos_id], np.int64), tokens])
    return tokens[:-1], tokens[1:]


def _outside(vocab_size: int, table: TokenTable, spans: list[_Span]) -> str:
    """The message for the first id in these spans that is outside the vocabulary."""
    for span in spans:
        first = max(0, span.start - 1)
        tokens = table.read(span.document, first, min(span.stop + 1, int(table.lengths[span.document])))
        places = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if places.size:
            place = int(places[0])
            return (
                f"document {span.document} ({table.names[span.document]}) has the id {int(tokens[place])} at position "
                f"{first + place}, outside the model's vocabulary of {vocab_size}; use the model's own tokenizer"
            )
    raise AssertionError("every id is inside the vocabulary")
