"""The states of all layers in one piece of a GPU's memory, so that a captured graph finds them by two addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import MambaState

Addresses = tuple[int, int]
"""Of the states of all layers: conv and ssm."""


class JoinedLayers(tuple[MambaState, ...]):
    """The layers of a state whose tensors are views of two tensors. It is used as a tuple like any other."""

    conv: Float[Tensor, "n_layers rows before d_inner"] | None = None
    ssm: Float[Tensor, "n_layers rows d_inner d_state"] | None = None

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)  # a copy's tensors are no longer in one piece


class StateShapes(NamedTuple):
    """The sizes of a model's states, which are the same in all its layers."""

    n_layers: int
    before: int
    """Inputs of the convolution that are kept."""
    d_inner: int
    d_state: int

    @classmethod
    def of(cls, model: LanguageModel) -> StateShapes:
        mixer: Any = model.blocks[0].mixer
        return cls(len(model.blocks), mixer.d_conv - 1, mixer.d_inner, mixer.d_state)

    def new(self, rows: int, device: torch.device) -> JoinedLayers:
        """Uninitialised states."""
        conv = torch.empty(self.n_layers, rows, self.before, self.d_inner, device=device)
        ssm = torch.empty(self.n_layers, rows, self.d_inner, self.d_state, device=device)
        layers = JoinedLayers(map(MambaState, conv.unbind(), ssm.unbind()))
        layers.conv, layers.ssm = conv, ssm
        return layers

    def joined(self, layers: tuple[MambaState, ...], rows: int, device: torch.device) -> JoinedLayers:
        """The same states in one piece; those that are so already are not copied."""
        if type(layers) is JoinedLayers and layers.conv is not None:
            return layers
        made = self.new(rows, device)
        for name in ("conv", "ssm"):
            torch._foreach_copy_([getattr(s, name) for s in made], [getattr(s, name) for s in layers])
        return made

    def fit(self, layers: tuple[Any, ...], rows: int, device: torch.device) -> bool:
        """Whether layers are states of this model with a row for each token."""
        if type(layers) is JoinedLayers and layers.conv is not None and layers.ssm is not None:
            ours = (layers.conv.shape, layers.ssm.shape) == (
                (self.n_layers, rows, self.before, self.d_inner),
                (self.n_layers, rows, self.d_inner, self.d_state),
            )
            return ours and layers.conv.device == device
        return len(layers) == self.n_layers and all(self._fits(layer, rows, device) for layer in layers)

    def _fits(self, layer: Any, rows: int, device: torch.device) -> bool:
        return (
            type(layer) is MambaState
            and type(layer.conv) is type(layer.ssm) is Tensor
            and layer.conv.shape == (rows, self.before, self.d_inner)
            and layer.ssm.shape == (rows, self.d_inner, self.d_state)
            and layer.conv.device == layer.ssm.device == device
            and layer.ssm.dtype == torch.float32
            and not (layer.conv.requires_grad or layer.ssm.requires_grad)
        )


def addresses(layers: JoinedLayers) -> Addresses:
    """Where the states of all layers are."""
    assert layers.conv is not None and layers.ssm is not None
    return layers.conv.data_ptr(), layers.ssm.data_ptr()
