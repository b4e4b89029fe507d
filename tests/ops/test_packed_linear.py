"""The product of packed weights as an op: dtypes, gradients, tracers, errors."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from anymamba.ops import dispatch
from anymamba.ops.packed_linear import FORMATS, PackedWeight, pack, packed_linear, unpack, unpack_rows

WRITTEN = [name for name in FORMATS if name != "q5_k"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    cpu = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return cpu.to(torch.empty(0).device)  # `--device` sets the default type of tensors, not the default device


@pytest.mark.parametrize("format", WRITTEN)
def test_backends_agree_to_the_rounding_of_the_activations(format):
    weight, x, bias = pack(normal(40, 512), format), normal(2, 3, 512, seed=1), normal(40)
    want = packed_linear(x, weight, bias, backend="reference")
    assert (want - torch.nn.functional.linear(x, unpack(weight), bias)).abs().max() <= 1e-4
    rounding = {"float32": 1e-6, "float16": 1e-6, "bfloat16": 3e-3}.get(format, 1e-2)
    assert (packed_linear(x, weight, bias) - want).abs().max() <= 5 * rounding * 512**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_x(dtype):
    weight, x = pack(normal(20, 64), "q8_0"), normal(3, 64, seed=1)
    y = packed_linear(x.to(dtype), weight)
    assert y.dtype == dtype and (y.float() - packed_linear(x, weight)).abs().max() <= 0.2


def test_an_empty_batch():
    assert packed_linear(torch.zeros(0, 64), pack(normal(20, 64), "q8_0")).shape == (0, 20)


def test_gradients_flow_to_the_activations_and_the_bias():
    weight = pack(normal(20, 64), "q4_0")
    x, bias = normal(3, 64).requires_grad_(), normal(20).requires_grad_()
    packed_linear(x, weight, bias).sum().backward()
    assert torch.allclose(x.grad, unpack(weight).sum(0).expand(3, 64), atol=1e-5)
    assert torch.equal(bias.grad, torch.full((20,), 3.0))


def test_a_tracer_sees_torch_operations():
    weight, x = pack(normal(20, 256), "q6_k"), normal(3, 256)
    dispatch.calls.clear()
    graph = make_fx(lambda x, data: packed_linear(x, weight._replace(data=data)))(x, weight.data)
    assert {name for _, name, _ in dispatch.calls} == {"reference"}
    assert torch.allclose(graph(x, weight.data), x @ unpack(weight).T, atol=1e-4)


@pytest.mark.parametrize("format", WRITTEN)
def test_rows_of_an_embedding(format):
    weight = pack(normal(30, 256), format)
    index = torch.tensor([[3, 29], [0, 3]])
    assert torch.equal(unpack_rows(weight, index), unpack(weight)[index])


def test_errors_name_the_way_out():
    weight = pack(normal(20, 64), "q8_0")
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., n_in\) = \(\.\.\., 64\) for this weight, got \(3, 32\)"):
        packed_linear(normal(3, 32), weight)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        packed_linear(torch.zeros(3, 64, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r"bias must be \(n_out,\) = \(20\), got \(3,\)"):
        packed_linear(normal(3, 64), weight, normal(3))
    with pytest.raises(
        ValueError, match=r"with 96 columns must be \(n_out, 102\), got \(20, 68\); pack the matrix again"
    ):
        packed_linear(normal(3, 96), weight._replace(n_in=96))
    with pytest.raises(TypeError, match=r"must be torch\.uint8, got torch\.int8; view it as bytes"):
        packed_linear(normal(3, 64), weight._replace(data=weight.data.view(torch.int8)))
    with pytest.raises(ValueError, match="unknown weight format 'q3_k'; the formats are float32, bfloat16"):
        packed_linear(normal(3, 64), PackedWeight(weight.data, "q3_k", 64))


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="q4_0 packs blocks of 32 columns, got 48 columns; use bfloat16"):
        pack(normal(2, 48), "q4_0")
    with pytest.raises(
        ValueError, match="q4_k packs blocks of 256 columns, got 96 columns; use q8_0, q4_0 or bfloat16"
    ):
        pack(normal(2, 96), "q4_k")
    with pytest.raises(ValueError, match="q5_k weights can be read but not written, got format 'q5_k'; use one of"):
        pack(normal(2, 256), "q5_k")
    with pytest.raises(ValueError, match=r"matrix must be \(n_out, n_in\) = \(any, any\), got \(64,\)"):
        pack(normal(64), "q8_0")
    bad = normal(2, 64)
    bad[1, 3] = torch.inf
    with pytest.raises(ValueError, match="q8_0 holds finite numbers, got infinity or NaN in the matrix; use bfloat16"):
        pack(bad, "q8_0")
