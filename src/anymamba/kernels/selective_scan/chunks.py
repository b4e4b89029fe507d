"""What leaves a whole row, from what leaves each of its chunks of time, which backends compute side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments


def leaving_row(leaving: Tensor, decays: Tensor, a: ScanArguments, chunk: int, *, reverse: bool = False) -> Tensor:
    """The state after a row's last token, or, in reverse, the gradient of the state before its first token.

    In a packed row, only the chunks that the last sequence reaches count; in reverse those that the first one reaches.

    Args:
        leaving: (b, chunks, ...) what leaves each chunk if nothing arrives at it.
        decays: (b, chunks, ...) what an arrival is multiplied with on its way through the chunk.
        chunk: tokens of a chunk.
    """
    counts = _reached(a, chunk, leaving.shape[1], reverse)
    if reverse:
        leaving, decays = leaving.flip(1), decays.flip(1).conj()
        counts = None if counts is None else counts.flip(0)
    later = torch.ones_like(decays)
    later[:, :-1] = decays[:, 1:].flip(1).cumprod(1).flip(1)
    left = leaving * later
    if counts is not None:
        left = torch.where(counts.view(-1, *[1] * (left.ndim - 2)), left, 0)
    return left.sum(1)


def _reached(a: ScanArguments, chunk: int, n_chunks: int, reverse: bool) -> Tensor | None:
    """(chunks,) true for those with tokens of the last sequence that is not empty, or of the first; None for all."""
    if a.cu_seqlens is None:
        return None
    offsets = a.cu_seqlens.long().clamp(0, a.length)
    first = torch.arange(n_chunks, device=offsets.device) * chunk
    if reverse:
        return first < torch.where(offsets[1:] > 0, offsets[1:], a.length).min()
    return first + chunk > torch.where(offsets[:-1] < a.length, offsets[:-1], 0).max()
