"""Steps that are queued before their tokens reach the CPU, as on a GPU: they change nothing but the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import SAMPLINGS, Client, alone, finish
from test_prompts import prompts_of

from anymamba.generation.engine import Engine
from anymamba.generation.generate import stream
from anymamba.generation.stepping import Stepper
from anymamba.parts.state import state_tensors


def run_ahead(monkeypatch) -> list[bool]:
    """Have steppers run ahead. The list grows with every step: whether it kept the states that it was given."""
    kept, call = [], Stepper.__call__

    def noted(self: Stepper, ids: Any, state: Any, *, reuse_state: bool = False) -> Any:
        kept.append(not reuse_state)
        return call(self, ids, state, reuse_state=reuse_state)

    monkeypatch.setattr(Stepper, "runs_ahead", lambda self, n_rows: True)
    monkeypatch.setattr(Stepper, "__call__", noted)
    return kept


@pytest.mark.parametrize("weights", [None, "float32"])
def test_a_batch_gives_the_same_tokens_and_states(mamba, weights, monkeypatch):
    model = mamba if weights is None else mamba.for_inference(weights)
    found = []
    for ahead in (False, True):
        kept = run_ahead(monkeypatch) if ahead else []
        prompts = prompts_of((3, 9, 1, 5), 37)
        steps = stream(model, prompts, max_new_tokens=30, eos_id=5, sampling=SAMPLINGS[1], seed=3)
        some = [next(steps) for _ in range(4)]
        between, rest = steps.state, list(steps)
        found.append((some + rest, *state_tensors((between, steps.state))))
        assert any(kept) is ahead
    without, with_steps_ahead = found
    assert {len(step.ids) for step in without[0]} > {4}  # rows have ended at different times
    assert without[0] == with_steps_ahead[0]
    for a, b in zip(without[1:], with_steps_ahead[1:], strict=True):
        assert torch.equal(a, b)


def test_no_step_is_queued_after_the_last_token(mamba, monkeypatch):
    kept = run_ahead(monkeypatch)
    list(stream(mamba, [[1, 2], [3]], max_new_tokens=6))
    assert kept == [True] * 5


def test_requests_come_and_go(mamba, monkeypatch):
    engine, clients = Engine(mamba, max_rows=5), []
    for i, prompt in enumerate(prompts_of((3, 40, 1, 17, 8, 2), 37)):
        options = {"sampling": SAMPLINGS[i % 3], "seed": i, "max_new_tokens": 3 + 5 * i, "eos_id": 5}
        wanted = alone(mamba, prompt, **options)
        with monkeypatch.context() as patch:
            kept = run_ahead(patch)
            clients.append((Client(engine, prompt=prompt, **options), wanted))
            for _ in range(i % 4):
                engine.step()
    with monkeypatch.context() as patch:
        kept = run_ahead(patch)
        finish(engine)
    assert any(kept)
    assert [client.ids[0] for client, _ in clients] == [wanted for _, wanted in clients]
