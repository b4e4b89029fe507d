"""The gradient of an embedding, the CUDA kernel run on the processor."""

from __future__ import annotations

import pytest
import torch
from emulation import emulate

from anymamba.kernels.embedding_gradient import cuda

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

CHUNK = cuda.CHUNK
RUNS = {
    "one token": [1],
    "one id": [5 * CHUNK + 3],
    "one id of more chunks than are read at once": [40 * CHUNK],
    "every token its own": [1] * 200,
    "runs that end with a chunk": [CHUNK, 2 * CHUNK, 0, CHUNK, CHUNK // 2, CHUNK // 2],
    "runs that begin one after": [CHUNK + 1, CHUNK, CHUNK, 1],
    "runs that begin one before": [CHUNK - 1, CHUNK, 3 * CHUNK, 2],
    "ids without tokens": [0, 0, 70, 0, 130, 3, 0],
    "exactly what is read at once": [CHUNK // 2, CHUNK // 2 + 16 * CHUNK, 17 * CHUNK, 9],
}
"""How many tokens each id has."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)


def check(dy: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """The error of a float32 sum grows with the sum of the sizes."""
    found = cuda.sums(dy, ids, vocab)
    assert found.dtype == torch.float32 and found.shape == (vocab, dy.shape[-1])
    wide, rows = dy.double().reshape(-1, dy.shape[-1]), ids.reshape(-1)
    wanted, sizes = (torch.zeros(vocab, dy.shape[-1]).double().index_add(0, rows, x) for x in (wide, wide.abs()))
    assert ((found - wanted).abs() <= 100 * torch.finfo(torch.float32).eps * sizes).all()
    return found


def shuffled(runs: list[int], seed: int = 0) -> torch.Tensor:
    ids = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("width", [1, 4, 6, 36])
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_sums(runs, dtype, width):
    ids = shuffled(runs)
    check(torch.randn(len(ids), width).to(dtype), ids, len(runs))


@pytest.mark.parametrize("backwards", [False, True])
def test_lanes_in_either_order(backwards, monkeypatch):
    dy, ids = torch.randn(1000, 20), shuffled([300, 1, 0, 699])
    wanted = cuda.sums(dy, ids, 4)
    monkeypatch.setattr(emulate.Kernel, "backwards", backwards)
    assert cuda.sums(dy, ids, 4).equal(wanted)


@pytest.mark.parametrize("vocab", [256, 257, 1 << 15, (1 << 15) + 1])
def test_every_key(vocab):
    """The largest id of a vocabulary fits its key."""
    ids = torch.tensor([vocab - 1, 0, vocab // 2, vocab - 1, vocab // 2 - 1])
    check(torch.randn(5, 8), ids, vocab)


def test_parts_of_wider_rows_and_leading_dimensions():
    wide, ids = torch.randn(3, 100, 41), shuffled([100, 120, 80]).view(3, 100)
    for part in (wide[..., 4:36], wide[..., 1:33], wide[..., ::2]):
        assert check(part, ids, 3).equal(check(part.contiguous().flatten(0, 1), ids.flatten().int(), 3))
    check(torch.ones(()).expand(3, 100, 8), ids, 3)


def test_tokens_are_added_in_their_order():
    """Small numbers are lost one by one after the large one, and not before it."""
    dy, ids = torch.tensor([2.0**24, 1, 1, 1]), torch.tensor([1, 0, 1, 0, 1, 1])
    assert cuda.sums(dy[:, None], torch.zeros(4).long(), 1).item() == 2**24
    assert cuda.sums(dy.flip(0)[:, None], torch.zeros(4).long(), 1).item() == 2**24 + 4
    mixed = torch.tensor([2.0**24, 5, 1, 6, 1, 1])
    assert cuda.sums(mixed[:, None], ids, 2).flatten().tolist() == [11, 2**24]
    assert cuda.sums(mixed.flip(0)[:, None], ids.flip(0), 2).flatten().tolist() == [11, 2**24 + 4]
