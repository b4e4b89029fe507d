"""What `--model_args` name: the model, where it runs, its tokenizer and the tokens that texts begin and end with."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import tokenizers
import torch

from anymamba.data.tokenizer import FILE_NAME, ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer
from anymamba.models.checkpoints import model_tokenizer
from anymamba.models.language_model import LanguageModel

DTYPES = {"auto": None, **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}}
"""Names of dtypes; "auto" is the dtype of the file."""


def load_model(
    pretrained: str | Path | LanguageModel,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
) -> LanguageModel:
    """The model of that name, in float32 unless told otherwise, or the one that is given, as it is."""
    if isinstance(pretrained, LanguageModel):
        if (dtype, device, revision) != (None, None, None):
            raise ValueError(
                "dtype, device and revision are for models to be loaded; leave them out for a LanguageModel"
            )
        return pretrained
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    elif dtype is None:
        dtype = torch.float32
    return LanguageModel.from_pretrained(pretrained, device=usable_device(device), dtype=dtype, revision=revision)


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, or the best there is. Raises ValueError where it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); leave it out") from error


def find_tokenizer(
    given: str | Path | Tokenizer | None,
    pretrained: str | Path | LanguageModel,
    revision: str | None,
    vocab_size: int,
) -> Tokenizer:
    """The one that is given, else the model's own, else bytes for a model of bytes."""
    if isinstance(given, str | Path):
        return load_tokenizer(given)
    if given is not None:
        return given
    own = None if isinstance(pretrained, LanguageModel) else model_tokenizer(pretrained, revision)
    if own is None and vocab_size not in (256, 257):
        raise FileNotFoundError(f"no {FILE_NAME} and a vocabulary of {vocab_size}; name the tokenizer, tokenizer=PATH")
    return own or ByteTokenizer()


def special_id(tokenizer: Tokenizer, key: str, default: int | None) -> int | None:
    """The id of "bos_token" or "eos_token" in the tokenizer_config.json beside a tokenizer.json, which `hf` takes."""
    if not isinstance(tokenizer, JsonTokenizer):
        return default
    file = tokenizer.path.with_name("tokenizer_config.json")
    token = json.loads(file.read_text(encoding="utf-8")).get(key) if file.is_file() else None
    ids = tokenizer.encode(token["content"] if isinstance(token, dict) else token) if token else []
    return ids[0] if len(ids) == 1 else default


def ids_before_texts(tokenizer: Tokenizer) -> list[int]:
    """What a tokenizer.json itself puts before every text: nothing in most of them, the id of <s> in others."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        by_template = tokenizers.Tokenizer.from_file(str(Path(folder) / FILE_NAME)).encode("a").ids
    plain = tokenizer.encode("a")
    return by_template[: -len(plain)] if by_template[-len(plain) :] == plain else []
