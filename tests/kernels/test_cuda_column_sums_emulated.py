"""The sums of a matrix's columns, the CUDA kernel run on the processor."""

from __future__ import annotations

import struct

import pytest
import torch
from emulation import emulate

from anymamba.kernels.column_sums import cuda
from anymamba.runtimes.launching import aligned

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

WIDTHS = [1, 7, 8, 64, 128, 576, 1168, 1500]
ROWS = [1, 5, 1000, 5000]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)


def matrix(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: torch.Tensor) -> None:
    """The error of a float32 sum grows with the sum of the sizes; each number is in few of the sums of sums."""
    found, wide = cuda.sums(x), x.double().flatten(0, -2)
    assert found.dtype == torch.float32 and found.shape == x.shape[-1:]
    budget = 4 * torch.finfo(torch.float32).eps * wide.abs().sum(0)
    error = (found - wide.sum(0)).abs()
    assert (error <= budget).all(), f"error {error.max()}, budget {budget[error.argmax()]}"


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums(width, rows, dtype):
    check(matrix(rows, width, dtype))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("width", [3, 24, 300])
def test_lanes_in_either_order(width, backwards, monkeypatch):
    monkeypatch.setattr(emulate.Kernel, "backwards", backwards)
    check(matrix(700, width, torch.bfloat16))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_a_part_of_wider_rows(dtype):
    """Aligned or not, the order of the sums is the same."""
    wide = matrix(1000, 608, dtype)
    for start in (16, 5):
        part = wide[:, start : start + 576]
        assert aligned(part, 8) == (start == 16)
        check(part)
        assert cuda.sums(part).equal(cuda.sums(part.contiguous()))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_rows_that_begin_anywhere(dtype):
    """The rows of an odd stride, and dense rows that begin beside a multiple of 16 bytes."""
    check(matrix(300, 65, dtype)[:, :64])
    check(matrix(1, 300 * 64 + 1, dtype)[0, 1:].view(300, 64))


def test_leading_dimensions_and_lazy_layouts():
    x = matrix(6000, 40, torch.bfloat16)
    wanted = cuda.sums(x)
    assert cuda.sums(x.view(5, 300, 4, 40)).equal(wanted)
    swapped = x.view(5, 1200, 40).transpose(0, 1).contiguous().transpose(0, 1)
    assert not swapped.is_contiguous() and cuda.sums(swapped).equal(wanted)
    across = x.T.contiguous().T
    assert across.stride(-1) != 1 and cuda.sums(across).equal(wanted)
    assert cuda.sums(torch.ones((), dtype=torch.bfloat16).expand(300, 7, 40)).equal(torch.full((40,), 2100.0))
    assert cuda.sums(x[0]).equal(x[0].float())
    assert cuda.sums(torch._neg_view(x)).equal(-wanted)


def test_only_rows_that_lie_badly_are_read_number_by_number(monkeypatch):
    flags, launch = [], emulate.Kernel.launch

    def note(kernel, n_blocks, threads, shared, parameters, early=False):
        flags.append(struct.unpack(f"{len(parameters) // 8}q", parameters)[cuda.LAYOUT.place["aligned"]])
        launch(kernel, n_blocks, threads, shared, parameters, early)

    monkeypatch.setattr(emulate.Kernel, "launch", note)
    for width, start, wanted in ((64, 0, 1), (64, 8, 1), (64, 4, 0), (63, 0, 0)):
        flags.clear()
        cuda.sums(matrix(9, 80, torch.float16)[:, start : start + width])
        assert set(flags) == {wanted}


def test_the_same_bits_again():
    """Also from another call's memory, when the call is repeated from its plan."""
    x = matrix(5000, 72, torch.bfloat16)
    assert cuda.sums(x.clone()).equal(cuda.sums(x))


@pytest.mark.parametrize("rows", [1, 64, 65, 5000, 65536, 10_000_000])
@pytest.mark.parametrize("vectors", [1, 2, 15, 17, 72, 146, 292, 1000, 200_000])
def test_blocks_have_all_vectors_once_and_few_idle_threads(vectors, rows):
    split = cuda.split_of(rows, vectors, 132)
    assert split.n_groups * split.across >= vectors > (split.n_groups - 1) * split.across
    assert split.n_parts * split.rows_of_part >= rows > (split.n_parts - 1) * split.rows_of_part
    assert split.n_parts == 1 or split.n_groups * split.n_parts <= cuda.BLOCKS * 132
    busy = vectors * (cuda.THREADS // split.across) / (cuda.THREADS * split.n_groups)
    assert busy > 0.8
    if rows >= 1 << 16 and 10 < vectors < 1000:
        assert split.n_groups * split.n_parts >= 2 * 132
