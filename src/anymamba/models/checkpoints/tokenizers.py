"""The tokenizer that goes with a model: one rule for training, generation, evaluation and lm-eval."""

from __future__ import annotations

from pathlib import Path

from anymamba.data.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer, tokenizer_from_json
from anymamba.data.tokenizer import load_tokenizer as read_tokenizer
from anymamba.models.checkpoints.formats.files import CONFIG, read_json
from anymamba.models.checkpoints.formats.folder import read_config
from anymamba.models.checkpoints.hub import hub_name, local_path
from anymamba.models.checkpoints.reading import Checkpoint, open_checkpoint
from anymamba.models.config import ModelConfig

BYTE_VOCABULARIES = (256, 257)
"""Sizes of byte vocabularies: the 256 bytes, without or with one more id that ends documents."""


def find_tokenizer(
    model: str | Path | Checkpoint | None = None,
    given: str | Path | Tokenizer | None = None,
    *,
    vocab_size: int | None = None,
    revision: str | None = None,
) -> Tokenizer:
    """The given tokenizer, else the model's own, else bytes for a model with a byte vocabulary.

    Args:
        model, revision: as in `load_pretrained`; None for a model in memory or one that does not exist yet. A file is
            opened once.
        given: a tokenizer, or the name of one, as in `load_tokenizer`.
        vocab_size: the model's; defaults to that of the opened model, and to bytes for a model that does not exist yet.
    Raises FileNotFoundError if there is none and the vocabulary is not bytes, ValueError or CheckpointError if one
        cannot be read, ValueError if it has more ids than the model.
    """
    if vocab_size is None and isinstance(model, Checkpoint):
        vocab_size = model.config.vocab_size
    found = _found_tokenizer(model, given, vocab_size, revision)
    if vocab_size is not None:
        require_fitting(found, vocab_size)
    return found


def require_fitting(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError for a tokenizer with ids that a model of that vocabulary does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids and the model a vocabulary of "
            f"{vocab_size:,}; give the model's own tokenizer (--tokenizer)"
        )


def _found_tokenizer(
    model: str | Path | Checkpoint | None,
    given: str | Path | Tokenizer | None,
    vocab_size: int | None,
    revision: str | None,
) -> Tokenizer:
    if given is not None:
        return load_tokenizer(given) if isinstance(given, str | Path) else given
    found = model if model is None or isinstance(model, Checkpoint) else _folder_or_checkpoint(model, revision)
    own = None if found is None else _own_tokenizer(found)
    if own is not None:
        return own
    if vocab_size is None:
        checkpoint = open_checkpoint(found, verify=False) if isinstance(found, Path) else found
        vocab_size = BYTE_VOCABULARIES[-1] if checkpoint is None else checkpoint.config.vocab_size
    if vocab_size not in BYTE_VOCABULARIES:
        name = model.path if isinstance(model, Checkpoint) else model or "the model"
        raise FileNotFoundError(
            f"{name} has no tokenizer that can be read, and its vocabulary of {vocab_size} is not "
            f"bytes; name its {FILE_NAME} with --tokenizer FILE (tokenizer=FILE for lm-eval)"
        )
    return _bytes(vocab_size)


def model_tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer | None:
    """The tokenizer in a model's .gguf file, or in the tokenizer.json beside it; None if there is none.

    Args:
        name, revision: of the model, as in `load_pretrained`.
    """
    return _own_tokenizer(_folder_or_checkpoint(name, revision))


def _folder_or_checkpoint(name: str | Path, revision: str | None) -> Path | Checkpoint:
    """A model folder, whose tokenizer can be read without its weights, or the opened .gguf file."""
    path = local_path(name, revision)
    return path if path.is_dir() and (path / CONFIG).exists() else open_checkpoint(path, verify=False)


def _own_tokenizer(model: Path | Checkpoint) -> Tokenizer | None:
    """The tokenizer of a model folder or of an open checkpoint."""
    path = model if isinstance(model, Path) else model.home or model.path
    if path.is_dir():
        return read_tokenizer(path) if (path / FILE_NAME).is_file() else None
    assert isinstance(model, Checkpoint), "a file has been opened as a checkpoint"
    own = model.tokenizer()
    return None if own is None else tokenizer_from_json(own.text, own.path)


def load_tokenizer(name: str | Path | None = None) -> Tokenizer:
    """The tokenizer of any name that the command line takes; None gives bytes.

    Args:
        name: a tokenizer.json; a model or run folder, a .gguf file or any other folder that holds one; or a name on the
            hub. A model of bytes needs none.
    Raises FileNotFoundError if there is none, ValueError or CheckpointError if it cannot be read.
    """
    if name is None:
        return ByteTokenizer()
    path = Path(name).expanduser()
    if not path.exists() and path.suffix != ".json" and hub_name(name):
        try:
            path = local_path(name, weights=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no tokenizer: {error}") from error
    holds_file = path.is_dir() and (path / FILE_NAME).exists()
    if holds_file or not path.exists() or (path.is_file() and path.suffix != ".gguf"):
        return read_tokenizer(path)
    try:
        model = _folder_or_checkpoint(path, None)
    except FileNotFoundError:  # a folder without a model
        return read_tokenizer(path)
    own = _own_tokenizer(model)
    if own is not None:
        return own
    vocab_size = (_config(model) if isinstance(model, Path) else model.config).vocab_size
    if vocab_size not in BYTE_VOCABULARIES:
        raise FileNotFoundError(f"{name} holds no tokenizer that can be read; give a {FILE_NAME}")
    return _bytes(vocab_size)


def _config(folder: Path) -> ModelConfig:
    """The config of a model folder, whose weights need not be there."""
    return read_config(read_json(folder / CONFIG), folder / CONFIG)[2]


def _bytes(vocab_size: int) -> ByteTokenizer:
    return ByteTokenizer(end_of_document=vocab_size == BYTE_VOCABULARIES[-1])
