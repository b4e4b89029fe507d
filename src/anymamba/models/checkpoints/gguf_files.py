"""GGUF files of architecture `mamba`, which llama.cpp runs: config, tensors and tokenizer.

They hold A = -exp(A_log), the convolution's filter as (d_inner, d_conv), and norms of dt, B and C without weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.models.checkpoints import gguf_tokenizer
from anymamba.models.checkpoints.files import StoredTensor
from anymamba.models.checkpoints.gguf_bounds import check_header
from anymamba.models.checkpoints.huggingface import expansion, foreign_mamba_options
from anymamba.models.checkpoints.names import is_wide, to_gguf
from anymamba.models.config import ModelConfig
from anymamba.models.options import MambaOptions

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

ARCHITECTURE = "mamba"
CONTEXT_LENGTH = 1 << 20  # llama.cpp wants a number; the state has none
OUR_CONFIG = "anymamba.config"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}
"""Types that are read, and what they are read as."""


def foreign_options(config: ModelConfig) -> list[str]:
    """Options of a config that llama.cpp's `mamba` computes otherwise or has no field for."""
    options, mamba = foreign_mamba_options(config), config.mamba
    if mamba.inner_norms and mamba.inner_norm_weights:
        options.append("inner_norms=True (with weights)")
    elif mamba.inner_norms and mamba.norm_eps != config.norm_eps:
        options.append(
            f"mamba.norm_eps={mamba.norm_eps!r} beside norm_eps={config.norm_eps!r} (one serves all norms there)"
        )
    if config.norm != "rmsnorm":
        options.append(f"norm={config.norm!r}")
    if config.d_inner != 2 * config.d_model:
        options.append(f"expand={mamba.expand!r} (it is 2 there)")
    if mamba.bias:
        options.append("bias=True")
    if not mamba.conv_bias:
        options.append("conv_bias=False")
    return options


