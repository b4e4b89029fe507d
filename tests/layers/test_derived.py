"""What steps keep of their weights while a stream runs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import anymamba
from anymamba.generation.generate import stream
from anymamba.layers.s6 import SSMParameters
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.derived import DerivesTensors, KeptTensors

MIXERS = ("mamba", "s4", "s4d", "s6", "h3-s4d", "mamba-s4")


def small(mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=11, mixers=(mixer,))).eval()


@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_with_kept_tensors_are_those_without(mixer):
    model = small(mixer)
    plain = kept = model.init_state(2)
    context = KeptTensors(model)
    with torch.inference_mode():
        for token in ([1, 2], [3, 4], [5, 6]):
            ids = torch.tensor(token)
            logits, plain = model.step(ids, plain)
            with context:
                again, kept = model.step(ids, kept)
            torch.testing.assert_close(again, logits, rtol=0, atol=0)


@pytest.mark.parametrize("context", [nullcontext(), anymamba.backend("portable")], ids=["best", "block by block"])
def test_A_is_computed_once_a_stream(monkeypatch, context):
    model, calls = small("mamba"), []
    compute = SSMParameters.A
    monkeypatch.setattr(SSMParameters, "A", lambda self: calls.append(self) or compute(self))
    counts = []
    with context:
        for n_tokens in (2, 6):
            calls.clear()
            assert len(list(stream(model, [[1, 2, 3]], max_new_tokens=n_tokens))) == n_tokens
            counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("change", ["in place", "new tensor"])
def test_a_change_of_the_weights_between_steps_is_seen(change):
    model = small("mamba")
    state, ids, context = model.init_state(1), torch.tensor([1]), KeptTensors(model)
    with torch.no_grad():
        with context:
            model.step(ids, state)
        for module in model.modules():
            if isinstance(module, SSMParameters):
                if change == "in place":
                    module.A_log.add_(0.5)
                else:
                    module.A_log = torch.nn.Parameter(module.A_log + 0.5)
        state = model.step(ids, state).state
        expected = model.step(ids, state).logits
        with context:
            torch.testing.assert_close(model.step(ids, state).logits, expected, rtol=0, atol=0)


def test_nothing_is_kept_outside_the_context():
    model = small("mamba")
    with torch.no_grad():
        next(stream(model, [[1]], max_new_tokens=3))
    assert all(m._kept is None for m in model.modules() if isinstance(m, DerivesTensors))
