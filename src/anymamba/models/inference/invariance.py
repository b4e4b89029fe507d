"""What makes a row's logits the same bits alone and in any batch, read whole, in pieces, or token by token.

A product of packed weights sums in one order for any number of rows, and so do norms. The compiled step of the whole
model computes every token of a text in the same way, and `InferenceModel.forward` reads with it. Where it cannot be
used, the compiled convolution and scan go through time in order for each channel, and compute one token as a sequence
of length one.
"""

from __future__ import annotations

import torch

from anymamba.kernels.selective_scan import cpu as scan
from anymamba.models.config import ModelConfig
from anymamba.runtimes import native


def obstacle(config: ModelConfig, device: torch.device) -> str | None:
    """Why the logits of a model depend on the batch or on the cut of the text; None if they do not."""
    others = sorted(set(config.layer_mixers) - {"mamba"})
    if others:
        return f"its mixers {', '.join(others)} sum in an order that depends on the length"
    if config.mamba.is_complex:
        return "complex A runs in plain PyTorch, which cuts the sequence into chunks"
    if native.unavailable(device.type) is not None:
        return f"it needs the compiled kernels for the CPU, and {native.unavailable(device.type)}"
    if scan.task_steps(1, scan.LONG, config.d_inner, 1) < scan.LONG:
        return f"the scan of so few channels (d_inner={config.d_inner}) is cut in time"
    return None
