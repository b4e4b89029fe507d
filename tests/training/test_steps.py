"""The loss of a batch whose rows continue documents, and in whose rows documents begin."""

from __future__ import annotations

import pytest
import torch

from anymamba import LanguageModel, ModelConfig
from anymamba.data.batches import Batch
from anymamba.models.mixers import MIXERS
from anymamba.parts.options import AttentionOptions, HyenaOptions
from anymamba.parts.state import state_tensors
from anymamba.training.steps import batch_loss, states_of_batches


def model_of(mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    options = {"hyena": HyenaOptions(max_length=32), "attention": AttentionOptions(n_heads=2, window=5)}
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=29, mixers=(mixer,), **options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


BOUNDED = [name for name in MIXERS if not model_of(name).grows]


@torch.no_grad()
@pytest.mark.parametrize("mixer", BOUNDED)
@pytest.mark.parametrize("inside", [False, True])
def test_a_document_that_begins_has_seen_nothing(mixer, inside):
    """The first row continues a document. Another begins with the second row, or inside it, where one ends."""
    model = model_of(mixer)
    before, ids, labels = (torch.randint(29, (2, 9)) for _ in range(3))

    def loss(ids: torch.Tensor, offsets: list[int], carried: list[bool], state=None):
        batch = Batch(ids, labels, torch.tensor(offsets, dtype=torch.int32), torch.tensor(carried), None)
        return batch_loss(model, model.loss, batch, state)

    def alone(row: int, part: slice, state=None) -> float:
        return model.loss(ids[row : row + 1, part], labels[row : row + 1, part], state).loss.item()

    state = loss(before, [0, 9, 18], [False, False])[2]
    first, second = (model.hidden(before[row : row + 1])[1] for row in (0, 1))
    want = alone(0, slice(None), first)
    if inside:
        got = loss(ids, [0, 9, 13, 18], [True, True], state)[0].item()
        want += alone(1, slice(4), second) + alone(1, slice(4, None))
    else:
        got = loss(ids, [0, 9, 18], [True, False], state)[0].item()
        want += alone(1, slice(None))
    assert got == pytest.approx(want, rel=1e-9)


def test_states_that_are_dropped_take_no_memory():
    """Neither of separate rows nor of packed documents."""
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=11, mixers=("attention", "s4d")))
    ids = torch.randint(11, (2, 33))
    for offsets in ([0, 32, 64], [0, 10, 32, 50, 64]):
        inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        batch = Batch(inputs, labels, torch.tensor(offsets, dtype=torch.int32), torch.zeros(2).bool(), {})
        losses = []
        for are_carried in (True, False):
            with states_of_batches(are_carried):
                nats, _, state = batch_loss(model, model.loss, batch, None)
            losses.append(nats.item())
            large = [t for t in state_tensors(state) if t.untyped_storage().nbytes() > 32]
            assert bool(large) == are_carried
        assert losses[0] == losses[1]