def config_fields(config: ModelConfig) -> dict[str, int | float | bool]:
    """The metadata that describe a model's sizes."""
    fields: dict[str, int | float | bool] = {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": config.d_model,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "ssm.conv_kernel": config.mamba.d_conv,
        "ssm.inner_size": config.d_inner,
        "ssm.state_size": config.mamba.d_state,
        "ssm.time_step_rank": config.dt_rank,
        "ssm.dt_b_c_rms": config.mamba.inner_norms,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    return {f"{ARCHITECTURE}.{name}": value for name, value in fields.items()}


# ------------------------------------------------------------------------------------------ reading


class GGUFFile:
    """A GGUF file of architecture `mamba`.

    Raises CheckpointError for a file that is broken, hostile, or of another architecture, ImportError without `gguf`.
    """

    def __init__(self, path: Path) -> None:
        require_gguf()
        self.path = path
        check_header(path)
        architecture = self.field("general.architecture")
        if architecture != ARCHITECTURE:
            raise CheckpointError(f"{path} is of architecture {architecture!r}; this reader takes {ARCHITECTURE!r}")

    @cached_property
    def _reader(self) -> GGUFReader:
        from gguf import GGUFReader

        try:
            return GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise CheckpointError(f"{self.path} is truncated or corrupt ({error}); copy it again") from error

    @cached_property
    def _tensors(self) -> dict[str, ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object, or the default where there is none."""
        found = self._reader.get_field(key)
        if found is None:
            return default
        try:
            value = found.contents()
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: metadata key {key!r} cannot be read ({error})") from error
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def stored(self) -> dict[str, StoredTensor]:
        found = {}
        for name, tensor in self._tensors.items():
            kind = tensor.tensor_type.name
            if kind not in DTYPES:
                raise CheckpointError(f"{self.path}: {name} is of type {kind}; {', '.join(DTYPES)} are read")
            found[name] = StoredTensor(tuple(int(size) for size in reversed(tensor.shape)), DTYPES[kind])
        return found

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        from gguf.quants import dequantize

        for name in names:
            info = self._tensors[name]
            shape = tuple(int(size) for size in reversed(info.shape))
            data = np.memmap(self.path, mode="c", offset=info.data_offset, shape=(int(info.n_bytes),))
            if info.tensor_type.name == "Q8_0":
                yield name, torch.from_numpy(dequantize(data.reshape(shape[0], -1), info.tensor_type)).view(shape)
            else:
                yield name, torch.from_numpy(data).view(DTYPES[info.tensor_type.name]).view(shape)

    def config(self) -> ModelConfig:
        """The model's config: our own where the file has it and its fields still agree, else from the fields."""
        text = self.field(OUR_CONFIG)
        try:
            if isinstance(text, str):
                ours = config_from_dict(ModelConfig, json.loads(text), OUR_CONFIG)
                written = config_fields(ours).items()
                if all(self.field(key) == value for key, value in written):
                    return ours
            return self._config_from_fields()
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def token_ids(self) -> dict[str, Any]:
        """eos_token_id and its like, those that the file has."""
        found = {name: self.field(key) for name, key in gguf_tokenizer.TOKEN_IDS.items()}
        return {name: value for name, value in found.items() if value is not None}

    def whole_tokenizer(self) -> str | None:
        """The tokenizer.json that the file holds, word for word; None where there is none that still agrees with it."""
        return gguf_tokenizer.read_whole(self.field, self.path)

    def tokenizer_from_parts(self) -> str | None:
        """A tokenizer.json of what the file tells llama.cpp; None where that is not of GPT-2's kind."""
        return gguf_tokenizer.read_parts(self.field)

    def _config_from_fields(self) -> ModelConfig:
        d_model, eps = self._required("embedding_length"), self._required("attention.layer_norm_rms_epsilon")
        stored = self.stored()
        if "token_embd.weight" not in stored:
            raise CheckpointError(f"{self.path} lacks the tensor token_embd.weight")
        normed = bool(self.field(f"{ARCHITECTURE}.ssm.dt_b_c_rms", False))
        return ModelConfig(
            d_model=d_model,
            n_layers=self._required("block_count"),
            vocab_size=stored["token_embd.weight"].shape[0],
            pad_vocab_multiple=1,
            tie_embeddings="output.weight" not in stored,
            norm_eps=eps,
            mamba=MambaOptions(
                d_state=self._required("ssm.state_size"),
                d_conv=self._required("ssm.conv_kernel"),
                expand=expansion(self._required("ssm.inner_size"), d_model),
                dt_rank=self._required("ssm.time_step_rank"),
                inner_norms=normed,
                inner_norm_weights=not normed,
                norm_eps=eps if normed else MambaOptions.norm_eps,
            ),
        )

    def _required(self, name: str) -> Any:
        value = self.field(f"{ARCHITECTURE}.{name}")
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata key {ARCHITECTURE}.{name}")
        return value


def to_A_log(A: Tensor, where: str) -> Tensor:
    """A_log (float32) of -exp(A_log), to half a unit in the last place of exp(A_log) or of A_log.

    Raises CheckpointError for an A that is not negative.
    """
    if not bool((A <= 0).all()):
        raise CheckpointError(f"{where} must be -exp(A_log), below 0; got up to {A.max().item():.4g}")
    return torch.log(-A.double()).float()


# ------------------------------------------------------------------------------------------ writing


def write(
    path: Path,
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    tensors: Iterable[tuple[str, Tensor]],
    kind: str,
    token_ids: dict[str, Any],
    tokenizer: str | None,
) -> list[str]:
    """Write a file, tensor by tensor.

    Args:
        stored: our names and what they hold; `tensors` come in this order.
        kind: "F32", "F16", "BF16" or "Q8_0", of the matrices; A, D, norms, biases and filters are float32.
        tokenizer: the contents of a tokenizer.json, None to leave it out.
    Returns what llama.cpp does otherwise than the tokenizer, a phrase each.
    """
    require_gguf()
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, ARCHITECTURE)
    file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(LlamaFileType[file_types[kind]])
    writer.add_quantization_version(2)
    writer.add_string(OUR_CONFIG, json.dumps(config_to_dict(config)))
    for key, value in config_fields(config).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    differences = gguf_tokenizer.write(writer, tokenizer, config.padded_vocab_size, token_ids)
    empty = {name: _encode(name, info.shape, kind) for name, info in stored.items()}
    for name, (shape, tensor_kind) in empty.items():
        writer.add_tensor_info(to_gguf(name), shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors:
        writer.write_tensor_data(_bytes(name, tensor, kind))
    writer.close()
    return differences


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type that one of our parameters is written as."""
    if len(shape) == 1 or is_wide(name) or name.endswith("conv.weight"):
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind  # blocks of 32


def _encode(name: str, shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], Any]:
    """Shape in bytes and type of a tensor in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    chosen = GGMLQuantizationType[_kind_of(name, shape, kind)]
    block, block_bytes = GGML_QUANT_SIZES[chosen]
    return (*shape[:-1], shape[-1] // block * block_bytes), chosen


def _bytes(name: str, tensor: Tensor, kind: str) -> np.ndarray:
    """The bytes of a tensor in the file."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    chosen = _kind_of(name, tuple(tensor.shape), kind)
    if name.endswith("A_log"):
        tensor = -torch.exp(tensor.double())
    if chosen == "Q8_0":
        return quantize(tensor.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
    return tensor.to(DTYPES[chosen]).contiguous().view(torch.uint8).numpy()


def require_gguf() -> None:
    """Raise ImportError that says what to install where `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError('GGUF files need the package gguf: pip install "anymamba[gguf]"') from error
