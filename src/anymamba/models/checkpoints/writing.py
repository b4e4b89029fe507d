"""Writing checkpoints in every format, from a model or from another checkpoint, tensor by tensor or shard by shard."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from anymamba.base.errors import CheckpointError, CheckpointWarning
from anymamba.base.files import atomic_file, atomic_folder, write_json
from anymamba.data.tokenizer import FILE_NAME
from anymamba.models.checkpoints import gguf_files, huggingface, state_spaces
from anymamba.models.checkpoints.files import SAFETENSORS, TORCH, StoredTensor
from anymamba.models.checkpoints.names import is_wide, to_huggingface, to_state_spaces
from anymamba.models.checkpoints.reading import CONFIG, Format, open_checkpoint
from anymamba.models.checkpoints.tokenizers import named_tokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer

FORMATS: tuple[Format, ...] = ("hf", "state-spaces", "gguf", "anymamba")
SHARD_BYTES = 5_000_000_000
GGUF_NAME = "model.gguf"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files that go with a tokenizer.json."""

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


class Weights(Protocol):
    """A config and its tensors under our names: a checkpoint, or a model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def stored(self) -> dict[str, StoredTensor]: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...


class ModelWeights:
    """The weights of a model that is in memory."""

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self._parameters = dict(model.named_parameters())
        self.stored = {name: StoredTensor(tuple(p.shape), p.dtype) for name, p in self._parameters.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, in order, on the CPU."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().cpu().contiguous()


class _Cast:
    """Weights in another dtype; A_log, D and the step's bias stay float32 or wider."""

    def __init__(self, weights: Weights, dtype: torch.dtype | None, progress: Progress | None) -> None:
        self.config, self._weights, self._progress = weights.config, weights, progress
        self.stored = {
            name: StoredTensor(info.shape, _target(name, info.dtype, dtype)) for name, info in weights.stored.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        done, total = 0, sum(info.nbytes for info in self.stored.values())
        for name, tensor in self._weights.tensors():
            yield name, tensor.to(self.stored[name].dtype)
            done += self.stored[name].nbytes
            if self._progress is not None:
                self._progress(done, total)


def _target(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return stored
    return torch.promote_types(dtype, torch.float32) if is_wide(name) else dtype


def foreign_options(config: ModelConfig, to: Format) -> list[str]:
    """Options of a config that a format cannot hold, by name and value; empty where it can hold the model."""
    rules = {
        "hf": huggingface.foreign_options,
        "state-spaces": state_spaces.foreign_options,
        "gguf": gguf_files.foreign_options,
    }
    return rules[to](config) if to in rules else []


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    format: Format | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model, each file replacing its predecessor atomically, with the tokenizer's file if one is given.

    Args:
        folder: for "gguf" also the path of a .gguf file; in a folder it is called model.gguf.
        format: "hf" (Hugging Face's `mamba` or `falcon_mamba`), "state-spaces", "gguf", or "anymamba"; absent means
            "hf" where its readers compute the same function, else "anymamba".
        shard_bytes: weights beyond this many are written in several files ("hf" and "anymamba").
    Raises CheckpointError, naming the options, when the format cannot hold the model.
    """
    if format is None:
        format = "anymamba" if huggingface.foreign_options(model.config) else "hf"
    folder = Path(folder)
    token_ids = {} if tokenizer is None or tokenizer.eos_id is None else {"eos_token_id": tokenizer.eos_id}
    text = None if tokenizer is None or format != "gguf" else tokenizer.to_json()
    write(ModelWeights(model), folder, format, token_ids=token_ids, tokenizer=text, shard_bytes=shard_bytes)
    if tokenizer is not None and folder.is_dir():
        tokenizer.save(folder)


def convert(
    source: str | Path,
    out: str | Path,
    to: Format,
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | Path | None = None,
    without_tokenizer: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint in another format without building the model; memory stays within one shard.

    Args:
        source: what `load_pretrained` takes.
        out: a folder that is not there yet or is empty; for "gguf" also a path that ends in .gguf.
        to: one of FORMATS.
        dtype: of the weights, "q8_0" for GGUF; absent means as stored.
        tokenizer: a tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to the
            source's own, if there is one.
        without_tokenizer: leave the tokenizer out.
        shard_bytes: as in `save_pretrained`.
    Raises FileExistsError when `out` holds something, CheckpointError when the source is broken or the format cannot
        hold the model, naming the options.
    """
    out = Path(out)
    if out.name in ("", ".."):
        raise ValueError(
            f"{out} has no name of its own; name a folder that is not there yet, {out / 'NAME'} for example"
        )
    checkpoint = open_checkpoint(source)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; name a folder that is not, or remove it")
    text = None
    if tokenizer is not None:
        text = named_tokenizer(tokenizer).to_json()
    elif not without_tokenizer:
        own = checkpoint.tokenizer()
        text = None if own is None else own.text
    with nullcontext(out) if out.suffix == ".gguf" else atomic_folder(out) as new:
        write(
            checkpoint,
            new,
            to,
            dtype=dtype,
            token_ids=checkpoint.token_ids,
            tokenizer=text if to == "gguf" else None,
            shard_bytes=shard_bytes,
            progress=progress,
        )
        if text is not None and new.is_dir():
            (new / FILE_NAME).write_text(text, encoding="utf-8")
            for name in BESIDE if tokenizer is None and checkpoint.path.is_dir() else ():
                if (checkpoint.path / name).is_file():
                    shutil.copyfile(checkpoint.path / name, new / name)


def write(
    weights: Weights,
    out: Path,
    to: Format,
    *,
    dtype: torch.dtype | str | None = None,
    token_ids: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write weights in a format; the arguments are those of `convert`, `tokenizer` the contents of a tokenizer.json.

    Warns, as CheckpointWarning, where llama.cpp does not do all that the tokenizer does.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")
    options = foreign_options(weights.config, to)
    if options:
        raise CheckpointError(f"the format {to} cannot hold this model: {', '.join(options)}; keep it as anymamba")
    if dtype == "q8_0" and to != "gguf":
        raise ValueError(f"dtype q8_0 is for gguf, not for {to}; take float32, bfloat16 or float16")
    torch_dtype = dtype if isinstance(dtype, torch.dtype) else None
    cast = _Cast(weights, torch_dtype, progress)
    if to == "gguf":
        _write_gguf(cast, out, "Q8_0" if dtype == "q8_0" else None, token_ids or {}, tokenizer)
        return
    out.mkdir(parents=True, exist_ok=True)
    narrow = cast.stored["embedding.weight"].dtype
    if to == "state-spaces":
        _write_torch_archive(cast, out)
        values = state_spaces.config_to_json(weights.config)
    else:
        _write_safetensors(cast, out, to, shard_bytes)
        values = huggingface.config_to_json(weights.config, narrow, token_ids or {}, ours=to == "anymamba")
    write_json(out / CONFIG, values)


@contextmanager
def _failures_told(name: str) -> Iterator[None]:
    """Have a library that reports a full disk in words of its own name the file, as an OSError."""
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(f"{name} could not be written ({error}); is the disk full?") from error


# ------------------------------------------------------------------------------------------ safetensors


def _write_safetensors(weights: _Cast, folder: Path, to: Format, shard_bytes: int) -> None:
    """One file, or numbered shards and their index; files of an earlier model go when the new ones are there."""
    shards = plan_shards(weights.stored, shard_bytes)
    numbered = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = numbered if len(shards) > 1 else [SAFETENSORS]
    table: dict[str, str] = {}
    tensors = weights.tensors()
    for file, names in zip(files, shards, strict=True):
        part = dict(_named(to, tensors, len(names)))
        table |= dict.fromkeys(part, file)
        with atomic_file(folder / file) as temporary, _failures_told(file):
            save_file(part, temporary, metadata={"format": "pt"})
        del part
    index = folder / f"{SAFETENSORS}.index.json"
    if len(shards) > 1:
        size = sum(info.nbytes for info in weights.stored.values())
        write_json(index, {"metadata": {"total_size": size}, "weight_map": table})
    old = {*folder.glob("model-*-of-*.safetensors"), folder / SAFETENSORS, index} - {folder / file for file in files}
    for path in old - ({index} if len(shards) > 1 else set()):
        path.unlink(missing_ok=True)


def plan_shards(stored: dict[str, StoredTensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most that many bytes (or of one tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in stored.items():
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def _named(to: Format, tensors: Iterator[tuple[str, Tensor]], count: int) -> Iterable[tuple[str, Tensor]]:
    """The next `count` tensors under the format's names and in its shapes, in memory of their own."""
    for _ in range(count):
        name, tensor = next(tensors)
        if to == "hf":
            tensor = tensor[:, None] if name.endswith("conv.weight") else tensor
            name = to_huggingface(name)
        yield name, tensor.contiguous().clone()


# ------------------------------------------------------------------------------------------ other formats


def _write_torch_archive(weights: _Cast, folder: Path) -> None:
    """pytorch_model.bin. torch.save wants all tensors at once: they wait in files, mapped into memory."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as waiting:
        table: dict[str, Tensor] = {}
        for number, (name, tensor) in enumerate(weights.tensors()):
            tensor = tensor[:, None] if name.endswith("conv.weight") else tensor
            mapped = _to_mapped_file(tensor, Path(waiting) / str(number))
            table[to_state_spaces(name)] = mapped
        if weights.config.tie_embeddings:
            table["lm_head.weight"] = table["backbone.embedding.weight"]
        with atomic_file(folder / TORCH) as temporary, _failures_told(TORCH):
            torch.save(table, temporary)
        del table, mapped


def _to_mapped_file(tensor: Tensor, path: Path) -> Tensor:
    """The tensor in a file of its own, mapped: its pages need no memory when it is scarce."""
    with open(path, "wb") as file:  # not through the mapping: where the disk is full that would end the process
        file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)


def _write_gguf(weights: _Cast, out: Path, kind: str | None, token_ids: dict[str, Any], tokenizer: str | None) -> None:
    path = out if out.suffix == ".gguf" else out / GGUF_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind is None:
        dtype = weights.stored["embedding.weight"].dtype
        kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        if dtype not in kinds:
            raise CheckpointError(f"the format gguf cannot hold {dtype}; take float32, bfloat16, float16 or q8_0")
        kind = kinds[dtype]
    with atomic_file(path) as temporary, _failures_told(path.name):
        differences = gguf_files.write(
            temporary, weights.config, weights.stored, weights.tensors(), kind, token_ids, tokenizer
        )
    if differences:
        warnings.warn(
            f"llama.cpp does not do all that the tokenizer in {path.name} does: {'; '.join(differences)}. The file "
            f"holds the tokenizer whole, and anymamba reads that",
            CheckpointWarning,
            stacklevel=4,
        )
