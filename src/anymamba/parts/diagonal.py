"""Sums over powers of a diagonal matrix: kernels, free responses and last states of diagonal state space models.

With t = q * block + r, base^t = base^(block q) base^r. So a sum over the states for each t, or over t for each state,
is a matrix product of two small tables of powers. No tensor of (width, length, d_state) is needed, and the tables grow
as the square root of the length. They are computed in float64, so that rounding errors do not grow with t as they would
in float32: by repeated doubling, which takes no logarithm, and on a GPU in few operations. The products run in the
layer's dtype.

A complex base also represents its conjugate: sums over states are then 2 Re(...).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

from anymamba.parts.parameters import complex_dtype

N_ON_CIRCLE = 18


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype for discretisation and powers: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def exponential_sums(
    weights: Num[Tensor, "rows width n_states"], base: Num[Tensor, "width n_states"], length: int
) -> Float[Tensor, "rows width length"]:
    """sums[t] = sum over the states of weights base^t, for t < length, in the weights' precision."""
    rows, width, _ = weights.shape
    block = _block(rows, length)
    fine, coarse = _powers(base, block, -(-length // block), weights.real.dtype)
    left = (weights[:, :, None] * coarse).transpose(0, 1)  # (width, rows, blocks, n_states)
    sums = _summands(left).flatten(1, 2) @ _parts(fine).transpose(1, 2)
    return sums.reshape(width, rows, coarse.shape[1] * block)[..., :length].transpose(0, 1)


def n_powers(length: int) -> int:
    """Powers of each base in the tables of `exponential_sums` with one row of weights."""
    block = _block(1, length)
    return block + -(-length // block)


def accumulate(
    u: Float[Tensor, "rows length width"], base: Num[Tensor, "width n_states"]
) -> Num[Tensor, "rows width n_states"]:
    """sum over t of base^(length - 1 - t) u[t]: the last state that the inputs leave, in u's precision."""
    rows, width, length = u.shape[0], u.shape[2], int(u.shape[1])
    block = _block(rows, length)
    blocks = -(-length // block)
    fine, coarse = _powers(base, block, blocks, u.dtype)
    u = F.pad(u, (0, 0, blocks * block - length, 0)).reshape(rows * blocks, block, width)
    sums = u.permute(2, 0, 1) @ _parts(fine.flip(1))  # (width, rows * blocks, parts)
    sums = _join(sums, base.is_complex()).reshape(width, rows, blocks, base.shape[1])
    return (sums * coarse.flip(1)[:, None]).sum(2).transpose(0, 1)


def elapsed(
    base: Num[Tensor, "width n_states"], length: int, lengths: Int[Tensor, " rows"] | None
) -> Num[Tensor, "rows width n_states"]:
    """base^lengths for each row, by squaring. Without lengths, a single row of base^length that serves every row."""
    exponents = torch.full((1,), length, device=base.device) if lengths is None else lengths
    result = torch.ones_like(base)[None]
    for bit in range(length.bit_length()):
        odd = (exponents >> bit) & 1
        result = torch.where(odd.bool()[:, None, None], result * base, result)
        base = base * base
    return result


def right_aligned(
    x: Float[Tensor, "rows length width"], lengths: Int[Tensor, " rows"] | None
) -> Float[Tensor, "rows length width"]:
    """Shift rows so that the last real token is at the end, with zeros before the first. A no-op without lengths."""
    if lengths is None:
        return x
    place = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - lengths)[:, None]
    moved = x.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return moved.masked_fill((place < 0)[..., None], 0)


def in_precision(x: Num[Tensor, "..."], real_dtype: torch.dtype) -> Num[Tensor, "..."]:
    """Convert x to the precision of a real dtype; a complex x stays complex."""
    return x.to(complex_dtype(real_dtype) if x.is_complex() else real_dtype)


def expm1_ratio(x: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
    """(exp(x) - 1) / x and its limit 1 at 0, exact in value and derivatives, in few operations but much memory.

    For |x| < 1/2 the quotient and its derivatives cancel. There its value is the mean of values on a circle of radius
    1 around x; with N_ON_CIRCLE of them the error is less than 1e-16.
    Source: Kassam and Trefethen, Fourth-order time-stepping for stiff PDEs (2005), section 3.
    """
    real = x.real.dtype if x.is_complex() else x.dtype
    angles = torch.arange(N_ON_CIRCLE, device=x.device, dtype=real) * (2j * math.pi / N_ON_CIRCLE)
    z = x[..., None] + (x.abs() < 0.5)[..., None] * torch.exp(angles)
    ratio = ((torch.exp(z) - 1) / z).mean(-1)
    return ratio if x.is_complex() else ratio.real


def real_sum(x: Num[Tensor, "... n_states"]) -> Float[Tensor, "..."]:
    """The sum over states and, where they are complex, their conjugates."""
    return 2 * x.real.sum(-1) if x.is_complex() else x.sum(-1)


def require_sizes(width: int, d_state: int, pairs: bool, instead: str = "") -> None:
    """Raise ValueError unless both are at least 1 and d_state is even where states come in conjugate pairs.

    `instead` ends the message with an alternative to conjugate pairs.
    """
    if width < 1 or d_state < 1:
        raise ValueError(f"width and d_state must be at least 1, got {width} and {d_state}")
    if pairs and d_state % 2:
        raise ValueError(
            f"d_state counts real numbers and complex states come in conjugate pairs: it must be even, got {d_state}; "
            f"take {d_state + 1}{instead}"
        )


@torch.no_grad()
def draw_log_dt(log_dt: Float[Tensor, " width"], dt_min: float, dt_max: float) -> None:
    """Fill log_dt so that the steps are log-uniform on [dt_min, dt_max]."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min and dt_max must be 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
    log_dt.uniform_(math.log(dt_min), math.log(dt_max))


def _powers(
    base: Num[Tensor, "width n_states"], block: int, n_blocks: int, real_dtype: torch.dtype
) -> tuple[Num[Tensor, "width block n_states"], Num[Tensor, "width n_blocks n_states"]]:
    """base^r for r < block, and base^(block q) for q < n_blocks, in the precision of real_dtype.

    block must be a power of two.
    """
    if base.is_cuda:
        return _powers_at_once(base, block, n_blocks, real_dtype)
    fine, jump = _doubled(base, block)
    coarse, _ = _doubled(jump, _smallest_power_of_two(n_blocks))
    return in_precision(fine, real_dtype), in_precision(coarse[:, :n_blocks], real_dtype)


def _doubled(base: Num[Tensor, "width n_states"], count: int) -> tuple[Num[Tensor, "width count n_states"], Tensor]:
    """base^0 ... base^(count - 1), and base^count; count must be a power of two."""
    table = torch.ones_like(base)[:, None]
    while table.shape[1] < count:
        table = torch.cat([table, table * base[:, None]], 1)
        base = base * base
    return table, base


def _powers_at_once(
    base: Num[Tensor, "width n_states"], block: int, n_blocks: int, real_dtype: torch.dtype
) -> tuple[Num[Tensor, "width block n_states"], Num[Tensor, "width n_blocks n_states"]]:
    """`_powers` in a few operations. On a GPU these small tables cost what their launches cost.

    A complex power takes a logarithm, here one for each base, so what is smaller than the smallest normal number, such
    as 0, is replaced by it.
    """
    real = base.real.dtype if base.is_complex() else base.dtype
    fine_steps = torch.arange(block, device=base.device, dtype=real)
    coarse_steps = torch.arange(0, n_blocks * block, block, device=base.device, dtype=real)
    exponents = torch.cat([fine_steps, coarse_steps])[:, None]
    if base.is_complex():
        tiny = torch.finfo(real).tiny
        logarithm = torch.log(torch.where(base.abs() < tiny, tiny, base))
        table = torch.exp(exponents * logarithm[:, None])
    else:
        table = torch.pow(base[:, None], exponents)
    fine, coarse = in_precision(table, real_dtype).split([block, n_blocks], 1)
    return fine, coarse


def _block(rows: int, length: int) -> int:
    """The block length that makes the tables smallest. They have block and rows * length / block entries."""
    return _smallest_power_of_two(min(length, round((max(1, int(rows)) * length) ** 0.5)))


def _smallest_power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _parts(x: Num[Tensor, "... n_states"]) -> Float[Tensor, "... n_parts"]:
    """Real and imaginary parts in turn; a real tensor as it is."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def _summands(x: Num[Tensor, "... n_states"]) -> Float[Tensor, "... n_parts"]:
    """The factor for which the sum of `_summands(x) * _parts(y)` is real_sum(x y)."""
    return _parts((2 * x).conj().resolve_conj()) if x.is_complex() else x


def _join(x: Float[Tensor, "... n_parts"], is_complex: bool) -> Num[Tensor, "... n_states"]:
    """The inverse of `_parts`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if is_complex else x
