"""Who looks at an op besides its caller: gradients, transforms, tracers, modes, profilers, subclasses of tensors.

An op has four ways to run, and `way` chooses: the kernel itself, the op registered with torch, an autograd function, or
plain torch operations. The private functions of torch that tell the cases apart are fenced in this file.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from anymamba.kernels.native import PLAIN

Way = Literal["kernel", "op", "function", "operations"]


def way(*tensors: Tensor | None) -> Way:
    """How an op on these tensors must run to be right, and at what cost.

    - "kernel": nobody looks. torch's Python wrappers of an op cost as much again as all of its own Python where caches
      are cold, as they are after a matrix product, so they are left out.
    - "op": a compiler, tracer, mode, profiler or subclass sees the registered op.
    - "function": reverse mode, in eager code and under `torch.func`, and `vmap`.
    - "operations": forward mode, and transforms that torch's functions do not pass through.
    """
    if torch.compiler.is_compiling():
        return "operations" if _traced_transforms() else "op"
    active = transforms()
    if TransformType.Jvp in active or has_tangent(*tensors):
        return "operations"
    if TransformType.Functionalize in active:
        return "operations" if len(active) > 1 else "op"
    if torch.jit.is_tracing():
        return "op"
    if active or differentiable(*tensors):
        return "function"
    seen = torch.autograd._profiler_enabled() or torch._C._is_torch_function_mode_enabled()
    return "op" if seen or not plain(*tensors) else "kernel"


def plain(*tensors: Tensor | None) -> bool:
    """Whether tensors are what they seem, so that code may read their memory: no tracer, transform or subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or _functorch.peek_interpreter_stack() is not None
    ) and all(t is None or _has_memory(t) for t in tensors)


def _has_memory(tensor: Tensor) -> bool:
    lazy = torch._is_functional_tensor(tensor) or tensor._is_zerotensor()
    return type(tensor) in PLAIN and not tensor.is_meta and not lazy


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether gradients in reverse mode may be asked of what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any of these is a dual tensor of forward mode."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of `torch.func` is active or forward mode differentiates these.

    Then code that torch cannot see through, as checkpoints and old functions of autograd, must give way to operations.
    """
    if torch.compiler.is_compiling():
        return _traced_transforms()
    return _functorch.peek_interpreter_stack() is not None or has_tangent(*tensors)


def transforms() -> list[TransformType]:
    """The active transforms of `torch.func`, outermost first."""
    return [interpreter.key() for interpreter in _functorch.get_interpreter_stack() or ()]


@torch.compiler.assume_constant_result
def _traced_transforms() -> bool:
    """Whether code that torch.compile traces stands inside a transform: asked while it traces."""
    return _functorch.peek_interpreter_stack() is not None
