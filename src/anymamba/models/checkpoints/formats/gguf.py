"""GGUF files, the format of llama.cpp: config, tensors and tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.models.checkpoints.families import Spelling, kinds, nearest_spelling, recognise
from anymamba.models.checkpoints.formats import gguf_digest, gguf_tokenizer
from anymamba.models.checkpoints.formats.files import BLOCKS, DTYPE_FORMATS
from anymamba.models.checkpoints.formats.gguf_header import TensorInfo, read_header
from anymamba.models.checkpoints.formats.tensors import StoredTensor, Unchanged
from anymamba.models.checkpoints.weights import CastWeights
from anymamba.models.config import ModelConfig
from anymamba.ops.packed_linear import PackedWeight, unpack

OUR_CONFIG = "anymamba.config"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
FORMATS = {kind: DTYPE_FORMATS[dtype] for kind, dtype in DTYPES.items()} | {name.upper(): name for name in BLOCKS}
"""The types that can be read, and their packed formats. Blocks are read as float32."""
FILE_TYPES = {"Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S", "F32": "ALL_F32"}
"""What llama.cpp calls a file by the type of most of its weights; for other types MOSTLY_ and the type."""


# ------------------------------------------------------------------------------------------ reading


class GGUFFile:
    """A GGUF file of an architecture that one of our families has.

    Args:
        verify: compare the file with its digest, if it has one.
    Raises CheckpointError if the file is broken, hostile, or of another architecture.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path, self._unchanged = path, Unchanged(path)
        self._header = read_header(path)
        if verify:
            gguf_digest.check(self._header)
        found = recognise(_Metadata(self), ("gguf",))
        if found is None:
            architecture, known = self.field("general.architecture"), ", ".join(map(repr, kinds(("gguf",))))
            raise CheckpointError(f"{path} is of architecture {architecture!r}; this reader takes {known}")
        self.spelling: Spelling = found[1]
        formats = {name: FORMATS.get(tensor.kind, "") for name, tensor in self._header.tensors.items()}
        self.formats = {name: format for name, format in formats.items() if format in BLOCKS}

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object, or the default if there is none."""
        return default if key not in self._header.values else self._header.value(key)

    def stored(self) -> dict[str, StoredTensor]:
        found = {}
        for name, tensor in self._header.tensors.items():
            if tensor.kind not in FORMATS:
                raise CheckpointError(
                    f"{self.path}: {name} is of type {tensor.kind}; {', '.join(FORMATS)} can be read: write it again "
                    f"with one of them, such as llama-quantize --allow-requantize {self.path.name} OUT Q8_0"
                )
            found[name] = StoredTensor(tensor.shape, DTYPES.get(tensor.kind, torch.float32))
        return found

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            info = self._header.tensors[name]
            if info.kind in DTYPES:
                yield name, self._mapped(info).view(DTYPES[info.kind]).view(info.shape)
            else:
                yield name, unpack(self._packed(info)).view(info.shape)

    def blocks(self, name: str) -> PackedWeight | None:
        return self._packed(self._header.tensors[name])

    def _packed(self, info: TensorInfo) -> PackedWeight:
        rows = self._mapped(info).view(math.prod(info.shape[:-1]), -1)
        return PackedWeight(rows, FORMATS[info.kind], info.shape[-1])

    def _mapped(self, info: TensorInfo) -> Tensor:
        """The bytes of a tensor in the mapped file."""
        data = torch.from_numpy(np.memmap(self.path, mode="c", offset=info.offset, shape=(info.n_bytes,)))
        self._unchanged.require()
        return data

    def config(self) -> ModelConfig:
        """The model's config: our own if the file has it and its fields agree, else one made from the fields."""
        text = self.field(OUR_CONFIG)
        try:
            if isinstance(text, str):
                ours = config_from_dict(ModelConfig, json.loads(text), OUR_CONFIG)
                written = nearest_spelling(ours, "gguf")[0].to_fields(ours).items()
                if all(self.field(key) == value for key, value in written):
                    return ours
            return self.spelling.from_fields(_Metadata(self))
        except KeyError as error:
            raise CheckpointError(f"{self.path} lacks the metadata key {error.args[0]}") from error
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def token_ids(self) -> dict[str, Any]:
        """The ids of special tokens (eos_token_id, ...) that the file has."""
        found = {name: self.field(key) for name, key in gguf_tokenizer.TOKEN_IDS.items()}
        return {name: value for name, value in found.items() if value is not None}

    def whole_tokenizer(self) -> str | None:
        """The complete tokenizer.json in the file; None if there is none or its tokens are not those of the file."""
        return gguf_tokenizer.read_whole(self.field, self.path)

    def tokenizer_from_parts(self) -> str | None:
        """A tokenizer.json made from what llama.cpp reads; None if that is not a tokenizer like GPT-2's."""
        return gguf_tokenizer.read_parts(self.field, self.path)

    def keys(self) -> Iterator[str]:
        """All metadata keys."""
        return iter(self._header.values)


