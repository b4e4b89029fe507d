"""Parameters that stay in float32 or wider, and the parameter groups of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anymamba.parts.derived import DerivesTensors


class WideParameters(DerivesTensors):
    """A module whose floating-point parameters stay in float32 or wider, whatever dtype `.to()` is given.

    `.double()` widens them. `.to()` with a narrower dtype moves them to the device and keeps float32. Gradients and
    buffers do the same. Its parameters have no weight decay.
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
        """The dtype of these parameters in a layer whose weights have `dtype`, which defaults to torch's default."""
        return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class KernelParameters(WideParameters):
    """Parameters of a time-invariant kernel (S4, S4D, H3's shift, Hyena's filter). Their learning rate is that of the
    other weights, but its peak is at most 1e-3, as in the papers."""


def wide_names(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of a model that are never narrower than float32."""
    wide = ((name, module) for name, module in model.named_modules() if isinstance(module, WideParameters))
    return frozenset(own for name, module in wide for own, _ in module.named_parameters(name))


def complex_dtype(real: torch.dtype) -> torch.dtype:
    """The complex dtype with parts of a real dtype: `dtype.to_complex()`, in a form that torch.compile can trace."""
    return torch.promote_types(real, torch.complex32)


def activations_of(projection: nn.Module) -> dict[str, Any]:
    """Device and dtype of a projection's inputs, as keyword arguments.

    This also works for a projection from another library, such as a quantised one. Its weight may hold integers, be a
    method or not exist; then the dtype is that of another of its tensors, or torch's default.
    """
    tensors = (getattr(projection, "weight", None), *projection.parameters(), *projection.buffers())
    found = [t for t in tensors if isinstance(t, Tensor)]
    dtype = next((t.dtype for t in found if t.is_floating_point() and t.itemsize > 1), torch.get_default_dtype())
    device = found[0].device if found else torch.device("cpu")  # torch.ao hides packed weights, on the CPU only
    return {"device": device, "dtype": dtype}


def without_decay(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model that have no weight decay: all `WideParameters`, every bias and every norm."""
    inside = {p for module in model.modules() if isinstance(module, WideParameters) for p in module.parameters()}
    return inside | {p for p in model.parameters() if p.ndim < 2}


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Split the trained parameters of a model, in its order, into three groups: with weight decay, without it, and
    kernel parameters, which have none either."""
    inside = {p for module in model.modules() if isinstance(module, KernelParameters) for p in module.parameters()}
    exempt = without_decay(model) - inside
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p not in exempt and p not in inside]
    return decayed, [p for p in trained if p in exempt], [p for p in trained if p in inside]
