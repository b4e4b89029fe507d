"""How long requests wait for each other, with a model whose calls take a stated time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hash_model import HashModel
from test_engine import Client, finish
from test_prompts import prompts_of

from anymamba.generation.engine import ALONE, Engine
from anymamba.generation.scheduling.reading import LEAST_TOKENS

TOKEN, STEP = 1e-3, 0.02  # seconds


class TimedModel(HashModel):
    """Moves a clock by the time that its calls stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def forward(self, input_ids, *args, **options):
        self.now += TOKEN * input_ids.numel()
        return super().forward(input_ids, *args, **options)

    def step(self, *args):
        self.now += STEP
        return super().step(*args)


class TimedClient(Client):
    """Takes the time of each token, too."""

    def __init__(self, engine: Engine, model: TimedModel, **request) -> None:
        self.model, self.times = model, []
        self.begun = model.now
        super().__init__(engine, **request)

    def take(self, event) -> None:
        super().take(event)
        if len(self.times) < len(self.tokens):
            self.times.append(self.model.now)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@pytest.fixture
def model(monkeypatch) -> TimedModel:
    model = TimedModel()
    clock = SimpleNamespace(perf_counter=lambda: model.now)
    monkeypatch.setattr("anymamba.generation.engine.time", clock)
    monkeypatch.setattr("anymamba.generation.scheduling.reading.time", clock)
    return model


@pytest.mark.parametrize(
    ("longest_wait", "wanted"), [(0.04, 0.04), (1.0, 2.5 * STEP), (0.001, 1.5 * STEP)], ids=["stated", "most", "least"]
)
def test_no_running_row_waits_longer_than_stated(model, longest_wait, wanted):
    engine = Engine(model, longest_wait=longest_wait)
    row = TimedClient(engine, model, prompt=[1], max_new_tokens=10_000)
    for _ in range(50):
        engine.step()
    long = TimedClient(engine, model, prompt=prompts_of((2000,), 13)[0], max_new_tokens=1)
    while not long.ends:
        engine.step()
    assert max(row.gaps) <= max(wanted, STEP + LEAST_TOKENS * TOKEN) + 1e-9
    reading = sum(row.gaps) - STEP * len(row.gaps)
    assert reading == pytest.approx(2000 * TOKEN)
    assert sum(row.gaps[50:]) < 1.3 * reading * wanted / max(
        wanted - STEP, LEAST_TOKENS * TOKEN
    )  # the time is used for reading


def test_a_burst_of_prompts_is_read_quickly(model):
    engine = Engine(model, longest_wait=0.1)
    row = TimedClient(engine, model, prompt=[1], max_new_tokens=100)
    for _ in range(50):
        engine.step()
    begun = model.now
    burst = [TimedClient(engine, model, prompt=p, max_new_tokens=1) for p in prompts_of((100,) * 8, 13)]
    while not all(client.ends for client in burst):
        engine.step()
    assert max(row.gaps) <= 0.1 + 1e-9
    assert model.now - begun < 1.6 * 800 * TOKEN


def test_owners_get_equal_shares_of_reading(model):
    engine = Engine(model)
    greedy = [TimedClient(engine, model, prompt=p, owner="a", max_new_tokens=1) for p in prompts_of((3000,) * 5, 13)]
    engine.step()
    short, longer = (
        TimedClient(engine, model, prompt=p, owner="b", max_new_tokens=1) for p in prompts_of((200, 1000), 13)
    )
    finish(engine)
    assert short.times[0] - short.begun < 2 * 0.2 + 2 * ALONE
    assert longer.times[0] - longer.begun < 2 * 1.2 + 2 * ALONE
    assert max(client.times[0] for client in greedy) == pytest.approx(16.2, abs=0.3)


def test_prompts_of_one_owner_take_turns(model):
    engine = Engine(model)
    long = TimedClient(engine, model, prompt=prompts_of((5000,), 13)[0], max_new_tokens=1)
    engine.step()
    short = TimedClient(engine, model, prompt=[1, 2, 3], max_new_tokens=1)
    finish(engine)
    assert short.times[0] < 2 * ALONE + 0.1 < long.times[0]


def test_a_row_that_is_free_goes_to_the_owner_with_the_fewest_tokens(model):
    engine = Engine(model, max_rows=1)
    first, second = (TimedClient(engine, model, prompt=[1], owner="a", max_new_tokens=20) for _ in range(2))
    engine.step()
    other = TimedClient(engine, model, prompt=[1], owner="b", max_new_tokens=20)
    finish(engine)
    assert first.times[-1] < other.times[0] and other.times[-1] < second.times[0]
