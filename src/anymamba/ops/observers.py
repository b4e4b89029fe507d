"""Who looks at an op besides its caller: gradients, transforms, tracers, modes, profilers, subclasses of tensors.

An op has four ways to run, and `way` chooses: the kernel itself, the op registered with torch, an autograd function, or
plain torch operations. The private functions of torch that tell the cases apart are fenced in this file. A version of
torch may lack one: then somebody may look, and the op that is registered runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anymamba.kernels.native import PLAIN

Way = Literal["kernel", "op", "function", "operations"]

Ask = Callable[..., Any] | None


def _private(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


_functorch = _private(torch._C, "_functorch")
_top_transform: Ask = _private(_functorch, "peek_interpreter_stack")
_all_transforms: Ask = _private(_functorch, "get_interpreter_stack")
_dispatch_modes: Ask = _private(torch._C, "_len_torch_dispatch_stack")
_function_modes: Ask = _private(torch._C, "_is_torch_function_mode_enabled")
_profiler: Ask = _private(torch.autograd, "_profiler_enabled")
_is_functional: Ask = _private(torch, "_is_functional_tensor")
_is_zero: Ask = _private(Tensor, "_is_zerotensor")


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
    if _may(_top_transform) and (active := transforms()):
        if "Jvp" in active:
            return "operations"
        if "Functionalize" in active:
            return "operations" if len(active) > 1 else "op"
        return "function"
    if has_tangent(*tensors):
        return "operations"
    if torch.jit.is_tracing():
        return "op"
    if differentiable(*tensors):
        return "function"
    return "op" if _may(_profiler) or _may(_function_modes) or not plain(*tensors) else "kernel"


def plain(*tensors: Tensor | None) -> bool:
    """Whether tensors are what they seem, so that code may read their memory: no tracer, transform or subclass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _may(_dispatch_modes) or _may(_top_transform):
        return False
    if _is_functional is None or _is_zero is None:
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in PLAIN or tensor.is_meta or _is_functional(tensor) or _is_zero(tensor)
        ):
            return False
    return True


def _may(ask: Ask) -> bool:
    """Whether somebody looks, as far as torch can be asked."""
    return ask is None or bool(ask())


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether gradients in reverse mode may be asked of what is computed from these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any of these is a dual tensor of forward mode."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of `torch.func` is active or forward mode differentiates these.

    Then code that torch cannot see through, as checkpoints and old functions of autograd, must give way to operations.
    """
    if torch.compiler.is_compiling():
        return _traced_transforms()
    return _may(_top_transform) or has_tangent(*tensors)


def transforms() -> list[str]:
    """The names of the active transforms of `torch.func`, outermost first; none where torch cannot be asked."""
    if _all_transforms is None:
        return []
    return [interpreter.key().name for interpreter in _all_transforms() or ()]


def _traced_transforms() -> bool:
    """Whether code that torch.compile traces stands inside a transform: asked while it traces."""
    return _top_transform is not None and _top_transform() is not None


# What torch.compiler.assume_constant_result sets; calling that would import the compiler, which takes two seconds.
_traced_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]
