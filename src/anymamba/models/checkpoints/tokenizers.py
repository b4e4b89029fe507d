"""The tokenizer that goes with a model: one rule for training, generation, evaluation and lm-eval."""

from __future__ import annotations

from pathlib import Path

from anymamba.data.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_json
from anymamba.models.checkpoints.formats.files import CONFIG
from anymamba.models.checkpoints.hub import HUB_NAME, local_path
from anymamba.models.checkpoints.reading import open_checkpoint

BYTE_VOCABULARIES = (256, 257)
"""Sizes of vocabularies that are bytes: all of them, and one id more that ends documents."""


def find_tokenizer(
    model: str | Path | None = None,
    given: str | Path | Tokenizer | None = None,
    *,
    vocab_size: int | None = None,
    revision: str | None = None,
) -> Tokenizer:
    """The tokenizer that is given, else the model's own, else bytes for a model of bytes.

    Args:
        model, revision: as `load_pretrained` takes them; None: a model in memory, or one that is yet to be made.
        given: a tokenizer, or what names one: a tokenizer.json, a folder or .gguf file that holds one, or a name on the
            hub.
        vocab_size: the model's; None: it is read from the model, and a model that is yet to be made takes bytes.
    Raises FileNotFoundError where there is none and the vocabulary is not of bytes, ValueError or CheckpointError for
        one that cannot be read.
    """
    if given is not None:
        return named_tokenizer(given) if isinstance(given, str | Path) else given
    own = None if model is None else model_tokenizer(model, revision)
    if own is not None:
        return own
    if vocab_size is None:
        vocab_size = BYTE_VOCABULARIES[-1] if model is None else open_checkpoint(model, revision).config.vocab_size
    if vocab_size not in BYTE_VOCABULARIES:
        raise FileNotFoundError(
            f"{model or 'the model'} has no tokenizer that is read here, and its vocabulary of {vocab_size} is not "
            f"bytes; name its {FILE_NAME} with --tokenizer FILE (tokenizer=FILE for lm-eval)"
        )
    return ByteTokenizer(end_of_document=vocab_size == BYTE_VOCABULARIES[-1])


def model_tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer | None:
    """The tokenizer of a model: in its .gguf file, or the tokenizer.json beside it; None without any.

    Args:
        name, revision: of the model, as `load_pretrained` takes them.
    """
    path = local_path(name, revision)
    if path.is_dir() and (path / CONFIG).exists():
        return load_tokenizer(path) if (path / FILE_NAME).is_file() else None
    own = open_checkpoint(path).tokenizer()
    return None if own is None else tokenizer_from_json(own.text, own.path)


def named_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of a folder or .gguf file that holds one, or of a name on the hub.

    Raises FileNotFoundError where there is none, ValueError or CheckpointError where it cannot be read.
    """
    path = Path(name)
    if not path.exists() and path.suffix != ".json" and HUB_NAME.fullmatch(path.as_posix()):
        try:
            path = local_path(name, weights=False)
        except FileNotFoundError as error:
            why = str(error).rpartition(": ")[2]
            raise FileNotFoundError(
                f"no tokenizer at {name}, here or on the hub ({why}); give a {FILE_NAME}"
            ) from error
    holds_gguf = path.suffix == ".gguf" or (not (path / FILE_NAME).exists() and any(path.glob("*.gguf")))
    own = model_tokenizer(path) if path.exists() and holds_gguf else load_tokenizer(path)
    if own is None:
        raise FileNotFoundError(f"{name} holds no tokenizer that is read here; give a {FILE_NAME}")
    return own
