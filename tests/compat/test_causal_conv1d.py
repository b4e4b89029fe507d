"""anymamba's `causal_conv1d` against torch's convolution: layouts, states, packed sequences, circular buffers."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from anymamba.compat import causal_conv1d as package
from anymamba.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
)
from anymamba.compat.causal_conv1d.causal_conv1d_interface import CausalConv1dFn
from anymamba.compat.causal_conv1d.cpp_functions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)

BATCH, DIM = 3, 5


def tensors(length: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, DIM, length, generator=generator)
    return x, torch.randn(DIM, width, generator=generator), torch.randn(DIM, generator=generator)


def oracle(x, weight, bias, before=None, silu=False):
    """torch's own convolution behind width - 1 inputs or zeros."""
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    y = F.conv1d(torch.cat([before, x], dim=2), weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if silu else y


@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_forward(length, width, activation):
    x, weight, bias = tensors(length, width)
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        got = causal_conv1d_fn(layout, weight, bias, activation=activation)
        assert got.shape == x.shape
        torch.testing.assert_close(got, oracle(x, weight, bias, silu=activation is not None))
    torch.testing.assert_close(causal_conv1d_ref(x, weight), oracle(x, weight, None))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_states(length):
    x, weight, bias = tensors(length, 4)
    before = torch.randn(BATCH, DIM, 3)
    out, last = causal_conv1d_fn(x, weight, bias, initial_states=before, return_final_states=True)
    torch.testing.assert_close(out, oracle(x, weight, bias, before))
    torch.testing.assert_close(last, torch.cat([before, x], dim=2)[..., -3:])
    into = torch.empty(BATCH, DIM, 3)
    out, same = causal_conv1d_fn(
        x, weight, bias, initial_states=before, return_final_states=True, final_states_out=into
    )
    assert same is into and torch.equal(into, last)


def test_gradients():
    x, weight, bias = (t.double().requires_grad_() for t in tensors(6, 3))
    before = torch.randn(BATCH, DIM, 2, dtype=torch.float64, requires_grad=True)

    def both(x, weight, bias, before):
        return causal_conv1d_fn(x, weight, bias, None, before, return_final_states=True, activation="silu")

    assert torch.autograd.gradcheck(both, (x, weight, bias, before), fast_mode=True)


def test_sequences_do_not_see_each_other():
    x, weight, bias = tensors(11, 4)
    seq_idx = torch.tensor([[0] * 11, [0] * 4 + [1] * 7, [-1] * 2 + [3] * 5 + [4] * 1 + [-1] * 3], dtype=torch.int32)
    got = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation="silu")
    for row, pieces in enumerate(([(0, 11)], [(0, 4), (4, 11)], [(2, 7), (7, 8)])):
        for start, end in pieces:
            alone = oracle(x[row : row + 1, :, start:end], weight, bias, silu=True)
            torch.testing.assert_close(got[row : row + 1, :, start:end], alone)
    assert not got[2, :, :2].any() and not got[2, :, 8:].any()


def test_misuse():
    x, weight, bias = tensors(5, 4)
    seq_idx = torch.zeros(BATCH, 5, dtype=torch.int32)
    for arguments, message in (
        ({"activation": "gelo"}, 'activation must be None, "silu" or "swish", got \'gelo\''),
        ({"seq_idx": seq_idx, "return_final_states": True}, "seq_idx cannot be combined with"),
        ({"seq_idx": seq_idx[:, :2]}, r"seq_idx must be \(batch, length\) = \(3, 5\), got \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv1d_fn(x, weight, bias, **arguments)
    with pytest.raises(ValueError, match=r"x must be \(batch, dim, length\)"):
        causal_conv1d_fn(x[0], weight)
    with pytest.raises(ValueError, match="conv_state must hold at least width - 1 = 3 inputs, got 2"):
        causal_conv1d_update(x[..., 0], torch.zeros(BATCH, DIM, 2), weight)


@pytest.mark.parametrize("state_length", [3, 4, 6])
@pytest.mark.parametrize("length", [None, 1, 2, 8])
def test_update_shifts(state_length, length):
    x, weight, bias = tensors(length or 1, 4)
    state = torch.randn(BATCH, DIM, state_length)
    whole = torch.cat([state, x], dim=2)
    want = oracle(x, weight, bias, state[..., -3:], silu=True)
    for update in (causal_conv1d_update, causal_conv1d_update_ref):
        kept = state.clone()
        got = update(x if length else x[..., 0], kept, weight, bias, "silu")
        torch.testing.assert_close(got if length else got[..., None], want)
        assert torch.equal(kept, whole[..., -state_length:])


@pytest.mark.parametrize("state_length", [3, 5])
@pytest.mark.parametrize("length", [1, 2])
def test_update_of_a_circular_buffer(state_length, length):
    """Every row at a place of its own; all steps together are the whole convolution."""
    x, weight, bias = tensors(12, 4)
    offset = torch.tensor([0, 1, 4])
    state = torch.zeros(BATCH, DIM, state_length)
    pieces = []
    for start in range(0, 12, length):
        pieces.append(
            causal_conv1d_update(
                x[..., start : start + length], state, weight, bias, cache_seqlens=(offset + start).int()
            )
        )
    torch.testing.assert_close(torch.cat(pieces, dim=2), oracle(x, weight, bias))
    newest = (offset + 11) % state_length
    assert torch.equal(state[torch.arange(3), :, newest], x[..., -1])


def test_update_with_indices_and_padding():
    x, weight, bias = tensors(1, 4)
    pool = torch.randn(7, DIM, 4)
    before = pool.clone()
    indices = torch.tensor([5, -1, 0], dtype=torch.int32)
    got = causal_conv1d_update(x, pool, weight, bias, conv_state_indices=indices)
    for row, index in ((0, 5), (2, 0)):
        torch.testing.assert_close(
            got[row : row + 1], oracle(x[row : row + 1], weight, bias, before[index : index + 1, :, -3:])
        )
        assert torch.equal(pool[index], torch.cat([before[index, :, 1:], x[row]], dim=1))
    assert not got[1].any()
    untouched = [1, 2, 3, 4, 6]
    assert torch.equal(pool[untouched], before[untouched])


def test_varlen_states():
    x = torch.randn(9, DIM)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9], dtype=torch.int32), 3)
    assert states.shape == (3, DIM, 3)
    assert torch.equal(states[0], torch.cat([torch.zeros(1, DIM), x[:2]]).T)
    assert not states[1].any() and torch.equal(states[2], x[6:9].T)


