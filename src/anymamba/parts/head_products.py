"""Outer products within heads, and their sums against a vector: what H3 does around its inner layer.

    products[i, j] = k_i v_j        y_j = sum over i of q_i products[i, j]

The products of 8 channels have 8 times as many numbers as the input, so each pass over them counts. Heads of 8 in 16
bits have a kernel on NVIDIA GPUs, which reads or writes them once. Other heads use torch's operations, which sum 8 of
them at a time at a tenth of the memory's speed. There, in 16 bits, the sums are taken by the matrix units of a GPU: a
product with a matrix of ones and zeros, which adds in float32.

Products have memory in the order of a GPU's convolution, which multiplies a matrix for each head by all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.head_products import cuda
from anymamba.parts.derivatives import as_operations, in_kernels, in_operations

FIRST, LAST = -2, -1
"""The channel of a product that is summed over."""


def outer(
    k: Float[Tensor, "batch length heads d"], v: Float[Tensor, "batch length heads d"]
) -> Float[Tensor, "heads length batch d d"]:
    """products[h, t, b, i, j] = k[b, t, h, i] v[b, t, h, j]; differentiable in any mode and of any order."""
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    return _outer(k, v) if as_operations(k, v) else _Outer.apply(k, v)


def contract(
    q: Float[Tensor, "batch length heads d"], products: Float[Tensor, "heads length batch d d"]
) -> Float[Tensor, "batch length heads d"]:
    """y[b, t, h, j] = sum over i of q[b, t, h, i] products[h, t, b, i, j]; differentiable as `outer`."""
    wanted = (*q.shape[2::-1], q.shape[3], q.shape[3])
    if products.shape != wanted:
        raise ValueError(f"products for this q must have shape {tuple(wanted)}, got {tuple(products.shape)}")
    return _contract(q, products) if as_operations(q, products) else _Contract.apply(q, products)


def _ordered(t: Float[Tensor, "batch length heads d"]) -> Float[Tensor, "heads length batch d"]:
    """Memory in the order of the products."""
    return t.permute(2, 1, 0, 3).contiguous()


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return _ordered(k)[..., :, None] * _ordered(v)[..., None, :]


def _contract(q: Tensor, products: Tensor) -> Tensor:
    return _in_rows(sums(_ordered(q)[..., :, None] * products, FIRST))


def _in_rows(t: Float[Tensor, "heads length batch d"]) -> Float[Tensor, "batch length heads d"]:
    return t.permute(2, 1, 0, 3)


def _in_kernel(*tensors: Tensor) -> bool:
    """Whether one kernel does it all."""
    one = len({(t.dtype, t.device) for t in tensors}) == 1
    return one and in_kernels(*tensors) and cuda.serves(tensors[0])


def sums(x: Float[Tensor, "*rows d d"], over: int) -> Float[Tensor, "*rows d"]:
    """The sums over the first or the last channel."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return x.sum(over)
    return x.flatten(-2) @ ones(x, over)


def ones(x: Float[Tensor, "*rows d d"], over: int) -> Float[Tensor, "d_times_d d"]:
    """The matrix whose product with the d^2 numbers of a row are their sums."""
    d = x.shape[-1]
    eye = torch.eye(d, device=x.device, dtype=x.dtype)
    return eye.repeat(d, 1) if over == FIRST else eye.repeat_interleave(d, 0, output_size=d * d)


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return cuda.outer(k, v) if _in_kernel(k, v) else _outer(k, v)

    @staticmethod
    def backward(ctx: Any, dproducts: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ctx.saved_tensors
        if in_operations(dproducts, k, v):
            return torch.func.vjp(_outer, k, v)[1](dproducts)
        if _in_kernel(k, v, dproducts):
            return cuda.gradients_of_outer(dproducts, k, v)
        return _in_rows(sums(dproducts * _ordered(v)[..., None, :], LAST)), _contract(k, dproducts)


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, products: Tensor) -> Tensor:
        ctx.save_for_backward(q, products)
        return cuda.contract(q, products) if _in_kernel(q, products) else _contract(q, products)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        q, products = ctx.saved_tensors
        if in_operations(dy, q, products):
            return torch.func.vjp(_contract, q, products)[1](dy)
        if _in_kernel(q, products, dy):
            return cuda.gradients_of_contract(dy, q, products)
        return _in_rows(sums(products * _ordered(dy)[..., None, :], LAST)), _outer(q, dy)
