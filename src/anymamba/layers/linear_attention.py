"""Linear attention: a positive feature map in place of the softmax, so that the state is two sums of fixed size.

    S[t] = S[t-1] + φ(k[t]) v[t]ᵀ;  z[t] = z[t-1] + φ(k[t]);  y[t] = S[t]ᵀ φ(q[t]) / (φ(q[t])·z[t] + ε)

Source: Linear Transformers (arXiv:2006.16236), sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.parts.padding import Rows
from anymamba.parts.parameters import activations_of
from anymamba.parts.sequence import SequenceLayer

FEATURE_MAPS = {"elu+1": lambda x: F.elu(x) + 1, "relu": F.relu}
EPSILON = 1e-6
CHUNK = 64  # tokens per chunk; the sums S cost as much as the scores when d_head is about this


class LinearAttentionState(NamedTuple):
    """State of linear attention; its size does not depend on how many tokens it has seen."""

    S: Float[Tensor, "batch n_heads d_head d_head"]
    """The sum of φ(k) vᵀ, in float32 or wider."""
    z: Float[Tensor, "batch n_heads d_head"]
    """The sum of φ(k), in float32 or wider."""


class LinearAttention(SequenceLayer):
    """Causal linear attention with several heads.

    Args:
        d_model: width of the input and output.
        n_heads: heads of d_model / n_heads channels.
        feature_map: φ, either "elu+1" as in the paper or "relu".
        bias: whether the projections have biases.
    Raises ValueError for invalid sizes and unknown feature maps.
    """

    state_type = LinearAttentionState

    def __init__(
        self, d_model: int, n_heads: int, *, feature_map: str = "elu+1", bias: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model < 1 or d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}; change either")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, d_model // n_heads
        self.feature_map = feature_map
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction: PyTorch's default for linear layers."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> LinearAttentionState:
        """Zeros in float32 or wider, whatever the dtype of the activations."""
        like = activations_of(self.in_proj)
        wide = torch.promote_types(dtype or like["dtype"], torch.float32)
        z = torch.zeros(batch, self.n_heads, self.d_head, device=like["device"], dtype=wide)
        return LinearAttentionState(z.new_zeros(*z.shape, self.d_head), z)

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: LinearAttentionState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], LinearAttentionState]:
        """Run over chunks in parallel; see `SequenceLayer.run`."""
        q, k, v = self._features(x)
        if rows is not None:  # padding adds nothing to the sums
            k, v = (t.masked_fill(~rows.mask[..., None, None], 0) for t in (k, v))
        y, after = chunked_linear_attention(q, k, v, state or self.init_state(x.shape[0], x.dtype))
        return self.out_proj(y.flatten(-2).to(x.dtype)), after

    def run_step(
        self, x: Float[Tensor, "batch d_model"], state: LinearAttentionState
    ) -> tuple[Float[Tensor, "batch d_model"], LinearAttentionState]:
        """One token, in constant time and memory."""
        q, k, v = self._features(x)
        S = state.S + k[..., None] * v[..., None, :]
        z = state.z + k
        y = torch.einsum("bhk,bhkv->bhv", q, S) / ((q * z).sum(-1, keepdim=True) + EPSILON)
        return self.out_proj(y.flatten(-2).to(x.dtype)), LinearAttentionState(S, z)

    def _features(self, x: Float[Tensor, "... d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """φ(q), φ(k) and v, each (..., n_heads, d_head) in float32 or wider."""
        qkv = self.in_proj(x)
        qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))  # sums of many terms follow
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, self.d_head)).unbind(-3)
        feature_map = FEATURE_MAPS[self.feature_map]
        return feature_map(q), feature_map(k), v


def chunked_linear_attention(
    q: Float[Tensor, "batch length n_heads d_head"],
    k: Float[Tensor, "batch length n_heads d_head"],
    v: Float[Tensor, "batch length n_heads d_head"],
    state: LinearAttentionState,
) -> tuple[Float[Tensor, "batch length n_heads d_head"], LinearAttentionState]:
    """Linear attention of features q and k, with masked score matrices inside chunks and sums carried between them.

    Needs length * (CHUNK + d_head) * d_head multiplications per head, and memory for length * (CHUNK + d_head +
    d_head**2 / CHUNK) numbers: the scores, the values and the sums before the chunks.
    """
    length = q.shape[1]
    if length == 0:
        return v, state
    n_chunks = math.ceil(length / CHUNK)
    chunk = min(CHUNK, length)
    q, k, v = (
        rearrange(F.pad(t, (0, 0, 0, 0, 0, n_chunks * chunk - length)), "b (c t) h d -> b c h t d", c=n_chunks)
        for t in (q, k, v)
    )
    S, S_after = _sums_before(torch.einsum("bchtk,bchtv->bchkv", k, v), state.S)
    z, z_after = _sums_before(k.sum(-2), state.z)
    scores = torch.einsum("bchtk,bchsk->bchts", q, k).tril()
    values = scores @ v + q @ S
    weights = scores.sum(-1, keepdim=True) + q @ z[..., None]
    y = rearrange(values / (weights + EPSILON), "b c h t d -> b (c t) h d")[:, :length]
    return y, LinearAttentionState(S_after, z_after)


def _sums_before(terms: Float[Tensor, "batch n_chunks *sizes"], start: Tensor) -> tuple[Tensor, Tensor]:
    """The sum at the beginning of each chunk, and the sum after the last chunk."""
    sums = torch.cat([start[:, None].to(terms.dtype), terms], 1).cumsum(1)
    return sums[:, :-1], sums[:, -1]