def test_functions_of_the_compiled_module():
    x, weight, bias = tensors(6, 4)
    before, into = torch.randn(BATCH, DIM, 3), torch.empty(BATCH, DIM, 3)
    out = causal_conv1d_fwd_function(x, weight, bias, None, before, into, True)
    torch.testing.assert_close(out, oracle(x, weight, bias, before, silu=True))
    assert torch.equal(into, torch.cat([before, x], dim=2)[..., -3:])
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, before)]
    dout, dlast = torch.randn_like(out), torch.randn_like(into)
    y = oracle(*leaves, silu=True)
    last = torch.cat([leaves[3], leaves[0]], dim=2)[..., -3:]
    want = torch.autograd.grad([y, last], leaves, [dout, dlast])
    dx = torch.empty_like(x)
    got = causal_conv1d_bwd_function(x, weight, bias, dout, None, before, dlast, dx, True, True)
    assert got[0] is dx and got[1].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    bare = causal_conv1d_bwd_function(x, weight, None, dout, None, None, None, None, False, False)
    assert bare[2] is None and bare[3] is None
    state = before.clone()
    step = causal_conv1d_update_function(x[..., :1], state, weight, bias, False, None, None)
    torch.testing.assert_close(step, oracle(x[..., :1], weight, bias, before))


# ------------------------------------------------------------------------------------------ states and gradients


def test_final_states_in_a_given_tensor_keep_their_gradient():
    """The tensor gets the values, what is returned has the gradient."""
    x, weight, bias = tensors(6, 4)
    x.requires_grad_()
    into = torch.empty(BATCH, DIM, 3)
    _, last = causal_conv1d_fn(x, weight, bias, return_final_states=True, final_states_out=into)
    assert torch.equal(into, x[..., -3:]) and not into.requires_grad
    last.sum().backward()
    want = torch.zeros_like(x)
    want[..., -3:] = 1
    assert torch.equal(x.grad, want)


