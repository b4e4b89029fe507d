"""DNA models by length: budgets, slopes, null results, the longest row."""

from __future__ import annotations

from math import log2

import pytest

from anymamba.experiments import load_experiment
from anymamba.experiments.dna_length.arms import ARCHITECTURES, BASES, sweep
from anymamba.experiments.dna_length.findings import slope
from anymamba.lab.language import n_parameters
from tests.experiments.conftest import made_up, rows, verdicts
from tests.experiments.test_dna_size import values_of

EXPERIMENT = load_experiment("dna-length")
LONGEST = 1 << 20


def on_lines(mamba=-0.001, hyena=0.002, apart=0.0001):
    """Losses that change by so many nats a base for each doubling; blocks differ by `apart`."""
    base, values = BASES["gpu"], {}
    slopes = {"mamba": mamba, "hyena": hyena}
    for arm in EXPERIMENT.arms("gpu"):
        name, length, *rate = arm.name.split("-")
        worse = 0.1 if rate and arm.name != list(sweep(base, name))[1] else 0.0
        loss = 1.2 + slopes[name] * (log2(int(length)) - 10) + worse
        blocks = [loss - apart * log2(int(length)), loss + apart * log2(int(length))]
        values[arm.name] = [values_of(arm, loss) | {"block_losses": blocks, "steps": 64}]
    return made_up(EXPERIMENT, "gpu", values)


@pytest.mark.parametrize("scale", BASES)
def test_parameters_agree_within_three_percent(scale):
    counts = [n_parameters(arm.settings.model) for arm in EXPERIMENT.arms(scale)]
    assert max(counts) <= 1.03 * min(counts)


def test_every_length_reads_the_same_bases_in_the_same_steps():
    arms = EXPERIMENT.arms("gpu")
    for arm in arms:
        how, window = arm.settings.optimization, arm.settings.window
        assert how.steps * how.batch_size * window == 1 << 26
        assert arm.settings.checkpointing == (window == LONGEST)
        assert how.batch_size * window == (LONGEST if window == LONGEST else 1 << 17)
        assert "hyena" not in arm.name or arm.settings.model.hyena.max_length == window
    assert {arm.settings.window for arm in arms} == {1 << n for n in (10, 12, 14, 16, 17, 20)}
    assert not any(arm.name == f"hyena-{LONGEST}" for arm in arms)


def test_thresholds():
    assert slope(on_lines(), "mamba") == pytest.approx(-0.001)
    assert verdicts(EXPERIMENT, on_lines()) == ["holds", "holds"]
    assert verdicts(EXPERIMENT, on_lines(mamba=0.0003)) == ["holds", "holds"]  # 0.0018 nats above
    assert verdicts(EXPERIMENT, on_lines(mamba=0.0004)) == ["fails", "holds"]
    assert verdicts(EXPERIMENT, on_lines(hyena=-0.002)) == ["holds", "fails"]
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {})) == ["not judged"] * 2


def test_a_gain_within_its_error_is_a_null_result():
    for result, words in (
        (on_lines(), "longer rows help"),
        (on_lines(mamba=-0.0001), "a null result"),
        (on_lines(mamba=0.003), "longer rows make it worse"),
    ):
        told = EXPERIMENT.sections(result)["Is context used?"]
        assert words in told.partition("Hyena")[0] and "thousands of times more bases" in told


def test_tables_and_the_longest_row():
    sections = EXPERIMENT.sections(on_lines())
    table = rows(sections["Loss by length"])
    assert [row[:2] for row in table][::4] == [["2^10", "128"], ["2^17", "1"]]
    assert table[3][3].startswith("-0.0060 ± ") and table[3][4] == "-0.0090" and table[0][3] == ""
    assert "64 steps in 90 seconds" in sections["The longest row"] and "3.0 GiB" in sections["The longest row"]
    assert len(rows(sections["Rates"])) == len(rows(sections["Rates of longer rows"])) == 3 * len(ARCHITECTURES)
    assert {"mamba-65536-rate2", "hyena-65536-rate1"} < {arm.name for arm in EXPERIMENT.arms("gpu")}
    assert EXPERIMENT.sections(made_up(EXPERIMENT, "gpu", {}))["Rates of longer rows"] == ""
