"""Checkpoints that several processes write: read by any number of them, without pickles, and never half."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anymamba.training.checkpoint import PICKLES, checkpoint_folder, load_checkpoint
from tests.training.parallel import cases
from tests.training.parallel.ranks import Pool

ALONE, TWO, FOUR = {"dp_shard": 1}, {"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of the same step, by the number of processes that wrote them."""
    folders = {}
    for size, sizes in ((2, TWO), (4, FOUR)):
        run = tmp_path_factory.mktemp(f"of-{size}")
        pool.run(size, cases.save, run, 7, sizes)
        folders[size] = checkpoint_folder(run, 7)
    run = tmp_path_factory.mktemp("of-1")
    cases.save_one(run, 7)
    folders[1] = checkpoint_folder(run, 7)
    return folders


def close(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("writers", [2, 4])
def test_one_process_reads_it_whole(saved: dict[int, Path], writers: int) -> None:
    tensors, values = load_checkpoint(saved[writers])
    want, _ = load_checkpoint(saved[1])
    assert values["step"] == 7
    ours = {name for name in tensors if not name.startswith("random.")}
    close({n: tensors[n] for n in ours}, {n: t for n, t in want.items() if not n.startswith("random.")})
    randoms = [tensors[name] for name in sorted(tensors.keys() - ours)]
    assert len({tuple(t.tolist()) for t in randoms}) == writers, "each rank has a random state of its own"


@pytest.mark.parametrize(("writers", "readers", "sizes"), [(4, 2, TWO), (1, 4, FOUR), (2, 4, FOUR), (4, 4, FOUR)])
def test_another_number_of_processes_reads_it(
    pool: Pool, saved: dict[int, Path], writers: int, readers: int, sizes: dict[str, int]
) -> None:
    want, _ = load_checkpoint(saved[writers])
    for rank, (tensors, rows, random) in enumerate(pool.run(readers, cases.load, saved[writers], sizes)):
        assert all(torch.equal(tensor, want[name]) for name, tensor in tensors.items())
        assert rows == list(range(rank * 4 // readers, (rank + 1) * 4 // readers)), "rows of the carried states"
        name = "random.torch" if rank == 0 else f"random.torch.rank-{rank}"
        assert name not in want or torch.equal(random, want[name])


def test_it_has_no_pickle(saved: dict[int, Path]) -> None:
    names = sorted(path.name for path in saved[4].iterdir())
    assert names == [
        "anymamba_manifest.json",
        *(f"shard-0000{i}-model-00001-of-00001.safetensors" for i in range(1, 5)),
        "state.json",
    ]
    assert not [name for name in names if name.endswith(PICKLES)]
