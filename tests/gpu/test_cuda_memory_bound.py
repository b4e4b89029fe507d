"""The CUDA kernels of the convolution, the norm of a sum and the loss on a GPU: values, equal bits, graphs, sizes.

python -m pytest tests/gpu
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scan_cases import assert_close, assert_within_budget, rms
from torch import Tensor

from anymamba import causal_conv1d
from anymamba.kernels.add_norm import cuda as norm
from anymamba.kernels.add_norm import reference as norm_reference
from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.kernels.causal_conv1d import cuda as conv
from anymamba.kernels.causal_conv1d import reference as conv_reference
from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.ops import dispatch
from anymamba.ops.add_norm import add_norm
from anymamba.ops.linear_cross_entropy import linear_cross_entropy
from anymamba.runtimes import nvrtc

if nvrtc.reason():
    pytest.skip(f"the CUDA kernels do not run here: {nvrtc.reason()}", allow_module_level=True)

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def on(device: str, record: Any) -> Any:
    return record._replace(**{k: t.to(device) for k, t in record._asdict().items() if isinstance(t, Tensor)})


def wide(record: Any) -> Any:
    floating = {k: t.double() for k, t in record._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()}
    return record._replace(**floating)


# ------------------------------------------------------------------------------------------------- convolution


def conv_contract(seed: int) -> ConvArguments:
    """A random call of the convolution."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = rng.choice(DTYPES)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    length, packed = rng.choice((1, 2, 7, 31, 33, 64, 127, 129, 257, 500)), rng.random() < 0.5
    d_inner, width = rng.choice((1, 3, 4, 32, 100, 128, 129, 260, 512)), rng.choice((1, 2, 3, 4, 4, 4, 5, 8))
    cuts = sorted(rng.randint(0, length) for _ in range(rng.choice((0, 1, 2, 5, 100))))
    offsets = torch.tensor([0, *cuts, length], dtype=rng.choice((torch.int32, torch.int64))) if packed else None
    batch = 1 if packed else rng.randint(1, 3)
    rows = batch if offsets is None else len(offsets) - 1
    x = normal(batch, length, 2 * d_inner)[..., :d_inner] if rng.random() < 0.3 else normal(batch, length, d_inner)
    bias = normal(d_inner) if rng.random() < 0.7 else None
    state = normal(rows, width - 1, d_inner) if rng.random() < 0.7 else None
    return ConvArguments(x, normal(d_inner, width), bias, state, offsets, rng.random() < 0.7)


def conv_results(module: Any, a: ConvArguments) -> dict[str, Tensor]:
    y, last_state = module.forward(a)
    generator = torch.Generator().manual_seed(1)
    dy, dlast = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, last_state))
    gradients = module.backward(dy, dlast, a)
    found = {f"d{k}": g for k, g in zip(a._fields, gradients, strict=False) if g is not None}
    return {"y": y, "last_state": last_state} | found


@pytest.mark.parametrize("block", range(20))
def test_random_convolutions(block):
    """Ten random calls; of many small tensors some are those on which the reference is lucky: eight times its error."""
    for seed in range(10 * block, 10 * block + 10):
        a = conv_contract(seed)
        got = {k: t.cpu() for k, t in conv_results(conv, on("cuda", a)).items()}
        peer = conv_results(conv_reference, a)
        try:
            if a.dtype == torch.float64:
                assert_close(got, peer, 1e-12)
            else:
                assert_within_budget(got, peer, conv_results(conv_reference, wide(a)), 8)
        except AssertionError as error:
            raise AssertionError(f"contract {seed}: {error}") from error


def test_a_long_convolution_is_that_of_its_halves():
    x = torch.randn(1, (1 << 20) + 1, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(256, 4, device="cuda")
    whole = conv.forward(ConvArguments(x, weight, silu=True))
    first = conv.forward(ConvArguments(x[:, :1000], weight, silu=True))
    second = conv.forward(ConvArguments(x[:, 1000:], weight, None, first[1], silu=True))
    assert torch.equal(torch.cat([first[0], second[0]], 1), whole[0]) and torch.equal(second[1], whole[1])


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    x = torch.randn(1, (1 << 21) + 1, 1040, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1040, 4, device="cuda")
    y, _ = conv.forward(ConvArguments(x, weight))
    tail, _ = conv.forward(ConvArguments(x[:, -100:].contiguous(), weight))
    assert torch.equal(y[:, -90:], tail[:, -90:])
    dx, *_ = conv.backward(y, y[:, :3].contiguous(), ConvArguments(x, weight))
    of_tail, *_ = conv.backward(y[:, -100:].contiguous(), y[:, :3].contiguous(), ConvArguments(x[:, -100:], weight))
    assert dx is not None and of_tail is not None and torch.equal(dx[:, -90:], of_tail[:, -90:])
    rows = x.view(-1, 1040)
    normed = norm.forward(NormArguments(rows), False)[0]
    assert torch.equal(normed[-9:], norm.forward(NormArguments(rows[-9:]), False)[0])


# ------------------------------------------------------------------------------------------------- norm


def norm_results(module: Any, a: NormArguments) -> dict[str, Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in a.tensors]
    y, total, saved = module.forward(a if module is norm else NormArguments(*leaves, *a.options), True)
    generator = torch.Generator().manual_seed(1)
    dy, dtotal = (torch.randn(a.x.shape, generator=generator, dtype=torch.float64).to(t.detach()) for t in (y, total))
    if module is norm:
        gradients = module.backward(dy, dtotal, a, saved)
    else:
        present = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad((y, total), present, (dy, dtotal)))
        gradients = [None if t is None else next(found) for t in leaves]
    return {"y": y.detach(), "total": total.detach()} | {
        f"d{k}": g for k, g in zip(a._fields, gradients, strict=False) if g is not None
    }


