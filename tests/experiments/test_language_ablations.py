"""Ablations of language models: what each arm changes, thresholds on the paper's numbers, ties, tables."""

from __future__ import annotations

from math import log

import pytest

from anymamba.experiments import load_experiment
from anymamba.experiments.language_ablations.arms import (
    A_INITS,
    BASES,
    LAYERS,
    LONGER,
    RANK,
    RATED,
    SELECTION,
    STATE,
    arm_of,
    arm_of_a,
    arm_of_rank,
    arm_of_selection,
    arm_of_state,
    at_rate,
    configs,
    is_in_tables,
    longer,
)
from anymamba.experiments.language_ablations.findings import close_arms, deviation
from anymamba.lab.language import n_parameters
from tests.experiments.conftest import made_up, rows, verdicts

EXPERIMENT = load_experiment("language-ablations")
TABLES = {
    **{arm_of(b, layer): ppl for b in LAYERS for layer, ppl in LAYERS[b].items()},
    **{arm_of_a(name): ppl for name, ppl in A_INITS.items()},
    **{arm_of_rank(name): ppl for name, ppl in RANK.items()},
    **{arm_of_selection(name): ppl for name, ppl in SELECTION.items()},
    **{arm_of_state(kind, n): ppl for kind in STATE for n, ppl in STATE[kind].items()},
}


def as_published(seeds: tuple[float, ...] = (0.0,), **changed: float):
    """The paper's losses, shrunk to nats a byte; each seed adds its number to all arms."""
    values = {}
    for arm in EXPERIMENT.arms("gpu"):
        loss = changed.get(arm.name.replace("-", "_"), log(TABLES.get(arm.name, 9.0)) / 4.2)
        common = {"parameters": 10, "learning_rate": 4e-3, "read_bytes": 10, "tokens_per_second": None}
        values[arm.name] = [{"validation_loss": loss + seed, **common} for seed in seeds]
    return made_up(EXPERIMENT, "gpu", values)


def test_every_cell_of_the_tables_is_an_arm():
    names = [arm.name for arm in EXPERIMENT.arms("gpu")]
    others = {"transformer", "mamba-mlp", "mamba-attention", *map(longer, LONGER)}
    others |= {at_rate(name, times) for name in RATED for times in RATED[name]}
    assert set(TABLES) | others == set(names) and len(names) == 54


def test_arms_that_read_more_show_how_gaps_grow():
    steps = {arm.name: arm.settings.optimization.steps for arm in EXPERIMENT.arms("gpu")}
    assert all(steps[longer(name)] == pytest.approx(6 * steps[name], abs=6) for name in LONGER)
    results = as_published(mamba_longer=0.5, mamba_real_longer=0.8, h3_s6_longer=0.6, h3_real_longer=0.7)
    found = rows(EXPERIMENT.sections(results)["With 6 times the bytes"])
    assert [row[2] for row in found[:2]] == ["+0.3000", "+0.1000"]
    assert [row[1] for row in found[:2]] == [f"{log(10.56 / 8.71) / 4.2:+.4f}", f"{log(10.34 / 8.95) / 4.2:+.4f}"]


def test_some_arms_learn_at_other_rates():
    arms = {arm.name: arm.settings for arm in EXPERIMENT.arms("gpu")}
    assert arms["h3-s6-rate-400"].optimization.learning_rate == 4 * arms["h3-s6"].optimization.learning_rate
    assert arms["h3-s6-rate-400"].model == arms["h3-s6"].model
    assert not any("rate" in arm.name for arm in EXPERIMENT.arms("cpu"))
    assert {name for name in arms if is_in_tables(name)} == set(configs(BASES["gpu"]))
    found = rows(EXPERIMENT.sections(as_published(mamba_rate_200=0.4))["At other rates"])
    assert len(found) == len(RATED) and found[0][0] == "Mamba block: S6"
    assert found[0][3] == found[0][5] == "0.4000" and found[0][2] == f"{log(8.71) / 4.2:.4f}"


