"""The operators of the left half of figure 8: fused scan, convolution by FFT, causal attention, scan in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anymamba.experiments.speed.arms import OperatorSettings
from anymamba.experiments.speed.timing import Call, Candidate, as_values, compare
from anymamba.lab.experiment import Context
from anymamba.ops import dispatch
from anymamba.ops.selective_scan import selective_scan
from anymamba.parts.fft_conv import CPU_BLOCK, GPU_BLOCK, fft_conv


@torch.no_grad()
def measure_operators(settings: OperatorSettings, context: Context) -> dict[str, Any]:
    """Measure the operators at a length; returns the times and the backend that ran the scan."""
    device = context.device
    candidates = operators(settings, device)
    found, _ = compare(candidates, settings.length, settings.limits, context)
    return {"times": as_values(found), "backend": dispatch.resolve("selective_scan", device.type, None)}


def operators(settings: OperatorSettings, device: torch.device) -> dict[str, Candidate]:
    """The candidates by name."""
    d, n, size = settings.width, settings.d_state, getattr(torch, settings.dtype).itemsize
    block = 16 * (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK)
    return {
        "attention": Candidate(lambda length: attention(settings, length, device), lambda L: 4 * size * L * d, 2),
        "convolution": Candidate(
            # u and y; kernel, padded kernel and its spectrum, twice for the FFT's copies; the spectra of a block
            lambda length: convolution(settings, length, device),
            lambda L: (2 * size + 4 + 8 + 16) * L * d + block,
            1.1,  # L log L
        ),
        "unfused": Candidate(
            # decay, drive, and half, a quarter, ... of both; then the results
            lambda length: scan(settings, length, device, fused=False),
            lambda L: UNFUSED_COPIES * 4 * L * d * n,
            1,
        ),
        # inputs and output; backends in plain torch hold a few more tensors
        "scan": Candidate(lambda length: scan(settings, length, device, fused=True), lambda L: 16 * 4 * L * d, 1),
    }


UNFUSED_COPIES = 5
"""Most tensors (batch, length, channels, states) in float32 that the unfused scan holds at once."""


def attention(settings: OperatorSettings, length: int, device: torch.device) -> Call:
    """Causal attention of torch; each head has its own keys."""
    shape = (1, settings.width // settings.d_head, length, settings.d_head)
    q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, settings.dtype)) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def convolution(settings: OperatorSettings, length: int, device: torch.device) -> Call:
    """The convolution of each channel with a kernel as long as the sequence; computing the kernel is not timed."""
    u = torch.randn(1, length, settings.width, device=device, dtype=getattr(torch, settings.dtype))
    kernel = torch.randn(settings.width, length, device=device) * length**-0.5
    return lambda: fft_conv(u, kernel)


def scan(settings: OperatorSettings, length: int, device: torch.device, *, fused: bool) -> Call:
    """The selective scan with softplus and D, without a gate: our operator, or the unfused one in plain torch."""
    dtype, d, n = getattr(torch, settings.dtype), settings.width, settings.d_state
    u, delta = (torch.randn(1, length, d, device=device, dtype=dtype) for _ in range(2))
    B, C = (torch.randn(1, length, n, device=device, dtype=dtype) for _ in range(2))
    A = -torch.arange(1, n + 1, device=device, dtype=torch.float32).repeat(d, 1)
    D = torch.ones(d, device=device)
    if fused:
        return lambda: selective_scan(u, delta, A, B, C, D, delta_softplus=True)
    return lambda: unfused_scan(u, delta, A, B, C, D)


def unfused_scan(
    u: Float[Tensor, "batch length d_inner"],
    delta: Float[Tensor, "batch length d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch length d_state"],
    C: Float[Tensor, "batch length d_state"],
    D: Float[Tensor, " d_inner"],
) -> Float[Tensor, "batch length d_inner"]:
    """The selective scan in straightforward plain torch, which holds the states of all steps in memory."""
    x, step = u.float(), F.softplus(delta.float())
    decay = torch.exp(step[..., None] * A)
    drive = (step * x)[..., None] * B.float()[:, :, None]
    h = associative_scan(decay, drive)
    return ((h @ C.float()[..., None])[..., 0] + D * x).to(u.dtype)


def associative_scan(
    decay: Float[Tensor, "batch length d_inner d_state"], drive: Float[Tensor, "batch length d_inner d_state"]
) -> Float[Tensor, "batch length d_inner d_state"]:
    """h[t] = decay[t] h[t-1] + drive[t] from h[-1] = 0, in 2 log2(length) parallel steps.

    Neighbours are combined into pairs, which halves the length. A scan of the pairs gives the states after each pair,
    and from these follow the states in between. This takes about 3 length products in all, like
    `jax.lax.associative_scan`; arXiv:2312.00752, section 3.3.2, cites the work-efficient parallel scan of Blelloch.
    """
    length = drive.shape[1]
    if length < 2:
        return drive
    first, second = slice(0, length - 1, 2), slice(1, None, 2)
    pairs = torch.addcmul(drive[:, second], decay[:, second], drive[:, first])
    after_pairs = associative_scan(decay[:, first] * decay[:, second], pairs)
    h = torch.empty_like(drive)
    h[:, second], h[:, 0] = after_pairs, drive[:, 0]
    between = slice(2, None, 2)
    h[:, between] = torch.addcmul(drive[:, between], decay[:, between], after_pairs[:, : (length - 1) // 2])
    return h
