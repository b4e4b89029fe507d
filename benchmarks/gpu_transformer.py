"""Transformer++ with a static cache of keys and values, for `gpu_throughput`: prompts in pieces, tokens in CUDA graphs.

The weights are those of a preset of this package, in bfloat16. All rows have the same length, so attention needs no
mask and reads exactly the keys that are there: there is a graph for each length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from anymamba.parts.norm import norm_of_sum

PIECE = 8
"""Rows of a prompt that are read at once."""


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., length, d_head) with rotary positions."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def gated(x: Tensor) -> Tensor:
    """SwiGLU's product."""
    u, gate = x.chunk(2, -1)
    return u * F.silu(gate)


class StaticTransformer:
    """A Transformer++ that generates greedily.

    Args:
        name: of the preset.
        batch, length: rows, and tokens that their cache can hold.
    """

    def __init__(self, name: str, batch: int, length: int) -> None:
        model: Any = LanguageModel(preset(name), device="cuda", dtype=torch.bfloat16).eval()
        self.model = model
        self.pairs = list(zip(model.blocks[::2], model.blocks[1::2], strict=True))
        mixer = self.pairs[0][0].mixer
        self.heads, self.d_head = mixer.n_heads, mixer.d_head
        shape = (len(self.pairs), 2, batch, self.heads, length, self.d_head)
        self.cache = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        half = torch.arange(self.d_head // 2, device="cuda") / (self.d_head // 2)
        angle = torch.arange(length, device="cuda")[:, None] * mixer.rotary_base**-half
        self.cos, self.sin = angle.cos(), angle.sin()
        self.tokens = torch.zeros(batch, device="cuda", dtype=torch.int64)
        self.fast = [torch.compile(f, dynamic=False) for f in (rotated, gated)]  # of prompts: one kernel each
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @staticmethod
    def row_bytes(name: str, length: int) -> int:
        """Bytes of a row's cache."""
        config = preset(name)
        return 2 * 2 * config.n_layers // 2 * config.d_model * length

    def read(self, ids: Tensor) -> None:
        """Read prompts (batch, length), and choose the first token of each."""
        for start in range(0, len(ids), PIECE):
            rows = slice(start, start + PIECE)
            whole = len(ids[rows]) == PIECE
            self.tokens[rows] = self._logits(ids[rows], rows, 0, *(self.fast if whole else (rotated, gated)))

    def capture(self, lengths: range) -> None:
        """Make the graphs of the steps after so many tokens."""
        every, pool = slice(None), torch.cuda.graph_pool_handle()
        self._logits(self.tokens[:, None], every, lengths[0])  # allocates what libraries need
        for n in lengths:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.tokens.copy_(self._logits(self.tokens[:, None], every, n))
            self.graphs[n] = graph

    def generate(self, lengths: range) -> Iterator[Tensor]:
        """One token for each row after each number of tokens."""
        for n in lengths:
            self.graphs[n].replay()
            yield self.tokens

    def _logits(self, ids: Tensor, rows: slice, before: int, rotate: Any = rotated, gate: Any = gated) -> Tensor:
        """The likeliest next token of each row, after reading ids (rows, length) at position `before`."""
        residual, update = self.model.embedding(ids).float(), None
        cos, sin = (t[before : before + ids.shape[1]] for t in (self.cos, self.sin))
        for layer, (attention, mlp) in enumerate(self.pairs):
            x, residual = norm_of_sum(attention.norm, update, residual)
            heads = attention.mixer.in_proj(x).unflatten(-1, (3, self.heads, self.d_head)).permute(2, 0, 3, 1, 4)
            q, k = rotate(heads[0], cos, sin), rotate(heads[1], cos, sin)
            update = attention.mixer.out_proj(self._attend(layer, rows, before, q, k, heads[2]))
            x, residual = norm_of_sum(mlp.norm, update, residual)
            update = mlp.mixer.out_proj(gate(mlp.mixer.in_proj(x)))
        x, _ = norm_of_sum(self.model.norm, update[:, -1:], residual[:, -1:])
        return self.model.logits(x[:, 0]).argmax(-1)

    def _attend(self, layer: int, rows: slice, before: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (rows, length, d_model), which keeps the new keys and values."""
        keys, values = self.cache[layer, 0, rows], self.cache[layer, 1, rows]
        after = before + q.shape[2]
        keys[:, :, before:after] = k
        values[:, :, before:after] = v
        if before == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, keys[:, :, :after], values[:, :, :after])
        return y.transpose(1, 2).flatten(2)
