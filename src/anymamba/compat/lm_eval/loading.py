"""Loads what `--model_args` name: the model, its device, and the tokens that texts begin and end with."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch

from anymamba.data.tokenizer import JsonTokenizer, Tokenizer
from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import Weights
from anymamba.ops.devices import usable_device
from anymamba.ops.packed_linear import no_kernels

DTYPES = {"auto": None, **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}}
"""Names of dtypes; "auto" is the dtype of the file."""


def load_model(
    pretrained: str | Path | LanguageModel,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
    weights: Weights | None = None,
    verify: bool = True,
) -> LanguageModel:
    """Load the model of that name, by default in float32; a LanguageModel is returned as it is.

    With weights it is packed for inference.
    """
    if isinstance(pretrained, LanguageModel):
        if (dtype, device, revision, weights, verify) != (None, None, None, None, True):
            raise ValueError(
                "dtype, device, revision, weights and verify apply only when a model is loaded; leave them out for a "
                "LanguageModel"
            )
        return pretrained
    if weights is not None:
        return _packed(pretrained, dtype, device, revision, weights, verify)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    elif dtype is None:
        dtype = torch.float32
    place = usable_device(device)
    return LanguageModel.from_pretrained(pretrained, device=place, dtype=dtype, revision=revision, verify=verify)


def _packed(
    pretrained: str | Path,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
    weights: Weights,
    verify: bool,
) -> LanguageModel:
    if dtype is not None:
        raise ValueError(f"dtype={dtype} and weights={weights} both choose the format of the weights; give one")
    place = usable_device(device)
    if why := no_kernels(place.type):
        if device is not None:
            raise ValueError(
                f"weights={weights} cannot run on device={device}: {why}; give device=cpu, or dtype in place of weights"
            )
        place = torch.device("cpu")
    return InferenceModel.from_pretrained(pretrained, weights, place, revision, verify=verify)


def special_id(tokenizer: Tokenizer, key: str, default: int | None) -> int | None:
    """The id of "bos_token" or "eos_token" in the tokenizer_config.json next to a tokenizer.json, as `hf` reads it."""
    if not isinstance(tokenizer, JsonTokenizer):
        return default
    file = tokenizer.path.with_name("tokenizer_config.json")
    token = json.loads(file.read_text(encoding="utf-8")).get(key) if file.is_file() else None
    ids = tokenizer.encode(token["content"] if isinstance(token, dict) else token) if token else []
    return ids[0] if len(ids) == 1 else default


def ids_before_texts(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer.json puts before every text: in most files none, in others the id of <s>."""
    by_template = tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("a").ids
    plain = tokenizer.encode("a")
    return by_template[: -len(plain)] if by_template[-len(plain) :] == plain else []