@pytest.mark.parametrize("subtract_mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 64, 768, 1000, 1536, 2560, 4096, 5120, 8192, 8200])
def test_norms(size, dtype, subtract_mean):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in ((300, size), (300, size), size, size)]
    x, residual, weight, bias = (t.to(dtype) for t in tensors)
    a = NormArguments(x + 1, residual.to(torch.promote_types(dtype, torch.float32)), weight, bias, 1e-5, subtract_mean)
    got, peer = norm_results(norm, on("cuda", a)), norm_results(norm_reference, a)
    exact = norm_results(norm_reference, wide(a))
    for name, value in got.items():
        assert value.dtype == peer[name].dtype
        error, peer_error = (rms(t.cpu().double() - exact[name]) for t in (value, peer[name]))
        rounding = max(torch.finfo(a.dtype).eps, torch.finfo(value.dtype).eps) * rms(exact[name])
        rounding *= 20 if value.ndim == 1 or dtype == torch.float64 else 1
        assert error <= 2 * peer_error + rounding, f"{name}: {error:.2e}, reference {peer_error:.2e}, {rounding:.2e}"


# ------------------------------------------------------------------------------------------------- how it runs


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (700, 5003))
    return x, weight, torch.randint(5003, (700,), device="cuda")


def calls() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Ops and the tensors that have gradients."""
    x, weight, labels = loss_inputs()
    offsets = torch.tensor([0, 0, 5, 400, 512], dtype=torch.int32, device="cuda")
    of_conv = [torch.randn(*s, device="cuda") for s in ((1, 512, 132), (132, 4), (132,), (4, 3, 132))]
    of_norm = [torch.randn(*s, device="cuda") for s in ((300, 768), (300, 768), (768,))]
    return {
        "causal_conv1d": (
            lambda x, w, b, s: causal_conv1d(x, w, b, activation="silu", initial_state=s, cu_seqlens=offsets),
            of_conv,
        ),
        "add_norm": (lambda x, r, w: add_norm(x, w, residual=r), of_norm),
        "linear_cross_entropy": (lambda x, w: (linear_cross_entropy(x, w, labels),), [x, weight]),
    }


@pytest.fixture(params=["causal_conv1d", "add_norm", "linear_cross_entropy"])
def call(request) -> Callable[[], list[Tensor]]:
    op, tensors = calls()[request.param]
    leaves = [t.requires_grad_() for t in tensors]

    def everything() -> list[Tensor]:
        outputs = op(*leaves)
        return [*(t.detach() for t in outputs), *torch.autograd.grad(sum(t.float().sum() for t in outputs), leaves)]

    everything.leaves = leaves  # type: ignore[attr-defined]
    dispatch.calls.clear()
    everything()
    assert dispatch.calls[request.param, "cuda", "forward"] == dispatch.calls[request.param, "cuda", "backward"] == 1
    return everything


def test_equal_bits_a_hundred_times(call):
    first = call()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


def test_nothing_waits_for_the_gpu_and_a_graph_holds_it(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    with torch.no_grad():
        call.leaves[0].mul_(-0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, call(), strict=True))


def test_compiled(call):
    want = call()
    torch._dynamo.reset()
    found = torch.compile(call, backend="aot_eager")()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_loss(dtype):
    x, weight, labels = loss_inputs()
    labels[::5] = -100
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, 0.1 * weight)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got, want = linear_cross_entropy(*leaves, labels), linear_cross_entropy(*exact, labels, backend="reference")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}[dtype]
    assert abs(got - want) <= tolerance * want
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, exact), strict=True):
        assert rms(a.double() - b) <= tolerance * rms(b)
