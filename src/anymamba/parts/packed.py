"""Linear maps and embeddings whose weight is packed: float32, bfloat16, or blocks of integers with scales.

They stand in for `nn.Linear` and `nn.Embedding` in a model for inference. Inputs and outputs are float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from anymamba.ops.packed_linear import PackedWeight, packed_linear, unpack


class _Packed(nn.Module):
    """A module with a packed weight. The bytes are a buffer, so that they move with the module."""

    weight: UInt8[Tensor, "n_out row_bytes"]
    """The rows as they lie in memory or in a mapped file."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.register_buffer("weight", weight.data)
        self.format, self.n_out, self.n_in = weight.format, weight.n_out, weight.n_in

    @property
    def packed(self) -> PackedWeight:
        """The weight with its format and sizes."""
        return PackedWeight(self.weight, self.format, self.n_in)

    def extra_repr(self) -> str:
        return f"{self.n_in}, {self.n_out}, {self.format}"


class PackedLinear(_Packed):
    """y = x weight^T + bias, without gradients.

    Args:
        weight: packed, of n_out rows and n_in columns.
        bias: (n_out,) in float32; defaults to none.
    """

    def __init__(self, weight: PackedWeight, bias: Float[Tensor, " n_out"] | None = None) -> None:
        super().__init__(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "... n_in"]) -> Float[Tensor, "... n_out"]:
        return packed_linear(x, self.packed, self.bias)


class PackedEmbedding(_Packed):
    """Rows of a packed table, in float32. `project` is the head of a model that shares the table.

    Args:
        weight: packed, a row for each id.
    """

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... n_in"]:
        """The rows of the ids. Raises IndexError for an id outside the table."""
        try:
            rows = F.embedding(ids.reshape(-1), self.weight)
        except IndexError:
            outside = ids[(ids < 0) | (ids >= self.n_out)].tolist()[0]
            raise IndexError(f"token id {outside} is outside the embedding's rows, 0 to {self.n_out - 1}") from None
        return unpack(PackedWeight(rows, self.format, self.n_in)).view(*ids.shape, self.n_in)

    def project(self, x: Float[Tensor, "... n_in"]) -> Float[Tensor, "... n_out"]:
        """x weight^T."""
        return packed_linear(x, self.packed)


def pack_modules(model: nn.Module, weights: Mapping[str, PackedWeight]) -> None:
    """Replace linear maps and embeddings by packed ones, in place.

    Args:
        model: its biases may be on the meta device.
        weights: by the names of the parameters that they stand for, such as "head.weight".
    """
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        parent, _, last = path.rpartition(".")
        module = model.get_submodule(path)
        bias = getattr(module, "bias", None)
        made = PackedEmbedding(weight) if isinstance(module, nn.Embedding) else PackedLinear(weight, bias)
        setattr(model.get_submodule(parent), last, made)
