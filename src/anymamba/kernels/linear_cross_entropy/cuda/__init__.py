"""The cross-entropy of a linear map on NVIDIA GPUs: torch's products, and `losses.cu` on the logits of one chunk.

Where gradients are wanted, forward computes them with the loss, so that no product is computed twice: three in all.
Logits are those of a chunk of tokens; the gradients of the weight are summed over the chunks in float32 or wider.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anymamba.kernels.linear_cross_entropy.arguments import LossArguments
from anymamba.runtimes import launching, nvrtc

NAME = "cuda"
TRANSPARENT: frozenset[str] = frozenset()

MOST_LOGITS = 1 << 27
"""Held at a time: 256 MiB in bfloat16. The weight's gradients are read and written for each chunk: few are better."""

TENSORS = {"logits": 2}
"""Fields that are a struct of address, stride and dtype, and their dimensions."""
FIELDS = ("labels", "losses", "rows", "vocab", "gradients", "lanes")
LAYOUT = launching.layout(TENSORS, FIELDS)
THREADS, THREADS_OF_FEW, WIDTH = 512, 128, 8
"""Of a block of each kernel, and the logits that a thread reads at once: see losses.cu."""
FEW = 1024
"""Lanes of a warp take a row of at most this many logits, a block takes a longer one."""


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve tensors on a device, in words; None where it can."""
    return "it serves tensors on an NVIDIA GPU" if device_type != "cuda" else nvrtc.reason()


def refuses(arguments: LossArguments) -> str | None:
    device = arguments.x.device
    return nvrtc.refuses_gpu(device.index) if device.type == "cuda" else None


def description() -> str:
    return f"CUDA C++: {nvrtc.description()}"


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [variant("losses")]


def variant(kernel: str) -> nvrtc.Variant:
    return nvrtc.Variant(nvrtc.source(Path(__file__).parent / "losses.cu"), kernel)


def lanes_of(vocab: int) -> int:
    """The lanes of a warp that share a row of few logits: a power of two, so that a warp has whole rows."""
    return min(32, 1 << (-(-vocab // WIDTH) - 1).bit_length())


def saved_shape(a: LossArguments) -> tuple[int, ...]:
    """Of the gradients for a loss whose own gradient is 1: the rows of x, then those of the weight."""
    return a.x.shape[0] + a.weight.shape[0], a.x.shape[1]


def forward(a: LossArguments, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, nothing, and the gradients of x and of the weight one below the other (or nothing)."""
    dtype, n_tokens, vocab = a.loss_dtype, a.x.shape[0], a.weight.shape[0]
    x, weight = (t.to(a.logits_dtype) for t in (a.x, a.weight))
    losses = x.new_empty(n_tokens, dtype=dtype)
    saved = x.new_zeros(saved_shape(a) if save else (0,), dtype=dtype)  # beta = 0 keeps what is not finite on a CPU
    size = max(1, MOST_LOGITS // max(1, vocab))
    stride = -(-vocab // WIDTH) * WIDTH
    for start in range(0, n_tokens, size):
        chunk = slice(start, start + size)
        logits = x.new_empty(len(x[chunk]), stride)[:, :vocab]
        torch.mm(x[chunk], weight.T, out=logits)
        _losses(logits, a.labels[chunk], losses[chunk], save)
        if save:
            _product(logits, weight, saved[:n_tokens][chunk], add=False)
            _product(logits.T, x[chunk], saved[n_tokens:], add=start > 0)
    loss = losses.sum()
    return loss, loss.new_empty(0), saved


def backward(dy: Tensor, _: Tensor | None, a: LossArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of x and weight; labels have none."""
    of_x, of_weight = saved.split([a.x.shape[0], a.weight.shape[0]])
    dx, dweight = a.x.new_empty(a.x.shape), a.weight.new_empty(a.weight.shape)
    torch.mul(of_x, dy, out=dx)
    torch.mul(of_weight, dy, out=dweight)
    return [dx, dweight, None]


def _losses(logits: Tensor, labels: Tensor, losses: Tensor, gradients: bool) -> None:
    """Write the losses of rows of logits and, in place of these, their gradients."""
    call = launching.Call(LAYOUT, logits)
    call.strided(logits=logits)
    call.dense(labels=labels)
    rows, vocab = logits.shape
    lanes = lanes_of(vocab)
    call.set(losses=losses.data_ptr(), rows=rows, vocab=vocab, gradients=gradients, lanes=lanes)
    if vocab <= FEW:
        kernel = "losses_of_few_in_float64" if logits.dtype == torch.float64 else "losses_of_few"
        call.launch(variant(kernel), -(-rows * lanes // THREADS_OF_FEW), THREADS_OF_FEW)
    else:
        call.launch(variant("losses"), rows, THREADS, THREADS // 32 * 2 * losses.element_size())


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a @ b or out += a @ b, in the dtype of `out`: short numbers are summed in float32."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=int(add))
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        out.mul_(int(add)).add_(a.to(out.dtype) @ b.to(out.dtype))
