"""Exporting models: the one-token step as an ONNX file, and files of `torch.export` programs.

`torch.export.export` takes a model without changes, with a dynamic batch and length where its layers allow that; see
docs/export.md. `torch.export.save` and `load` need this module to be imported, because it registers the names of our
outputs, of the states of all layers and of the scan.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # its error message says to register there

from anymamba.base.files import atomic_file, own_file
from anymamba.layers.positions import PositionsState
from anymamba.models.language_model import LanguageModel, LanguageModelOutput, LanguageModelState
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import map_state, state_tensors

ONE_FILE = 2_000_000_000  # bytes; a message of protobuf, which an ONNX file is, cannot exceed 2 GiB


def state_names(state: Any, prefix: str = "state") -> Iterator[str]:
    """A name for each tensor of a state, in the order of `state_tensors`: "state.layers.0.conv" and so on."""
    if isinstance(state, Tensor):
        yield prefix
        return
    for name, entry in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
        yield from state_names(entry, f"{prefix}.{name}")


class _Step(nn.Module):
    """`LanguageModel.step` with tensors as arguments and results; its logits have no padding."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.template = model.init_state(1)
        self.training = False  # the exporter requires it; set here only, so that the model is not changed

    def forward(self, token_ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        given = iter(state)
        before: LanguageModelState = map_state(lambda _: next(given), self.template)
        output = self.model.step(token_ids, before)
        return output.logits[:, : self.model.config.vocab_size], *state_tensors(output.state)


def export_step_onnx(model: LanguageModel, path: str | Path) -> None:
    """Write an ONNX file that reads one token per row and returns the logits of the next token and the new state.

    Inputs are `token_ids` (batch,) int64 and, for each layer i, `state.layers.i.conv` (batch, d_conv - 1, d_inner) and
    `state.layers.i.ssm` (batch, d_inner, d_state), zeros before the first token. Outputs are `logits` (batch,
    vocab_size) and the new states under the same names with the prefix `new_`. The batch may be of any size; all but
    the token ids is float32.

    Args:
        model: in float32, with a real A.
        path: of the file. If the weights exceed 2 GB, they go into a second file, path + ".data".
    Raises ValueError for a model that ONNX cannot express, ImportError without onnx and onnxscript.
    """
    _require_expressible(model)
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"exporting to ONNX needs {name}, which is not installed; pip install onnx onnxscript")
    device = model.embedding.weight.device
    state = model.init_state(2)
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    names = list(state_names(state))
    batch = torch.export.Dim("batch", min=1)
    tensors = tuple(state_tensors(state))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    path = Path(path)
    with own_file(path), atomic_file(path) as temporary, torch.no_grad():
        torch.onnx.export(
            _Step(model),
            (tokens, *tensors),
            str(temporary),
            dynamo=True,
            dynamic_shapes={"token_ids": {0: batch}, "state": tuple({0: batch} for _ in tensors)},
            input_names=["token_ids", *names],
            output_names=["logits", *(f"new_{name}" for name in names)],
            external_data=size > ONE_FILE,
            verbose=False,
        )
        data = f"{path.name}.data"
        if temporary.with_name(data).exists():
            os.replace(temporary.with_name(data), path.with_name(data))


def _require_expressible(model: LanguageModel) -> None:
    if model.config.mamba.is_complex:
        raise ValueError('ONNX has no complex arithmetic, which A_init="s4d-lin" needs; this model cannot be exported')
    for name, block in zip(model.config.layer_mixers, model.blocks, strict=True):
        if not block.mixer.exports_step:
            raise ValueError(
                f"ONNX cannot express the step of the mixer {name!r}: it must be real arithmetic on a state of fixed "
                "size; torch.export takes every model, some at fixed sizes"
            )
    if model.positions is not None:
        raise ValueError(
            "the ONNX step cannot check for the end of a table of absolute positions; torch.export takes every model, "
            "some at fixed sizes"
        )
    dtype = model.embedding.weight.dtype
    if dtype != torch.float32:
        raise ValueError(f"the ONNX file is written in float32, got a model in {dtype}; use model.float()")


def _layers(kind: type) -> Iterator[type]:
    """The classes that are derived from a kind of layer, which importing a model defines."""
    layers: list[type] = kind.__subclasses__()
    for layer in layers:
        yield layer
        yield from _layers(layer)


_types = [getattr(layer, "state_type", tuple) for layer in _layers(SequenceLayer)]
for _type in dict.fromkeys((*_types, PositionsState, LanguageModelState, LanguageModelOutput)):
    if hasattr(_type, "_fields"):
        pytree._register_namedtuple(_type, serialized_type_name=f"{_type.__module__}.{_type.__qualname__}")
