"""Scans of a row in parts, as ranks of a group have them: one process plays all ranks, without exchanges."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import N_TENSORS, ScanArguments
from anymamba.ops.groups import SequenceGroup
from anymamba.ops.selective_scan import registration
from anymamba.ops.selective_scan.over_group import _of_given, _Part


def parts_of(a: ScanArguments, lengths: tuple[int, ...], backend: str) -> list[_Part]:
    """The parts of the ranks."""
    starts = (0, *itertools.accumulate(lengths))
    parts = []
    for rank, (start, stop) in enumerate(itertools.pairwise(starts)):
        rows = {k: t[:, start:stop] for k in ("u", "delta", "z") if (t := getattr(a, k)) is not None}
        rows |= {k: getattr(a, k)[:, start:stop] for k in ("B", "C") if getattr(a, k).ndim == 4}
        parts.append(_Part(a._replace(**rows), SequenceGroup("none", rank, starts), backend))
    return parts


def in_parts(parts: list[_Part], dy: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the last states, and the gradients of all parts."""
    n, offsets = len(parts), parts[0].arguments.cu_seqlens
    begun = [part.begin() for part in parts]
    leaving, steps = (torch.stack([b[i] for b in begun]) for i in (0, 1))
    arriving = [p.fold(leaving, steps, range(i), reverse=False) for i, p in enumerate(parts)]
    ran = [p.finish(begun[i][2], arriving[i], True) for i, p in enumerate(parts)]
    last = sum(p.group.only_where_it_ends(ran[i][1], offsets) for i, p in enumerate(parts))
    dys = [dy[:, start:stop] for start, stop in itertools.pairwise(parts[0].group.starts)]
    dlasts = [p.group.only_where_it_ends(dlast, offsets) for p in parts]
    reverse = [p.begin_reverse(dys[i], dlasts[i]) for i, p in enumerate(parts)]
    gradients = torch.stack([r[0] for r in reverse])
    grads = []
    for i, p in enumerate(parts):
        departing = p.fold(gradients, steps, range(n - 1, i, -1), reverse=True)
        own = p.finish_reverse(reverse[i][1], departing, arriving[i], ran[i][2], dys[i], dlasts[i])
        grads.append([*own[:-1], _of_given(p, own[-1])])
    return torch.cat([r[0] for r in ran], 1), last, grads


def check_parts(a: ScanArguments, lengths: tuple[int, ...], backend: str, tolerance: float) -> list[bool]:
    """Values and gradients of the parts are those of the whole; returns which parts had a first phase of their own."""
    y, last, saved = registration._forward(a, True, backend)
    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    want = registration._backward(dy, dlast, a, saved, backend)
    parts = parts_of(a, lengths, backend)
    got_y, got_last, grads = in_parts(parts, dy, dlast)
    found = {"y": (got_y, y), "last state": (got_last, last)}
    for i, field in enumerate(ScanArguments._fields[: N_TENSORS - 1]):
        tensor = getattr(a, field)
        if tensor is not None:
            along = field in ("u", "delta", "z") or (field in "BC" and tensor.ndim == 4)
            own = [g[i] for g in grads]
            found[f"gradient of {field}"] = (torch.cat(own, 1) if along else sum(own), want[i])
    errors = {name: ((got - want).abs().max() / want.abs().max()).item() for name, (got, want) in found.items()}
    assert max(errors.values()) < tolerance, errors
    return [part.begin()[2] is not None for part in parts]
