"""DNA models by size: equal parameters, budgets, the best rate, thresholds and tables."""

from __future__ import annotations

import pytest

from anymamba.experiments import load_experiment
from anymamba.experiments.dna_size.arms import ARCHITECTURES, BASES, sweep, sweep_again
from anymamba.experiments.dna_size.findings import arms_of
from anymamba.lab.genome_models import config_of, paired
from anymamba.lab.language import n_parameters
from tests.experiments.conftest import made_up, measured, rows, verdicts

EXPERIMENT = load_experiment("dna-size")
BEHIND = {"mamba": 0.0, "hyena": 0.012, "transformer": 0.02}


def values_of(arm, loss):
    settings = arm.settings
    return {
        "validation_loss": loss,
        "block_losses": [loss - 0.01, loss + 0.01],
        "parameters": n_parameters(settings.model),
        "learning_rate": settings.optimization.learning_rate,
        "read_bases": 1 << 26,
        "tokens_per_second": 1e6,
        "training_seconds": 90.0,
        "peak_gib": 3.0,
        "recorded": True,
    }


def with_gaps(behind=BEHIND, scale="gpu"):
    """Mamba on a line of its sizes, the others some nats above it, the best rate the second."""
    base, values = BASES[scale], {}
    for arm in EXPERIMENT.arms(scale):
        name, size, *more = arm.name.split("-")
        rate = [word for word in more if word.startswith("rate")]
        index = [one.name for one in base.sizes].index(size)
        worse = 0.1 if rate and arm.name != list(sweep(base, name))[1] else 0.0
        values[arm.name] = [values_of(arm, 1.3 - 0.02 * index + behind[name] + worse)]
    return made_up(EXPERIMENT, scale, values)


@pytest.mark.parametrize("scale", BASES)
def test_parameters_agree_within_three_percent(scale):
    base = BASES[scale]
    for size in base.sizes:
        counts = [n_parameters(config_of(n, size.n_layers, size.d_model, base.window)) for n in ARCHITECTURES]
        assert max(counts) <= 1.03 * min(counts), (size, counts)


def test_sizes_are_the_papers():
    sizes = [n_parameters(config_of("mamba", s.n_layers, s.d_model, 1024)) for s in BASES["paper"].sizes]
    assert [round(n / 1e6, 1) for n in sizes] == [0.3, 0.7, 1.4, 3.5, 7.0, 19.3, 40.7]


def test_every_run_on_a_gpu_reads_64_million_bases():
    for arm in EXPERIMENT.arms("gpu"):
        how = arm.settings.optimization
        longer = 4 if arm.name.endswith("-longer") else 1
        assert how.steps * how.batch_size * arm.settings.window == longer << 26
        assert how.betas == (0.9, 0.95) and how.weight_decay == 0.1 and how.warmup_steps == how.steps // 10


def test_the_smallest_size_has_the_best_rate_and_a_second_seed():
    arms = {arm.name: arm for arm in EXPERIMENT.arms("gpu")}
    assert arms_of(with_gaps(), "mamba", 0) == ["mamba-1400k-rate4", "mamba-1400k"]
    assert arms["mamba-1400k"].settings.seed_offset == 1 and arms["mamba-3500k"].settings.seed_offset == 0
    assert set(arms["hyena-7000k"].settings.rate_of) == set(sweep(BASES["gpu"], "hyena"))


def test_the_largest_size_is_tried_at_other_rates_and_with_more_bases():
    arms, base = {arm.name: arm.settings for arm in EXPERIMENT.arms("gpu")}, BASES["gpu"]
    for name in ("mamba", "hyena"):
        rates = sweep_again(base, name)
        assert list(rates) == [f"{name}-7000k-rate1", f"{name}-7000k-rate4"]
        assert all(arms[arm].optimization.learning_rate == rate for arm, rate in rates.items())
        assert not any(arms[arm].rate_of for arm in rates) and arms[f"{name}-7000k-longer"].rate_of
    sections = EXPERIMENT.sections(with_gaps())
    assert len(rows(sections["Rates at the largest size"])) == 6
    table = rows(sections["With more bases"])
    assert [row[0] for row in table] == ["as above", "4 times as many"] and table[1][3] == "+0.0120 ± 0.0000"
    without = EXPERIMENT.sections(made_up(EXPERIMENT, "gpu", {}))
    assert without["Rates at the largest size"] == without["With more bases"] == ""


def test_thresholds():
    assert verdicts(EXPERIMENT, with_gaps()) == ["holds"] * 2
    assert measured(EXPERIMENT, with_gaps())[0] == pytest.approx([0.012] * 3)
    assert verdicts(EXPERIMENT, with_gaps({**BEHIND, "hyena": 0.004})) == ["fails", "holds"]
    assert verdicts(EXPERIMENT, with_gaps({**BEHIND, "transformer": -0.1})) == ["holds", "fails"]
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {})) == ["not judged"] * 2


def test_tables_and_the_error_over_blocks():
    sections = EXPERIMENT.sections(with_gaps())
    table = rows(sections["Loss by size"])
    assert [row[0] for row in table] == ["1400k", "3500k", "7000k"]
    assert table[0][4] == "+0.0120 ± 0.0000" and table[0][6] == "+0.012"  # log(2.959 / 2.925), as in the paper
    assert len(rows(sections["Rates"])) == 9 and rows(sections["Speed"])[0][4] == "1,000,000"
    arms = {arm.name: arm for arm in EXPERIMENT.arms("gpu")}
    one, other = (dict(values_of(arms["mamba-3500k"], 0.0), block_losses=own) for own in ([1.0, 2.0], [0.9, 1.7]))
    results = made_up(EXPERIMENT, "gpu", {"hyena-3500k": [one], "mamba-3500k": [other]})
    mean, error = paired(results, ["hyena-3500k"], ["mamba-3500k"])
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1)
    assert paired(results, ["hyena-3500k"], ["mamba-7000k"]) is None
