"""One token of the selective scan in Triton: the state goes in and the new state comes out.

A program has a block of channels of one row and all their states, a block of states at a time, so that the state is
read and written in the order of its memory.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from anymamba.runtimes.triton.functions import LN2, LOG2E, exp2, expm1_ratio, sigmoid, softplus, store

NUMBERS = ("u_row", "delta_row", "z_row", "d_inner", "d_state", "per_group", "n_groups")


@triton.jit(do_not_specialize=NUMBERS)
def step(
    u, delta, z, B, C, A, D, bias, initial, y, last, u_row, delta_row, z_row, d_inner, d_state, per_group, n_groups,
    BLOCK: tl.constexpr, STATES: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = A.dtype.element_ty
    blocks = (d_inner + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < d_inner
    x = tl.load(u + row * u_row + channel, mask=inside, other=0).to(R)
    d = tl.load(delta + row * delta_row + channel, mask=inside, other=0).to(R)
    if bias is not None:
        d += tl.load(bias + channel, mask=inside, other=0)
    if SOFTPLUS:
        d = softplus(d, FAST)
    total = tl.full([BLOCK], 0, R)
    if D is not None:
        total += tl.load(D + channel, mask=inside, other=0) * x
    for first in tl.range(0, d_state, STATES):
        n = first + tl.arange(0, STATES)
        ok = inside[:, None] & (n < d_state)[None, :]
        matrix = channel[:, None] * d_state + n[None, :]
        state = row * d_inner * d_state + matrix
        of_group = (row * n_groups + channel // per_group)[:, None] * d_state + n[None, :]
        rate = tl.load(A + matrix, mask=ok, other=0) * LOG2E
        a = exp2(d[:, None] * rate, FAST)
        weight = d[:, None]
        if ZOH:
            weight = weight * expm1_ratio(d[:, None] * rate * LN2, a)
        h = weight * x[:, None] * tl.load(B + (matrix if CONSTANT_B else of_group), mask=ok, other=0).to(R)
        if initial is not None:
            h += a * tl.load(initial + state, mask=ok, other=0)
        tl.store(last + state, h, mask=ok)
        term = h * tl.load(C + (matrix if CONSTANT_C else of_group), mask=ok, other=0).to(R)
        total += tl.sum(tl.where(ok, term, 0.0), 1)
    if z is not None:
        gate = tl.load(z + row * z_row + channel, mask=inside, other=0).to(R)
        total = total * (gate * sigmoid(gate, FAST))
    store(y + row * d_inner + channel, total, inside, False)
