"""The gated attention unit: one gate, and one attention head with a squared ReLU in place of the softmax.

    [u, v, z] = silu(in_proj(x));  q = z * q_scale + q_offset;  k = z * k_scale + k_offset
    a[t, s] = relu(q[t] . k[s] / (t + 1) + bias[min(t - s, max_distance - 1)]) ** 2   for s <= t
    y[t] = out_proj(u[t] * sum over s <= t of a[t, s] v[s])

The paper divides by the length of the sequence. A causal layer cannot, because a token's output would then depend on
later tokens. Here the divisor is the number of tokens that t sees, so the last token of a sequence, whole or cut, has
the paper's output. The relative bias is a table over distances; all distances from max_distance - 1 on share the last
entry. Without the bias, the squares of the products, which are small at first, would have almost no gradient.

Source: Transformer Quality in Linear Time (arXiv:2202.10447), section 2; the causal divisor is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.base.sizes import require_at_least, require_sizes
from anymamba.parts.cache import Cache, GrowingState
from anymamba.parts.options import GAUOptions
from anymamba.parts.padding import Rows
from anymamba.parts.sequence import SequenceLayer

MOST_QUERIES = 512
"""Queries whose scores are held at once."""


class _GAUTensors(NamedTuple):
    keys: Float[Tensor, "batch cache_length d_key"]
    """Oldest first."""
    values: Float[Tensor, "batch cache_length d_inner"]
    n_seen: Int[Tensor, " batch"]
    """Tokens that each row has seen; all of them are cached."""


class GAUState(_GAUTensors, GrowingState):
    """State of `GAU`."""


class GAU(SequenceLayer):
    """A gated attention unit.

    Args:
        d_model: width of the input and output.
        expand: values and gate are d_inner = int(expand * d_model) wide.
        d_key: size of queries and keys.
        max_distance: entries of the relative bias.
    Raises ValueError for sizes below 1.
    """

    state_type = GAUState

    def __init__(
        self,
        d_model: int,
        expand: float = GAUOptions.expand,
        d_key: int = GAUOptions.d_key,
        max_distance: int = GAUOptions.max_distance,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_inner, self.d_key = d_model, int(expand * d_model), d_key
        self.max_distance = max_distance
        require_sizes(d_model=d_model, d_key=d_key, max_distance=max_distance)
        require_at_least("d_inner = int(expand * d_model)", self.d_inner, 1)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + d_key, bias=False, **like)
        self.q_scale = nn.Parameter(torch.empty(d_key, **like))
        self.q_offset = nn.Parameter(torch.empty(d_key, **like))
        self.k_scale = nn.Parameter(torch.empty(d_key, **like))
        self.k_offset = nn.Parameter(torch.empty(d_key, **like))
        self.relative_bias = nn.Parameter(torch.empty(max_distance, **like))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **like)
        self._reset_vectors()

    @property
    def grows(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        """torch's defaults for the linear maps; scales and relative bias N(0, 0.02), offsets 0."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self._reset_vectors()

    def _reset_vectors(self) -> None:
        for vector in (self.q_scale, self.k_scale, self.relative_bias):
            nn.init.normal_(vector, std=0.02)
        nn.init.zeros_(self.q_offset)
        nn.init.zeros_(self.k_offset)

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> GAUState:
        """An empty cache."""
        scale = self.q_scale  # projections may have been replaced by quantised ones
        like: dict[str, Any] = {"device": scale.device, "dtype": dtype or scale.dtype}
        count = torch.zeros(batch, dtype=torch.int64, device=scale.device)
        return GAUState(torch.zeros(batch, 0, self.d_key, **like), torch.zeros(batch, 0, self.d_inner, **like), count)

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: GAUState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], GAUState]:
        if state is None:
            state = self.init_state(x.shape[0], x.dtype)
        x = x if rows is None else rows.zero_padding(x)
        u, v, z = F.silu(self.in_proj(x)).split((self.d_inner, self.d_inner, self.d_key), -1)
        q, k = z * self.q_scale + self.q_offset, z * self.k_scale + self.k_offset
        before = Cache((state.keys, state.values), state.n_seen) if state.cache is None else state.cache
        cache = before.append((k, v), None if rows is None else rows.lengths)
        keys, values = (k, v) if before.length == 0 else cache.tensors
        read = [
            self._read(q[:, start : start + MOST_QUERIES], keys, values, before, start)
            for start in range(0, x.shape[1], MOST_QUERIES)
        ]
        y = self.out_proj(u * torch.cat(read, 1) if read else u)
        cache = cache if rows is None else cache.trimmed()
        keys, values = cache.tensors
        new = GAUState(keys, values, cache.filled)
        new.remember(cache)
        return y, new

    def _read(
        self, q: Float[Tensor, "batch queries d_key"], keys: Tensor, values: Tensor, before: Cache, start: int
    ) -> Float[Tensor, "batch queries d_inner"]:
        """sum over s of a[t, s] v[s], for queries that begin `start` places after the entries of `before`."""
        filled: Tensor | int = before.filled[:, None, None]
        if before.is_even:
            filled = before.length
            last = filled + start + q.shape[1]
            keys, values = keys[:, :last], values[:, :last]
        place = filled + start + torch.arange(q.shape[1], device=q.device)[:, None]
        distance = place - torch.arange(keys.shape[1], device=q.device)
        wide = torch.promote_types(q.dtype, torch.float32)  # scores start near 1e-4, whose square is 0 in float16
        bias = self.relative_bias.to(wide)[distance.clamp(0, self.max_distance - 1)]
        scores = (q @ keys.mT).to(wide) / (place + 1) + bias
        weights = F.relu(scores).square().masked_fill(distance < 0, 0)
        return weights.to(values.dtype) @ values
