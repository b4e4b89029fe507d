"""Learning a task of tokens: the score of right and wrong predictors, the streams, and the optimiser behind them."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from anymamba.lab.experiment import Context
from anymamba.lab.learning import Score, Source, build_model, evaluate, finite, fixed_set, learn
from anymamba.lab.optimization import Optimization, TrainingStep, build_optimizer, set_rates
from anymamba.lab.saving import SUFFIX, OutOfTime, Saving
from anymamba.models.config import ModelConfig

SYMBOLS = 6


class Says(nn.Module):
    """A model whose logits at each position say what `answer` makes of the token ids."""

    config = SimpleNamespace(vocab_size=SYMBOLS)

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def hidden(self, ids):
        return 20.0 * nn.functional.one_hot(self.answer(ids), 8).float(), None

    def logits(self, x):
        return x


def make(generator: torch.Generator, rows: int):
    """The answer, at the last three of eight positions, is the token itself."""
    ids = torch.randint(0, SYMBOLS, (rows, 8), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, 5:] = ids[:, 5:]
    return ids, labels


def context(seed: int = 0) -> Context:
    return Context(torch.device("cpu"), seed, lambda *told: None)


CPU = torch.device("cpu")


def test_a_perfect_predictor():
    score = evaluate(Says(lambda ids: ids), fixed_set(make, 20, CPU), rows=7)
    assert (score.tokens, score.sequences, score.n_tokens, score.n_sequences) == (1, 1, 60, 20)
    assert score.loss < 1e-6


def test_a_wrong_predictor():
    score = evaluate(Says(lambda ids: (ids + 1) % SYMBOLS), fixed_set(make, 20, CPU))
    assert (score.tokens, score.sequences) == (0, 0)
    assert score.loss == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_predictor_that_errs_at_one_position_of_some_rows(rows):
    def answer(ids):
        wrong = ids.clone()
        wrong[:, 6] = torch.where(ids[:, 0] < 3, ids[:, 6], (ids[:, 6] + 1) % SYMBOLS)
        return wrong

    ids, labels = fixed_set(make, 50, CPU)
    good = int((ids[:, 0] < 3).sum())
    score = evaluate(Says(answer), (ids, labels), rows)
    assert 0 < good < 50
    assert score.sequences == good / 50 and score.tokens == (100 + good) / 150


def test_rows_without_labels_do_not_count():
    ids, labels = fixed_set(make, 10, CPU)
    labels[:4] = -100
    score = evaluate(Says(lambda ids: ids), (ids, labels))
    assert (score.sequences, score.n_sequences, score.n_tokens) == (1, 6, 18)
    with pytest.raises(ValueError, match="all labels are -100"):
        evaluate(Says(lambda ids: ids), (ids, torch.full_like(labels, -100)))


def test_padding_of_the_vocabulary_is_never_an_answer():
    class Beyond(Says):
        def logits(self, x):
            return x + 100 * (torch.arange(8) >= SYMBOLS)

    assert evaluate(Beyond(lambda ids: ids), fixed_set(make, 5, CPU)).tokens == 1


def test_evaluation_keeps_the_mode_and_makes_no_graph():
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    for training in (True, False):
        model.train(training)
        evaluate(model, fixed_set(make, 4, CPU))
        assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_the_fixed_set_is_one_and_training_sees_what_the_seed_says():
    assert torch.equal(fixed_set(make, 9, CPU)[0], fixed_set(make, 9, CPU)[0])
    assert not torch.equal(fixed_set(make, 9, CPU)[0], fixed_set(make, 9, CPU, seed=5)[0])

    def seen(on: Context, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        batches = []

        def spied(source, rows):
            batches.append(make(source, rows))
            return batches[-1]

        model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), on)
        learn(model, Optimization(2, 4, 1e-3), spied, fixed_set(make, 4, CPU), on, every=2, generator=generator)
        return [ids for ids, _ in batches]

    first, same, other = (seen(context(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, same)) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], fixed_set(make, 4, CPU)[0])
    source = torch.Generator().manual_seed(0)
    assert all(map(torch.equal, [*seen(context(), source), *seen(context(), source)][:2], first))


def test_learning_an_easy_task():
    torch.manual_seed(0)
    model = build_model(ModelConfig(d_model=16, n_layers=1, vocab_size=SYMBOLS), context())
    told = []
    on = Context(CPU, 0, lambda *words: told.append(words))
    values = learn(model, Optimization(45, 8, 1e-2), make, fixed_set(make, 32, CPU), on, every=20)
    assert [point[0] for point in values["curve"]] == [20, 40, 45]
    assert values["accuracy"] == values["curve"][-1][2] == 1 and values["sequence_accuracy"] == 1
    assert values["curve"][0][1] > values["curve"][2][1] > values["validation_loss"] > 0
    assert values["steps"] == 45 and values["parameters"] == model.n_parameters()
    assert told[-1][:2] == (45, 45) and "accuracy" in told[-1][2]


def test_enough_ends_the_learning():
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    validation = fixed_set(make, 4, CPU)
    values = learn(model, Optimization(50, 2, 1e-3), make, validation, context(), every=5, enough=lambda s: True)
    assert values["steps"] == 5 and len(values["curve"]) == 1


@pytest.mark.parametrize("stops", [(), (6,), (3, 2, 2)])
def test_evaluations_without_a_mistake_in_a_row_end_the_learning_also_across_a_stop(tmp_path, monkeypatch, stops):
    shares = iter([1.0, 0.99, 1.0, 1.0, 1.0])
    module = sys.modules[learn.__module__]
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Score(*[next(shares)] * 2, 0.0, 100, 100))
    how, values = Optimization(50, 2, 1e-3), None
    for steps in (*stops, None):
        model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
        path = tmp_path / "arm"
        saving = Saving(path, {}) if steps is None else Stopping(path, {}).due_after(steps)
        on = replace(context(), saving=saving)
        with suppress(OutOfTime):
            values = learn(model, how, make, fixed_set(make, 4, CPU), on, every=2, perfect_in_a_row=2, resumable=True)
    assert values["steps"] == 8 and [point[2] for point in values["curve"]] == [1.0, 0.99, 1.0, 1.0]


def test_a_loss_that_is_not_finite_is_none():
    assert [finite(x) for x in (1.5, math.inf, math.nan)] == [1.5, None, None]
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    nn.init.constant_(model.embedding.weight, math.nan)
    values = learn(model, Optimization(1, 2, 1e-3), make, fixed_set(make, 4, CPU), context(), every=1)
    assert values["validation_loss"] is None and values["curve"][0][1] is None


# ------------------------------------------------------------------------------------------------- optimising


def rates(config: Optimization, steps: list[int]) -> list[float]:
    """Of a usual parameter, whose peak is 2."""
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "rate": 1.0}], lr=1.0)
    found = []
    for step in steps:
        set_rates(optimizer, replace(config, learning_rate=2.0), step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_rates_of_warm_up_constant_and_cosine():
    constant = Optimization(10, 1, 1e-3, warmup_steps=4)
    assert rates(constant, [1, 2, 4, 5, 10]) == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = Optimization(12, 1, 1e-3, warmup_steps=4, cosine=True)
    assert rates(cosine, [2, 4, 8, 12]) == pytest.approx([1.0, 2.0, 1.0, 0.0])
    assert rates(Optimization(10, 1, 1e-3), [1, 10]) == [2.0, 2.0]
    to_a_rate = Optimization(12, 1, 1e-3, warmup_steps=4, cosine=True, final_rate=0.5)
    assert rates(to_a_rate, [2, 4, 8, 12]) == pytest.approx([1.0, 2.0, 1.25, 0.5])


@pytest.mark.parametrize(("kernel_rate", "peak"), [(1e-3, 1e-3), (5e-3, 3e-3)])
def test_groups_of_the_optimiser(kernel_rate, peak):
    model = build_model(ModelConfig(d_model=8, n_layers=2, vocab_size=8, mixers=("mamba", "s4d")), context())
    how = Optimization(1, 1, 3e-3, weight_decay=0.1, kernel_learning_rate=kernel_rate, betas=(0.5, 0.6), eps=1e-16)
    optimizer = build_optimizer(model, how)
    set_rates(optimizer, how, 1)
    assert {(g["betas"], g["eps"]) for g in optimizer.param_groups} == {((0.5, 0.6), 1e-16)}
    group = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    got = {name: group.pop(id(p)) for name, p in model.named_parameters()}
    assert not group and len(got) == len(list(model.parameters()))
    decayed, plain, kernel = (3e-3, 0.1), (3e-3, 0.0), (peak, 0.0)
    assert got["embedding.weight"] == got["blocks.0.mixer.in_proj.weight"] == decayed
    assert got["norm.weight"] == got["blocks.0.norm.weight"] == plain
    assert all(v == plain for n, v in got.items() if n.endswith(("A_log", "delta_bias")) and "blocks.0" in n)
    inner = {n: v for n, v in got.items() if n.startswith("blocks.1.mixer.inner")}
    assert inner and set(inner.values()) == {kernel}


def test_training_repeats_and_clips():
    def run(**options):
        torch.manual_seed(0)
        model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
        learn(model, Optimization(4, 2, 1e-2, **options), make, fixed_set(make, 4, CPU), context(), every=4)
        return model

    assert all(map(torch.equal, run().parameters(), run().parameters()))
    norms = [torch.cat([p.grad.flatten() for p in run(clip_norm=c).parameters()]).norm() for c in (1e-3, None)]
    assert norms[0] == pytest.approx(1e-3, rel=1e-3) and norms[1] > 0.1


# ------------------------------------------------------------------------------------------------------ resuming


class Stopping(Saving):
    """A saving that is due after some steps, and late at the last of them."""

    def due_after(self, steps: int) -> Saving:
        self.left = steps
        return self

    def is_due(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def is_late(self) -> bool:
        return self.left <= 0


def trained(path, stops=()) -> tuple[dict, list[torch.Tensor]]:
    """Seven steps of a model with a kernel, interrupted after these numbers of steps."""
    how = Optimization(7, 2, 1e-2, warmup_steps=3, cosine=True)
    for steps in (*stops, None):
        torch.manual_seed(0)
        model = build_model(ModelConfig(d_model=8, n_layers=2, vocab_size=SYMBOLS, mixers=("mamba", "s4d")), context())
        saving = Saving(path, {"a": [1]}) if steps is None else Stopping(path, {"a": [1]}).due_after(steps)
        on = replace(context(), saving=saving)
        try:
            values = learn(model, how, make, fixed_set(make, 4, CPU), on, every=3, resumable=True)
        except OutOfTime:
            continue
        return values, list(model.parameters())
    raise AssertionError("the last run has no deadline")


@pytest.mark.parametrize("stops", [(2,), (3, 1), (1, 1, 1, 1, 1, 1)])
def test_a_training_that_goes_on_equals_one_without_a_stop(tmp_path, stops):
    straight, weights = trained(tmp_path / "straight")
    resumed, same = trained(tmp_path / "resumed", stops)
    differs = {"training_seconds", "tokens_per_second"}
    assert {k: v for k, v in straight.items() if k not in differs} == {
        k: v for k, v in resumed.items() if k not in differs
    }
    assert all(map(torch.equal, weights, same))


def test_a_training_that_another_version_saved_is_refused(tmp_path):
    saving = Saving(tmp_path / "arm", {})
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    how = Optimization(2, 4, 1e-3)
    saving.write(model, build_optimizer(model, how), torch.Generator(), {"step": 1, "tokens": 32})
    with pytest.raises(ValueError, match="arm was written by another version; delete it to measure the arm"):
        learn(model, how, make, fixed_set(make, 4, CPU), replace(context(), saving=saving), every=1, resumable=True)


def test_sources_take_turns_also_across_a_stop(tmp_path):
    taken = []

    def of(rows: int):
        return Source(lambda generator, n: (taken.append(n), make(generator, n))[1], rows)

    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    how, saving = Optimization(20, 1, 1e-3), Saving(tmp_path / "arm", {}, deadline=0.0)
    late, values = replace(context(), saving=saving), None
    for _ in range(19):
        with suppress(OutOfTime):
            values = learn(model, how, [of(2), of(3), of(4)], fixed_set(make, 4, CPU), late, every=50, resumable=True)
    assert taken == ([2, 3, 4] * 7)[:19] and values is None


def test_the_speed_counts_the_tokens_of_all_sources(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("anymamba.lab.learning.time.perf_counter", lambda: float(next(clock)))
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    sources = [Source(make, rows) for rows in (2, 4)]
    values = learn(model, Optimization(30, 1, 1e-3), sources, fixed_set(make, 4, CPU), context(), every=50)
    assert values["tokens_per_second"] == 10 * 3 * 8  # ten steps of 3 rows of 8 in the mean, in one tick of the clock


@pytest.mark.parametrize("enough", [False, True])
def test_a_training_that_had_ended_is_not_trained_again(tmp_path, enough):
    def values_and_weights():
        torch.manual_seed(0)
        model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
        on, many = replace(context(), saving=Saving(tmp_path / "arm", {})), Optimization(12, 2, 1e-2)
        ends = {"enough": lambda score: enough, "resumable": True}
        return learn(model, many, make, fixed_set(make, 4, CPU), on, every=6, **ends), list(model.parameters())

    first, weights = values_and_weights()
    assert first["steps"] == (6 if enough else 12)
    again, same = values_and_weights()
    assert first == again and all(map(torch.equal, weights, same))


def test_the_time_of_earlier_runs_is_kept(tmp_path, monkeypatch):
    """In parts, too: an arm takes as long as all its runs."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    optimizer, source = build_optimizer(model, Optimization(1, 1, 1e-3)), torch.Generator()
    for run, before in ((0, 0.0), (1, 10.0), (2, 20.0)):
        saving = Saving(tmp_path / f"arm{SUFFIX}", {}, _started=now[0])
        now[0] += 5.0  # spent before the part begins
        part = saving.part("rate0")
        for one, seconds in ((saving, 0.0), (part, 5.0)):
            one.read(model, optimizer, source)
            now[0] += seconds
            one.write(model, optimizer, source, {"run": run})
        assert saving.seconds_before() == before, run


