"""The CUDA kernels of the product of packed weights: run on the processor."""

from __future__ import annotations

import pytest
import torch
from emulation import emulate

from anymamba.kernels.packed_linear import cuda, reference
from anymamba.kernels.packed_linear.arguments import PackedLinearArguments
from anymamba.kernels.packed_linear.formats import FORMATS, PackedWeight, row_bytes, unpack
from anymamba.kernels.packed_linear.writing import pack

emulated = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    emulate.patch(monkeypatch)


def random_weight(format: str, n_out: int, n_in: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_in)
    if format != "q5_k":
        return pack(torch.randn(n_out, n_in, generator=generator), format)
    data = torch.randint(256, (n_out, row_bytes(format, n_in)), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n_out, n_in // 256, 2, generator=generator).half() / 100
    data.view(n_out, -1, FORMATS[format].n_bytes)[:, :, :4] = scales.view(torch.uint8)
    return data


def random_arguments(format: str, rows: int, n_out: int, n_in: int, bias: bool = False) -> PackedLinearArguments:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, n_in, generator=generator).bfloat16().float()
    weight = random_weight(format, n_out, n_in)
    return PackedLinearArguments(x, weight, torch.randn(n_out, generator=generator) if bias else None, format)


FORMATS_OF_TESTS = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "q4_k" else [])  # q5_k has all that it has
    for name in cuda.BLOCKS
]
SHAPES = {"small": (32, 3), "odd rows of bytes": (96, 17), "two chunks and a bit": (288, 33), "aligned": (512, 18)}
"""Columns and outputs."""


@emulated
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS_OF_TESTS)
def test_products(format, shape, rows):
    """Inputs that bfloat16 holds are multiplied exactly; sums are float32."""
    n_in, n_out = SHAPES[shape]
    n_in = n_in if FORMATS[format].columns == 32 else 512
    a = random_arguments(format, rows, n_out, n_in, bias=rows == 9)
    want = reference.forward(a)
    scale = a.x.abs() @ unpack(a.data, format).abs().T
    assert ((cuda.forward(a) - want).abs() <= 2e-6 * scale + 1e-6).all()
    short = cuda.forward(a._replace(x=a.x.bfloat16()))
    assert short.dtype == torch.bfloat16 and ((short.float() - want).abs() <= 2e-6 * scale + 2**-8 * want.abs()).all()


@emulated
@pytest.mark.parametrize("format", FORMATS_OF_TESTS)
def test_weights(format):
    data = random_weight(format, 5, 512)
    found = cuda.unpack(PackedWeight(data, format, 512))
    assert torch.allclose(found, unpack(data, format), rtol=1e-6, atol=1e-6)


@emulated
def test_a_row_has_the_same_bits_in_any_batch():
    a = random_arguments("q4_0", 12, 17, 96)
    together = cuda.forward(a)
    assert torch.equal(cuda.forward(a._replace(x=a.x[3:4])), together[3:4])
    assert torch.equal(cuda.forward(a._replace(x=a.x[3:12])), together[3:12])


@emulated
def test_few_blocks_go_through_many_outputs(monkeypatch):
    emulate.patch(monkeypatch, n_multiprocessors=1)
    a = random_arguments("q8_0", 2, 90, 288)
    assert torch.allclose(cuda.forward(a), reference.forward(a), atol=1e-4)


@emulated
def test_many_rows_and_strided_ones():
    a = random_arguments("q8_0", cuda.MOST_ROWS + 1, 20, 64)
    assert torch.allclose(cuda.forward(a), reference.forward(a), atol=0.1)  # weights are rounded to bfloat16
    strided = a.x.repeat(1, 2)[:5, 61:125]
    assert torch.equal(cuda.forward(a._replace(x=strided)), cuda.forward(a._replace(x=strided.contiguous())))
    assert cuda.forward(a._replace(x=a.x[:0])).shape == (0, 20)


def test_it_says_what_it_does_not_serve():
    a = random_arguments("q8_0", 1, 2, 32)
    assert cuda.refuses(a) is None
    assert "bfloat16 and q8_0, q4_0, q4_k, q5_k, q6_k, got float32" in str(cuda.refuses(a._replace(format="float32")))
