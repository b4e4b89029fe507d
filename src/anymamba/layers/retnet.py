"""Retention (RetNet): linear attention with a decay for each head, and with rotated queries and keys.

    S[t] = γ S[t-1] + k[t] v[t]ᵀ;   o[t] = S[t]ᵀ q[t];   y[t] = out_proj(silu(g[t]) * rmsnorm(o[t]))

γ = 1 - 2^(-5-h) in head h. q and k are rotated by their positions, and k is scaled by 1 / sqrt(d_head).

Source: RetNet (arXiv:2307.08621), sections 2.1 to 2.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.parts.norm import RMSNorm
from anymamba.parts.options import RetentionOptions
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import activations_of
from anymamba.parts.rotary import rotate
from anymamba.parts.sequence import SequenceLayer

CHUNK = 64  # tokens per chunk


class RetentionState(NamedTuple):
    """State of a retention layer; its size does not depend on how many tokens it has seen."""

    S: Float[Tensor, "batch n_heads d_head d_head_value"]
    """The decayed sum of k vᵀ, in float32 or wider."""
    position: Int[Tensor, " batch"]
    """Tokens seen, needed for the next rotation."""


class Retention(SequenceLayer):
    """Multi-scale retention with a swish gate.

    Each head is normalised separately, without weights. So the paper's normalisation of the rows of the score matrix is
    not needed: it multiplies o[t] of a head by a positive number, which the norm removes.

    Args:
        d_model: width of the input and output, and of queries and keys.
        n_heads: heads; each has d_model / n_heads channels, which must be even.
        d_value: width of values and gate; defaults to 2 d_model.
        norm_eps: epsilon of the heads' norms.
    Raises ValueError for invalid sizes.
    """

    state_type = RetentionState

    def __init__(
        self,
        d_model: int,
        n_heads: int = RetentionOptions.n_heads,
        *,
        d_value: int | None = None,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        d_value = 2 * d_model if d_value is None else d_value
        _require_sizes(d_model, n_heads, d_value)
        self.d_model, self.n_heads, self.d_value = d_model, n_heads, d_value
        self.d_head, self.d_head_value = d_model // n_heads, d_value // n_heads

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.q_proj, self.k_proj = linear(d_model, d_model), linear(d_model, d_model)
        self.v_proj, self.g_proj = linear(d_model, d_value), linear(d_model, d_value)
        self.out_proj = linear(d_value, d_model)
        self.norm = RMSNorm(self.d_head_value, norm_eps, weight=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform, with gain 2^-1 for the output projection and 2^-2.5 for the others."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> RetentionState:
        """Zeros. S is float32 or wider, whatever the dtype of the activations."""
        like = activations_of(self.q_proj)
        wide = torch.promote_types(dtype or like["dtype"], torch.float32)
        sizes = (batch, self.n_heads, self.d_head, self.d_head_value)
        return RetentionState(
            torch.zeros(sizes, device=like["device"], dtype=wide),
            torch.zeros(batch, device=like["device"], dtype=torch.int64),
        )

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: RetentionState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], RetentionState]:
        """Run over chunks in parallel; see `SequenceLayer.run`."""
        state = state or self.init_state(x.shape[0], x.dtype)
        length = x.shape[1]
        positions = state.position[:, None] + torch.arange(length, device=x.device)
        q, k, v = self._rotated(x, positions)
        lengths = torch.full_like(state.position, length)
        if rows is not None:  # padding adds nothing to the sum; with `lengths` the sum does not decay there either
            k, v = (t.masked_fill(~rows.mask[..., None, None], 0) for t in (k, v))
            lengths = rows.lengths
        o, S = chunked_retention(q, k, v, log_decay(self.n_heads, q), state.S, lengths)
        return self._output(x, o), RetentionState(S, state.position + lengths)

    def run_step(
        self, x: Float[Tensor, "batch d_model"], state: RetentionState
    ) -> tuple[Float[Tensor, "batch d_model"], RetentionState]:
        """One token, in constant time and memory."""
        q, k, v = (t[:, 0] for t in self._rotated(x[:, None], state.position[:, None]))
        S = torch.exp(log_decay(self.n_heads, q))[:, None, None] * state.S + k[..., None] * v[..., None, :]
        return self._output(x, torch.einsum("bhk,bhkv->bhv", q, S)), RetentionState(S, state.position + 1)

    def _rotated(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "batch length"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (..., n_heads, d_head) and v (..., n_heads, d_head_value), in float32 or wider."""
        q, k, v = (
            projection(x).unflatten(-1, (self.n_heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide) * self.d_head**-0.5, v.to(wide)
        return rotate(q, positions), rotate(k, positions), v

    def _output(self, x: Tensor, o: Float[Tensor, "... n_heads d_head_value"]) -> Float[Tensor, "... d_model"]:
        return self.out_proj(F.silu(self.g_proj(x)) * self.norm(o).flatten(-2).to(x.dtype))


def log_decay(n_heads: int, like: Tensor) -> Float[Tensor, " n_heads"]:
    """log γ of each head, γ = 1 - 2^(-5-h), without the cancellation of log(1 - small)."""
    heads = torch.arange(n_heads, device=like.device, dtype=like.dtype)
    return torch.log1p(-torch.exp2(-5 - heads))


def chunked_retention(
    q: Float[Tensor, "batch length n_heads d_head"],
    k: Float[Tensor, "batch length n_heads d_head"],
    v: Float[Tensor, "batch length n_heads d_head_value"],
    log_gamma: Float[Tensor, " n_heads"],
    S: Float[Tensor, "batch n_heads d_head d_head_value"],
    lengths: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch length n_heads d_head_value"], Tensor]:
    """o[t], and the state after the first `lengths` tokens of each row; k and v must be zero after them.

    Scores are masked matrices inside chunks, and the state is carried between chunks. Every decay is exp of a number
    <= 0, and nothing is divided by a decay. Needs length * (CHUNK + d_head) * (d_head + d_head_value) multiplications
    per head.
    """
    length = q.shape[1]
    if length == 0:
        return v, S
    n_chunks, chunk = math.ceil(length / CHUNK), min(CHUNK, length)
    q, k, v = (
        rearrange(F.pad(t, (0, 0, 0, 0, 0, n_chunks * chunk - length)), "b (c t) h d -> b c h t d", c=n_chunks)
        for t in (q, k, v)
    )
    t = torch.arange(chunk, device=q.device)
    starts = torch.arange(n_chunks, device=q.device) * chunk
    filled = (lengths[:, None] - starts).clamp(0, chunk)  # real tokens in each chunk of each row
    to_end = _powers(log_gamma, (filled[..., None] - 1 - t).clamp(min=0))  # (b, c, h, t)
    sums = torch.einsum("bchtk,bchtv->bchkv", k * to_end[..., None], v)
    befores, S = _carried(sums, _powers(log_gamma, filled[..., None])[..., None], S)
    within = torch.exp(log_gamma[:, None, None] * (t[:, None] - t).clamp(min=0)).tril()
    scores = (q @ k.mT) * within
    o = scores @ v + (q * _powers(log_gamma, t + 1)[..., None]) @ befores
    return rearrange(o, "b c h t d -> b (c t) h d")[:, :length], S


def _powers(log_gamma: Float[Tensor, " n_heads"], exponents: Int[Tensor, "*sizes n"]) -> Float[Tensor, "*sizes h n"]:
    """γ of each head to non-negative powers."""
    return torch.exp(log_gamma[:, None] * exponents[..., None, :])


def _carried(
    sums: Float[Tensor, "batch n_chunks ..."], decays: Float[Tensor, "batch n_chunks ..."], S: Tensor
) -> tuple[Float[Tensor, "batch n_chunks ..."], Tensor]:
    """The state at the beginning of each chunk, and the state after the last chunk."""
    before = []
    for decay, added in zip(decays.unbind(1), sums.unbind(1), strict=True):
        before.append(S)
        S = torch.addcmul(added, decay, S)
    return torch.stack(before, 1), S


def _require_sizes(d_model: int, n_heads: int, d_value: int) -> None:
    if n_heads < 1 or d_model < 1 or d_model % (2 * n_heads):
        raise ValueError(
            f"d_model must be a multiple of 2 * n_heads, because heads rotate pairs of channels, got {d_model} and "
            f"{n_heads} heads; change either"
        )
    if d_value < 1 or d_value % n_heads:
        raise ValueError(f"d_value must be a multiple of n_heads, got {d_value} and {n_heads}; change either")
