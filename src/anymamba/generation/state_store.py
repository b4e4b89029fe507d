"""States in files: the state of a model after some tokens, saved once and loaded on any device.

A file is safetensors: the tensors of a GenerationState under their names (`model.layers.0.ssm`, `logits`, ...), and the
model's config, so that a state is not used with another kind of model. The metadata contain a format version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anymamba.base.errors import FORMAT_VERSION, CheckpointError, require_format_version
from anymamba.base.files import atomic_file
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.generation.prompts import GenerationState
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import map_state

KIND = "anymamba-state"
DIGEST = "sha256"
VERSION = 1
"""The format version: the one that is written, and the newest one that can be read."""


def save_state(path: str | Path, state: GenerationState, model: LanguageModel) -> None:
    """Write a state atomically; an existing file is replaced. Its metadata contain its digest.

    Raises ValueError if the state is not one of this model.
    """
    tensors, metadata = pack_state(state, model)
    with atomic_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata)


def load_state(path: str | Path, model: LanguageModel) -> GenerationState:
    """Read a state of this model onto the model's device.

    Raises FileNotFoundError if there is no file, CheckpointError if it is damaged, not a state, of a newer format
        version, or of a model with another config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no state at {path}; give a file that save_state has written")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); save the state again"
        ) from error
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path} is not a state; give a file that save_state has written")
    return unpack_state(tensors, metadata, model, path)


def pack_state(
    state: GenerationState,
    model: LanguageModel,
    *,
    kind: str = KIND,
    version: int = VERSION,
    extra: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that holds a state.

    Args:
        kind: what the file is, for formats that hold more than a state.
        version: of that format.
        extra: other tensors for the file, by names that no state has.
        notes: other entries of the metadata.
    Raises ValueError if the state is not one of this model.
    """
    tensors = tensors_of(state, model)
    tensors |= extra or {}
    metadata = {"kind": kind, FORMAT_VERSION: str(version), "config": json.dumps(config_to_dict(model.config))}
    metadata |= notes or {}
    metadata[DIGEST] = _digest(tensors, metadata)
    return tensors, metadata


def tensors_of(state: GenerationState, model: LanguageModel) -> dict[str, Tensor]:
    """Copies of a state's tensors on the CPU as they are stored, by their names. safetensors has no complex128, which
    becomes (..., 2) in float64. Raises ValueError if the state is not of this model."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in _named(state)}
    problem = _mismatch(tensors, model)
    if problem is not None:
        raise ValueError(f"the state is not one of this model: {problem}")
    return {name: torch.view_as_real(t) if t.dtype == torch.complex128 else t for name, t in tensors.items()}


def unpack_state(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    model: LanguageModel,
    where: Path | str,
    *,
    version: int = VERSION,
    extra: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> GenerationState:
    """The state in a file's tensors and metadata, on the model's device.

    Args:
        where: the file, for messages.
        version: the newest one of its format that can be read.
        extra, notes: the names of what else the file holds.
    Raises CheckpointError if it is damaged, of a newer format version, or of a model with another config.
    """
    found = metadata.get(FORMAT_VERSION, "1")
    require_format_version({FORMAT_VERSION: int(found) if found.isdecimal() else found}, version, where)
    _require_known(metadata, where, notes)
    if metadata.get(DIGEST, "") not in ("", _digest(tensors, metadata)):
        raise CheckpointError(f"{where} is damaged: its SHA-256 is not that in its metadata; save the state again")
    _require_config(metadata.get("config", ""), model.config, where)
    others = set(extra)
    return state_of({name: tensor for name, tensor in tensors.items() if name not in others}, model, where)


def state_of(tensors: dict[str, Tensor], model: LanguageModel, where: Path | str) -> GenerationState:
    """The state with these tensors, on the model's device. Raises CheckpointError if it is not one of the model."""
    template = _template(model)
    wanted = dict(_named(template))
    tensors = {name: _as_in(wanted.get(name), tensor) for name, tensor in tensors.items()}
    problem = _mismatch(tensors, model)
    if problem is not None:
        raise CheckpointError(f"{where} is not a state of this model: {problem}")
    names = iter(wanted)
    return map_state(lambda like: tensors[next(names)].to(like.device, like.dtype), template)


def _as_in(like: Tensor | None, stored: Tensor) -> Tensor:
    """A tensor of a file as the state has it; see `tensors_of`."""
    if like is None or not like.is_complex() or stored.dtype != torch.float64:
        return stored
    in_pairs = stored.ndim == like.ndim + 1 and stored.shape[-1] == 2
    return torch.view_as_complex(stored) if in_pairs else stored


def _require_known(metadata: dict[str, str], where: Path | str, notes: Iterable[str]) -> None:
    """Raise CheckpointError for a key that is not written here; a digest under a damaged key would not be compared."""
    unknown = sorted(set(metadata) - {"kind", "config", FORMAT_VERSION, DIGEST, *notes})
    if unknown:
        raise CheckpointError(
            f"{where} is damaged: it has the unknown metadata key {unknown[0]!r}; save the state again"
        )


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The SHA-256 of all tensors and of the metadata without their own digest. Earlier files have none."""
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    rest = {key: value for key, value in metadata.items() if key != DIGEST}
    digest = hashlib.sha256(json.dumps([described, rest], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _template(model: LanguageModel) -> GenerationState:
    """A state with one row, to compare structure, shapes, dtypes and device with."""
    logits = torch.zeros(1, model.config.vocab_size, device=next(model.parameters()).device)
    return GenerationState(model.init_state(1), logits, logits.bool())


def _named(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state with dotted names, in the order of `map_state`."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    fields = getattr(state, "_fields", range(len(state)))
    for field, entry in zip(fields, state, strict=True):
        yield from _named(entry, f"{prefix}.{field}".lstrip("."))


def _mismatch(tensors: dict[str, Tensor], model: LanguageModel) -> str | None:
    """Why these tensors are not a state of the model, or None if they are."""
    wanted = dict(_named(_template(model)))
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))
        return f"{odd[0]} is {'missing' if odd[0] in wanted else 'not part of it'}"
    batch = tensors["logits"].shape[:1]
    for name, like in wanted.items():
        got, shape = tuple(tensors[name].shape), (*batch, *like.shape[1:])
        grows = 0 in shape[1:]  # a cache, which is empty before the first token; it may have any length
        if len(got) != len(shape) or any(a != b and not (grows and b == 0) for a, b in zip(got, shape, strict=True)):
            return f"{name} must have shape {shape}, got {got}"
        if _kind(tensors[name]) != _kind(like):
            return f"{name} must be {like.dtype}, got {tensors[name].dtype}"
    return None


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else str(tensor.dtype)


def _require_config(text: str, config: ModelConfig, where: Path | str) -> None:
    """Raise CheckpointError if a file's config is not the model's; options missing in the file have their defaults."""
    try:
        stored, own = config_to_dict(config_from_dict(ModelConfig, json.loads(text))), config_to_dict(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is a state of another model: {error}") from error
    different = sorted(key for key in {*stored, *own} if stored.get(key) != own.get(key))
    if different:
        key = different[0]
        raise CheckpointError(
            f"{where} is a state of another model: {key} is {stored.get(key)!r} there, {own.get(key)!r} in this model"
        )
