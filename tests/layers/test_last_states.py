"""States that nobody wants cost nothing: outputs and gradients stay the same, and the states are NaN."""

from __future__ import annotations

import threading

import pytest
import torch

from anymamba.layers.attention import Attention
from anymamba.layers.h3 import H3
from anymamba.layers.s4 import S4
from anymamba.layers.s4d import S4D
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import last_states, last_states_are_wanted, state_tensors, without_last_states

LAYERS = {
    "s4": lambda: S4(6, 4),
    "s4d": lambda: S4D(6, 4),
    "h3": lambda: H3(12, S4D(6, 4), d_head=2, d_shift=3),
    "attention": lambda: Attention(12, 3, positions="rotary"),
    "attention in a window": lambda: Attention(12, 3, n_kv_heads=1, positions="xpos", window=5, d_conv=3),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("carried", [False, True])
def test_outputs_and_gradients_without_last_states(name, carried):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 17, 6 if name.startswith("s4") else 12, requires_grad=True)
    with torch.no_grad():
        start = layer(torch.randn(2, 5, x.shape[2]))[1] if carried else None
    y, state = layer(x, start)
    with without_last_states():
        same, unwanted = layer(x, start)
    assert torch.equal(same, y)
    parameters = [x, *layer.parameters()]
    expected, got = (torch.autograd.grad(out.square().sum(), parameters, allow_unused=True) for out in (y, same))
    for a, b in zip(expected, got, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-6, atol=1e-9)
    shapes = [[t.shape for t in state_tensors(s)] for s in (state, unwanted)]
    assert shapes[0] == shapes[1]
    if not (carried and (name == "s4" or "attention" in name)):
        assert any(t.isnan().all() for t in state_tensors(unwanted))
    assert not any(t.isnan().any() for t in state_tensors(state))


def test_blocks_may_be_nested_and_end_with_an_error():
    with without_last_states():
        with without_last_states():
            pass
        assert not last_states_are_wanted()
        with last_states(), without_last_states():
            assert not last_states_are_wanted()
        with pytest.raises(KeyError), last_states():
            assert last_states_are_wanted()
            raise KeyError
        assert not last_states_are_wanted()
    with pytest.raises(KeyError), without_last_states():
        raise KeyError
    assert last_states_are_wanted()


@pytest.mark.parametrize("mixer", ["mamba", "h3-s4d", "mamba-s4", "hyena", "attention"])
def test_the_loss_of_a_model_is_the_same(mixer):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=8, mixers=(mixer,)))
    ids = torch.randint(8, (2, 9))
    expected = model.loss(ids, ids).loss
    with without_last_states():
        assert torch.equal(model.loss(ids, ids).loss, expected)


def test_another_thread_gets_its_states():
    """One thread may train while another generates."""
    layer, x, found = LAYERS["attention"](), torch.randn(1, 5, 12), []
    with without_last_states():
        thread = threading.Thread(target=lambda: found.append(layer(x)[1]))
        thread.start()
        thread.join()
        own = layer(x)[1]
    assert own.keys.isnan().all() and not found[0].keys.isnan().any()


@pytest.mark.parametrize("mixers", [("h3-s4d", "mlp"), ("s4d",), ("attention", "mlp"), ("mamba",)], ids=str)
def test_recomputed_blocks_want_what_the_first_pass_wanted(mixers):
    """The backward pass runs outside the context and must save the same tensors."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=11, mixers=mixers))
    ids = torch.randint(11, (2, 20))
    found = []
    for again in (False, True):
        model.activation_checkpointing = again
        with without_last_states():
            loss = model.loss(ids[:, :-1], ids[:, 1:]).loss
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
