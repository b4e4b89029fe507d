"""AdamW with the groups that state space models need, and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from anymamba.parts.parameters import parameter_groups
from anymamba.training.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with three groups: matrices, with weight decay; A_log, D, the step's bias, other biases and norms, without;
    time-invariant kernels, without weight decay and with a smaller learning rate.

    The model may be any module of this package's layers. Parameters that do not require a gradient are left out.
    """
    decayed, plain, kernels = parameter_groups(model)
    kernel_rate = min(1.0, config.kernel_learning_rate / config.learning_rate)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "rate": 1.0},
        {"params": plain, "weight_decay": 0.0, "rate": 1.0},
        {"params": kernels, "weight_decay": 0.0, "rate": kernel_rate},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    set_learning_rate(optimizer, config.learning_rate)
    return optimizer


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step, counted from 1: linear warm-up to the peak, then half a cosine down to the minimum."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group; that of kernels is the same fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, "name.exp_avg" and so on, without copying the tensors."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load what `optimizer_tensors` returned into the optimizer."""
    for name, parameter in model.named_parameters():
        state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if _is_state_of(key, name)}
        if state:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def _is_state_of(key: str, name: str) -> bool:
    return key.startswith(f"{name}.") and "." not in key.removeprefix(f"{name}.")
