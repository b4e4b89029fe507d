"""Kernels that are launched before the previous kernel of their stream ends wait for it first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anymamba import kernels

FOLDER = Path(kernels.__file__).parent
EARLY = {
    "causal_conv1d/cuda/fast.cu": ["forward", "backward", "sum_parts", "step"],
    "column_sums/cuda/column_sums.cu": ["sum_columns", "sum_parts"],
    "embedding_gradient/cuda/embedding_gradient.cu": ["sum_runs", "join_runs"],
    "fft_conv/cuda/toeplitz_correlate.cu": ["correlate", "finish"],
    "gated/cuda/gated.cu": ["gate", "gate_gradients"],
    "head_products/cuda/head_products.cu": ["combine"],
    "rotary/cuda/rotary.cu": ["rotate"],
    "selective_scan/cuda/fast_step.cu": ["step"],
}
"""The kernels that these ops launch with `early=True`. Those of model_step read weights before they wait."""


@pytest.mark.parametrize("path", EARLY)
def test_a_kernel_waits_for_the_previous_one_first(path):
    """A thread that returns, branches or reads a tensor before that would see what is not written yet."""
    waiting = []
    for body in re.split(r"\n(?:CLUSTERED_)?KERNEL\(", (FOLDER / path).read_text("utf-8"))[1:]:
        before, *after = re.split(r"wait_for_previous\([^;]*\);", body, maxsplit=1)
        if after:
            waiting += re.findall(r"\) (\w+)\(", before)[:1]
            assert not re.search(r"\b(if|for|while|return|reinterpret_cast|read)\b", before), before
    assert waiting == EARLY[path]