class _Metadata(Mapping[str, Any]):
    """The metadata of a file, with two keys that come from its tensors: `vocab_size` and `tie_embeddings`."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def __getitem__(self, key: str) -> Any:
        if key == "vocab_size":
            stored = self._file.stored()
            if EMBEDDING not in stored:
                raise CheckpointError(f"{self._file.path} lacks the tensor {EMBEDDING}")
            return stored[EMBEDDING].shape[0]
        if key == "tie_embeddings":
            return HEAD not in self._file.stored()
        value = self._file.field(key)
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        yield from ("vocab_size", "tie_embeddings")
        yield from self._file.keys()

    def __len__(self) -> int:
        return sum(1 for _ in self)


# ------------------------------------------------------------------------------------------ writing


def write(
    path: Path,
    weights: CastWeights,
    spelling: Spelling,
    token_ids: dict[str, Any],
    tokenizer: str | None,
) -> list[str]:
    """Write a file, tensor by tensor.

    Args:
        weights: A, D, norms, biases and filters are written in float32, whatever their dtype.
        tokenizer: the contents of a tokenizer.json, None to leave it out.
    Returns phrases that say where llama.cpp differs from the tokenizer.
    """
    require_gguf()
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, spelling.kind)
    most = _kind_of("blocks.0.mixer.in_proj.weight", weights)
    writer.add_file_type(LlamaFileType[FILE_TYPES.get(most, f"MOSTLY_{most}")])
    writer.add_quantization_version(2)
    digest, its_copy = gguf_digest.KEYS
    writer.add_string(digest, gguf_digest.BLANK)
    writer.add_string(OUR_CONFIG, json.dumps(config_to_dict(weights.config)))
    writer.add_string(its_copy, gguf_digest.BLANK)
    for key, value in spelling.to_fields(weights.config).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    differences = gguf_tokenizer.write(writer, tokenizer, weights.config.padded_vocab_size, token_ids)
    for name, info in weights.stored.items():
        kind_of = _kind_of(name, weights)
        as_written = spelling.encode(name, torch.empty(info.shape, device="meta")).shape
        item = 1 if name in weights.formats else DTYPES[kind_of].itemsize
        shape = (*as_written[:-1], as_written[-1] * item)
        writer.add_tensor_info(
            spelling.name(name), shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=GGMLQuantizationType[kind_of]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    kinds = {name: DTYPES[_kind_of(name, weights)] for name in weights.stored if name not in weights.formats}
    for name, tensor in weights.tensors(dtypes=kinds):
        encoded = spelling.encode(name, tensor)
        encoded = encoded.to(kinds.get(name, encoded.dtype))
        writer.write_tensor_data(encoded.contiguous().view(torch.uint8).numpy())
    writer.close()
    gguf_digest.sign(path)
    return differences


def _kind_of(name: str, weights: CastWeights) -> str:
    """The type to write one of our parameters in."""
    if name in weights.formats:
        return weights.formats[name].upper()
    info = weights.stored[name]
    if len(info.shape) == 1 or name in weights.wide or name.endswith("conv.weight"):
        return "F32"
    return KINDS[info.dtype]


def require_gguf() -> None:
    """Raise ImportError, which says what to install, if `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError('writing GGUF files needs the package gguf: pip install "anymamba[gguf]"') from error
