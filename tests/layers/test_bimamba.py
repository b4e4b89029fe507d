"""The bidirectional layer against two Mamba layers with shared projections; it is one function padded and packed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract import LENGTHS, close

from anymamba import LanguageModel, ModelConfig
from anymamba.layers import BiMamba, Mamba
from anymamba.parts import recipes
from anymamba.parts.options import MambaOptions

OPTIONS = MambaOptions(d_state=4)


def layer(**changes) -> BiMamba:
    torch.manual_seed(0)
    return BiMamba(6, dataclasses.replace(OPTIONS, **changes)).double().eval()


def two_layers(both: BiMamba) -> tuple[Mamba, Mamba]:
    """The Mamba layers of the two directions, each with the shared projections."""
    shared = {n: p for n, p in both.state_dict().items() if n.startswith(("in_proj", "out_proj"))}
    made = []
    for direction in (both.ahead, both.back):
        one = Mamba(6, d_state=4).double().eval()
        one.load_state_dict(shared | direction.state_dict())
        made.append(one)
    return made[0], made[1]


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_sum_of_two_layers_with_shared_projections(length):
    both, x = layer(), torch.randn(2, length, 6, dtype=torch.float64)
    ahead, back = two_layers(both)
    close(both(x)[0], ahead(x)[0] + back(x.flip(1))[0].flip(1), f"length {length}")


@torch.no_grad()
def test_padding_and_packing_change_nothing():
    both = layer()
    parts = [torch.randn(1, n, 6, dtype=torch.float64) for n in (5, 1, 7)]
    alone = [both(part)[0][0] for part in parts]
    offsets = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    close(both(torch.cat(parts, 1), cu_seqlens=offsets)[0][0], torch.cat(alone), "packed")
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for row, places in enumerate([range(5), [7], [0, 1, 3, 4, 5, 6, 7]]):
        mask[row, list(places)] = True
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    x[mask] = torch.cat(parts, 1)[0]
    close(both(x, attention_mask=mask)[0][mask], torch.cat(alone), "padded")


@torch.no_grad()
def test_every_output_sees_the_whole_sequence():
    both, x = layer(), torch.randn(1, 9, 6, dtype=torch.float64)
    for place in (0, 8):
        other = x.clone()
        other[0, place] += 1
        assert ((both(other)[0] - both(x)[0]).abs().amax(-1) > 0).all()


def test_gradients():
    both = layer(output_norm="rmsnorm", inner_norms=True)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    parameters = list(both.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: both(x)[0], (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("complement", [(), (0, 2, 1, 3)])
def test_recomputing_gives_the_same_bits(monkeypatch, complement):
    """Also with activation checkpointing, in a model of one strand and of both."""
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16, n_layers=2, vocab_size=4, mixers=("bimamba",), mamba=OPTIONS, complement=complement
    )
    model, ids = LanguageModel(config), torch.randint(0, 4, (2, 21))
    found = []
    for devices, checkpointing in (((), False), (("cpu",), False), ((), True)):
        monkeypatch.setattr(recipes, "DEVICES", devices)
        monkeypatch.setattr(recipes, "LEAST_SIZE", 0)
        model.activation_checkpointing = checkpointing
        found.append(torch.autograd.grad(model.loss(ids, ids).loss, list(model.parameters())))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_parameters_of_the_projections_count_once():
    both, one = layer(), Mamba(6, d_state=4)
    shared = sum(p.numel() for n, p in one.named_parameters() if n.startswith(("in_proj", "out_proj")))
    count = sum(p.numel() for p in one.parameters())
    assert sum(p.numel() for p in both.parameters()) == 2 * count - shared


def test_state_and_step_say_that_it_is_not_causal():
    both, x = layer(), torch.randn(1, 4, 6, dtype=torch.float64)
    state = both(x)[1]
    for call in (lambda: both.init_state(1), lambda: both.step(x[:, 0], state), lambda: both(x, state)):
        with pytest.raises(ValueError, match="reads sequences in both directions and has no st"):
            call()
