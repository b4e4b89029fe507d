"""Causal multi-head attention, with a cache of keys and values as its state.

    [q, k, v] = in_proj(x), optionally followed by a short causal convolution;  q, k = rotated by their positions
    y[t] = out_proj(concat over heads h of sum over s <= t of softmax_s(q[h, t] . k[h, s] / sqrt(d_head)) v[h, s])

Source: the Transformer (arXiv:1706.03762), section 3.2; grouped keys and values: arXiv:2305.13245; rotary positions:
arXiv:2104.09864; xPos: arXiv:2212.10554; the convolution: Mamba's Transformer++ (arXiv:2312.00752, appendix E.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from anymamba.ops.checks import n_sequences
from anymamba.ops.groups import SequenceGroup, current_group, gathered_parts
from anymamba.ops.observers import transformed
from anymamba.parts.cache import Cache, GrowingState
from anymamba.parts.conv import ShortConvolution
from anymamba.parts.derivatives import differentiable_again
from anymamba.parts.linear import linear
from anymamba.parts.options import AttentionOptions
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import activations_of
from anymamba.parts.rotary import rotate_heads, xpos_scale
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import last_states_are_wanted, unread

POSITIONS = ("none", "rotary", "xpos")
MOST_QUERIES = 1024
"""Queries per block. A block has one mask, and for xPos one origin: zeta_0 ** (-1024 / 512) = 12 fits every dtype."""


class _AttentionTensors(NamedTuple):
    keys: Float[Tensor, "batch n_kv_heads cache_length d_head"]
    """Rotated keys, oldest first."""
    values: Float[Tensor, "batch n_kv_heads cache_length d_head"]
    n_seen: Int[Tensor, " batch"]
    """Tokens that each row has seen. The cache has the keys of the last min(n_seen, window - 1) of them."""
    conv: Float[Tensor, "batch d_conv_minus_1 d_qkv"]
    """The last inputs of the short convolution; its size is 0 without a convolution."""


class AttentionState(_AttentionTensors, GrowingState):
    """State of `Attention`."""


class Attention(SequenceLayer):
    """Causal multi-head attention.

    Args:
        d_model: width of the input and output.
        n_heads: heads of the queries.
        n_kv_heads: heads of keys and values, each shared by n_heads / n_kv_heads heads; defaults to n_heads.
        d_head: size of a head; defaults to d_model / n_heads.
        positions: "none", "rotary" or "xpos". For absolute positions put `LearnedPositions` at the model's input.
        rotary_base: base of the rotations' frequencies.
        d_conv: width of a depthwise causal convolution of queries, keys and values; defaults to none.
        bias: whether the two projections have biases.
        window: how many keys a query sees, including its own; older keys are dropped. Defaults to all.
    Raises ValueError for invalid sizes and names.
    """

    state_type = AttentionState
    projects_input = True
    takes_parts = True

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        positions: str = "none",
        rotary_base: float = AttentionOptions.rotary_base,
        d_conv: int | None = None,
        bias: bool = AttentionOptions.bias,
        window: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        sizes = {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
        optional = {"d_head": d_head, "d_conv": d_conv, "window": window}
        require_sizes(**sizes, **{name: size for name, size in optional.items() if size is not None})
        if d_head is None:
            if d_model % n_heads:
                raise ValueError(
                    f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}; change either or give d_head"
                )
            d_head = d_model // n_heads
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}; change either")
        if positions not in POSITIONS:
            raise ValueError(
                f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}; "
                f"for absolute positions put LearnedPositions at the model's input"
            )
        if positions != "none" and d_head % 2:
            raise ValueError(f"{positions} positions need an even d_head, got {d_head}; change d_head or n_heads")
        self.d_model, self.n_heads, self.n_kv_heads, self.d_head = d_model, n_heads, n_kv_heads, d_head
        self.positions, self.rotary_base, self.d_conv, self.window = positions, rotary_base, d_conv, window
        self.d_qkv = (n_heads + 2 * n_kv_heads) * d_head
        self.in_proj = nn.Linear(d_model, self.d_qkv, bias, device, dtype)
        # only its weights are used, because its forward would apply SiLU
        self.conv = None if d_conv is None else ShortConvolution(self.d_qkv, d_conv, device=device, dtype=dtype)
        self.out_proj = nn.Linear(n_heads * d_head, d_model, bias, device, dtype)

    @property
    def grows(self) -> bool:
        return self.window is None

    def reset_parameters(self) -> None:
        """PyTorch's defaults, in the order of construction."""
        for module in (self.in_proj, self.conv, self.out_proj):
            if module is not None:
                module.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> AttentionState:
        """An empty cache."""
        like = activations_of(self.in_proj)
        like["dtype"] = dtype or like["dtype"]
        keys = torch.zeros(batch, self.n_kv_heads, 0, self.d_head, **like)
        count = torch.zeros(batch, dtype=torch.int64, device=like["device"])
        return AttentionState(
            keys, torch.zeros_like(keys), count, torch.zeros(batch, (self.d_conv or 1) - 1, self.d_qkv, **like)
        )

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: AttentionState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], AttentionState]:
        group = current_group(x.shape[1])
        if group is not None:
            return self._run_part(x, state, rows, None, group)
        is_read = state is not None or last_states_are_wanted()
        if state is None:
            state = self.init_state(x.shape[0], x.dtype)
        x = x if rows is None else rows.zero_padding(x)
        before = self._cache(state)
        q, k, v, conv = self._project(x, state, rows, begins=before.length == 0)
        if not is_read:
            y = self._attend(q, (k, v), before)
            return self._output(y), self._unread(len(x), q, x.shape[1])
        lengths = None if rows is None else rows.lengths
        cache = before.append((k, v), lengths)
        y = self._attend(q, (k, v) if before.length == 0 else cache.tensors, before)
        cache = (cache if rows is None else cache.trimmed()).keep_last(self._most_kept(cache))
        after = state.n_seen + (x.shape[1] if lengths is None else lengths)
        keys, values = cache.tensors
        new = AttentionState(keys, values, after, conv)
        new.remember(cache)
        return self._output(y), new

    def run_packed(
        self, x: Float[Tensor, "1 length d_model"], state: AttentionState | None, cu_seqlens: Tensor
    ) -> tuple[Float[Tensor, "1 length d_model"], AttentionState]:
        group = current_group(x.shape[1])
        if group is None:
            return super().run_packed(x, state, cu_seqlens)
        return self._run_part(x, state, None, cu_seqlens, group)

    def _run_part(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: AttentionState | None,
        rows: Rows | None,
        cu_seqlens: Tensor | None,
        group: SequenceGroup,
    ) -> tuple[Float[Tensor, "batch length d_model"], AttentionState]:
        """`run` or `run_packed` on this process's part of the sequences. It gathers the keys and values of all parts.
        The state that it returns is NaN.

        Raises ValueError for a state and for padding.
        """
        if state is not None or rows is not None:
            given = "a state" if rows is None else "an attention_mask"
            raise ValueError(
                f"attention on parts of sequences takes no state and no padding, got {given}; begin with whole "
                "sequences, and pack sequences of several lengths (cu_seqlens)"
            )
        qkv = linear(self.in_proj, x)
        if self.conv is not None:
            qkv = causal_conv1d(qkv, self.conv.weight, self.conv.bias, cu_seqlens=cu_seqlens, group=group).y
        q, k, v = self._heads(qkv, group.positions(cu_seqlens, x.device)[None])
        k, v = (t.transpose(1, 2) for t in self._gathered(torch.cat([k, v], -1), group).chunk(2, -1))
        start = group.start
        before = Cache((k[:, :, :start], v[:, :, :start]), torch.full((x.shape[0],), start, device=x.device), True)
        begins = None
        if cu_seqlens is not None:
            begins = cu_seqlens[:-1].long()[group.sequences(cu_seqlens)]
        y = self._attend(q.transpose(1, 2), (k, v), before, begins)
        return self._output(y), self._unread(n_sequences(x.shape[0], cu_seqlens), qkv)

    @staticmethod
    def _gathered(part: Float[Tensor, "batch length heads width"], group: SequenceGroup) -> Tensor:
        """The tokens of all parts up to the end of this one."""
        missing = max(group.lengths) - part.shape[1]
        parts = gathered_parts(F.pad(part, (0, 0, 0, 0, 0, missing)), group)
        tokens = [tokens[:, :length] for tokens, length in zip(parts, group.lengths, strict=True)]
        return torch.cat(tokens, 1)[:, : group.stop]

    def _unread(self, n_rows: int, like: Tensor, length: int = 1) -> AttentionState:
        """A state after `length` tokens that nobody may read."""
        kept = length if self.window is None else min(length, self.window - 1)
        keys = unread((n_rows, self.n_kv_heads, kept, self.d_head), like.dtype, like.device)
        n_seen = torch.full((n_rows,), length, dtype=torch.int64, device=like.device)
        conv = unread((n_rows, (self.d_conv or 1) - 1, self.d_qkv), like.dtype, like.device)
        return AttentionState(keys, keys, n_seen, conv)

    def _most_kept(self, cache: Cache) -> int:
        """How many entries a later query can still see."""
        return cache.length if self.window is None else self.window - 1

    def _cache(self, state: AttentionState) -> Cache:
        if state.cache is not None:
            return state.cache
        filled = state.n_seen if self.window is None else state.n_seen.clamp(max=self.window - 1)
        return Cache((state.keys, state.values), filled)

    def _project(
        self, x: Float[Tensor, "batch length d_model"], state: AttentionState, rows: Rows | None, begins: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (batch, heads, length, d_head); and the convolution's state.

        Args:
            begins: whether no earlier key is left, so that all rows may count from the first token of x.
        """
        qkv, conv = self._convolve(linear(self.in_proj, x), state.conv, rows)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if not begins:
            positions = state.n_seen[:, None] + positions
        q, k, v = self._heads(qkv, positions)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), conv

    def _heads(self, qkv: Tensor, positions: Int[Tensor, "batch_or_1 length"]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (batch, length, heads, d_head)."""
        heads = qkv.unflatten(-1, (-1, self.d_head))
        if self.positions == "none":
            q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), 2)
            return q, k, v
        return rotate_heads(heads, positions, self.n_kv_heads, self.rotary_base)

    def _convolve(self, qkv: Tensor, state: Tensor, rows: Rows | None) -> tuple[Tensor, Tensor]:
        """The short convolution, and its new state: the last real inputs."""
        if self.conv is None:
            return qkv, state
        state = state.to(qkv.dtype)
        if qkv.shape[1] == 1 and rows is None:
            y, state = causal_conv1d_step(state, qkv[:, 0], self.conv.weight, self.conv.bias)
            return y[:, None], state
        y, last = causal_conv1d(qkv, self.conv.weight, self.conv.bias, initial_state=state)
        return y, last if rows is None else rows.last(qkv, state, state.shape[1])

    def _attend(
        self,
        q: Float[Tensor, "batch n_heads length d_head"],
        keys_values: tuple[Tensor, ...],
        before: Cache,
        begins: Int[Tensor, " length"] | None = None,
    ) -> Float[Tensor, "batch n_heads length d_head"]:
        """Softmax attention; in each row the queries' own keys come after the entries of `before`.

        Args:
            begins: the first key that each query may see; None means that there is no such limit.
        """
        k, v = keys_values
        length, xpos = q.shape[2], self.positions == "xpos"
        if begins is not None:
            blocks = self._blocks(length)
            parts = [self._attend_block(q, k, v, before, *block, begins[slice(*block)]) for block in blocks]
            return torch.cat(parts, 2)
        if before.length == 0 and self.window is None and (length <= MOST_QUERIES or not xpos) and length > 0:
            if xpos:
                q, k = _scaled(q, k, 0)
            return _softmax_attention(q, k, v, is_causal=True)
        if length == 1:
            return self._attend_one(q, k, v, before)
        return torch.cat([self._attend_block(q, k, v, before, *block) for block in self._blocks(length)], 2)

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor, before: Cache) -> Float[Tensor, "batch n_heads 1 d_head"]:
        """Attention of one query. Heads that share keys become rows of one product; even rows need no mask."""
        mask = None
        if not before.is_even:
            mask = (torch.arange(k.shape[2], device=k.device) <= before.filled[:, None])[:, None, None]
        if self.positions == "xpos":
            q, k = _scaled(q, k, -(before.length if before.is_even else before.filled))
        y = _softmax_attention(q.unflatten(1, (self.n_kv_heads, -1))[:, :, :, 0], k, v, mask)
        return y.flatten(1, 2)[:, :, None]

    def _attend_block(
        self, q: Tensor, k: Tensor, v: Tensor, before: Cache, start: int, stop: int, begins: Tensor | None = None
    ) -> Float[Tensor, "batch n_heads block d_head"]:
        """Attention of queries start .. stop - 1 with their own mask, on the keys that at least one of them can see."""
        first, last = 0, k.shape[2]
        filled: int | Tensor = before.filled
        if before.is_even:
            filled, last = before.length, before.length + stop
            first = 0 if self.window is None else max(0, filled + start - self.window + 1)
        q, k, v = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        mask = _visible(filled, start, stop, first, k, self.window)
        if begins is not None:
            mask = mask & (torch.arange(first, last, device=k.device) >= begins[:, None])
        if self.positions == "xpos":
            q, k = _scaled(q, k, first - (filled + start))
        return _softmax_attention(q, k, v, mask)

    def _output(self, y: Float[Tensor, "batch n_heads length d_head"]) -> Float[Tensor, "batch length d_model"]:
        return linear(self.out_proj, y.transpose(1, 2).flatten(2))

    def _blocks(self, length: int) -> Iterator[tuple[int, int]]:
        """Ranges of queries. With a window a range is about as long as the window, so time and memory are linear."""
        size = MOST_QUERIES if self.window is None else min(MOST_QUERIES, max(128, self.window))
        return ((start, min(length, start + size)) for start in range(0, max(1, length), size))


