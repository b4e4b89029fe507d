"""The cost of a layer: parameters, floating-point operations per token, bytes of state. It is counted in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from anymamba.models.config import ModelConfig
from anymamba.models.mixers import build_mixer
from anymamba.parts.state import state_bytes

SCAN_FLOPS = 9
"""Operations of a scan per token, channel and state: the step times A, its exponential, B's part, update and output."""


@dataclass(frozen=True)
class Cost:
    """The cost of one layer in float32."""

    parameters: int
    flops_per_token: float
    """Floating-point operations of a forward pass over the sequence, per token. A multiply-add counts as two. A product
    with a causal mask counts as much as is computed of it."""
    state_bytes: int
    """Bytes of the state after the sequence."""


@torch.no_grad()
def layer_cost(name: str, config: ModelConfig, length: int) -> Cost:
    """Measure a config's mixer by running it once over `length` tokens."""
    layer = build_mixer(name, replace(config, n_layers=1, mixers=(name,)), 0, {}).eval()
    x = torch.zeros(1, length, config.d_model)
    with OperationCounter() as counter:
        _, state = layer(x)
    return Cost(n_parameters(layer), counter.total / length, state_bytes(state))


def n_parameters(module: nn.Module) -> int:
    """The number of parameters; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())


def _scan(u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> int:
    return SCAN_FLOPS * u.numel() * A.shape[-1] * (4 if A.is_complex() else 1)


def _convolution(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * x.numel() * weight.shape[-1]


def _fourier(x: Tensor, dims: list[int], *rest: Any) -> int:
    """2.5 n log2 n for a real transform of length n; a complex one takes twice as many."""
    size = math.prod(x.shape[d] for d in dims)
    if x.is_complex() and rest and isinstance(rest[-1], int) and not isinstance(rest[-1], bool):
        size = rest[-1]  # complex to real: the length of the result
    rows = x.numel() // max(1, math.prod(x.shape[d] for d in dims))
    return round(2.5 * rows * size * math.log2(max(2, size)))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    rows, queries = query.shape[0] * query.shape[1], query.shape[-2]
    return 2 * rows * queries * key.shape[-2] * (query.shape[-1] + value.shape[-1])


FORMULAS: dict[str, Callable[..., int]] = {
    "anymamba::selective_scan": _scan,
    "anymamba::causal_conv1d": _convolution,
    "aten::_fft_r2c": _fourier,
    "aten::_fft_c2r": _fourier,
    "aten::_fft_c2c": lambda x, dims, *rest: 2 * _fourier(x, dims),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
}
"""The number of operations, from the arguments of a call, for operators that are not in torch's own registry."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations of everything that runs while it is active; an elementwise operation counts once."""

    total: float = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, packet = func.name().split(".")[0], func._overloadpacket
        if name in FORMULAS:
            self.total += FORMULAS[name](*args)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        elif torch.Tag.pointwise in func.tags and isinstance(out, Tensor):
            self.total += out.numel()
        return out
