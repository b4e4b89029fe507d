"""Functions that Triton kernels share. `FAST` takes the instructions of NVIDIA GPUs for float32."""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + exp2(-x * LOG2E, FAST), FAST)


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + exp(x)), and x above 20.

    It is max(x, 0) + 2 artanh(s) with s = e / (2 + e) and e = exp(-|x|): s is at most 1/3, so a short series is exact.
    """
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    e = exp2(-tl.abs(x) * LOG2E, FAST)
    s = e * reciprocal(2.0 + e, FAST)
    square = s * s
    series = square * 0.0 + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS - 1, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * series)


@triton.jit
def expm1_ratio(x, exp_x):
    """(exp(x) - 1) / x, and its limit 1 at 0: near 0 a power series."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 9
    near = tl.abs(x) < 0.5
    small = tl.where(near, x, 0.25)
    series = small * 0.0 + 1.0
    for k in tl.static_range(TERMS, 0, -1):
        series = 1.0 + series * small * (1.0 / (k + 1))
    return tl.where(near, series, (exp_x - 1.0) / tl.where(near, 1.0, x))


@triton.jit
def expm1_ratio_slope(x, exp_x, ratio):
    """The derivative of `expm1_ratio`."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 9
    near = tl.abs(x) < 0.5
    small = tl.where(near, x, 0.25)
    series = small * 0.0 + 1.0
    for k in tl.static_range(TERMS, 0, -1):
        series = 1.0 + series * small * ((k + 1.0) / (k * (k + 2.0)))
    return tl.where(near, 0.5 * series, (exp_x - ratio) / tl.where(near, 1.0, x))


@triton.jit
def load(place, inside, WHOLE: tl.constexpr):
    """What is at `place`, and 0 outside; WHOLE: all is inside."""
    if WHOLE:
        return tl.load(place)
    else:
        return tl.load(place, mask=inside, other=0)


@triton.jit
def store(place, value, inside, WHOLE: tl.constexpr):
    """Put a value of any dtype at `place`, where `inside` says so; WHOLE: all is inside.

    From float64 to bfloat16 it goes through float32, as in torch: the interpreter makes a direct cast one of integers.
    """
    if value.dtype == tl.float64 and place.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    if WHOLE:
        tl.store(place, value.to(place.dtype.element_ty))
    else:
        tl.store(place, value.to(place.dtype.element_ty), mask=inside)
