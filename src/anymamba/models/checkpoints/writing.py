"""Writing checkpoints in every format, from a model or from another checkpoint, tensor by tensor or shard by shard."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from anymamba.base import manifest
from anymamba.base.errors import CheckpointError, CheckpointWarning
from anymamba.base.files import atomic_file, atomic_folder, contents, own_file, own_folder, require_utf8
from anymamba.data.tokenizer import FILE_NAME
from anymamba.models.checkpoints.families import Format, Spelling, nearest_spelling, spelling_for
from anymamba.models.checkpoints.formats import folder as folders
from anymamba.models.checkpoints.formats import gguf, state_spaces
from anymamba.models.checkpoints.formats.files import failures_told
from anymamba.models.checkpoints.reading import open_checkpoint, stored_formats
from anymamba.models.checkpoints.tokenizers import load_tokenizer, require_fitting
from anymamba.models.checkpoints.weights import CastWeights, ModelWeights, Progress, Weights
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import BLOCK_FORMATS, format_table

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer

FORMATS: tuple[Format, ...] = get_args(Format)
SHARD_BYTES = 5_000_000_000
GGUF_NAME = "model.gguf"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files that go with a tokenizer.json."""


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    format: Format | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model, with the tokenizer's file if one is given. Each file replaces an earlier one atomically.

    A folder also gets a manifest of the files' digests, a GGUF file has its digest inside; both are checked on load.

    Args:
        folder: for "gguf" also the path of a .gguf file; in a folder it is called model.gguf.
        format: "hf" (Hugging Face's `mamba` or `falcon_mamba`), "state-spaces", "gguf", or "anymamba"; defaults to
            "hf" if its readers compute the same function, else "anymamba".
        shard_bytes: weights with more bytes than this are written in several files ("hf" and "anymamba").
    Raises CheckpointError, which names the options, if the format cannot hold the model, ValueError for a tokenizer
        with more ids than the model.
    """
    save_weights(ModelWeights(model), folder, tokenizer, format=format, shard_bytes=shard_bytes)


def save_weights(
    weights: Weights,
    folder: str | Path,
    tokenizer: Tokenizer | None,
    *,
    format: Format | None = None,
    formats: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`save_pretrained` for weights from anywhere.

    Args:
        formats: the format of each matrix, as in `write`; defaults to the dtypes of the weights.
    """
    if format is None:
        format = "anymamba" if nearest_spelling(weights.config, "hf")[1] else "hf"
    if tokenizer is not None:
        require_fitting(tokenizer, weights.config.padded_vocab_size)
    folder = Path(folder)
    if format != "gguf":
        require_utf8(folder)
    token_ids = {} if tokenizer is None or tokenizer.eos_id is None else {"eos_token_id": tokenizer.eos_id}
    text = None if tokenizer is None or format != "gguf" else tokenizer.to_json()
    with own_file(folder) if folder.suffix == ".gguf" else own_folder(folder), _manifest(folder) as files:
        files += write(
            weights, folder, format, formats=formats, token_ids=token_ids, tokenizer=text, shard_bytes=shard_bytes
        )
        if tokenizer is not None and folder.is_dir():
            tokenizer.save(folder)
            files.append(FILE_NAME)


def convert(
    source: str | Path,
    out: str | Path,
    to: Format,
    *,
    dtype: torch.dtype | str | None = None,
    weights: str | None = None,
    tokenizer: str | Path | None = None,
    without_tokenizer: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    verify: bool = True,
    adapter: str | Path | None = None,
) -> None:
    """Write a checkpoint in another format without building the model; peak memory is one shard.

    Args:
        source: as in `load_pretrained`.
        out: a folder that does not exist yet or is empty; for "gguf" also a path that ends in .gguf.
        to: one of FORMATS.
        dtype: of the weights; for GGUF also the block format "q8_0", "q4_0", "q4_k" or "q6_k". Defaults to the stored
            one; blocks are kept in GGUF and our own format, and become float32 in others.
        weights: "int8" or "int4", for matrices in blocks as `LanguageModel.for_inference` packs them. In a folder they
            have our own model type, which other programs do not read.
        tokenizer: a tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to the
            source's own, if there is one.
        without_tokenizer: leave the tokenizer out.
        shard_bytes: as in `save_pretrained`.
        verify: compare the source with its digests or checksums, as in `open_checkpoint`.
        adapter: a LoRA adapter in PEFT's format that is merged into the weights, as in `open_checkpoint`.
    Raises FileExistsError if `out` is not empty, InUseError if another process is writing it, CheckpointError if the
        source is broken or if the format cannot hold the model (the message names the options).
    """
    formats_of = _checked_formats(to, dtype, weights)
    out = Path(out)
    if out.name in ("", ".."):
        raise ValueError(f"{out} has no name of its own; give a folder that does not exist yet, such as {out / 'NAME'}")
    if to != "gguf":
        require_utf8(out)
    _require_new(out)
    checkpoint = open_checkpoint(source, verify=verify, adapter=adapter)
    formats = None if formats_of is None else format_table(checkpoint.config, formats_of)
    if formats_of is None and dtype is None and checkpoint.in_blocks:
        if to in ("gguf", "anymamba"):
            formats = stored_formats(checkpoint)
        else:
            warnings.warn(
                f"weights in blocks become float32 in {to}; anymamba and gguf keep blocks, and weights=int8 packs them",
                CheckpointWarning,
                stacklevel=2,
            )
    if formats_of is None and dtype is None and to not in ("gguf", "anymamba"):
        dtype = checkpoint.dtypes["embedding.weight"]  # these formats have one dtype for all
    text = None
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        require_fitting(given, checkpoint.config.vocab_size)
        text = given.to_json()
    elif not without_tokenizer:
        own = checkpoint.tokenizer()
        text = None if own is None else own.text
    with _new_output(out) as new, _manifest(new) as files:
        files += write(
            checkpoint,
            new,
            to,
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            formats=formats,
            token_ids=checkpoint.token_ids,
            tokenizer=text if to == "gguf" else None,
            shard_bytes=shard_bytes,
            progress=progress,
        )
        if text is not None and new.is_dir():
            (new / FILE_NAME).write_text(text, encoding="utf-8")
            files.append(FILE_NAME)
            for name in BESIDE if tokenizer is None and checkpoint.path.is_dir() else ():
                if (checkpoint.path / name).is_file():
                    shutil.copyfile(checkpoint.path / name, new / name)


def _checked_formats(to: Format, dtype: torch.dtype | str | None, weights: str | None) -> str | None:
    """The name of the formats of matrices; None for plain numbers. Raises ValueError for what does not go together."""
    if dtype is not None and weights is not None:
        raise ValueError(f"dtype={dtype} and weights={weights!r} both choose the format of the weights; give one")
    if weights is not None and weights not in ("int8", "int4"):
        raise ValueError(f"weights must be int8 or int4, got {weights!r}; for plain numbers give dtype")
    if not isinstance(dtype, str):
        return weights
    if dtype not in BLOCK_FORMATS:
        raise ValueError(f"dtype must be a torch.dtype or one of {', '.join(BLOCK_FORMATS)}, got {dtype!r}")
    if to != "gguf":
        raise ValueError(
            f"dtype {dtype} is for gguf, not for {to}; take float32, bfloat16 or float16, or weights int8 or int4, "
            "which only anymamba reads"
        )
    return dtype


@contextmanager
def _new_output(out: Path) -> Iterator[Path]:
    """Be the only writer of a new folder or .gguf file; gives the path to write to."""
    gguf = out.suffix == ".gguf"
    with own_file(out, wait=0) if gguf else own_folder(out, wait=0):
        _require_new(out)
        with nullcontext(out) if gguf else atomic_folder(out) as new:
            yield new


def _require_new(out: Path) -> None:
    if out.exists() and (out.is_file() or contents(out)):
        raise FileExistsError(f"{out} exists already; name a new folder, or remove it")


def _manifest(out: Path) -> AbstractContextManager[list[str]]:
    """The manifest of a folder; takes the names of files that this package reads. A .gguf file by itself has none."""
    return nullcontext([]) if out.suffix == ".gguf" else manifest.rewritten(out)


def write(
    weights: Weights,
    out: Path,
    to: Format,
    *,
    dtype: torch.dtype | None = None,
    formats: Mapping[str, str] | None = None,
    token_ids: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Write weights in a format. The arguments are those of `convert`; `tokenizer` is the contents of a tokenizer.json.

    Args:
        formats: the format of each matrix, by our names of the parameters; all other tensors are then float32. Those in
            blocks make a folder one of our own format. Defaults to `dtype` for all.
    Returns the names of the files for the manifest. A GGUF file is not among them: its digest is inside.
    Warns with CheckpointWarning if llama.cpp differs from the tokenizer.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; the formats are {', '.join(FORMATS)}")
    cast = CastWeights(weights, dtype, progress, formats)
    if cast.formats and to == "state-spaces":
        raise ValueError(f"weights in blocks are for hf, anymamba and gguf, not for {to}; take one of them, or a dtype")
    if cast.formats and to == "hf":
        to = "anymamba"  # readers of Hugging Face's format do not know the blocks
    spelling = spelling_for(weights.config, to)
    if to == "gguf":
        _write_gguf(cast, out, spelling, token_ids or {}, tokenizer)
        return []
    if to == "state-spaces":
        return state_spaces.write(cast, out, spelling)
    return folders.write(cast, out, spelling, token_ids or {}, shard_bytes)


def _write_gguf(
    weights: CastWeights,
    out: Path,
    spelling: Spelling,
    token_ids: dict[str, Any],
    tokenizer: str | None,
) -> None:
    path = out if out.suffix == ".gguf" else out / GGUF_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = weights.stored["embedding.weight"].dtype
    if not weights.formats and dtype not in gguf.KINDS:
        raise CheckpointError(f"the format gguf cannot hold {dtype}; take float32, bfloat16, float16 or q8_0")
    with atomic_file(path) as temporary, failures_told(path.name):
        differences = gguf.write(temporary, weights, spelling, token_ids, tokenizer)
    if differences:
        warnings.warn(
            f"llama.cpp does not do all that the tokenizer in {path.name} does: {'; '.join(differences)}. The file "
            f"also holds the complete tokenizer, which anymamba reads",
            CheckpointWarning,
            stacklevel=4,
        )
