"""Reading prompts: in chunks, in constant memory, with different lengths in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from anymamba.base.sizes import require_sizes
from anymamba.data.token_ids import row_of_ids
from anymamba.models.inference.native_reading import read
from anymamba.models.inference.native_step import NativeStep
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import concatenate_rows, map_state, select_rows

PREFILL_CHUNK = 2048
"""Default for the number of tokens of each prompt that are read at once."""

Prompts = Sequence[ArrayLike] | NDArray[np.integer] | Tensor
"""Token ids of each prompt: lists, ranges, arrays or tensors of integers, on any device; or one 2-D array or tensor."""


class GenerationState(NamedTuple):
    """All that generation needs to continue after some tokens. With recurrent layers its size is constant.

    Rows can be selected, repeated and joined with the functions of `anymamba.parts.state`: `select_rows(state,
    torch.tensor([0, 0]))` forks a prompt that was read once.
    """

    model: LanguageModelState
    """The model's state after these tokens."""
    logits: Float[Tensor, "batch vocab_size"]
    """Logits of the next token, without the padding of the vocabulary."""
    seen: Bool[Tensor, "batch vocab_size"]
    """True for ids that have occurred, for the repetition penalty."""


def read_prompts(
    model: LanguageModel,
    prompts: Prompts,
    *,
    eos_id: int | None = None,
    state: GenerationState | None = None,
    chunk: int = PREFILL_CHUNK,
) -> GenerationState:
    """Run the model over prompts of any lengths and return the state after them.

    Args:
        model: a language model.
        prompts: the ids of each, see `Prompts`; apart from them memory depends on the chunk only.
        eos_id: the id that documents begin with, which is read for an empty prompt without state; None: an empty
            prompt is an error.
        state: the state to continue from, one row per prompt; prompts may then be empty.
        chunk: tokens of each prompt to read at once.
    Raises ValueError if there are no prompts, an id is outside the vocabulary, a prompt is empty without eos_id or
        state, or the state has another number of rows; TypeError if ids are not integers.
    """
    rows = prompt_rows(prompts)  # outside inference mode, where nested tensors cannot be unbound
    with torch.inference_mode():
        result = prefill(model, rows, eos_id, state, chunk)
    return map_state(Tensor.clone, result)  # outside inference mode, so that autograd can use it


def prefill(
    model: LanguageModel,
    prompts: Prompts,
    eos_id: int | None,
    state: GenerationState | None,
    chunk: int,
    native: NativeStep | None = None,
) -> GenerationState:
    """`read_prompts` for callers that are in inference mode.

    Prompts are sorted by length, longest first. With the compiled step of the model each token is computed as in a
    step, so that a prompt gives the same bits here, in the engine, and beside any others. Otherwise prompts are padded
    on the left, so that their last tokens, whose logits are needed, are in one column, and a row is computed from the
    chunk in which its prompt begins.
    """
    require_sizes(prefill_chunk=chunk)
    rows = check_prompts(prompts, model.config.vocab_size, eos_id, state is not None)
    device = next(model.parameters()).device
    if state is None:
        empty = torch.zeros(len(rows), model.config.vocab_size, device=device)
        state = GenerationState(model.init_state(len(rows)), empty, empty.bool())
    elif tuple(state.logits.shape) != (len(rows), model.config.vocab_size):
        raise ValueError(
            f"the state must have one row per prompt and the model's vocabulary, ({len(rows)}, "
            f"{model.config.vocab_size}), got {tuple(state.logits.shape)}; select_rows repeats, drops and reorders rows"
        )
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    state, ordered = select_rows(state, torch.tensor(order, device=device)), [rows[row] for row in order]
    for i, row in enumerate(ordered):
        state.seen[i, torch.from_numpy(np.unique(row)).to(device)] = True
    if native is not None and native.serves(torch.zeros(len(rows), dtype=torch.int64, device=device), state.model):
        state = _read_as_steps(native, ordered, state, chunk)
    else:
        state = _read_padded(model, ordered, state, chunk, device)
    return select_rows(state, torch.tensor(np.argsort(order), device=device))


