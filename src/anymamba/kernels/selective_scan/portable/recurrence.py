"""The recurrence over the steps and segments of one block, forwards and backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.elementwise import conj
from anymamba.kernels.selective_scan.portable.plan import Places


def scan_(
    x: list[Tensor],
    coefficient: list[Tensor],
    carry: Tensor,
    through: Tensor | None,
    *,
    reverse_segments: bool,
    fresh: list[Tensor] | None = None,
) -> Tensor:
    """Compute x[i] += coefficient[i] * x[i - 1] in place, in the order of the lists, beginning with the carry.

    Args:
        x, coefficient: one (s, ...) slab per step. The segments are in the order of s, or in reverse.
        carry: (...) the value before the first step of the first segment.
        through: (s, ...) the product of each segment's coefficients, from `segment_decays`; not used for one segment.
        fresh: one boolean (s, 1, ...) per step, true where the coefficient is 0; a NaN is not carried past it.
    Returns the value after the last step of the last segment.
    """
    n_segments = x[0].shape[0]
    stops: list[Tensor | None] = [None] * len(x) if fresh is None else [*fresh]
    if n_segments == 1:
        previous = carry[None]
        for value, factor, stop in zip(x, coefficient, stops, strict=True):
            previous = value.addcmul_(factor, _unless(stop, previous))
        return previous[0].clone()  # x is a buffer that the next block reuses
    assert through is not None, "several segments need it"
    product, seen = [coefficient[0]], [stops[0]]
    for i in range(1, len(x)):
        x[i].addcmul_(coefficient[i], _unless(stops[i], x[i - 1]))
        product.append(_unless(stops[i], product[-1]) * coefficient[i])
        seen.append(_either(seen[-1], stops[i]))
    incoming = torch.empty_like(x[0])
    for s in reversed(range(n_segments)) if reverse_segments else range(n_segments):
        incoming[s] = carry
        carry = torch.addcmul(x[-1][s], through[s], carry if seen[-1] is None else _unless(seen[-1][s], carry))
    for value, factor, stop in zip(x, product, seen, strict=True):
        value.addcmul_(factor, _unless(stop, incoming))
    return carry


def segment_decays(A: Tensor, step: Tensor, starts: Places | None, *, reverse: bool = False) -> Tensor | None:
    """The decay of a state over each whole segment, (s, ...): exp(A times the sum of its steps).

    It is not computed as a running product, because the rounding errors of decays near 1 would all have the same sign
    and add up over the length.

    Args:
        step: (t, s, ...) Δ.
        starts: where packed sequences start; the decay of their segments is 0.
        reverse: return the decay of a gradient instead. It covers the segment's steps without the first one, and the
            first step of the next segment.
    """
    if step.shape[1] == 1:
        return None
    total = step[1:].sum(0) if reverse else step.sum(0)
    if reverse:
        total[:-1] += step[0, 1:]
    decays = torch.exp(total * A)
    if starts is not None:
        t, s = starts.where
        if reverse:
            s = torch.where(t == 0, s - 1, s)
            s = s[s >= 0]
        decays[s] = 0
    return decays


def reverse_scan_(
    dh: Tensor, decay: Tensor, carry: Tensor, through: Tensor | None, fresh: Tensor | None = None
) -> Tensor:
    """Compute dh[t] += conj(decay[t + 1]) dh[t + 1] in place; the carry is d loss / d (state after the block).

    Args:
        dh, decay: (t, s, ...).
        through: (s, ...), from `segment_decays`.
        fresh: boolean (t, s, 1, ...), as in `scan_`.
    Returns d loss / d (state before the block).
    """
    decay = conj(decay)
    after = torch.ones_like(decay[0])
    after[:-1] = decay[0, 1:]
    values, coefficients = list(dh)[::-1], [after, *list(decay)[:0:-1]]
    through = None if through is None else conj(through)
    if fresh is None:
        return decay[0, 0] * scan_(values, coefficients, carry, through, reverse_segments=True)
    fresh_after = torch.zeros_like(fresh[0])
    fresh_after[:-1] = fresh[0, 1:]
    stops = [fresh_after, *list(fresh)[:0:-1]]
    first = scan_(values, coefficients, carry, through, reverse_segments=True, fresh=stops)
    return decay[0, 0] * _unless(fresh[0, 0], first)


def _unless(condition: Tensor | None, value: Tensor) -> Tensor:
    return value if condition is None else torch.where(condition, 0, value)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a | b


def leaks(state: Tensor) -> bool:
    """Whether a NaN or infinity reached the end of a block. A decay of 0 does not stop them, because 0 * NaN is NaN."""
    return not bool(torch.isfinite(state).all())


def fresh_steps(decay: Tensor, starts: Places) -> Tensor:
    """(t, s, 1, ...): true where a packed sequence starts."""
    fresh = torch.zeros(decay.shape[:2], dtype=torch.bool, device=decay.device)
    fresh[starts.where] = True
    return fresh[(..., *[None] * (decay.ndim - 2))]
