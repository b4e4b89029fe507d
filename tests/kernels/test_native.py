"""The compiled kernels on every instruction set: their functions to the last digits, sizes, splitting, and threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anymamba import causal_conv1d, selective_scan
from anymamba.kernels.selective_scan import cpu, portable
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.ops.add_norm import add_norm
from anymamba.runtimes import native

if native.load() is None:
    pytest.skip(f"no compiled kernels here: {native.reason()}", allow_module_level=True)

DTYPES = list(native.DTYPES)


@pytest.fixture(autouse=True, params=native.module().instruction_sets())
def instruction_set(request):
    """Every test runs on every instruction set of the machine."""
    before = native.module().instruction_set()
    native.module().choose_instruction_set(request.param)
    yield request.param
    native.module().choose_instruction_set(before)


# ------------------------------------------------------------------------------------------------- functions


def last_places(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units of the last place of a float32."""
    size = exact.abs().clamp(min=2.0**-126)
    unit = torch.exp2(torch.floor(torch.log2(size)) - 23)
    return ((got.double() - exact).abs() / unit).max().item()


def matrix(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def exponentials(delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """exp(delta A) of each channel: what one step leaves of a state of ones."""
    d_inner, zeros = len(delta), torch.zeros(1, 1, len(delta))
    tensors = (zeros, delta[None, None], A[:, None], matrix(0.0), matrix(0.0))
    arguments = ScanArguments(*tensors, initial_state=torch.ones(1, d_inner, 1))
    return cpu.forward(arguments, save=False)[1].flatten()


def softplus(x: torch.Tensor) -> torch.Tensor:
    """The state after one step of input one from nothing."""
    tensors = (torch.ones(1, 1, len(x)), x[None, None], -torch.ones(len(x), 1), matrix(1.0), matrix(0.0))
    return cpu.forward(ScanArguments(*tensors, delta_softplus=True), save=False)[1].flatten()


def silu(x: torch.Tensor) -> torch.Tensor:
    """A convolution of one tap."""
    return causal_conv1d(x[None, None], torch.ones(len(x), 1), activation="silu", backend="cpu").y.flatten()


@pytest.mark.parametrize("size", [1e-6, 0.01, 1, 10, 87])
def test_exp(size):
    generator = torch.Generator().manual_seed(0)
    delta = torch.rand(1 << 16, generator=generator) * size / 3
    A = -3 * torch.rand(1 << 16, generator=generator)
    assert last_places(exponentials(delta, A), torch.exp(delta.double() * A.double())) < 2
    A = -A / 2  # growth, where a careless product of delta and log2(e) A loses digits, too
    assert last_places(exponentials(delta, A), torch.exp(delta.double() * A.double())) < 2


@pytest.mark.parametrize(
    ("function", "exact"), [(softplus, lambda x: torch.log1p(x.exp())), (silu, lambda x: x / (1 + (-x).exp()))]
)
@pytest.mark.parametrize("size", [1e-6, 0.01, 1, 10, 86])
def test_softplus_and_silu(function, exact, size):
    x = (torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size
    assert last_places(function(x), exact(x.double())) < 3.5


def test_exp_at_the_ends():
    """Beyond the range of float32, at zero, for infinities and NaN; ordinary channels beside them stay as they are."""
    inf, nan = math.inf, math.nan
    x = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 88.5, 89.0, 200.0, -88.0, -104.0, -200.0, -1e30, 1e30, nan, 50.0, -50.0, 3.0]
    )
    got, want = exponentials(x, torch.ones(len(x))), torch.exp(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert torch.allclose(got[finite], want[finite], rtol=5e-7, atol=2e-38)
    ordinary = x.abs() < 80
    alone = exponentials(x[ordinary], torch.ones(int(ordinary.sum())))
    assert torch.equal(got[ordinary], alone)
    for delta, A in ((inf, -1.0), (1.0, -inf), (inf, 0.0), (-inf, 1.0), (nan, 0.0), (0.0, nan)):
        got = exponentials(torch.tensor([delta]), torch.tensor([A]))
        want = torch.exp(torch.tensor(delta) * torch.tensor(A)) + torch.tensor(delta) * 0  # delta u B of u = 0
        assert torch.equal(got.isnan(), want.isnan()[None]), (delta, A)


def test_softplus_and_silu_at_the_ends():
    x = torch.tensor([0.0, 19.9, 20.1, 100.0, 1e30, math.inf, -20.0, -87.0, -104.0, -1e30, -math.inf, math.nan])
    got, want = softplus(x), torch.nn.functional.softplus(x)
    assert torch.allclose(got, want, rtol=5e-7, atol=2e-38, equal_nan=True)
    assert softplus(torch.tensor([-math.inf])).item() == 0
    got, want = silu(x), torch.nn.functional.silu(x)
    assert torch.allclose(got, want, rtol=5e-7, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_floats_are_read_and_rounded_as_torch_does(dtype):
    """A convolution of one tap that multiplies by one: every bit pattern goes in and comes out."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = causal_conv1d(x[None, None], torch.ones(1 << 16, 1), backend="cpu").y.flatten()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])
    wide = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    wide *= torch.exp2(torch.randint(-40, 40, (1 << 16,), generator=torch.Generator().manual_seed(1)))
    y = causal_conv1d(torch.ones(1, 1, 1 << 16, dtype=dtype), wide[:, None], backend="cpu").y.flatten()
    assert torch.equal(y, wide.to(dtype))


# ------------------------------------------------------------------------------------------------- shapes


def scan_arguments(batch, length, d_inner, d_state, lengths=None, dtype=torch.float32, seed=0) -> ScanArguments:
    """Arguments of the kernels, gradients to come."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = batch if lengths is None else len(lengths)
    offsets = None if lengths is None else torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tensors = [normal(batch, length, d_inner), normal(batch, length, d_inner), -normal(d_inner, d_state).abs()]
    tensors += [normal(batch, length, 1, d_state), normal(batch, length, 1, d_state), normal(d_inner)]
    tensors += [normal(batch, length, d_inner), normal(d_inner)]
    return ScanArguments(*tensors, normal(rows, d_inner, d_state), offsets, delta_softplus=True)


def everything(module, arguments) -> list[torch.Tensor]:
    """Outputs and gradients of one backend."""
    y, last_state, saved = module.forward(arguments, save=True)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, last_state)]
    return [y, last_state, *module.backward(*cotangents, arguments, saved)]


@pytest.mark.parametrize("lengths", [None, [5000, 0, 700, 10 * cpu.LONG // 10 - 5700]], ids=["one", "packed"])
@pytest.mark.parametrize("length", [cpu.LONG, cpu.LONG + 77])
def test_a_long_narrow_row_is_cut_in_time(length, lengths):
    assert cpu.task_steps(1, length, 3, 1) < length, "the shape no longer reaches the code that this test is for"
    if lengths is not None:
        lengths = [*lengths[:-1], length - sum(lengths[:-1])]
    arguments = scan_arguments(1, length, 3, 2, lengths, torch.float64)
    arguments = arguments._replace(A=arguments.A * 1e-3)  # so slow a decay that states pass through whole chunks
    for got, want in zip(everything(cpu, arguments), everything(portable, arguments), strict=True):
        assert (got - want).abs().max() <= 1e-10 * (1 + want.abs().max())


@pytest.mark.parametrize("shape", [(1, cpu.LONG + 5, 7, 5), (1, 700, 127, 16), (3, 300, 33, 4), (2, 100, 520, 8)])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_the_same_bits_for_one_two_and_seven_threads(shape, packed):
    batch, length = shape[:2]
    if packed and batch > 1:
        pytest.skip("packed sequences are one row")
    arguments = scan_arguments(*shape, lengths=[length // 3, 0, length - length // 3] if packed else None)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append([cpu.forward(arguments, save=True)[2], *everything(cpu, arguments)])
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@st.composite
def views(draw, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A tensor of a shape as a view: dense, part of a wider one, transposed, or one row for all."""
    kind = draw(st.sampled_from(["dense", "wider", "transposed", "expanded", "shifted"]))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "wider":
        return normal(*shape[:-1], 2 * shape[-1] + 1)[..., 1 : shape[-1] + 1]
    if kind == "transposed":
        return normal(*shape[:1], *reversed(shape[1:])).permute(0, *range(len(shape) - 1, 0, -1))
    if kind == "expanded":
        return normal(*shape[:1], 1, *shape[2:]).expand(shape)
    if kind == "shifted":
        return normal(shape[0], 2 * shape[1] + 1, *shape[2:])[:, 1::2]
    return normal(*shape)


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@given(data=st.data())
@FUZZ
def test_fuzz_the_scan_against_the_reference_in_float64(data, instruction_set):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = st.sampled_from(DTYPES)
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, 70))
    n_groups, d_state = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 3, 4, 8, 16, 17, 32]))
    d_inner = n_groups * draw(st.integers(1, 20))
    selective = draw(st.tuples(st.booleans(), st.booleans()))

    def long(*shape):
        return draw(views((batch, length, *shape), draw(dtype), generator))

    def vector(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(draw(dtype))

    B, C = (long(n_groups, d_state) if s else vector(d_inner, d_state) for s in selective)
    z, D, bias = (draw(st.booleans()) for _ in range(3))
    initial = draw(st.booleans())
    tensors = {
        "u": long(d_inner),
        "delta": long(d_inner),
        "A": -vector(d_inner, d_state).abs(),
        "B": B,
        "C": C,
        "z": long(d_inner) if z else None,
        "D": vector(d_inner) if D else None,
        "delta_bias": vector(d_inner) if bias else None,
        "initial_state": vector(batch, d_inner, d_state) if initial else None,
    }
    rule = draw(st.sampled_from(["euler", "zoh"]))
    found = on_both(partial(selective_scan, delta_softplus=True, b_discretization=rule), tensors)
    for got, want in zip(*found, strict=True):
        close(got, want, length)


@given(data=st.data())
@FUZZ
def test_fuzz_the_convolution_against_the_reference_in_float64(data, instruction_set):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = st.sampled_from(DTYPES)
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, 70))
    d_inner, width = draw(st.integers(1, 40)), draw(st.integers(1, 6))

    def vector(*shape, of=None):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(of or draw(dtype))

    x = draw(views((batch, length, d_inner), draw(dtype), generator))
    tensors = {
        "x": x,
        "weight": vector(d_inner, width),
        "bias": vector(d_inner) if draw(st.booleans()) else None,
        "initial_state": vector(batch, width - 1, d_inner, of=x.dtype) if draw(st.booleans()) else None,
    }
    activation = draw(st.sampled_from([None, "silu"]))
    found = on_both(partial(causal_conv1d, activation=activation), tensors)
    for got, want in zip(*found, strict=True):
        close(got, want, length)


@given(data=st.data())
@FUZZ
def test_fuzz_the_norm_against_the_reference_in_float64(data, instruction_set):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = st.sampled_from(DTYPES)
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(st.integers(1, 70)))

    def vector():
        return torch.randn(shape[2], generator=generator, dtype=torch.float64).to(draw(dtype))

    tensors = {
        "x": draw(views(shape, draw(dtype), generator)),
        "residual": draw(views(shape, draw(dtype), generator)) if draw(st.booleans()) else None,
        "weight": vector() if draw(st.booleans()) else None,
        "bias": vector() if draw(st.booleans()) else None,
    }
    options = {"subtract_mean": draw(st.booleans()), "eps": 0.1}  # a row of few numbers may be nearly constant
    curve = torch.sin  # a plain sum has a gradient of zero through a layer norm
    found = on_both(partial(add_norm, **options), tensors, curve)
    shortest = max(torch.finfo(t.dtype).eps for t in (*tensors.values(), found[0][0]) if t is not None)
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape
        if got.numel():
            rounding = 8 * max(shortest, 1e-6) * (1 + want.abs().max())
            summed = shape[0] * shape[1] if got.ndim == 1 else 1
            assert (got.double() - want).abs().max() <= rounding * summed**0.5


def on_both(call, tensors, curve=lambda y: y) -> list[list[torch.Tensor]]:
    """The two results and all gradients of the compiled kernels, and of the reference in float64."""
    results = []
    for backend, wide in (("cpu", False), ("reference", True)):
        leaves = {
            k: None if v is None else (v.double() if wide else v).detach().requires_grad_() for k, v in tensors.items()
        }
        y, other = call(**leaves, backend=backend)
        present = [v for v in leaves.values() if v is not None]
        nothing = sum(v.double().sum() for v in present) * 0
        (curve(y.double()).sum() + other.double().sum() + nothing).backward()
        results.append([y, other, *(v.grad for v in present)])
    return results


def close(got: torch.Tensor, want: torch.Tensor, length: int) -> None:
    """Within the rounding of the result's dtype, or of the float32 in which sums over the length are kept."""
    assert got.shape == want.shape
    if got.numel():
        eps = max(torch.finfo(got.dtype).eps, 1e-6 * (1 + length) ** 0.5)
        assert (got.double() - want).abs().max() <= 2 * eps * (1 + want.abs().max())


# ------------------------------------------------------------------------------------------------- the module


def test_the_variable_forces_an_instruction_set(instruction_set):
    code = "from anymamba.ops import dispatch; print(dispatch.report('cpu')[0].reason)"
    environment = os.environ | {native.ISA_VARIABLE: instruction_set}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f", {instruction_set} (" in result.stdout
    environment[native.ISA_VARIABLE] = "z80"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (
        result.returncode != 0
        and f"ANYMAMBA_ISA must be one of {', '.join(native.module().instruction_sets())}" in result.stderr
    )


def test_a_dtype_that_the_kernels_do_not_know():
    x = torch.zeros(1, 3, 2, dtype=torch.float8_e5m2)
    with pytest.raises(TypeError, match=r"x must have at least 16 bits per number, got torch\.float8_e5m2"):
        causal_conv1d(x, torch.zeros(2, 4), backend="cpu")


def test_an_error_of_memory_is_raised_not_fatal():
    arguments = scan_arguments(1, 3, 2, 1)
    call = cpu._Call(arguments)
    call.args.tile = 1 << 50
    call.args.chunk = 1 << 50
    with pytest.raises(MemoryError):
        native.module().scan_forward(call.args)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    """2.3e9 elements in a call, the inputs one row for all steps: the end is the steady state of a short sequence."""
    length, d_inner = 1_150_000, 2000
    assert length * d_inner > 2**31
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 1, d_inner, generator=generator).to(torch.bfloat16)
    matrix_row = torch.ones(1, 1, 1, 1)
    A, D = -torch.ones(d_inner, 1), torch.ones(d_inner)

    def both(n):
        u = row.expand(1, n, d_inner)
        conv = causal_conv1d(u, torch.ones(d_inner, 4), activation="silu", backend="cpu").y[:, -1].clone()
        M = matrix_row.expand(1, n, 1, 1)
        scan = selective_scan(u, u, A, M, M, D, u, delta_softplus=True, backend="cpu")
        return conv, scan.y[:, -1].clone(), scan.last_state

    for got, want in zip(both(length), both(2000), strict=True):
        assert torch.equal(got, want)