def _read_as_steps(
    native: NativeStep, rows: list[NDArray[np.int64]], state: GenerationState, chunk: int
) -> GenerationState:
    """Read prompts that are sorted by length, longest first. In each pass all that have tokens left read as many."""
    lengths, logits, running = [len(row) for row in rows], state.logits, state.model
    done, n_left, ended = 0, len(rows), []
    while n_left:
        n_going_on = sum(length > done for length in lengths)
        if n_going_on < n_left:
            ended.append(map_state(lambda t, a=n_going_on, b=n_left: t[a:b], running))
            running, n_left = map_state(lambda t, n=n_going_on: t[:n], running), n_going_on
            continue
        stop = min(done + chunk, lengths[n_left - 1])
        ids = torch.from_numpy(np.stack([row[done:stop] for row in rows[:n_left]]))
        found = read(native, ids, running, num_last_logits=1)
        running, done = found.state, stop
        at_end = sum(length > stop for length in lengths)
        logits[at_end:n_left] = found.logits[at_end:, -1, : logits.shape[1]]
    return GenerationState(concatenate_rows(ended[::-1]), logits, state.seen)


def _read_padded(
    model: LanguageModel, rows: list[NDArray[np.int64]], state: GenerationState, chunk: int, device: torch.device
) -> GenerationState:
    """Read prompts that are sorted by length, longest first."""
    longest, lengths = len(rows[0]), np.array([len(row) for row in rows])
    logits, running = state.logits, state.model
    for start in range(-longest, 0, chunk):  # positions are counted from the end, where all prompts are aligned
        stop = min(start + chunk, 0)
        n_active = int((lengths > -stop).sum())
        ids, mask = _left_padded(rows[:n_active], start, stop)
        whole = n_active == len(rows)
        output = model(
            torch.from_numpy(ids).to(device),
            running if whole else map_state(lambda t, n=n_active: t[:n], running),
            attention_mask=None if mask.all() else torch.from_numpy(mask).to(device),
            num_last_logits=1 if stop == 0 else 0,
        )
        rest = map_state(lambda t, n=n_active: t[n:], running)
        running = output.state if whole else concatenate_rows([output.state, rest])
        if stop == 0:
            logits[:n_active] = output.logits[:, -1, : logits.shape[1]].to(logits.dtype)
    return GenerationState(running, logits, state.seen)


def _left_padded(
    rows: list[NDArray[np.int64]], start: int, stop: int
) -> tuple[Int[np.ndarray, "rows length"], Bool[np.ndarray, "rows length"]]:
    """Tokens [start, stop) of each row, counted from its end, and a mask that is false at padding."""
    ids = np.zeros((len(rows), stop - start), np.int64)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        piece = row[max(0, len(row) + start) : len(row) + stop]
        ids[i, ids.shape[1] - len(piece) :] = piece
        mask[i, ids.shape[1] - len(piece) :] = True
    return ids, mask


def prompt_rows(prompts: Prompts) -> list[Int[np.ndarray, " length"]]:
    """The ids of each prompt as an array.

    Raises TypeError for text and for values that are not integers, ValueError for ids that are not in rows.
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of lists of token ids, got {type(prompts).__name__}")
    if isinstance(prompts, Tensor):
        prompts = prompts.detach().cpu()  # once, not row by row
    return [_prompt_row(number, prompt) for number, prompt in enumerate(prompts)]


def _prompt_row(number: int, prompt: ArrayLike) -> Int[np.ndarray, " length"]:
    if isinstance(prompt, bytes):
        raise TypeError(f"prompt {number} must hold integer token ids, got bytes; encode them with the tokenizer first")
    if not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) == 0:
        raise ValueError(
            f"prompt {number} must be a list of token ids, got {prompt!r}; prompts is a list of lists: write [ids] for "
            f"one prompt"
        )
    return row_of_ids(prompt, f"prompt {number}")


def check_prompts(
    prompts: Prompts, vocab_size: int, eos_id: int | None, may_be_empty: bool = False
) -> list[Int[np.ndarray, " length"]]:
    """The prompts as arrays. Ids are checked against the vocabulary, and an empty prompt becomes [eos_id]."""
    rows = prompt_rows(prompts)
    if not rows:
        raise ValueError("no prompts; give at least one list of token ids")
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id must be an id of the vocabulary, 0 to {vocab_size - 1}, got {eos_id}")
    return [_check_prompt(number, row, vocab_size, eos_id, may_be_empty) for number, row in enumerate(rows)]


def _check_prompt(
    number: int, ids: Int[np.ndarray, " length"], vocab_size: int, eos_id: int | None, may_be_empty: bool
) -> Int[np.ndarray, " length"]:
    if ids.size == 0:
        if not may_be_empty and eos_id is None:
            raise ValueError(f"prompt {number} is empty and there is no eos_id to begin with; give at least one token")
        return np.array([] if may_be_empty else [eos_id], np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        place = int(outside[0])
        raise ValueError(
            f"prompt {number} has the id {int(ids[place])} at position {place}, outside the model's vocabulary of "
            f"{vocab_size} (0 to {vocab_size - 1}); encode it with the model's own tokenizer"
        )
    return ids.astype(np.int64)
