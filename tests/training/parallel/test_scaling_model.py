"""The model of the time of a step: it counts what the package sends and multiplies, and finds rates that made times."""

from __future__ import annotations

import dataclasses

import pytest

from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from benchmarks.scaling_model import Links, Rates, Step, fitted, links_of, seconds

RATES = Rates(scan=5.5e10, overhead=0.004, state_pass=0.3, visible=0.2)
LINKS = Links(inside=2.5e11, latency_inside=2.5e-5)


def found(rates: Rates) -> dict:
    """What `benchmarks.distributed` would write if the rates were the truth."""

    def row(tokens: int, size: int) -> dict:
        step = Step(preset("mamba-130m"), tokens, cp=size, recompute=True)
        return {"length": tokens, "seconds": seconds(step, rates, LINKS)["total"]}

    def parts(size: int) -> dict:
        data = Step(preset("mamba-370m"), 32768 * size, 16 * size, dp=size)
        return {
            "row": {"model": "mamba-130m", "half": row(1 << 16, size), "whole": row(1 << 17, size)},
            "data": {
                "model": "mamba-370m",
                "rows": 16,
                "length": 2048,
                "seconds": seconds(data, rates, LINKS)["total"],
            },
        }

    links = {"bytes_per_second": LINKS.inside, "latency": LINKS.latency_inside}
    return {"1": parts(1), "2": {**parts(2), "links": links}}


def test_a_fit_finds_the_rates() -> None:
    given = found(RATES)
    got = fitted(given, links_of(given, Links()))
    assert dataclasses.asdict(got) == pytest.approx(dataclasses.asdict(RATES), rel=1e-6)


def test_a_fit_sees_steps_that_are_bound_by_python() -> None:
    """Half a row takes as long as a whole one on two GPUs, and sharded rows take longer than all of their bytes."""
    rates = dataclasses.replace(RATES, visible=1.0, host=0.0028, host_exchange=0.0002)
    given = found(rates)
    assert given["2"]["row"]["whole"]["seconds"] < 1.3 * given["2"]["row"]["half"]["seconds"]
    got = fitted(given, links_of(given, Links()))
    assert dataclasses.asdict(got) == pytest.approx(dataclasses.asdict(rates), rel=1e-6)


def test_a_fit_without_one_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="a fit needs the parts row and data on one GPU, got \\['row'\\]; run both"):
        fitted({"1": {"row": found(RATES)["1"]["row"]}}, LINKS)


@pytest.mark.parametrize("name", ["mamba-130m", "mamba-370m", "mamba-2.8b"])
def test_parameters_are_counted(name: str) -> None:
    config = preset(name)
    assert Step(config, 1).parameters == pytest.approx(LanguageModel(config, device="meta").n_parameters(), rel=0.01)


def test_bytes_of_context_parallelism_do_not_depend_on_the_length() -> None:
    """A layer and row send 4 d_inner (2 d_state + 1) bytes to another rank, and the halo."""
    short, long = (Step(preset("mamba-130m"), tokens, cp=2).context_bytes for tokens in (1 << 12, 1 << 20))
    halo = 2 * 2 * 3 * 1536
    assert short == long == 24 * (4 * 1536 * (2 * 16 + 1) + halo)


def test_more_gpus_do_not_help_without_end() -> None:
    """With a row of one length, latency and the states of all parts grow with the ranks, and the scan shrinks."""
    times = [seconds(Step(preset("mamba-130m"), 1 << 17, cp=n), RATES, LINKS)["total"] for n in (1, 2, 8, 64, 1024)]
    assert times[0] > times[1] > times[2] and times[-1] > min(times)
