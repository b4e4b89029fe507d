"""The pre-norm block of version 2: residual, norm, mixer, and optionally an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn


class Block(nn.Module):
    """h = norm(residual := hidden + residual); hidden = mixer(h), then the same with the MLP.

    Args:
        dim: width.
        mixer_cls, mlp_cls, norm_cls: called with dim; mlp_cls=nn.Identity means no MLP.
        fused_add_norm: addition and norm as one call; in float32 the result is the same.
        residual_in_fp32: the residual is kept in float32.
    """

    layer_idx: int | None
    """The number of the block in the model; `create_block` sets it."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer: Any = mixer_cls(dim)
        if mlp_cls is nn.Identity:
            self.mlp: Any = None
        else:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise ValueError(f"fused_add_norm is for LayerNorm and RMSNorm, got {type(self.norm).__name__}")

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params=None, **mixer_kwargs
    ) -> tuple[Tensor, Tensor]:
        """(hidden_states, residual), both like hidden_states (batch, length, dim)."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs):
        """The zero states of the mixer."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _add_norm(self, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            out, total = layer_norm_fn(
                hidden,
                norm.weight,
                norm.bias,
                residual=residual,
                eps=norm.eps,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(norm, RMSNorm),
            )
            return out.to(norm.weight.dtype), total
        total = hidden if residual is None else hidden + residual
        out = norm(total.to(norm.weight.dtype))
        return out, total.to(torch.float32) if self.residual_in_fp32 else total
