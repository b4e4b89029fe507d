"""Detect what observes an op: gradients, transforms, tracers, modes, profilers or tensor subclasses.

An op can run in four ways, and `way` chooses one: the kernel itself, the op registered with torch, an autograd
function, or plain torch operations. The private torch functions that distinguish these cases are used only in this
file. If a version of torch does not have one of them, we assume an observer and run the registered op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anymamba.runtimes.native import PLAIN

Way = Literal["kernel", "op", "function", "operations"]

Ask = Callable[..., Any] | None


def _private(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


_functorch = _private(torch._C, "_functorch")
_top_transform: Ask = _private(_functorch, "peek_interpreter_stack")
_all_transforms: Ask = _private(_functorch, "get_interpreter_stack")
_unwrap: Ask = _private(_functorch, "unwrap_if_dead")
_dispatch_modes: Ask = _private(torch._C, "_len_torch_dispatch_stack")
_function_modes: Ask = _private(torch._C, "_is_torch_function_mode_enabled")
_profiler: Ask = _private(torch.autograd, "_profiler_enabled")
_is_functional: Ask = _private(torch, "_is_functional_tensor")
_is_zero: Ask = _private(Tensor, "_is_zerotensor")
_autograd = _private(torch._C, "_autograd")
_top_hooks: Ask = _private(_autograd, "_top_saved_tensors_default_hooks")
_hooks_enabled: Ask = _private(_autograd, "_saved_tensors_hooks_is_enabled")


def way(*tensors: Tensor | None) -> Way:
    """The fastest way to run an op on these tensors that is correct.

    - "kernel": there is no observer. This skips torch's Python wrappers of a registered op. With cold CPU caches, as
      after a matrix product, they take as long as the rest of the op's Python code.
    - "op": a compiler, tracer, mode, profiler or tensor subclass needs the registered op.
    - "function": reverse mode, in eager code and under `torch.func`, and `vmap`.
    - "operations": forward mode, and transforms that autograd functions do not support.
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
    """Whether the tensors' values are in their memory and may be read: no tracer, transform or subclass is involved."""
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
    """Whether there may be an observer: the answer of torch's function, or True if this torch does not have it."""
    return ask is None or bool(ask())


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether reverse-mode gradients may be needed for results that are computed from these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any of these tensors is a dual tensor of forward mode."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a `torch.func` transform is active, or forward mode differentiates these tensors.

    Then plain operations must replace code that these cannot follow, such as checkpointing and old autograd functions.
    """
    if torch.compiler.is_compiling():
        return _traced_transforms()
    return _may(_top_transform) or has_tangent(*tensors)


def transforms() -> list[str]:
    """The names of the active `torch.func` transforms, outermost first; empty if this torch cannot list them."""
    if _all_transforms is None:
        return []
    return [interpreter.key().name for interpreter in _all_transforms() or ()]


def without_transforms(*args: Any) -> list[Any] | None:
    """Arguments of an autograd function outside of all transforms, or None inside one or if this torch cannot tell.

    Tensors that a transform has wrapped and that outlived it are unwrapped.
    """
    if _unwrap is None or _may(_top_transform):
        return None
    return [_unwrap(a) if isinstance(a, Tensor) else a for a in args]


def may_pack_saved_tensors() -> bool:
    """Whether hooks may be set for the tensors that autograd saves: they are not disabled, and nobody else has set any.

    Only the innermost hooks apply, so ours would replace those of a caller, such as checkpointing. False if this torch
    cannot tell.
    """
    if _top_hooks is None or _hooks_enabled is None:
        return False
    return bool(_hooks_enabled()) and _top_hooks(True) is None


def _traced_transforms() -> bool:
    """Whether torch.compile is tracing code inside a transform; evaluated at tracing time."""
    return _top_transform is not None and _top_transform() is not None


# The same as torch.compiler.assume_constant_result, which would import the compiler and take two seconds.
_traced_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]
