"""A sharded model has the losses and gradients of one process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.parallel import cases
from tests.training.parallel.ranks import Job, Pool

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"dp_shard": 1},
        {"dp_shard": 2},
        {"dp_shard": 4},
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_replicate": 2},
        {"dp_shard": 2, "cp": 2},
        {"dp_replicate": 2, "cp": 2},
    ],
    ids=lambda sizes: " x ".join(f"{name} {size}" for name, size in sizes.items()),
)
def test_gradients_are_those_of_one_process(pool: Pool, sizes: dict[str, int], dtype: torch.dtype) -> None:
    world_size = torch.Size(sizes.values()).numel()
    for found in pool.run(world_size, cases.compare_gradients, sizes, dtype, {}, {}):
        assert max(found) < TOLERANCE[dtype], f"errors of loss, gradients and norm: {found}"


HYBRID = {"mixers": ("attention", "mamba", "mlp")}


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"n_layers": 3}, {"reshard_after_forward": False}),
        ({}, {"activation_checkpointing": True}),
        ({"n_layers": 3}, {"activation_checkpointing": True, "blocks_per_unit": 2}),
        ({"n_layers": 3}, {"blocks_per_unit": 2}),
        ({}, {"blocks_per_unit": 1}),
        ({"tie_embeddings": False, "norm": "layernorm"}, {}),
    ],
    ids=["kept after forward", "recomputed", "two blocks, recomputed", "two blocks", "a block", "head of its own"],
)
def test_options_do_not_change_gradients(pool: Pool, options: dict, how: dict) -> None:
    for found in pool.run(2, cases.compare_gradients, {"dp_shard": 2}, torch.float64, options, how):
        assert max(found) < 1e-10, f"errors of loss, gradients and norm: {found}"


def test_accumulated_gradients_are_reduced_once(pool: Pool) -> None:
    """One reduction a unit, after the last batch: blocks of a unit share one, and the rest has one."""
    for found in pool.run(2, cases.compare_gradients, {"dp_shard": 2}, torch.float64, {}, {}, 3):
        assert max(found) < 1e-10, f"errors of loss, gradients and norm: {found}"
    assert pool.run(2, cases.count_reductions, 3, None) == [[0, 0, 2]] * 2
    assert pool.run(2, cases.count_reductions, 3, 1) == [[0, 0, 3]] * 2


def test_large_blocks_are_gathered_alone(pool: Pool) -> None:
    """Units have at most UNIT_BYTES of weights as they are gathered."""
    assert pool.run(1, cases.blocks_of_units, 4) == [[1, 1, 1, 1]]
    assert pool.run(1, cases.blocks_of_units, 2) == [[2, 2]]
    assert pool.run(1, cases.unit_error) == ["blocks_per_unit must be at least 1, got 0"]


def test_param_dtype_narrows_projections_only(pool: Pool) -> None:
    """A_log, D, the bias of the step, convolution and norm are float32 in storage, and where the scan reads them."""
    for inside, stored, dtype_of_A in pool.run(2, cases.dtypes_in_bfloat16):
        assert set(stored.values()) == {torch.float32}
        narrow = {name for name, dtype in inside.items() if dtype == torch.bfloat16}
        assert narrow == {f"mixer.{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
        assert dtype_of_A == torch.float32


def test_param_dtype_has_the_bits_of_gathering_in_float32(pool: Pool) -> None:
    """Autocast narrows the projections anyway; narrowing them before they are sent changes nothing."""
    [(loss, gradients), _] = pool.run(2, cases.bfloat16_loss, torch.bfloat16)
    [(want_loss, want), _] = pool.run(2, cases.bfloat16_loss, None)
    assert loss == want_loss
    assert [name for name in want if not torch.equal(gradients[name], want[name])] == []


def test_a_policy_that_narrows_the_wide_parameters_is_an_error(pool: Pool) -> None:
    for message in pool.run(2, cases.error_of_narrowed_parameters):
        assert message.startswith(
            "A_log must be float32 or wider, got torch.bfloat16, in which states would never fade;"
        )


def test_param_dtype_needs_autocast(pool: Pool) -> None:
    for message in pool.run(2, cases.loss_without_autocast):
        assert message.startswith("the projections are gathered in torch.bfloat16: run the model under torch.autocast(")


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}], ids=["tied", "untied"])
def test_a_model_made_on_the_meta_device_gets_the_weights_of_rank_0(pool: Pool, options: dict) -> None:
    assert pool.run(4, cases.through_the_meta_device, options) == [True] * 4


def test_compiled_blocks_train_alike(pool: Pool) -> None:
    compiled, eager = pool.run(2, cases.trained, True), pool.run(2, cases.trained, False)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)


def test_a_mesh_with_other_names_is_refused(pool: Pool) -> None:
    for message in pool.run(2, cases.mesh_error, ("tp",)):
        assert message == (
            "the dimensions of the mesh must be called dp_replicate, dp_shard, cp, got ('tp',); give init_device_mesh "
            "these names as mesh_dim_names"
        )


def test_the_loop_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "distributed.md").read_text(encoding="utf-8")
    block, *_ = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    job = Job(tmp_path, 2, cases.run_text, block)
    assert job.codes() == [0, 0], job.text(0) + job.text(1)
    assert job.text(0).splitlines()[-1] == job.text(1).splitlines()[-1], "the norm is that of all ranks"
