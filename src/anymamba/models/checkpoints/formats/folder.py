"""Model folders with a config.json and safetensors: Hugging Face's `mamba` and `falcon_mamba`, and our own `anymamba`.

Every config.json that is written here holds our own config, too, beside the fields that other programs read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anymamba.base.errors import FORMAT_VERSION, CheckpointError, require_format_version
from anymamba.base.files import atomic_file, write_json
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.models.checkpoints.families import Format, Spelling, kinds, nearest_spelling, recognise
from anymamba.models.checkpoints.families.anymamba import TABLE
from anymamba.models.checkpoints.formats.files import BLOCKS, CONFIG, SAFETENSORS, failures_told
from anymamba.models.checkpoints.formats.tensors import StoredTensor
from anymamba.models.checkpoints.weights import CastWeights
from anymamba.models.config import ModelConfig

TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
FORMATS: tuple[Format, ...] = ("hf", "anymamba", "state-spaces")
"""Formats with a config.json."""
BLOCK_FORMATS = "weight_formats"
"""The key of the formats of tensors that are stored in blocks, by their names. Only our own format has it."""
UNREAD = {"architectures", "use_cache"}
"""Fields that do not change what the model computes."""


# ------------------------------------------------------------------------------------------ reading


def read_config(values: dict[str, Any], where: Path) -> tuple[Format, Spelling, ModelConfig]:
    """The format, the family's spelling and the config from the contents of a config.json.

    Raises CheckpointError for another model_type, a newer version, or a value that no model of the family has.
    """
    found = recognise(values, FORMATS)
    if found is None:
        known = ", ".join(map(repr, kinds(("hf", "anymamba"))))
        kind = values.get("model_type")
        raise CheckpointError(f"{where} is of model_type {kind!r}; this reader takes {known} and state-spaces folders")
    format, spelling = found
    if spelling.own_version is not None:
        require_format_version(values, spelling.own_version, where)
    try:
        return format, spelling, _own_config(values, format) or spelling.from_fields(values)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the key {error}; it is not a complete {spelling.kind} config") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _own_config(values: dict[str, Any], format: Format) -> ModelConfig | None:
    """Our own config in the file; None if the other fields do not agree with it: another program has changed them."""
    if format != "hf" or TABLE not in values:
        return None
    ours = config_from_dict(ModelConfig, values[TABLE], TABLE)
    written = nearest_spelling(ours, format)[0].to_fields(ours)
    fields = set(written) & set(values) - UNREAD
    return ours if all(values[field] == written[field] for field in fields) else None


def token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens (eos_token_id, ...) that a config.json has."""
    return {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}


def block_formats(values: Mapping[str, Any], where: Path) -> dict[str, str]:
    """The formats of the tensors that a config.json says are stored in blocks.

    Raises CheckpointError if they are not a table of formats that can be read.
    """
    found = values.get(BLOCK_FORMATS, {})
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {BLOCK_FORMATS} must be a table of names and formats, got {found!r}")
    for name, format in found.items():
        if format not in BLOCKS:
            raise CheckpointError(
                f"{where}: {name} is in {format!r}; the formats that can be read are {', '.join(BLOCKS)}: write the "
                "model again with anymamba convert"
            )
    return found


# ------------------------------------------------------------------------------------------ writing


def write(
    weights: CastWeights, folder: Path, spelling: Spelling, token_ids: dict[str, Any], shard_bytes: int
) -> list[str]:
    """Write a folder and return the names of its files.

    The weights are one safetensors file, or several of at most `shard_bytes` each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _write_safetensors(weights, folder, spelling, shard_bytes)
    dtype = torch.float32 if weights.formats else weights.stored["embedding.weight"].dtype
    values = spelling.to_fields(weights.config)
    if weights.formats:
        values |= {FORMAT_VERSION: spelling.own_version, BLOCK_FORMATS: weights.formats}
    values |= {TABLE: config_to_dict(weights.config), "dtype": str(dtype).removeprefix("torch.")}
    values |= dict.fromkeys(TOKEN_IDS, token_ids.get("eos_token_id")) | token_ids
    write_json(folder / CONFIG, values)
    return [*files, CONFIG]


def _write_safetensors(weights: CastWeights, folder: Path, spelling: Spelling, shard_bytes: int) -> list[str]:
    """Write one file, or numbered shards and their index; then delete the files of an earlier model."""
    shards = plan_shards(weights.stored, shard_bytes)
    numbered = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = numbered if len(shards) > 1 else [SAFETENSORS]
    table: dict[str, str] = {}
    tensors = weights.tensors()
    for file, names in zip(files, shards, strict=True):
        part = dict(_named(spelling, tensors, len(names)))
        table |= dict.fromkeys(part, file)
        with atomic_file(folder / file) as temporary, failures_told(file):
            save_file(part, temporary, metadata={"format": "pt"})
        del part
    index = folder / f"{SAFETENSORS}.index.json"
    if len(shards) > 1:
        size = sum(info.nbytes for info in weights.stored.values())
        write_json(index, {"metadata": {"total_size": size}, "weight_map": table})
    old = {*folder.glob("model-*-of-*.safetensors"), folder / SAFETENSORS, index} - {folder / file for file in files}
    for path in old - ({index} if len(shards) > 1 else set()):
        path.unlink(missing_ok=True)
    return [*files, index.name] if len(shards) > 1 else files


def plan_shards(stored: dict[str, StoredTensor], shard_bytes: int) -> list[list[str]]:
    """Split the names, in order, into groups of at most `shard_bytes` bytes (or of one larger tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in stored.items():
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def _named(spelling: Spelling, tensors: Iterator[tuple[str, Tensor]], count: int) -> Iterable[tuple[str, Tensor]]:
    """The next `count` tensors with the format's names and shapes, copied."""
    for _ in range(count):
        name, tensor = next(tensors)
        yield spelling.name(name), spelling.encode(name, tensor).contiguous().clone()
