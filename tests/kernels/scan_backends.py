"""A backend of the scan called by itself, and random calls that its contract allows."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from scan_cases import scan_inputs
from torch import Tensor

from anymamba.kernels.selective_scan import reference
from anymamba.kernels.selective_scan.arguments import ScanArguments


def arguments(inputs: dict[str, Any], device: str = "cpu") -> ScanArguments:
    """The record of the op's arguments; B and C get their dimension of groups."""
    grouped = {k: inputs[k][:, :, None] if inputs[k].ndim == 3 else inputs[k] for k in "BC"}
    return moved(ScanArguments(**inputs | grouped), device)


def moved(a: ScanArguments, device: str) -> ScanArguments:
    """The record on a device, with the strides that it has."""

    def move(t: Tensor) -> Tensor:
        memory = t.new_empty(0).set_(t.untyped_storage()).to(device)
        return memory.as_strided(t.shape, t.stride(), t.storage_offset())

    return a._replace(**{k: move(t) for k, t in a._asdict().items() if isinstance(t, Tensor)})


def results(module: Any, a: ScanArguments) -> dict[str, Tensor]:
    """y, last_state and, from cotangents that depend on the shapes alone, every gradient."""
    y, last_state, saved = module.forward(a, True)
    generator = torch.Generator().manual_seed(1)
    dy, dlast = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, last_state))
    gradients = module.backward(dy, dlast, a, saved)
    found = {f"d{k}": g for k, g in zip(a._fields, gradients, strict=False) if g is not None}
    return {"y": y, "last_state": last_state} | found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 257, 320, 397)
STATES = (16, 16, 16, 16, 8, 32, 64, 1, 4, 5, 17, 48, 65, 128, 300)
CHANNELS = (1, 2, 6, 7, 12, 31, 32, 33, 60, 64, 96, 100, 128, 160)
MOST = 400_000
"""Numbers that the reference holds a state for."""


def contract(seed: int) -> ScanArguments:
    """A random call of the scan: shapes, dtypes, what is there, packing, strides."""
    rng = random.Random(seed)
    dtype = rng.choices((torch.float32, torch.bfloat16, torch.float16, torch.float64), (4, 3, 2, 2))[0]
    is_complex = dtype in (torch.float32, torch.float64) and rng.random() < 0.25
    length, d_inner, d_state, batch = rng.choice(LENGTHS), rng.choice(CHANNELS), rng.choice(STATES), rng.randint(1, 4)
    while batch * length * d_inner * d_state > MOST:
        batch, length = max(1, batch // 2), max(1, length // 2)
    lengths = _lengths(rng, length) if rng.random() < 0.4 else None
    groups = rng.choice([g for g in (1, 2, 3, 4, 6) if d_inner % g == 0])
    selective = "selective" if groups == 1 else groups
    inputs = scan_inputs(
        1 if lengths else batch,
        length,
        d_inner,
        d_state,
        B=rng.choices((selective, "constant"), (5, 1))[0],
        C=rng.choices((selective, "constant"), (5, 1))[0],
        is_complex=is_complex,
        rule=rng.choices(("euler", "zoh"), (4, 1))[0],
        lengths=lengths,
        dtype=dtype,
        seed=seed,
        **{name: rng.random() < 0.7 for name in ("D", "z", "bias", "softplus", "initial")},
    )
    if dtype in (torch.bfloat16, torch.float16) and rng.random() < 0.3:
        name = rng.choice(("delta", "B", "z"))
        inputs[name] = None if inputs[name] is None else inputs[name].float()
    for name in ("u", "delta", "z", "B", "C"):
        if inputs[name] is not None and inputs[name].ndim > 2:
            inputs[name] = _laid_out(rng, inputs[name])
    return arguments(inputs)


def _lengths(rng: random.Random, length: int) -> list[int]:
    """Of packed sequences: few long ones or many short ones, with empty ones between."""
    cuts = sorted(rng.randint(0, length) for _ in range(rng.choice((0, 1, 2, 5, min(length, 40)))))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


def _laid_out(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers with other strides: padded rows, time first, or a row that lies anywhere."""
    way = rng.choice(("dense", "dense", "dense", "padded", "turned", "moved"))
    if way == "padded":
        return torch.cat([tensor, torch.full_like(tensor, torch.nan)[..., :8]], -1)[..., : tensor.shape[-1]]
    if way == "turned":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if way == "moved":
        return torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(tensor.shape)
    return tensor


def check_summaries(module: Any, a: ScanArguments) -> None:
    """`summary` and `reverse_summary` of a backend are what the reference's whole passes give, in float64.

    The sum of steps has no meaning in a row of several sequences: no state passes through it.
    """
    wide = ScanArguments(*(t.to(_wide(t.dtype)) if isinstance(t, Tensor) and i != 9 else t for i, t in enumerate(a)))
    if wide.initial_state is None:
        wide = wide._replace(initial_state=torch.zeros(a.n_sequences, a.d_inner, a.d_state, dtype=wide.dtype))
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(a.u.shape, generator=generator, dtype=torch.float64)
    dlast = torch.randn(a.n_sequences, a.d_inner, a.d_state, generator=generator, dtype=wide.dtype)
    last, first = slice(None), slice(None)
    if a.cu_seqlens is not None:
        ends = [(i, end) for i, (start, end) in enumerate(itertools.pairwise(a.cu_seqlens.tolist())) if end > start]
        last, first = slice(ends[-1][0], ends[-1][0] + 1), slice(ends[0][0], ends[0][0] + 1)
    steps = wide.delta if a.delta_bias is None else wide.delta + wide.delta_bias
    steps = torch.nn.functional.softplus(steps) if a.delta_softplus else steps
    state = reference.forward(wide, False)[1][last]
    gradient = reference.backward(dy, dlast, wide, dy)[8]
    leaving, found_steps = module.summary(a)
    got = {"state": leaving, "gradient": module.reverse_summary(dy.to(a.u.dtype), dlast.to(a.dtype), a)}
    wanted = {"state": state, "gradient": gradient[first]}
    if a.cu_seqlens is None or len(ends) == 1:
        got["steps"], wanted["steps"] = found_steps, steps.sum(1)
    for name, want in wanted.items():
        found = got[name]
        assert found.dtype == (a.real_dtype if name == "steps" else a.dtype)
        tolerance = 1e-12 if a.real_dtype == torch.float64 else 1e-5 if a.u.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.to(want.dtype), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float64)
