"""One batch through the model: packed documents, carried states, and the loss over a held-out table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from anymamba.data.batches import Batch
from anymamba.models.language_model import LanguageModel, LanguageModelState, LossOutput
from anymamba.parts.state import (
    detach_state,
    last_states_are_wanted,
    map_state,
    put_rows,
    where_rows,
    without_last_states,
)
from anymamba.training.masking import Masking
from anymamba.training.parallel.processes import Processes

LossFunction = Callable[..., LossOutput]


def batch_loss(
    model: LanguageModel, loss: LossFunction, batch: Batch, carried: LanguageModelState | None
) -> tuple[Tensor, Tensor, LanguageModelState]:
    """The loss of a batch summed in nats, the number of labels counted, and the detached state of each row after it, or
    anything where last states are not wanted.

    Args:
        loss: `model.loss`, compiled or not.
        carried: the state of each row after the previous batch. Rows that continue a document (`batch.carried`) start
            from it, other rows from the model's initial state.
    """
    device = model.embedding.weight.device
    input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    rows, length = input_ids.shape
    start = None
    if carried is not None and bool(batch.carried.any()):
        start = where_rows(batch.carried.to(device), carried, model.init_state(rows))
    if batch.cu_seqlens.numel() == rows + 1:  # no document begins inside a row
        out = loss(input_ids, labels, start)
        return out.loss, out.n_tokens, detach_state(out.state)
    offsets = batch.cu_seqlens.to(device)
    row_offsets = torch.arange(rows + 1, device=device, dtype=offsets.dtype) * length
    sequence = torch.searchsorted(offsets, row_offsets)
    out = loss(
        input_ids.view(1, -1),
        labels.view(1, -1),
        None if start is None else put_rows(model.init_state(offsets.numel() - 1), sequence[:-1], start),
        cu_seqlens=offsets,
    )
    if not last_states_are_wanted():
        return out.loss, out.n_tokens, detach_state(out.state)
    last = sequence[1:] - 1
    return out.loss, out.n_tokens, detach_state(map_state(lambda t: t.index_select(0, last), out.state))


def states_of_batches(are_carried: bool) -> AbstractContextManager[object]:
    """The context of `batch_loss`, in which layers need not compute states that are dropped."""
    return nullcontext() if are_carried else without_last_states()


@torch.no_grad()
def held_out_nats(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    carry_state: bool = True,
    masking: Masking | None = None,
    processes: Processes | None = None,
) -> float:
    """Mean nats per label over held-out batches.

    Without carry_state every row starts from the initial state. With masking the labels are the masked tokens.
    Of several processes each takes its rows of the batches, and all get the mean.
    """
    loss = model.loss if processes is None else processes.loss(model)
    total, count, carried = 0.0, 0.0, None
    for number, batch in enumerate(batches):
        batch = batch if masking is None else masking.apply(batch, number)
        batch = batch if processes is None else processes.rows_of(batch)
        with states_of_batches(carry_state):
            nats, n_tokens, state = batch_loss(model, loss, batch, carried)
        carried = state if carry_state else None
        total, count = total + nats.item(), count + int(n_tokens)
    if processes is not None:
        total, count = processes.sums(total, count)
    return total / max(1, count)
