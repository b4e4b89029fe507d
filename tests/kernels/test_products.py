"""Products of packed weights on every instruction set: exact sums, one order of sums, formats as in GGUF files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anymamba.kernels.packed_linear import cpu, formats, writing
from anymamba.kernels.packed_linear.arguments import PackedLinearArguments
from anymamba.kernels.packed_linear.formats import FORMATS, PackedWeight
from anymamba.ops.packed_linear import packed_linear
from anymamba.runtimes import native

if native.load() is None:
    pytest.skip(f"no compiled kernels here: {native.reason()}", allow_module_level=True)

BLOCKS = [name for name, format in FORMATS.items() if format.columns > 1]
WRITTEN = [name for name in BLOCKS if name not in formats.READ_ONLY]
SETS = native.module().instruction_sets()
DOT = ["dot"] if native.module().has_dot_products() else []


@pytest.fixture(params=[*DOT, *SETS])
def instruction_set(request):
    """Every instruction set of the machine, and the best one with its products of bytes."""
    before = native.module().instruction_set()
    native.module().use_dot_products(request.param == "dot")
    native.module().choose_instruction_set(SETS[0] if request.param == "dot" else request.param)
    yield request.param
    native.module().use_dot_products(True)
    native.module().choose_instruction_set(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(format: str, n_out: int, n_in: int, seed: int = 0) -> PackedWeight:
    """Random weights. Those of block formats are random bytes with scales of about 1, so all their values occur."""
    if format in formats.DTYPES:
        data = writing.pack(normal(n_out, n_in, seed=seed), format)
        return PackedWeight(data, format, n_in)
    _, columns, n_bytes, _ = FORMATS[format]
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (n_out, n_in // columns, n_bytes), generator=generator, dtype=torch.uint8)
    for start in {"q6_k": (208,), "q4_k": (0, 2), "q5_k": (0, 2)}.get(format, (0,)):
        scales = torch.rand(n_out, n_in // columns, 1, generator=generator).half() + 0.5
        data[..., start : start + 2] = scales.view(torch.uint8)
    return PackedWeight(data.flatten(1), format, n_in)


def whole_numbers(rows: int, n_in: int) -> torch.Tensor:
    """Activations that int8 blocks hold exactly: whole numbers, 127 the largest of each block."""
    x = torch.randint(-126, 127, (rows, n_in), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = 127
    return x


def wide_product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return x.double() @ formats.unpack(weight.data, weight.format).double().T


def multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return cpu.forward(PackedLinearArguments(x, weight.data, bias, weight.format))


# ------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("format", BLOCKS)
def test_blocks_are_read_as_gguf_does(format, instruction_set):
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    weight = packed(format, 5, 512)
    kind = gguf.GGMLQuantizationType[format.upper()]
    want = torch.from_numpy(gguf.quants.dequantize(weight.data.numpy(), kind))
    assert torch.equal(formats.unpack(weight.data, format), want)
    assert torch.equal(cpu.unpack(weight), want)


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_simple_blocks_have_the_bits_of_gguf(format, instruction_set):
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    matrix = normal(64, 256) * torch.logspace(-6, 4, 64)[:, None]
    matrix[0, :32] = 0
    matrix[1, :32] = torch.arange(32) / 2 - 8  # ties
    want = gguf.quants.quantize(matrix.numpy(), gguf.GGMLQuantizationType[format.upper()])
    assert np.array_equal(cpu.pack(matrix, format).data.numpy(), want)
    assert np.array_equal(writing.pack(matrix, format).numpy(), want)


ERRORS = {"q8_0": 0.005349, "q6_k": 0.01773, "q4_0": 0.08611, "q4_k": 0.0716}
"""Root mean square errors of llama.cpp's quantisers on the same normal weights."""


@pytest.mark.parametrize("format", WRITTEN)
def test_the_error_of_a_format(format, instruction_set):
    matrix = normal(128, 1024)
    errors = []
    for data in (cpu.pack(matrix, format).data, writing.pack(matrix, format)):
        errors.append((formats.unpack(data, format) - matrix).square().mean().sqrt().item())
    assert max(errors) <= 1.001 * ERRORS[format], errors


@pytest.mark.parametrize("format", WRITTEN)
def test_values_at_the_ends_of_a_block_are_packed(format, instruction_set):
    """Zeros, one sign, a constant, one large value, tiny values: finite, and at most one step away."""
    rows = [torch.zeros(256), torch.ones(256), -torch.ones(256), normal(256).abs(), -normal(256).abs()]
    spike = torch.zeros(256)
    spike[17] = 1000
    matrix = torch.stack([*rows, spike, normal(256) * 1e-30])
    for data in (cpu.pack(matrix, format).data, writing.pack(matrix, format)):
        error = (formats.unpack(data, format) - matrix).abs()
        assert (error <= matrix.abs().amax(1, keepdim=True) / 6 + 1e-7).all()