UPDATES = {
    "one": {},
    "circular": {"cache_seqlens": torch.tensor([0, 1, 4])},
    "indices": {"conv_state_indices": torch.tensor([2, -1, 0])},
    "both": {"cache_seqlens": torch.tensor([0, 1, 4]), "conv_state_indices": torch.tensor([2, -1, 0])},
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("length", [1, 2])
def test_gradients_through_updates(options, length):
    """Two updates in place and the state after them, against finite differences."""
    x, weight, bias = (t.double().requires_grad_() for t in tensors(2 * length, 3))
    state = torch.randn(BATCH, DIM, 4, dtype=torch.float64, requires_grad=True)

    def updates(x, state, weight, bias):
        state, seen = state.clone(), options.get("cache_seqlens")
        first = causal_conv1d_update(x[..., :length], state, weight, bias, "silu", **options)
        then = options if seen is None else options | {"cache_seqlens": seen + length}
        second = causal_conv1d_update(x[..., length:], state, weight, bias, "silu", **then)
        return first, second, state

    assert torch.autograd.gradcheck(updates, (x, state, weight, bias), fast_mode=True)


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_a_state_of_inference_mode_is_updated_outside_it(options):
    x, weight, bias = tensors(1, 4)
    plain = torch.randn(BATCH, DIM, 4)
    with torch.inference_mode():
        state = plain.clone()
    for grad in (False, True):
        weight.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            want = causal_conv1d_update(x, plain, weight, bias, **options)
            got = causal_conv1d_update(x, state, weight, bias, **options)
        plain = plain.detach()
        assert torch.equal(got, want) and torch.equal(state, plain) and state.is_inference()
    got.sum().backward()
    assert weight.grad.abs().sum() > 0


TRACED = {"plain": {}, "indices": {"conv_state_indices": torch.tensor([2, -1, 0], dtype=torch.int32)}}


@pytest.mark.parametrize("options", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("grad", [False, True])
def test_updates_compile_into_one_graph(options, grad):
    x, weight, bias = tensors(1, 4)
    step = torch.compile(
        lambda x, state, weight: causal_conv1d_update(x, state, weight, bias, "silu", **options),
        fullgraph=True,
        backend="eager",
    )
    state = torch.randn(BATCH, DIM, 4)
    plain = state.clone()
    with torch.set_grad_enabled(grad):
        want = causal_conv1d_update(x, plain, weight, bias, "silu", **options)
        torch.testing.assert_close(step(x, state, weight), want)
    assert torch.equal(state, plain)


def test_sequences_compile_into_one_graph():
    x, weight, bias = tensors(6, 4)
    seq_idx = torch.tensor([[0] * 6, [0, 0, 1, 1, 2, 2], [-1, -1, 3, 4, 4, -1]])
    packed = torch.compile(
        lambda x, seq_idx: causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(packed(x, seq_idx), causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx))


def test_the_meta_device():
    """Shapes without values, also where values say which rows change and where sequences end."""
    x, weight, bias = (t.to("meta") for t in tensors(6, 4))
    state, seq_idx = (
        torch.empty(BATCH + 2, DIM, 4, device="meta"),
        torch.empty(BATCH, 6, dtype=torch.int, device="meta"),
    )
    assert causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx).shape == x.shape
    for options in TRACED.values():
        indices = {name: value.to("meta") for name, value in options.items()}
        rows = state if options else state[:BATCH]
        assert causal_conv1d_update(x, rows, weight, bias, **indices).shape == x.shape


# ------------------------------------------------------------------------------------------ activations and versions


def test_the_activation_in_its_older_places():
    x, weight, bias = tensors(6, 4)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]] * BATCH, dtype=torch.int32)
    want = causal_conv1d_fn(x, weight, bias, activation="silu")
    assert torch.equal(causal_conv1d_fn(x, weight, bias, "silu"), want)  # version 1.0
    assert torch.equal(causal_conv1d_fn(x, weight, bias, None, "swish"), want)  # version 1.1
    assert torch.equal(
        causal_conv1d_fn(x, weight, bias, seq_idx, "silu"),
        causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation="silu"),
    )
    assert torch.equal(causal_conv1d_ref(x, weight, bias, "silu"), want)
    assert torch.equal(CausalConv1dFn.apply(x, weight, bias, None, None, False, None, "silu"), want)
    assert torch.equal(
        causal_conv1d_ref(x, weight, bias, activation="silu", seq_idx=seq_idx),
        causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu"),
    )
    for function in (causal_conv1d_fn, causal_conv1d_ref):
        with pytest.raises(TypeError, match="activation was given twice, as 'silu' by position and as 'swish' by name"):
            function(x, weight, bias, "silu", activation="swish")


def test_activations_of_transformers():
    """Its models pass `hidden_act`; padding stays 0 for activations that are not 0 there."""
    activations = pytest.importorskip("transformers.activations", reason="the extra 'test' installs transformers")
    x, weight, bias = tensors(6, 4)
    for name in ("gelu", "relu2", "sigmoid"):
        want = activations.ACT2FN[name](oracle(x, weight, bias))
        torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation=name), want)
        step = causal_conv1d_update(x, torch.zeros(BATCH, DIM, 3), weight, bias, name)
        torch.testing.assert_close(step, want)
    padded = torch.full((BATCH, 6), -1, dtype=torch.int32)
    assert not causal_conv1d_fn(x, weight, bias, padded, activation="sigmoid").any()
    rows = torch.tensor([-1, -1, -1])
    assert not causal_conv1d_update(x, torch.zeros(BATCH, DIM, 3), weight, bias, "sigmoid", None, rows).any()


def test_those_activations_are_refused_without_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.activations", raising=False)
    x, weight, bias = tensors(6, 4)
    for call in (
        lambda: causal_conv1d_fn(x, weight, bias, activation="gelu"),
        lambda: causal_conv1d_update(x, torch.zeros(BATCH, DIM, 3), weight, bias, "gelu"),
    ):
        with pytest.raises(ValueError, match="got 'gelu'"):
            call()


def test_half_precision_keeps_its_dtype():
    x, weight, bias = (t.bfloat16() for t in tensors(9, 4))
    got = causal_conv1d_fn(x, weight, bias, activation="silu")
    assert got.dtype == torch.bfloat16
    want = oracle(x.float(), weight.float(), bias.float(), silu=True)
    assert (got.float() - want).abs().max() < 0.02 * want.abs().max()


def test_names():
    assert package.__version__ == "1.7.0" and set(package.__all__) <= set(dir(package))
