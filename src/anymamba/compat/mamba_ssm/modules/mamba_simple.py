"""The Mamba layer under the names of `mamba_ssm`, and the block of version 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.compat.mamba_ssm.modules import block
from anymamba.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from anymamba.compat.mamba_ssm.ops.triton.selective_state_update import before_writing, selective_state_update, write
from anymamba.ops.causal_conv1d import causal_conv1d
from anymamba.ops.selective_scan import selective_scan
from anymamba.parts.init import delta_bias, initial_A

__all__ = [
    "Block",
    "Mamba",
    "RMSNorm",
    "layer_norm_fn",
    "mamba_inner_fn",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_state_update",
]


class Mamba(nn.Module):
    """The layer with the parameters, the arguments and the states of `mamba_ssm.Mamba` 2.3.

    The state is (batch, d_inner, d_conv) inputs of the convolution, the newest last, and h (batch, d_inner, d_state).
    With a cache, any number of tokens can continue from the state, not only one. Gradients flow through the states, so
    two calls give the same gradients as one. The projections are called as modules, so adapters on them take effect.

    Args: those of `mamba_ssm.Mamba`; use_fast_path has no effect, because there is only one path.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **like)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **like
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **like)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **like)
        self._init_dt_proj(dt_init, dt_scale, (dt_min, dt_max, dt_init_floor))
        A_log, _ = initial_A("s4d-real", self.d_inner, d_state, device)
        self.A_log = nn.Parameter(A_log)
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **like)
        self.mark_parameters()

    def mark_parameters(self) -> None:
        """Set the flags that optimizers and initialisations look for; call it again after replacing parameters."""
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_dt_proj(self, dt_init: str, dt_scale: float, steps: tuple[float, float, float]) -> None:
        bound = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        else:
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        self.dt_proj.bias.copy_(delta_bias(self.d_inner, *steps, device=self.dt_proj.bias.device))

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """Map (batch, length, d_model) to the same shape.

        With inference_params, the states of this layer in its key_value_memory_dict are read (unless seqlen_offset is
        0, the beginning) and written: in place, or as new tensors with gradients while gradients are recorded.
        """
        if inference_params is None:
            return self._run(hidden_states, None)[0]
        states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        before = None
        if inference_params.seqlen_offset > 0:
            before = before_writing(states[0]), before_writing(states[1])
        out, *after = self._run(hidden_states, before)
        if torch.is_grad_enabled():
            after = [new.to(state.dtype) for state, new in zip(states, after, strict=True)]
            inference_params.key_value_memory_dict[self.layer_idx] = tuple(after)
        else:
            for state, new in zip(states, after, strict=True):
                write(state, new)
        return out

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (batch, 1, d_model) to the same shape; both states are changed in place and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token, got {hidden_states.shape[1]}; forward takes any number")
        before = before_writing(conv_state), before_writing(ssm_state)
        out, new_conv, new_ssm = self._run(hidden_states, before)
        return out, write(conv_state, new_conv), write(ssm_state, new_ssm)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> tuple[Tensor, Tensor]:
        """Zero states; their size does not depend on max_seqlen.

        Args:
            dtype: dtype of both; defaults to those of conv1d and dt_proj. If conv1d is quantised its state is float32;
                if dt_proj is quantised, h has the dtype of the convolution's state.
        """
        conv_dtype = dtype or _dtype_of(self.conv1d, torch.float32)
        ssm_dtype = dtype or _dtype_of(self.dt_proj, conv_dtype)
        sizes = ((self.d_conv, conv_dtype), (self.d_state, ssm_dtype))
        conv_state, ssm_state = (
            torch.zeros(batch_size, self.d_inner, size, device=self.A_log.device, dtype=kind) for size, kind in sizes
        )
        return conv_state, ssm_state

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("caching needs the layer's number; pass layer_idx to Mamba")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                write(state, torch.zeros_like(state))
        return cache[self.layer_idx]

    def _run(self, hidden_states: Tensor, states: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The output and both new states."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        inputs = x
        x = self._convolve(x, None if states is None else states[0][..., 1:].transpose(1, 2).to(x.dtype))
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, bias = self._delta(dt)
        scan = selective_scan(
            x,
            delta,
            -torch.exp(_wide(self.A_log)),
            B,
            C,
            _wide(self.D),
            z,
            bias,
            delta_softplus=True,
            initial_state=None if states is None else _wide(states[1]),
        )
        return self.out_proj(scan.y), self._last_inputs(inputs, states), scan.last_state

    def _convolve(self, x: Tensor, before: Tensor | None) -> Tensor:
        """The short convolution and its SiLU; `before` has the inputs before x, (batch, d_conv - 1, d_inner)."""
        if _is_bare(self.conv1d, nn.Conv1d):
            weight = self.conv1d.weight.squeeze(1)
            return causal_conv1d(x, weight, self.conv1d.bias, activation="silu", initial_state=before).y
        whole = x if before is None else torch.cat([before, x], dim=1)
        y = self.conv1d(whole.transpose(1, 2))  # padded on both sides: the last d_conv - 1 outputs are past the end
        return F.silu(y[..., whole.shape[1] - x.shape[1] : whole.shape[1]].transpose(1, 2))

    def _delta(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """The step before its softplus, and the bias, if the scan still has to add it in float32 or wider."""
        if _is_bare(self.dt_proj, nn.Linear):
            bias = self.dt_proj.bias
            return F.linear(dt, self.dt_proj.weight), None if bias is None else _wide(bias)
        return self.dt_proj(dt), None

    def _last_inputs(self, x: Tensor, states: tuple[Tensor, Tensor] | None) -> Tensor:
        """The last d_conv inputs (batch, d_inner, d_conv), the newest last, filled up from the state or with zeros."""
        x = x.transpose(1, 2)
        before = x.new_zeros(*x.shape[:2], self.d_conv) if states is None else states[0].to(x.dtype)
        return torch.cat([before, x[..., -self.d_conv :]], dim=-1)[..., -self.d_conv :]


def _is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module can be replaced by its weights: it is exactly of this class, with no hooks and its own forward.

    This is False for adapters, quantised modules, modules with hooks, and modules whose forward was replaced.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in vars(module)


def _dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of a module's weight, or the default if the weight is quantised (integers, or not a tensor)."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
        return weight.dtype
    return default


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Block(block.Block):
    """The block of version 1, which has no MLP."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