@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_other_blocks_have_the_parameters_of_mamba(scale):
    found = configs(BASES[scale])
    wanted = n_parameters(found["mamba"])
    for name, config in found.items():
        if name.startswith(("h3-", "mamba-", "transformer")):
            assert n_parameters(config) == pytest.approx(wanted, rel=0.03), name


def test_arms_change_what_they_say():
    found = {name: config.mamba for name, config in configs(BASES["gpu"]).items()}
    chosen = {n: (o.selective_delta, o.selective_B, o.selective_C) for n, o in found.items()}
    assert chosen["selective-none"] == (False, False, False) and chosen["selective-b"] == (False, True, False)
    assert chosen["selective-c"] == (False, False, True) and chosen["selective-delta"] == (True, False, False)
    assert chosen["rank-none"] == (False, True, True) and chosen["constant-n4"] == (True, False, False)
    assert (found["selective-n2"].d_state, found["constant-n8"].d_state, found["rank-4"].dt_rank) == (2, 8, 4)
    assert {found[f"a-{name}"].A_init for name in ("complex", "constant", "random")} == {
        "s4d-lin",
        "constant",
        "random",
    }
    depth = configs(BASES["gpu"])["mamba-attention"]
    assert {"mamba", "attention"} == set(depth.layer_mixers) and depth.n_layers == 15


def test_the_papers_numbers_hold():
    assert verdicts(EXPERIMENT, as_published()) == ["holds"] * 8
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {})) == ["not judged"] * 8


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"h3_real": log(8.95) / 4.2}, 0),
        ({"mamba_hyena": log(8.7) / 4.2}, 1),
        ({"selective_none": log(10.0) / 4.2}, 2),
        ({"constant_n1": log(13.0) / 4.2}, 7),
    ],
)
def test_a_threshold_fails_where_an_arm_is_moved(changed, place):
    assert verdicts(EXPERIMENT, as_published(**changed))[place] == "fails"


def test_gaps_within_what_seeds_differ_by_are_ties():
    results = as_published(seeds=(-0.01, 0.01))
    assert deviation(results) == pytest.approx(0.02**0.5 / 10)
    assert verdicts(EXPERIMENT, results)[2:7] == ["tie"] * 4 + ["holds"]
    assert "are ties" in EXPERIMENT.sections(results)["Seeds"] and deviation(as_published()) is None


def test_arms_with_attention_are_pooled_apart():
    """They differ more, and would make ties of what the others tell apart."""
    results = as_published(seeds=(-0.01, 0.01))
    for record in results.of("transformer"):
        record.values["validation_loss"] *= 1 + 0.5 * record.seed
    assert deviation(results) == pytest.approx(0.02**0.5 / 10)
    assert deviation(results, with_attention=True) > 0.1
    assert "arms with attention" in EXPERIMENT.sections(results)["Seeds"]


def test_arms_close_to_a_neighbour_are_named_until_they_have_three_seeds():
    close = close_arms(as_published())
    assert {"h3-complex", "h3-real", "rank-1", "rank-2", "constant-n1"} <= set(close)
    assert {"mamba-mlp", "transformer"} <= set(close)  # they stand in table 6 as well
    assert "selective-none" not in close_arms(as_published(selective_none=1.0))
    assert not close_arms(as_published(seeds=(0.0, 0.0, 0.0)))


def test_tables_have_our_gaps_beside_the_papers():
    sections = EXPERIMENT.sections(as_published())
    sizes = {heading: len(rows(text)) for heading, text in sections.items() if heading.startswith("Table")}
    assert list(sizes.values()) == [11, 5, 4, 6, 10]
    none = rows(sections["Table 7: what is selective"])[0]
    assert none[0] == "none" and float(none[4]) == pytest.approx(0.227, abs=1e-3)
    assert float(none[3]) == pytest.approx(log(10.93 / 8.69) / 4.2, abs=0.01)
