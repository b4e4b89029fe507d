"""Reading several tokens of each sequence in one compiled call, and going back to an earlier one of them.

Every token is computed as `NativeStep.step` computes it: a text gives the same bits read whole, in pieces or token by
token, alone or in a batch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.models.inference.native_step import NativeStep
from anymamba.models.language_model import LanguageModelOutput, LanguageModelState
from anymamba.parts.state import concatenate_rows, map_state


@torch.no_grad()
def read(
    native: NativeStep,
    token_ids: Int[Tensor, "batch length"],
    state: LanguageModelState,
    *,
    num_last_logits: int | None = None,
) -> LanguageModelOutput:
    """`LanguageModel.forward` for arguments whose first token `native.serves`.

    Args:
        token_ids: (batch, length), without padding; the length is at least 1.
        state: one row per sequence.
        num_last_logits: compute the logits of this many last positions only; defaults to all.
    Returns logits (batch, positions, padded_vocab) and the new state. Raises IndexError for an id outside the
    vocabulary.
    """
    old = map_state(Tensor.contiguous, state)
    new = map_state(torch.empty_like, old)
    n_logits = token_ids.shape[1] if num_last_logits is None else min(num_last_logits, token_ids.shape[1])
    logits = _read(native, token_ids, _addresses(old, new), [], n_logits)
    return LanguageModelOutput(logits, new)


@torch.no_grad()
def read_sequences(
    native: NativeStep,
    input_ids: Int[Tensor, "batch length"],
    state: LanguageModelState | None,
    *,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_last_logits: int | None,
) -> LanguageModelOutput | None:
    """`LanguageModel.forward`, with padded and packed sequences read one by one.

    Returns None for arguments that the compiled step does not serve, among them all that `LanguageModel.forward`
    refuses.
    """
    if type(input_ids) is not Tensor or input_ids.ndim != 2 or not input_ids.numel() or (num_last_logits or 0) < 0:
        return None
    places = _places(input_ids, attention_mask, cu_seqlens)
    if places is None:
        return None
    state = native.model.init_state(len(places)) if state is None else state
    if not native.serves(input_ids.new_zeros(len(places)), state):
        return None
    if attention_mask is None and cu_seqlens is None:
        return read(native, input_ids, state, num_last_logits=num_last_logits)
    total = input_ids.shape[1]
    n_logits = total if num_last_logits is None else min(num_last_logits, total)
    logits, states = torch.zeros(input_ids.shape[0], n_logits, native.n_logits), []
    for i, (row, columns) in enumerate(places):
        before = map_state(lambda tensor, i=i: tensor[i : i + 1], state)
        if columns.numel():
            wanted = columns[columns >= total - n_logits] - (total - n_logits)
            output = read(native, input_ids[row, columns][None], before, num_last_logits=len(wanted))
            logits[row, wanted], before = output.logits[0], output.state
        states.append(before)
    return LanguageModelOutput(logits, concatenate_rows(states))


def _places(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, Tensor]] | None:
    """The row and the columns of each sequence; None if the arguments do not fit together."""
    batch, length = input_ids.shape
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        fits = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == length and offsets == sorted(offsets)
        if attention_mask is not None or batch != 1 or not fits:
            return None
        return [(0, torch.arange(a, b)) for a, b in pairwise(offsets)]
    if attention_mask is None:
        return [(row, torch.arange(length)) for row in range(batch)]
    if attention_mask.shape != input_ids.shape or not attention_mask.is_cpu:
        return None
    return [(row, mask.nonzero()[:, 0]) for row, mask in enumerate(attention_mask)]


class Verifier:
    """Reads drafted tokens of each sequence in one pass, and then gives the state after those that were accepted.

    The pass keeps the inputs of the recurrence, so that the state after an earlier token needs no products. Memory for
    states and inputs is kept between passes.

    Args:
        native: the compiled step of the model.
    """

    def __init__(self, native: NativeStep) -> None:
        self._native, self._sizes = native, native.kept_sizes()
        self._kept: list[Tensor] = []
        self._kept_addresses: list[int] = []
        self._n_kept = 0
        self._old: LanguageModelState | None = None
        self._new: LanguageModelState | None = None
        self._addresses: list[int] = []
        self._shape = (0, 0)

    @torch.no_grad()
    def read(
        self, token_ids: Int[Tensor, "batch length"], state: LanguageModelState
    ) -> Float[Tensor, "batch length padded_vocab"]:
        """Logits after each token.

        Args:
            token_ids: (batch, length), the length at least 1.
            state: a row for each sequence, which `native.serves`. Its memory is used again after `accept`.
        """
        batch, length = self._shape = (token_ids.shape[0], token_ids.shape[1])
        if self._n_kept < batch * length:
            self._n_kept = batch * length
            self._kept = [torch.empty(self._n_kept * size) for size in self._sizes]
            self._kept_addresses = [tensor.data_ptr() for tensor in self._kept]
        if self._old is not state:
            self._old = state
            contiguous = map_state(Tensor.contiguous, state)
            if self._new is None or self._new.layers[0].conv.shape[0] != batch:
                self._new = map_state(torch.empty_like, contiguous)
            self._source, self._addresses = contiguous, _addresses(contiguous, self._new)
        return _read(self._native, token_ids, self._addresses, self._kept_addresses, length)

    @torch.no_grad()
    def accept(self, n_tokens: int) -> LanguageModelState:
        """The state after the first n_tokens of each sequence. The state given to `read` is then not valid any more."""
        assert self._old is not None and self._new is not None
        batch, length = self._shape
        if n_tokens < length:
            counts = torch.full((batch,), n_tokens)
            self._native.stack.replay(
                counts.data_ptr(), batch, length, torch.get_num_threads(), self._addresses, self._kept_addresses
            )
        after, self._new = self._new, self._source
        self._old, self._source, self._addresses = after, after, _addresses(after, self._new)
        return after


def _read(
    native: NativeStep, token_ids: Tensor, addresses: list[int], kept: list[int], n_logits: int
) -> Float[Tensor, "batch n_logits padded_vocab"]:
    stack, ids = native.stack, token_ids.to(torch.int64).contiguous()
    batch, length = ids.shape
    logits = torch.empty(batch, n_logits, native.n_logits)
    threads = native.threads(batch * length)
    stack.read(ids.data_ptr(), batch, length, threads, addresses, kept, logits.data_ptr(), n_logits)
    return logits


def _addresses(old: LanguageModelState, new: LanguageModelState) -> list[int]:
    """Four for each layer: conv, ssm, and where their new values go."""
    found: list[int] = []
    for before, after in zip(old.layers, new.layers, strict=True):
        found += [tensor.data_ptr() for tensor in (*before, *after)]
    return found
