"""Parameters that are kept in float32 or wider and that weight decay must not touch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WideParameters(nn.Module):
    """A module whose floating-point parameters are never narrower than float32, whatever `.to()` is called.

    `.double()` widens them; a narrower dtype moves them to the device only. Gradients and buffers follow. Its
    parameters are not weight-decayed.
    """

    def _apply(self, fn, recurse: bool = True):
        def keep_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.is_floating_point() and torch.finfo(result.dtype).bits < 32:
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        return super()._apply(keep_wide, recurse)

    @staticmethod
    def wide(dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of these parameters in a layer whose weights have `dtype` (None: torch's default)."""
        return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class KernelParameters(WideParameters):
    """Parameters of a time-invariant kernel (S4, S4D, H3's shift, Hyena's filter): optimised at the rate of the other
    weights, but with a peak of at most 1e-3, as in the papers."""


def complex_dtype(real: torch.dtype) -> torch.dtype:
    """The complex dtype whose parts hold a real one; as `dtype.to_complex()`, which torch.compile does not trace."""
    return torch.promote_types(real, torch.complex32)


def activations_of(projection: nn.Module) -> dict[str, Any]:
    """Device and dtype of what a projection takes, as keyword arguments; also of one that another library put there.

    The weight of such a one may hold integers, be a method or not exist. Then another of its tensors tells the dtype,
    or torch's default does.
    """
    tensors = (getattr(projection, "weight", None), *projection.parameters(), *projection.buffers())
    found = [t for t in tensors if isinstance(t, Tensor)]
    dtype = next((t.dtype for t in found if t.is_floating_point() and t.itemsize > 1), torch.get_default_dtype())
    device = found[0].device if found else torch.device("cpu")  # torch.ao packs weights, and on the CPU alone
    return {"device": device, "dtype": dtype}


def without_decay(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of a model that weight decay must not touch: all of `WideParameters`, every bias, every norm."""
    inside = {p for module in model.modules() if isinstance(module, WideParameters) for p in module.parameters()}
    return inside | {p for p in model.parameters() if p.ndim < 2}


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters of a model, in its order: those that decay, those that do not, and those of kernels, which
    do not either."""
    inside = {p for module in model.modules() if isinstance(module, KernelParameters) for p in module.parameters()}
    exempt = without_decay(model) - inside
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p not in exempt and p not in inside]
    return decayed, [p for p in trained if p in exempt], [p for p in trained if p in inside]