def _softmax_attention(
    q: Float[Tensor, "batch n_heads queries d_head"],
    k: Float[Tensor, "batch n_kv_heads keys d_head"],
    v: Float[Tensor, "batch n_kv_heads keys d_head"],
    mask: Bool[Tensor, "batch_or_1 1 queries keys"] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "batch n_heads queries d_head"]:
    """torch's fused attention, or the same in plain operations for derivatives that the fused form does not have."""

    def operations(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if is_causal else mask
        q = q.unflatten(1, (k.shape[1], -1))
        scores = q @ k[:, :, None].mT * q.shape[-1] ** -0.5
        if visible is not None:
            scores = scores.masked_fill(~(visible if is_causal else visible[:, :, None]), -math.inf)
        return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)

    if transformed(q, k, v):
        return operations(q, k, v)
    grouped = bool(q.shape[1] != k.shape[1])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
    return differentiable_again(y, operations, q, k, v)


def _visible(
    filled: int | Int[Tensor, " batch"], start: int, stop: int, first: int, keys: Tensor, window: int | None
) -> Bool[Tensor, "batch_or_1 1 queries keys"]:
    """The mask of queries start .. stop - 1 on the keys first, first + 1, ... of each row: true where a key is seen."""
    place = torch.arange(start, stop, device=keys.device)[:, None]
    place = place + (filled if isinstance(filled, int) else filled[:, None, None])
    key = torch.arange(first, first + keys.shape[2], device=keys.device)
    mask = key <= place
    if window is not None:
        mask = mask & (key > place - window)
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def _scaled(
    q: Float[Tensor, "batch n_heads queries d_head"],
    k: Float[Tensor, "batch n_kv_heads keys d_head"],
    k_offset: int | Int[Tensor, " batch"],
) -> tuple[Tensor, Tensor]:
    """Apply xPos's decay: queries times zeta ** n, keys times zeta ** -n, with n counted from the first query.

    Counted from the start of the sequence, the factors would overflow float32 after position 36 000. So keys are cached
    without a factor and get it when they are read. It is below 1 for old keys, where it may underflow, and at most 12
    for keys of the current block.
    """

    def offsets(first: int | Tensor, n: int) -> Int[Tensor, "batch_or_1 n"]:
        count = torch.arange(n, device=q.device)[None]
        return count + (first if isinstance(first, int) else first.reshape(-1, 1))  # a graph cannot copy an int

    q = xpos_scale(q.transpose(1, 2), offsets(0, q.shape[2])).transpose(1, 2)
    k = xpos_scale(k.transpose(1, 2), -offsets(k_offset, k.shape[2])).transpose(1, 2)
    return q, k