def test_parts_of_a_saving_have_files_of_their_own(tmp_path):
    saving = Saving(tmp_path / f"arm-seed0{SUFFIX}", {"a": 1}, deadline=5.0)
    parts = [saving.part(name) for name in ("rate0", "rate1")]
    assert [part.path.name for part in parts] == [f"arm-seed0.rate{i}{SUFFIX}" for i in (0, 1)]
    assert all((part.settings, part.deadline) == ({"a": 1}, 5.0) for part in parts)
    parts[0].path.write_text("state")
    saving.delete()
    assert not list(tmp_path.iterdir())


def test_a_saved_state_of_other_settings_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "arm"
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    optimizer, source = build_optimizer(model, Optimization(1, 1, 1e-3)), torch.Generator()
    Saving(path, {"a": 1}).write(model, optimizer, source, {"step": 1})
    assert Saving(path, {"a": 1}).read(model, optimizer, source) == {"step": 1}
    with pytest.raises(ValueError, match="other settings; delete"):
        Saving(path, {"a": 2}).read(model, optimizer, source)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read"):
        Saving(path, {"a": 1}).read(model, optimizer, source)
    Saving(path, {}).delete()
    assert Saving(path, {}).read(model, optimizer, source) is None


def rewrite(path, change) -> None:
    """Change the tensors of a state, with its values as they are."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("generator"), "generator is missing"),
        (lambda t: t.pop("model.embedding.weight"), "model.embedding.weight is missing"),
        (lambda t: t.update({"model.other": t.pop("model.embedding.weight")}), "model.embedding.weight is missing"),
        (lambda t: t.update({"model.other": torch.zeros(1)}), "model.other is unknown"),
        (lambda t: t.update({"model.embedding.weight": torch.zeros(1)}), r"model.embedding.weight must have shape \("),
        (lambda t: t.update(generator=torch.zeros(3, dtype=torch.uint8)), "RNG state"),
        (lambda t: t.update(generator=torch.zeros(3)), "RNG state"),
    ],
)
def test_a_saved_state_of_other_tensors_is_refused_and_changes_nothing(tmp_path, change, words):
    path = tmp_path / "arm"
    model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
    optimizer, source = build_optimizer(model, Optimization(1, 1, 1e-3)), torch.Generator()
    Saving(path, {}).write(model, optimizer, source, {"step": 1})
    rewrite(path, change)
    with torch.no_grad():
        model.embedding.weight.fill_(2.0)
    with pytest.raises(ValueError, match=rf"arm cannot be read \(.*{words}.*; delete .*arm to measure the arm"):
        Saving(path, {}).read(model, optimizer, source)
    assert bool((model.embedding.weight == 2).all())


def test_a_saving_is_due_after_its_interval_and_late_after_its_deadline(tmp_path):
    assert not Saving(tmp_path / "arm", {}).is_due() and Saving(tmp_path / "arm", {}, every=0).is_due()
    late = Saving(tmp_path / "arm", {}, deadline=0.0)
    assert late.is_late() and late.is_due() and not Saving(tmp_path / "arm", {}).is_late()


@pytest.mark.parametrize("count", [3, 5])
def test_logits_at_the_labels_alone_give_the_same_loss_and_gradients(count):
    ids, labels = fixed_set(make, 6, CPU)
    labels[0, 6] = -100
    found = []
    for of in (None, count):
        torch.manual_seed(0)
        model = build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context())
        asked, logits = [], model.logits
        model.logits = lambda x, asked=asked, logits=logits: (asked.append(x.shape), logits(x))[1]
        loss = TrainingStep(model, Optimization(1, 6, 1e-3))((ids, labels), 1, of)
        assert asked == ([] if of is None else [(6, count, 8)])
        found.append([loss, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_runs_products_under_autocast():
    seen = []

    class Spied(type(build_model(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS), context()))):
        def loss(self, ids, labels):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().loss(ids, labels)

    for precision, autocast in (("float32", False), ("bfloat16", True)):
        model = Spied(ModelConfig(d_model=8, n_layers=1, vocab_size=SYMBOLS))
        how = Optimization(1, 2, 1e-3, precision=precision)
        learn(model, how, make, fixed_set(make, 4, CPU), context(), every=1)
        assert seen.pop() is autocast and all(p.dtype == torch.float32 for p in model.parameters())
