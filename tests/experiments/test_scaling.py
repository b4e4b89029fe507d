"""Scaling laws: equal parameters, the best rate, fitted laws, thresholds and tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anymamba.experiments import load_experiment
from anymamba.experiments.scaling.arms import ARCHITECTURES, BASES, SWEPT, config_of, sweep_names
from anymamba.experiments.scaling.findings import arms_of, fitted, points
from anymamba.lab.byte_windows import fixed_windows, random_windows
from anymamba.lab.experiment import Context
from anymamba.lab.language import (
    best_of,
    best_rate,
    losses,
    n_parameters,
    share_of_peak,
    speed_table,
    training_flops,
    with_parameters,
)
from anymamba.lab.learning import batch_generator
from anymamba.lab.saving import SUFFIX, Saving
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from tests.experiments.conftest import made_up, rows, verdicts

EXPERIMENT = load_experiment("scaling")
BEHIND = {"mamba": 0.0, "transformer": 0.005, "h3": 0.05, "hyena": 0.06}


def on_a_law(behind: dict[str, float] | None = None, scale: str = "gpu"):
    """Mamba on a power law of its parameters, the others some nats above it, the best rate the second."""
    base, values = BASES[scale], {}
    for arm in EXPERIMENT.arms(scale):
        name, size, *rest = arm.name.split("-")
        n = n_parameters(config_of("mamba", next(s for s in base.sizes if s.name == size), base.window))
        worse = 0.1 if rest[:1] and rest[0].startswith("rate") and arm.name != sweep_names(base, name)[1] else 0.0
        values[arm.name] = [
            {
                "validation_loss": 3 * n**-0.08 + (behind or BEHIND)[name] + worse,
                "parameters": n,
                "flops_per_byte": 6.0 * n,
                "read_bytes": 20 * n,
                "learning_rate": arm.settings.optimization.learning_rate,
                "tokens_per_second": 1e6,
            }
        ] * arm.seeds
    return made_up(EXPERIMENT, scale, values)


@pytest.mark.parametrize("scale", BASES)
def test_parameters_agree_within_three_percent(scale):
    base = BASES[scale]
    for size in base.sizes:
        counts = [n_parameters(config_of(name, size, base.window)) for name in ARCHITECTURES]
        assert max(counts) <= 1.03 * min(counts), (size, counts)


def test_parameters_are_those_of_the_model_and_too_few_are_refused():
    config = config_of("h3", BASES["toy"].sizes[0], 16)
    assert n_parameters(config) == LanguageModel(config).n_parameters()
    with pytest.raises(ValueError, match="must have 100 parameters with its MLPs, got"):
        with_parameters(config, 100)


def test_operations_of_a_training_are_six_for_each_parameter_of_a_product():
    config = ModelConfig(d_model=64, n_layers=4, vocab_size=256, mixers=("mlp",))
    products = 6 * n_parameters(config)
    assert products <= training_flops(config, 32) <= 1.05 * products
    logits = 6 * config.d_model * config.padded_vocab_size
    assert training_flops(config, 32, 0.25) == pytest.approx(training_flops(config, 32) - 0.75 * logits)


def test_the_rate_is_that_of_the_best_arm():
    results, names = on_a_law(), sweep_names(BASES["gpu"], "mamba")
    context = Context(torch.device("cpu"), 0, lambda *told: None, finished=lambda: results)
    assert best_rate(names, context) == 4e-3
    without = replace(results, records=tuple(r for r in results.records if r.arm != names[2]))
    with pytest.raises(ValueError, match=f"run {names[2]} first"):
        best_rate(names, replace(context, finished=lambda: without))
    with pytest.raises(ValueError, match="first"):
        best_rate(names, replace(context, finished=None))


def test_the_swept_size_has_the_best_rate_and_a_second_seed():
    results = on_a_law()
    assert arms_of(results, "mamba", SWEPT) == ["mamba-3m-rate4", "mamba-3m"]
    assert arms_of(results, "mamba", 0) == ["mamba-1m"] and len(results.of("mamba-1m")) == 2
    partial = replace(results, records=tuple(r for r in results.records if r.arm != "mamba-3m-rate8"))
    assert arms_of(partial, "mamba", SWEPT) == ["mamba-3m"]


def test_a_law_is_found_with_its_error():
    law = fitted([(10.0, 2.0), (100.0, 1.0), (1000.0, 0.5)])
    assert law is not None and law(1e4) == pytest.approx(0.25) and law.error == pytest.approx(0, abs=1e-9)
    noisy = fitted([(10.0, 2.1), (100.0, 1.0), (1000.0, 0.5)])
    assert noisy is not None and noisy.error is not None and noisy.error > 0.001
    assert fitted([(10.0, 1.0)]) is None and fitted([(10.0, 1.0), (20.0, 1.0)]).error is None


def test_thresholds_hold_on_a_law_and_fail_off_it():
    assert verdicts(EXPERIMENT, on_a_law()) == ["holds"] * 4
    for name, nats, place in (("transformer", -0.02, 0), ("h3", 0.01, 1), ("hyena", 0.0, 2)):
        found = verdicts(EXPERIMENT, on_a_law({**BEHIND, name: nats}))
        assert found[place] == "fails" and found.count("holds") == 3
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {})) == ["not judged"] * 4


def test_a_diverged_arm_is_left_out():
    results = on_a_law()
    values = {
        r.arm: [dict(r.values, validation_loss=None if r.arm == "h3-7m" else r.values["validation_loss"])]
        for r in results.records
    }
    broken = made_up(EXPERIMENT, "gpu", values)
    assert len(points(broken, "h3")) == 2 and verdicts(EXPERIMENT, broken)[1] == "holds"


def test_tables_and_the_share_of_the_peak():
    results = on_a_law()
    sections = EXPERIMENT.sections(results)
    table = rows(sections["Loss by size"])
    assert [row[0] for row in table] == ["1m", "3m", "7m", "19m"] and table[3][3] == ""
    assert [float(row[5]) for row in table] == pytest.approx([0.005] * 4)
    assert len(rows(sections["Rates"])) == 12 and len(rows(sections["Rows of 8,192"])) == 2
    assert len(rows(sections["Power laws"])) == 4
    record = results.of("mamba-7m")[0]
    assert share_of_peak(record) is None
    expected = 6 * record.values["parameters"] * 1e6 / 989e12
    assert share_of_peak(replace(record, machine="NVIDIA H200, Linux")) == pytest.approx(expected)


def test_the_share_of_the_peak_is_a_mean_over_the_seeds_as_the_speed_is():
    """Seeds that shared a GPU are slower."""
    values = on_a_law().of("mamba-1m")[0].values
    results = made_up(EXPERIMENT, "gpu", {"mamba-1m": [values | {"tokens_per_second": n} for n in (1e6, 3e6)]})
    records = [replace(record, machine="NVIDIA H200, Linux") for record in results.records]
    found = next(row for row in rows(speed_table(replace(results, records=records))) if row[0] == "mamba-1m")
    shares = [share_of_peak(record) for record in records]
    assert found[6:] == ["2,000,000", f"{100 * sum(shares) / 2:.1f}"]
    assert found[7] != f"{100 * shares[0]:.1f}"


def test_windows_end_documents_at_the_separator_and_are_the_bytes():
    text = torch.tensor([5, 6, 0, 7, 8, 9], dtype=torch.uint8)
    ids, labels = fixed_windows(text, 3, 3, separator=0)
    assert ids.tolist() == [[5, 6, 256], [6, 256, 7], [256, 7, 8]] and labels.tolist()[0] == [6, 256, 7]
    context = Context(torch.device("cpu"), 3, lambda *told: None)
    make = random_windows(text, 2)
    ids, labels = make(batch_generator(context), 50)
    assert ids.shape == (50, 2) and set(ids[:, 0].tolist()) == {5, 6, 0, 7}
    assert torch.equal(make(batch_generator(context), 50)[0], ids)


def test_an_arm_that_needs_books_says_so():
    with pytest.raises(ValueError, match="give the folder with their files with --data"):
        EXPERIMENT.measure(EXPERIMENT.arms("gpu")[0].settings, Context(torch.device("cpu"), 0, lambda *told: None))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_kept_model_lies_beside_the_results_in_bfloat16(tmp_path, name):
    settings = next(arm.settings for arm in EXPERIMENT.arms("toy") if arm.name.startswith(f"{name}-d112-rate"))
    saving = Saving(tmp_path / f"{name}-seed0{SUFFIX}", {})
    context = Context(torch.device("cpu"), 0, lambda *told: None, saving=saving)
    values = EXPERIMENT.measure(replace(settings, keep=True), context)
    model = LanguageModel.from_pretrained(tmp_path / f"{name}-seed0")
    assert model.n_parameters() == values["parameters"] and model.embedding.weight.dtype == torch.bfloat16
    assert (tmp_path / f"{name}-seed0" / "tokenizer.json").is_file()


def test_a_seed_that_two_arms_have_counts_once():
    """The second seed of the best rate is that of the arm with the size's name."""
    results = on_a_law()
    again = [replace(r, seed=1) for r in results.records if r.arm == sweep_names(BASES["gpu"], "mamba")[1]]
    more = replace(results, records=(*results.records, *again))
    arms = arms_of(more, "mamba", SWEPT)
    assert len(losses(more, arms)) == len(losses(results, arms)) == 2
    assert len(losses(more, arms[:1])) == 2


def test_later_seeds_do_not_change_the_rate():
    """Other sizes have been trained with the best rate of the first seeds."""
    results, other = on_a_law(), sweep_names(BASES["gpu"], "mamba")[0]
    lucky = [replace(r, seed=1, values=r.values | {"validation_loss": 0.1}) for r in results.records if r.arm == other]
    assert (
        lucky
        and best_of(replace(results, records=(*results.records, *lucky)), sweep_names(BASES["gpu"], "mamba"))
        == (sweep_names(BASES["gpu"], "mamba")[1])
    )
