"""Embeddings whose gradient has the same bits each time.

On a GPU torch adds up the gradient of an embedding in float32 with atomic operations where tokens are many. The sums
then depend on which block came first, and no training repeats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.kernels.embedding_gradient import cuda
from anymamba.parts.bare import is_bare
from anymamba.parts.derivatives import as_operations, in_kernels, in_operations


def embedding(ids: Int[Tensor, "*tokens"], weight: Float[Tensor, "vocab width"]) -> Float[Tensor, "*tokens width"]:
    """The rows of `weight` at `ids`; differentiable in any mode and of any order.

    On a GPU the gradient of the weight is summed in float32 or wider, in the order of the tokens, and rounded once.
    """
    if not _by_sums(ids, weight):
        return F.embedding(ids, weight)
    return _Embedding.apply(ids, weight)


def embed(module: nn.Embedding, ids: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens width"]:
    """module(ids), with the gradient of `embedding` if the module is what its class says and has no options."""
    if torch.is_grad_enabled() and _is_plain(module) and _by_sums(ids, module.weight):
        return _Embedding.apply(ids, module.weight)
    return module(ids)


def _is_plain(module: nn.Embedding) -> bool:
    if not is_bare(module, nn.Embedding):
        return False
    return module.padding_idx is None and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


def _by_sums(ids: Tensor, weight: Tensor) -> bool:
    if not torch.is_grad_enabled() or not weight.requires_grad or not _is_on_gpu(weight):
        return False
    return in_kernels(ids, weight) and not as_operations(ids, weight)


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def sums(dy: Float[Tensor, "*tokens width"], ids: Int[Tensor, "*tokens"], vocab: int) -> Float[Tensor, "vocab width"]:
    """The sums of the rows of `dy` that have an id, for each id, in float32 or wider."""
    if not in_operations(dy) and in_kernels(dy, ids) and cuda.serves(dy) and vocab <= cuda.MOST_IDS:
        return cuda.sums(dy, ids, vocab)
    wide = dy.to(torch.promote_types(dy.dtype, torch.float32)).reshape(-1, dy.shape[-1])
    none = wide.new_zeros(vocab, dy.shape[-1])
    return none.index_put((ids.reshape(-1).long(),), wide, accumulate=True)  # sorts on a GPU


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocab, ctx.dtype = len(weight), weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, sums(dy, ids, ctx.vocab).to(ctx.dtype)
