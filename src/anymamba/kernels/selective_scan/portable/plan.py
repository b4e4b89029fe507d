"""The spans of time, the slices of rows, and the places where packed sequences start and end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.portable.inputs import Inputs
from anymamba.kernels.selective_scan.portable.splitting import Span, rows_at_once, spans, split


class Places(NamedTuple):
    """Positions in one block at which packed sequences start or end."""

    where: tuple[Tensor, Tensor]  # (step, segment)
    sequence: Tensor


class Sequences:
    """Where packed sequences start and end, by block. Empty sequences have neither."""

    def __init__(self, cu_seqlens: Tensor | None, spans: list[Span]) -> None:
        self.starts: dict[int, Places] = {}
        self.ends: dict[int, Places] = {}
        if cu_seqlens is not None and spans:
            blocks = [(start, span.n_steps) for span in spans for start in span.block_starts()]
            offsets = cu_seqlens.long()
            filled = (offsets[1:] > offsets[:-1]).nonzero().flatten()
            self.starts = self._by_block(offsets[filled], filled, blocks)
            self.ends = self._by_block(offsets[filled + 1] - 1, filled, blocks)

    @staticmethod
    def _by_block(positions: Tensor, sequence: Tensor, blocks: list[tuple[int, int]]) -> dict[int, Places]:
        """The places in each block that has at least one."""
        starts = torch.tensor([start for start, _ in blocks], device=positions.device)
        cuts = [*torch.searchsorted(positions, starts).tolist(), positions.numel()]
        places = {}
        for i, (start, n_steps) in enumerate(blocks):
            here = slice(cuts[i], cuts[i + 1])
            if here.start < here.stop:
                offset = positions[here] - start
                places[i] = Places((offset % n_steps, offset // n_steps), sequence[here])
        return places


class Plan:
    """How the work of a call is split: spans of time, slices of rows, and the places of packed sequences."""

    def __init__(self, batch: int, length: int, inputs: Inputs, cu_seqlens: Tensor | None) -> None:
        n_groups, d_state, per_group = inputs.A.shape
        d_inner = n_groups * per_group
        n_segments, n_steps = split(batch, d_inner, d_state)
        rows = rows_at_once(batch, d_inner, d_state)
        self.row_slices = [slice(start, min(batch, start + rows)) for start in range(0, batch, rows)]
        self.spans = spans(length, n_segments, n_steps, rows * d_inner)
        self.sequences = Sequences(cu_seqlens, self.spans)