@pytest.mark.parametrize("format", list(formats.DTYPES))
def test_floats_are_those_of_torch(format, instruction_set):
    matrix = normal(3, 37)
    matrix[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    weight = cpu.pack(matrix, format)
    want = matrix.to(formats.DTYPES[format]).float()
    assert torch.equal(cpu.unpack(weight).nan_to_num(), want.nan_to_num())
    assert torch.equal(formats.unpack(weight.data, format).nan_to_num(), want.nan_to_num())


# ------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("format", FORMATS)
def test_products_are_exact_but_for_the_sums(format, instruction_set):
    """Every format holds these activations exactly, so only the rounding of float32 sums remains."""
    for n_out, n_in, rows in ((1, 256, 1), (3, 512, 2), (17, 768, 5), (40, 1280, 65), (70, 256, 9)):
        weight = packed(format, n_out, n_in)
        x = whole_numbers(rows, n_in)
        scale = x.abs().double() @ formats.unpack(weight.data, format).abs().double().T
        bias = normal(n_out)
        error = (multiply(x, weight, bias) - wide_product(x, weight) - bias).abs() / scale
        assert error.max() <= 1e-6, (n_out, n_in, rows, error.max())


@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n_in", [1, 7, 31, 33, 48, 97])
def test_odd_numbers_of_columns(format, n_in, instruction_set):
    weight = packed(format, 13, n_in)
    x = normal(5, n_in)
    rounded = x.bfloat16().float() if format == "bfloat16" else x
    assert (multiply(x, weight) - wide_product(rounded, weight)).abs().max() <= 3e-6 * (1 + n_in**0.5)


@pytest.mark.parametrize("format", BLOCKS)
def test_activations_are_rounded_to_half_a_step_of_their_block(format, instruction_set):
    weight = packed(format, 33, 512)
    x = normal(7, 512) * torch.logspace(-3, 3, 7)[:, None]
    steps = x.reshape(7, -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(7, 512) / 127
    bound = steps.double() @ formats.unpack(weight.data, format).abs().double().T / 2
    error = (multiply(x, weight) - wide_product(x, weight)).abs()
    assert (error <= 1.001 * bound).all()
    assert error.mean() <= 0.2 * bound.mean()  # errors are independent


@pytest.mark.parametrize(
    ("format", "n_in"), [*((f, 768) for f in FORMATS), *((f, 48) for f in formats.DTYPES)], ids=str
)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_a_prompt(format, n_in, instruction_set):
    weight = packed(format, 83, n_in)
    x = normal(300, n_in)
    whole = multiply(x, weight)
    for rows in (slice(0, 1), slice(7, 9), slice(1, 5), slice(3, 8), slice(2, 10), slice(100, 165), slice(290, 300)):
        assert torch.equal(multiply(x[rows], weight), whole[rows])
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(multiply(x, weight), whole)
    finally:
        torch.set_num_threads(before)
    some = PackedWeight(weight.data[5:40], format, n_in)  # another cut into panels
    assert torch.equal(multiply(x[:9], some), whole[:9, 5:40])


@pytest.mark.parametrize("format", FORMATS)
def test_infinity_and_nan_reach_their_row_only(format, instruction_set):
    weight, x = packed(format, 20, 512), normal(4, 512)
    plain = multiply(x, weight)
    x[1, 40], x[2, 300] = torch.nan, torch.inf
    y = multiply(x, weight)
    assert torch.equal(y[[0, 3]], plain[[0, 3]])
    assert y[1].isnan().all() and not y[2].isfinite().any()


@pytest.mark.parametrize("format", BLOCKS)
def test_activations_too_small_for_a_scale_count_as_zeros(format, instruction_set):
    weight = packed(format, 20, 256)
    assert (multiply(torch.full((2, 256), 1e-38), weight) == 0).all()
    assert (multiply(torch.zeros(2, 256), weight) == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_mapped_file_may_be_apart_and_unaligned(format, instruction_set):
    weight, x = packed(format, 20, 512), normal(3, 512)
    row = weight.data.shape[1]
    offset = 4 if format == "float32" else 2
    spaced = torch.zeros(20, row + 4, dtype=torch.uint8)[:, offset : offset + row].copy_(weight.data)
    assert torch.equal(multiply(x, weight._replace(data=spaced)), multiply(x, weight))
    assert torch.equal(multiply(x.T.contiguous().T, weight), multiply(x, weight))


def test_the_public_function_takes_the_compiled_product(instruction_set):
    weight, x = packed("q8_0", 20, 64), normal(2, 3, 64)
    y = packed_linear(x, weight)
    assert torch.equal(y, multiply(x.flatten(0, 1), weight).reshape(2, 3, 20))
