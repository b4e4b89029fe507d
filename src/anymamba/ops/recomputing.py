"""Functions whose backward pass computes the intermediate results again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anymamba.ops.groups import is_spread, recomputation_contexts
from anymamba.ops.observers import transformed


def as_operations(*tensors: Tensor) -> bool:
    """Whether plain torch operations must run: in a `torch.func` transform, in forward mode, or in `jit.trace`."""
    return transformed(*tensors) or torch.jit.is_tracing()


def recomputed(fn: Callable[..., Any], *args: Any) -> Any:
    """Return fn(*args). The backward pass computes the intermediate results again instead of keeping them.

    Args:
        fn: a function; every tensor that it reads must be in args.
        args: tensors, tuples of tensors, and other values.
    """
    tensors = [t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, Tensor)]
    if not torch.is_grad_enabled() or as_operations(*tensors):
        return fn(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if is_spread() and not torch.compiler.is_compiling():
        options["context_fn"] = recomputation_contexts
    return checkpoint(fn, *args, **options)
