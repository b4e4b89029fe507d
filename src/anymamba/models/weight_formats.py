"""Which tensors of a language model are packed for inference, and in which format.

| weights | projections | embedding and head | x_proj and dt_proj |
| --- | --- | --- | --- |
| `float32` | float32 | float32 | float32 |
| `bfloat16` | bfloat16 | bfloat16 | bfloat16 |
| `int8` (`q8_0`) | Q8_0 | Q8_0 | Q8_0 |
| `int4` (`q4_0`) | Q4_0 | Q6_K | Q8_0 |
| `q4_k` | Q4_K | Q6_K | Q8_0 |
| `q6_k` | Q6_K | Q6_K | Q8_0 |

A format has blocks of 256 columns (Q4_K, Q5_K, Q6_K) or of 32 (Q8_0, Q4_0). A tensor whose columns are not a multiple
of 256 takes Q4_0 for Q4_K and Q8_0 for Q6_K; one whose columns are not a multiple of 32 stays bfloat16. Convolutions,
A, D, biases, norms, tables of positions and the state stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from torch import nn

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.parameters import WideParameters

Weights = Literal["float32", "bfloat16", "int8", "int4"]
"""What `for_inference` and the flag `--weights` take."""
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
BLOCK_FORMATS = ("q8_0", "q4_0", "q4_k", "q6_k")
"""Block formats that matrices can be written in. Q5_K is only read."""


class _Choice(NamedTuple):
    """The formats of one choice of weights."""

    projections: str
    vocabulary: str
    """Of the embedding and the head."""
    selection: str
    """Of x_proj and dt_proj: errors in the step grow with the length, so they have at least 8 bits."""


_CHOICES = {
    "float32": _Choice("float32", "float32", "float32"),
    "bfloat16": _Choice("bfloat16", "bfloat16", "bfloat16"),
    "q8_0": _Choice("q8_0", "q8_0", "q8_0"),
    "q4_0": _Choice("q4_0", "q6_k", "q8_0"),
    "q4_k": _Choice("q4_k", "q6_k", "q8_0"),
    "q6_k": _Choice("q6_k", "q6_k", "q8_0"),
}
_NAMES = {"int8": "q8_0", "int4": "q4_0"}
_COLUMNS = {"q4_k": 256, "q6_k": 256, "q8_0": 32, "q4_0": 32}
_INSTEAD = {"q4_k": "q4_0", "q6_k": "q8_0", "q8_0": "bfloat16", "q4_0": "bfloat16"}


def format_table(config: ModelConfig, weights: str) -> dict[str, str]:
    """The format of each matrix of a model, by the parameter's name. All other parameters are float32.

    Args:
        config: of the model; none of its memory is allocated.
        weights: one of WEIGHTS or BLOCK_FORMATS.
    Raises ValueError for another name.
    """
    choice = _CHOICES.get(_NAMES.get(weights, weights))
    if choice is None:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    found = {}
    for name, module in matrices(LanguageModel(config, device="meta")):
        n_in = module.weight.shape[1]
        last = name.rpartition(".")[2]
        format = (
            choice.vocabulary
            if name in ("embedding", "head")
            else choice.selection
            if last in ("x_proj", "dt_proj")
            else choice.projections
        )
        while n_in % _COLUMNS.get(format, 1):
            format = _INSTEAD[format]
        found[f"{name}.weight"] = format
    return found


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    """The modules whose weight is packed, by name: linear maps and embeddings, except those that make kernels."""
    own = {m for wide in model.modules() if isinstance(wide, WideParameters) for m in wide.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module not in own:
            yield name, module
