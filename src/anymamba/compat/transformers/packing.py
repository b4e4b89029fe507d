"""Finds the sequences that are packed along the rows of a batch, from the arguments that a collator gives.

Offsets (`cu_seqlens`, or `cu_seq_lens_q` and `cu_seq_lens_k` for callers of FlashAttention), `position_ids` that start
again at 0, and changes of `seq_idx` all say where a sequence begins. One of them is enough; several must agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anymamba.ops.checks import n_sequences, require_offsets, require_shape

OFFSETS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
LENGTHS = ("max_length_q", "max_length_k")
"""The length of the longest sequence, which collators pass with the offsets; it follows from them and is ignored."""


class PackedRow(NamedTuple):
    """The real tokens of a batch as one row of sequences, one after the other."""

    offsets: Int[Tensor, " n_plus_1"]
    """The offset of each sequence in the row, then the length of the row."""
    places: Int[Tensor, " tokens"] | None
    """The indices of the row's tokens in the flattened batch; None if the batch is that row already."""

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, ...) as (1, tokens, ...)."""
        return x if self.places is None else x.flatten(0, 1)[self.places][None]

    def unpack(self, x: Float[Tensor, "1 tokens channels"], batch: int, length: int) -> Tensor:
        """The inverse of `pack`, with zeros at the padding."""
        if self.places is None:
            return x
        whole = x.new_zeros(batch * length, *x.shape[2:])
        return whole.index_copy(0, self.places, x[0]).unflatten(0, (batch, length))

    def starts(self, batch: int, length: int) -> Bool[Tensor, "batch length"]:
        """True at the first token of each sequence."""
        row = _begins_at(self.offsets, length if self.places is None else self.places.numel())
        if self.places is not None:
            row = torch.zeros(batch * length, dtype=torch.bool, device=row.device).index_copy(0, self.places, row)
        return row.view(batch, length)


def packed_row(
    inputs: Tensor,
    mask: Tensor | None,
    *,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    offsets: dict[str, Tensor | None],
    continues: bool,
    first: Int[Tensor, " batch"] | None,
) -> PackedRow | None:
    """The packed row of a batch; None if each row is one sequence.

    Args:
        inputs: (batch, length, ...).
        mask: (batch, length), nonzero at real tokens; None if all are real.
        position_ids, seq_idx: (batch, length), or (1, length) for all rows; their values at padding are ignored.
        offsets: the given offsets, by the name of their argument.
        continues: whether the sequences continue from a state.
        first: the position that the first token of each row must have; None if the model does not need it.
    Raises ValueError if these contradict each other, or skip positions.
    """
    batch, length = inputs.shape[:2]
    given = {name: tensor.to(inputs.device, torch.int32) for name, tensor in offsets.items() if tensor is not None}
    told = next(iter(given.values()), None)
    if told is None and position_ids is None and seq_idx is None:
        return None
    if told is not None:
        n_sequences(batch, told)
        if torch.compiler.is_compiling() or mask is not None:  # the rest compares values; the layers refuse a mask
            return PackedRow(told, None)
        for tensor in given.values():
            require_offsets(tensor, length)
    tokens = _Tokens.of(batch, length, mask, inputs.device)
    begins = {name: _begins_at(tensor, length) for name, tensor in given.items()}
    if seq_idx is not None:
        begins["seq_idx"] = tokens.first | _differs(tokens.pick("seq_idx", seq_idx), 0)
    if position_ids is not None:
        positions = tokens.pick("position_ids", position_ids)
        begins["position_ids"] = tokens.first | _differs(positions, 1)
        if continues and told is not None:  # the positions may by chance rise by one from one sequence to the next
            begins["position_ids"] = begins["position_ids"] | _begins_at(told, length)
    found = _agreed(begins)
    if position_ids is not None and not (continues and told is not None):
        _require_positions(positions, found, tokens, first, continues)
    if told is not None:
        return PackedRow(told, None)
    if bool((found == tokens.first).all()):
        return None
    if continues:
        raise ValueError(
            f"{' and '.join(begins)} must not begin a new sequence inside a row that continues from a cache; pass the "
            "sequences as rows, or cu_seqlens and a cache with a row for each sequence"
        )
    edges = [found.nonzero()[:, 0], torch.tensor([found.numel()], device=found.device)]
    return PackedRow(torch.cat(edges).to(torch.int32), None if batch == 1 and mask is None else tokens.places)


class _Tokens(NamedTuple):
    """The real tokens of a batch in order."""

    shape: tuple[int, int]
    places: Int[Tensor, " tokens"]
    """The index of each in the flattened batch."""
    row: Int[Tensor, " tokens"]
    """The row of each."""
    first: Bool[Tensor, " tokens"]
    """Whether it is the first of its row."""

    @classmethod
    def of(cls, batch: int, length: int, mask: Tensor | None, device: torch.device) -> _Tokens:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask is not None:
            require_shape("attention_mask", mask, (batch, length), "(batch, length)")
            real = mask.bool()
        places = real.flatten().nonzero()[:, 0]
        row = places // max(1, length)
        first = _differs(row, 0)
        first[:1] = True
        return cls((batch, length), places, row, first)

    def pick(self, name: str, values: Tensor) -> Int[Tensor, " tokens"]:
        """The values of the real tokens."""
        batch, length = self.shape
        if values.ndim == 1:
            values = values[None]
        if values.ndim != 2 or values.shape[1] != length or values.shape[0] not in (1, batch):
            raise ValueError(
                f"{name} must be (batch, length) = ({batch}, {length}) like the inputs, or (1, {length}), got "
                f"{tuple(values.shape)}"
            )
        return values.to(self.places.device).expand(batch, length).flatten()[self.places].long()


def _differs(values: Int[Tensor, " tokens"], step: int) -> Bool[Tensor, " tokens"]:
    """For each token, whether its value differs from that of the previous token plus `step`; False for the first."""
    result = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    result[1:] = values[1:] != values[:-1] + step
    return result


def _begins_at(offsets: Int[Tensor, " n_plus_1"], n_tokens: int) -> Bool[Tensor, " tokens"]:
    """True at the first token of each sequence that is not empty."""
    begins = torch.zeros(n_tokens + 1, dtype=torch.bool, device=offsets.device)
    return begins.index_fill(0, offsets.long(), True)[:n_tokens]


def _agreed(begins: dict[str, Bool[Tensor, " tokens"]]) -> Bool[Tensor, " tokens"]:
    """Where sequences begin; raises ValueError unless all arguments agree."""
    (name, found), *others = begins.items()
    for other, theirs in others:
        if not torch.equal(found, theirs):
            place = int((found != theirs).nonzero()[0])
            raise ValueError(
                f"{name} and {other} must begin their sequences at the same tokens, but they first differ at token "
                f"{place}; pass only one of them"
            )
    return found


def _require_positions(
    positions: Tensor, begins: Tensor, tokens: _Tokens, first: Tensor | None, continues: bool
) -> None:
    """Raise ValueError unless rows start at `first`, and later sequences at 0 or at the first position of their row."""
    starts = positions[tokens.first]
    rows = tokens.row[tokens.first]
    if first is not None:
        wanted = first.to(starts.device)[rows]
        wrong = (starts != wanted).nonzero()[:, 0]
        if wrong.numel():
            row = int(wrong[0])
            raise ValueError(
                f"position_ids of row {int(rows[row])} must start at {int(wanted[row])}, the number of tokens that it "
                f"has seen, got {int(starts[row])}; leave position_ids out, this model counts positions itself"
            )
    if continues:
        return
    anew = begins & ~tokens.first
    of_row = starts[torch.cumsum(tokens.first, 0) - 1]
    wrong = (anew & (positions != 0) & (positions != of_row)).nonzero()[:, 0]
    if wrong.numel():
        place = int(wrong[0])
        raise ValueError(
            "position_ids must rise by one in a sequence and start again at 0 in the next, got "
            f"{int(positions[place])} after {int(positions[place - 1])} in row {int(tokens.row[place])}; mark padding "
            "in attention_mask"
        )
