"""Reading checkpoints of any format: the config, and the tensors with our names and shapes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.base import manifest
from anymamba.base.errors import CheckpointError
from anymamba.base.files import require_utf8
from anymamba.data.tokenizer import FILE_NAME
from anymamba.models.checkpoints import runs
from anymamba.models.checkpoints.adapters import Adapter, fitted, read_adapter, weights_digest
from anymamba.models.checkpoints.families import ANYMAMBA, Format, Spelling
from anymamba.models.checkpoints.formats import folder as folders
from anymamba.models.checkpoints.formats.files import CONFIG, DTYPE_FORMATS, TORCH, open_weights, read_json
from anymamba.models.checkpoints.formats.gguf import GGUFFile
from anymamba.models.checkpoints.formats.tensors import StoredTensor, TensorFile
from anymamba.models.checkpoints.hub import local_path
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import format_table
from anymamba.ops.packed_linear import PackedWeight
from anymamba.parts.parameters import wide_names


class TokenizerJson(NamedTuple):
    """A tokenizer as a value."""

    text: str
    """The contents of a tokenizer.json."""
    path: Path
    """The file that the contents come from: that one, or a .gguf file."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Its tensors are checked against its config.

    Raises CheckpointError if tensors are missing, unexpected, or of another shape.
    """

    path: Path
    """The folder or the file."""
    format: Format
    spelling: Spelling
    config: ModelConfig
    file: TensorFile
    token_ids: dict[str, Any] = field(default_factory=dict)
    """Ids of special tokens, such as eos_token_id."""
    home: Path | None = None
    """The folder of the tokenizer, where it is not that of the weights."""
    adapter: Adapter = field(default_factory=dict, repr=False)
    """LoRA adapters, by our names of the weights that they are merged into."""

    def __post_init__(self) -> None:
        stored = self.file.stored()
        if self.config.n_layers > len(stored):
            raise CheckpointError(
                f"{self.file.path} holds {len(stored)} tensors, too few for the {self.config.n_layers} layers of "
                "its config"
            )
        model = model_without_weights(self.config, self.path)
        shapes, wide = {name: tuple(p.shape) for name, p in model.named_parameters()}, wide_names(model)
        keys = {name: self._key(name, stored) for name in shapes}
        tied = {self.spelling.tied_head} if self.config.tie_embeddings else set()
        _require_names(self, set(stored) - tied, set(keys.values()))
        for name, key in keys.items():
            shape = self.spelling.shape(name, stored[key].shape)
            if shape != shapes[name]:
                raise CheckpointError(f"{self.file.path}: {key} must have shape {shapes[name]}, got {shape}")
        found = {name: StoredTensor(shapes[name], stored[key].dtype) for name, key in keys.items()}
        narrow = found["embedding.weight"].dtype
        object.__setattr__(self, "stored", found)
        object.__setattr__(self, "wide", wide)
        object.__setattr__(self, "dtypes", {n: info.dtype if n in wide else narrow for n, info in found.items()})
        object.__setattr__(self, "_names", {key: name for name, key in keys.items()})
        object.__setattr__(self, "_keys", keys)

    stored: dict[str, StoredTensor] = field(init=False, repr=False)
    """Shapes and dtypes by our names; those of matrices in blocks are float32."""
    wide: frozenset[str] = field(init=False, repr=False)
    """The names of those that are never narrower than float32: A_log, D, the step's bias, what makes kernels."""
    dtypes: dict[str, torch.dtype] = field(init=False, repr=False)
    """Of the model, if no other one is asked for: the embedding's, and that of the file for those in `wide`."""
    _names: dict[str, str] = field(init=False, repr=False)
    """Our names by the file's names."""
    _keys: dict[str, str] = field(init=False, repr=False)
    """The file's names by our names."""

    def tensors(
        self, names: Container[str] | None = None, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of `stored`, in its order; each is valid until the next one is requested.

        Args:
            names: of those to read; defaults to all.
            dtypes: by our names; defaults to `self.dtypes`. The file's numbers, with those of an adapter, are
                rounded once.
        """
        wanted = [key for name, key in self._keys.items() if names is None or name in names]
        for key, tensor in self.file.read(wanted):
            name = self._names[key]
            tensor = self.spelling.decode(name, tensor, f"{self.file.path}: {key}")
            tensor = tensor.view(self.stored[name].shape)
            if name in self.adapter:
                tensor = self.adapter[name].added_to(tensor)
            yield name, tensor.to((dtypes or self.dtypes)[name])

    @property
    def in_blocks(self) -> bool:
        """Whether the file holds matrices in blocks of integers."""
        return bool(self.file.formats)

    def blocks(self, name: str) -> PackedWeight | None:
        """A matrix as it lies in the mapped file; None if the file does not give that or an adapter changes it."""
        return None if name in self.adapter else self.file.blocks(self._keys[name])

    def with_adapter(self, adapter: Adapter, wide: bool = False) -> Checkpoint:
        """The same checkpoint with an adapter merged into its tensors.

        Args:
            wide: whether all tensors are in float32 or wider then, unless another dtype is asked for.
        Raises CheckpointError if the adapter is of another model.
        """
        result = copy.copy(self)
        if wide:
            dtypes = {name: torch.promote_types(info.dtype, torch.float32) for name, info in self.stored.items()}
            stored = {name: info._replace(dtype=dtypes[name]) for name, info in self.stored.items()}
            object.__setattr__(result, "stored", stored)
            object.__setattr__(result, "dtypes", dtypes)
        object.__setattr__(result, "adapter", fitted(adapter, self.stored, self._names, self.path))
        return result

    def tokenizer(self) -> TokenizerJson | None:
        """The model's tokenizer, or None.

        The first of: the complete tokenizer.json in a .gguf file, the tokenizer.json beside the model, one made from
        the parts of a .gguf file that llama.cpp reads.
        """
        inside = self.file if isinstance(self.file, GGUFFile) else None
        whole = None if inside is None else inside.whole_tokenizer()
        beside = (self.home or (self.path if self.path.is_dir() else self.path.parent)) / FILE_NAME
        if whole is None and beside.is_file():
            read_json(beside)  # raises CheckpointError if it is not JSON
            return TokenizerJson(beside.read_text(encoding="utf-8"), beside)
        text = whole if whole is not None or inside is None else inside.tokenizer_from_parts()
        return None if text is None else TokenizerJson(text, self.file.path)

    def _key(self, name: str, stored: Container[str]) -> str:
        """The name in the file of one of our parameters."""
        key = self.spelling.name(name)
        return next((other for other in self.spelling.aliases(key) if other in stored), key)


def stored_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """The packed formats of a checkpoint's matrices, by our names: those of its blocks, else those of their dtypes."""
    found = {}
    for name in format_table(checkpoint.config, "float32"):
        blocks = checkpoint.blocks(name)
        found[name] = DTYPE_FORMATS.get(checkpoint.stored[name].dtype, "float32") if blocks is None else blocks.format
    return found


def open_checkpoint(
    name: str | Path, revision: str | None = None, *, verify: bool = True, adapter: str | Path | None = None
) -> Checkpoint:
    """Open a model folder, a checkpoint of a run, a .gguf file, or a name on the hub; tensors are read later.

    Args:
        adapter: a LoRA adapter in PEFT's format, a folder or a name on the hub, that is merged into the weights.
        verify: read the files once to compare them with the digests or checksums that they have: the manifest of a
            folder that we saved, the digest in a GGUF file of ours, the CRC-32s of torch's archives.
    Raises FileNotFoundError if there is none, CheckpointError if it is broken, has changed since it was saved, or is of
        another kind of model.
    """
    if adapter is not None:
        low_ranks = read_adapter(adapter)
        return open_checkpoint(name, revision, verify=verify).with_adapter(low_ranks)
    path = local_path(name, revision)
    verified = manifest.check(path) if verify and path.is_dir() else frozenset()
    if path.is_dir() and runs.is_run_checkpoint(path):
        return _open_run_checkpoint(path, verify)
    if path.is_dir() and not (path / CONFIG).exists():
        path = _only_gguf(path)
    try:
        if path.is_dir():
            require_utf8(path)
            return _open_folder(path, verify and TORCH not in verified)
        if path.suffix != ".gguf":
            raise FileNotFoundError(
                f"{path} is a file; give the folder that holds {CONFIG} and model.safetensors, or a .gguf file"
            )
        file = GGUFFile(path, verify)
        return Checkpoint(path, "gguf", file.spelling, file.config(), file, file.token_ids())
    except KeyError as error:  # a parameter that the format has no name for
        raise CheckpointError(f"{path}: its format has no name for the parameter {error} of its config") from error


def load_pretrained(
    name: str | Path | Checkpoint,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    *,
    verify: bool = True,
    adapter: str | Path | None = None,
) -> LanguageModel:
    """Load a model; peak memory is the weights in their dtype plus one tensor.

    Args:
        name: a folder of Hugging Face's or the original state-spaces format, a checkpoint in a run's folder, a .gguf
            file, a name on the hub, or a `Checkpoint`.
        device: where the weights go; defaults to the CPU.
        dtype: of the weights; defaults to that of the file. A_log, D, the step's bias and what makes the kernels of S4,
            S4D, H3 and Hyena or the decay of RWKV stay float32 or wider.
        revision: of a repository on the hub.
        verify, adapter: as in `open_checkpoint`; for a `Checkpoint` they were decided when it was opened.
    Raises FileNotFoundError if a folder or file is missing, CheckpointError if a file is broken, has changed since it
        was saved, is a pickle that would run code, or does not hold the tensors of the model in its config.
    """
    if isinstance(name, Checkpoint):
        checkpoint = name
    else:
        checkpoint = open_checkpoint(name, revision, verify=verify, adapter=adapter)
    model = LanguageModel(checkpoint.config, device="meta")
    tensors = {}
    dtypes = {name: dtype or own for name, own in checkpoint.dtypes.items()}
    dtypes |= {name: torch.promote_types(dtypes[name], torch.float32) for name in checkpoint.wide}
    for key, tensor in checkpoint.tensors(dtypes=dtypes):
        tensors[key] = tensor.to(device=device, copy=True).contiguous()
    model.load_state_dict(tensors, assign=True)
    return model


def model_without_weights(config: ModelConfig, where: Path) -> LanguageModel:
    """A model on the meta device.

    Raises CheckpointError if no model can have the config.
    """
    try:
        return LanguageModel(config, device="meta")
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        why = str(error).splitlines()[0]
        raise CheckpointError(f"{where}: no model can have its config: {why}") from error


def _open_folder(folder: Path, verify: bool) -> Checkpoint:
    values = read_json(folder / CONFIG)
    format, spelling, config = folders.read_config(values, folder / CONFIG)
    file = open_weights(folder, verify, folders.block_formats(values, folder / CONFIG))
    return Checkpoint(folder, format, spelling, config, file, folders.token_ids(values))


def _open_run_checkpoint(folder: Path, verify: bool) -> Checkpoint:
    """A checkpoint of a run; one that holds adapters is that of the model that they adapt, with them."""
    config, run = runs.model_config(folder), runs.run_folder(folder)
    ids = folders.token_ids(read_json(run / CONFIG)) if (run / CONFIG).is_file() else {}
    values = runs.run_config(folder)
    if values.get("lora") is None:
        spelling = ANYMAMBA.spellings["anymamba"]
        return Checkpoint(folder, "anymamba", spelling, config, runs.ModelTensors(folder), ids, run)
    base = open_checkpoint(values["start_from"], verify=verify)
    as_trained = base.tensors(dtypes=dict.fromkeys(base.stored, torch.float32))
    if verify and weights_digest(t for _, t in as_trained) != read_json(folder / runs.STATE).get("base"):
        raise CheckpointError(f"{base.path} has changed since {folder} was written, whose adapters belong to it")
    base = dataclasses.replace(base, token_ids=ids, home=run)
    return base.with_adapter(runs.adapter_of(folder), wide=True)  # as the run trains, and as its folder is


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
        raise FileNotFoundError(f"{folder} has several GGUF files ({names}); give the path of one of them")
    if not found:
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: it is not a model folder, or it is a run that has no checkpoint yet"
        )
    return found[0]


def _require_names(checkpoint: Checkpoint, stored: Iterable[str], wanted: Iterable[str]) -> None:
    missing, unexpected = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} (first: {names[0]})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        what = "its metadata" if checkpoint.format == "gguf" else CONFIG
        raise CheckpointError(
            f"{checkpoint.file.path} does not hold the model described by {what}: tensors {' and '.join(parts)}"
        )
