"""The gated MLP of hybrid models."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.parts.gated import gated_halves


class GatedMLP(nn.Module):
    """fc2(y * activation(gate)) with [y, gate] = fc1(x).

    Args:
        in_features: width of the input.
        hidden_features: defaults to 8/3 of in_features; rounded up to a multiple of `multiple_of`.
        out_features: defaults to in_features.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        both = self.fc1(x)
        if self.activation is F.silu:
            return self.fc2(gated_halves(both, "silu"))
        y, gate = both.chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))
