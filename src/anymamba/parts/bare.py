"""Modules whose parameters may be used without calling them."""

from __future__ import annotations

from torch import nn

from anymamba.runtimes.native import PLAIN


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its class says, so that a fused op may take its parameters instead of calling it.

    False for another class or a subclass (adapters, quantised layers, shards), for one with hooks or a forward of its
    own, and for parameters that are a subclass of a tensor.

    Args:
        module: what is in the place of a module of class `kind`.
        kind: the class.
    """
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and all(p is None or type(p) in PLAIN for p in module._parameters.values())
    )
