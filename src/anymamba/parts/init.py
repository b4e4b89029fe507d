"""Initialisation of state space layers, as in the published models."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode


def inverse_softplus(y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x such that softplus(x) = y, for y > 0, without overflow."""
    return y + torch.log(-torch.expm1(-y))


def delta_bias(
    d_inner: int, dt_min: float, dt_max: float, floor: float, device: torch.device | None = None
) -> Float[Tensor, " d_inner"]:
    """Bias whose softplus is log-uniform on [dt_min, dt_max], never below the floor; one uniform draw per channel."""
    uniform = torch.rand(d_inner, device=device)
    step = torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
    return inverse_softplus(step.clamp(min=floor))


def initial_A(
    name: str, d_inner: int, d_state: int, device: torch.device | None = None
) -> tuple[Float[Tensor, "d_inner d_state"], Float[Tensor, "d_inner d_state"] | None]:
    """log(-Re A) and Im A (None where A is real) of a named initialisation.

    "s4d-real": A[n] = -(n + 1).  "s4d-lin": A[n] = -1/2 + π n i.  "constant": A = -1/2.  "random": A = -exp(N(0, 1)).
    Source: Mamba (arXiv:2312.00752), section 3.6 and table 8; S4D (arXiv:2206.11893).
    """
    n = torch.arange(d_state, dtype=torch.float32, device=device).repeat(d_inner, 1)
    half = torch.full_like(n, math.log(0.5))
    if name == "s4d-real":
        return torch.log(n + 1), None
    if name == "s4d-lin":
        return half, math.pi * n
    if name == "constant":
        return half, None
    if name == "random":
        return torch.randn_like(n), None
    raise ValueError(f'A_init must be "s4d-real", "s4d-lin", "constant" or "random", got {name!r}')


FILLS = (
    *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_, Tensor.copy_, Tensor.mul_, Tensor.div_),
    *(torch.nn.init.uniform_, torch.nn.init.normal_, torch.nn.init.kaiming_uniform_, torch.nn.init.zeros_),
    torch.nn.init.ones_,
)


class WithoutMetaValues(TorchFunctionMode):
    """A context in which filling a tensor on the meta device does nothing.

    Such a tensor has no values. torch would still dispatch each call, and the first one imports its compiler, which
    takes longer than loading a small model.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
