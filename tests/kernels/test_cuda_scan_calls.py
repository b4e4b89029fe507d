"""How a call of the CUDA scan's kernels describes its tensors; no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.cuda import passes
from anymamba.kernels.selective_scan.cuda.call import Call


def call_of(dt_rank: int, d_state: int) -> tuple[Call, torch.Tensor, torch.Tensor]:
    """A call with B and C as a layer has them: slices of one product's columns."""
    product = torch.randn(2, 8, dt_rank + 2 * d_state).bfloat16()
    _, B, C = (t.unsqueeze(2) if i else t for i, t in enumerate(product.split([dt_rank, d_state, d_state], -1)))
    u = torch.randn(2, 8, 64).bfloat16()
    a = ScanArguments(u, u, -torch.rand(64, d_state), B, C)
    call = Call(a)
    passes.matrices(call, a, torch.bfloat16)
    return call, B, C


@pytest.mark.parametrize("dt_rank", [1, 2, 8, 12, 16, 24, 48])
def test_b_and_c_of_a_layer_of_any_width_reach_the_kernels_aligned(dt_rank):
    """The fast path is for tokens that start at multiples of 16 bytes; dt_rank is 12 for 192 channels."""
    call, B, C = call_of(dt_rank, 16)
    assert call["aligned"]
    held = {t.data_ptr() for t in call._held.values()}
    copied = {t.data_ptr() for t in (B, C)} - held
    assert bool(copied) == bool(dt_rank % 8), "aligned ones are read where they lie"


def test_states_that_are_no_multiple_of_16_bytes_are_reported():
    call, _, _ = call_of(8, 3)
    assert not call["aligned"]
