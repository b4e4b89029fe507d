"""Language models of blocks, under the names of `mamba_ssm`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymamba.base import manifest
from anymamba.base.files import atomic_file, own_folder, write_text
from anymamba.compat.mamba_ssm.models.config_mamba import MambaConfig
from anymamba.compat.mamba_ssm.modules.block import Block
from anymamba.compat.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.compat.mamba_ssm.modules.mlp import GatedMLP
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from anymamba.compat.mamba_ssm.refused import refusing
from anymamba.compat.mamba_ssm.utils.generation import GenerationMixin
from anymamba.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from anymamba.compat.mamba_ssm.version_1 import accepting_version_1
from anymamba.models.checkpoints import CheckpointError, local_path, open_checkpoint
from anymamba.models.checkpoints.families.mamba import ORIGINAL
from anymamba.models.checkpoints.formats.files import CONFIG, SAFETENSORS, TORCH, open_weights, read_json
from anymamba.parts.embedding import embed

__all__ = [
    "Block",
    "CausalLMOutput",
    "GatedMLP",
    "GenerationMixin",
    "Mamba",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "create_block",
    "layer_norm_fn",
    "load_config_hf",
    "load_state_dict_hf",
    "rms_norm_fn",
]
__getattr__ = refusing(__name__)

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])

_BLOCK_1 = (
    "d_model",
    "ssm_cfg",
    "norm_epsilon",
    "rms_norm",
    "residual_in_fp32",
    "fused_add_norm",
    "layer_idx",
    "device",
    "dtype",
)
_MIXER_1 = (
    "self",
    "d_model",
    "n_layer",
    "vocab_size",
    "ssm_cfg",
    "norm_epsilon",
    "rms_norm",
    "initializer_cfg",
    "fused_add_norm",
    "residual_in_fp32",
    "device",
    "dtype",
)


def _is_block_1(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether the second argument is not an integer: version 1 has ssm_cfg there, version 2 d_intermediate."""
    return len(arguments) > 1 and not isinstance(arguments[1], Integral)


def _is_mixer_1(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether there is one integer after n_layer, vocab_size; version 2 has two, d_intermediate and vocab_size."""
    if len(arguments) == 4:
        return "vocab_size" not in options
    return len(arguments) > 4 and not isinstance(arguments[4], Integral)


@accepting_version_1(_BLOCK_1, _is_block_1)
def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device=None,
    dtype=None,
) -> Block:
    """Make one block; the positional arguments of version 1, without d_intermediate, are accepted too.

    Raises ValueError for layers other than Mamba (S6): attention and Mamba-2.
    """
    options = dict(ssm_cfg or {})
    layer = options.pop("layer", "Mamba1")
    if layer != "Mamba1":
        raise ValueError(f"ssm_cfg['layer'] must be 'Mamba1', got {layer!r}")
    if layer_idx is not None and layer_idx in (attn_layer_idx or []):
        raise ValueError(
            f"attn_layer_idx asks for attention (attn_cfg={attn_cfg!r}) in block {layer_idx}, but only Mamba is "
            "available; leave attn_layer_idx out"
        )
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    mixer = partial(Mamba, layer_idx=layer_idx, **options, **like)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **like)
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **like)
    block = Block(d_model, mixer, mlp, norm, fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32)
    block.layer_idx = layer_idx
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Set biases to zero, draw embeddings from N(0, initializer_range), and draw output projections scaled by depth."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and norm; the positional arguments of version 1, without d_intermediate, are accepted too."""

    @accepting_version_1(_MIXER_1, _is_mixer_1)
    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int | None = None,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if vocab_size is None:
            raise TypeError("MixerModel needs vocab_size, the number of rows of the embedding, got None")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **like)
        self.layers: Any = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate=d_intermediate,
                ssm_cfg=ssm_cfg,
                attn_layer_idx=attn_layer_idx,
                attn_cfg=attn_cfg,
                norm_epsilon=norm_epsilon,
                rms_norm=rms_norm,
                residual_in_fp32=residual_in_fp32,
                fused_add_norm=fused_add_norm,
                layer_idx=i,
                **like,
            )
            for i in range(n_layer)
        )
        self.norm_f: Any = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **like)
        per_layer = 2 if d_intermediate else 1
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {}), n_residuals_per_layer=per_layer))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict[int, Any]:
        """The zero states of every layer."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params=None, **mixer_kwargs) -> Tensor:
        """Map (batch, length) ids to the normed output (batch, length, d_model)."""
        hidden, residual = embed(self.embedding, input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        norm = self.norm_f
        if not self.fused_add_norm:
            total = hidden if residual is None else hidden + residual
            return norm(total.to(norm.weight.dtype))
        return layer_norm_fn(
            hidden,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            residual=residual,
            is_rms_norm=isinstance(norm, RMSNorm),
        ).to(norm.weight.dtype)


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model with the interface of `mamba_ssm`.

    Args:
        config: sizes and options.
        initializer_cfg: keyword arguments of `_init_weights`.
    """

    def __init__(
        self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        if isinstance(config, Integral):
            raise TypeError(
                f"config must be a MambaConfig, got the number {config} as in mamba_ssm 1.0; write "
                f"MambaLMHeadModel(MambaConfig(d_model={config}, n_layer=..., vocab_size=...))"
            )
        self.config = config
        multiple = config.pad_vocab_size_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=rows,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict[int, Any]:
        """The zero states of every layer, {layer: (conv_state, ssm_state)}."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self, input_ids: Tensor, position_ids=None, inference_params=None, num_last_tokens: int = 0, **mixer_kwargs
    ) -> Any:
        """Logits (batch, length or num_last_tokens, padded vocabulary) in a named tuple.

        position_ids are ignored, because a recurrence needs none; generation passes them.
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden))

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str, device=None, dtype=None, **kwargs) -> MambaLMHeadModel:
        """Load a published model: a folder, a .gguf file, or a name on the hub, in any format that anymamba reads.

        A_log and D are float32 for every dtype. kwargs go to the constructor.
        Raises CheckpointError for a model that these classes cannot hold, such as FalconMamba.
        """
        path = local_path(pretrained_model_name)
        values = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
        if ORIGINAL.matches(values):
            model, tensors = _open_own(cls, path, values, dtype, kwargs)
        else:
            model, tensors = _open_other(cls, path, dtype, kwargs)
        weights = {
            name: tensor.to(torch.float32 if name.endswith(("A_log", ".D")) else dtype or torch.float32, copy=True)
            for name, tensor in tensors
        }
        if model.config.tie_embeddings:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        for layer in model.backbone.layers:
            layer.mixer.mark_parameters()
        return model if device is None else model.to(device)

    def save_pretrained(self, save_directory: str) -> None:
        """Write pytorch_model.bin and config.json.

        Raises ValueError for weights that are not floating point (quantised ones), and for a folder with a
        model.safetensors, which readers would prefer to pytorch_model.bin.
        """
        folder = Path(save_directory)
        tensors = self.state_dict()
        for name, tensor in tensors.items():
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must be floating point to be saved, got {kind}; save before quantising")
        if (folder / SAFETENSORS).exists():
            raise ValueError(
                f"{folder} holds {SAFETENSORS}, which readers prefer to {TORCH}; save to another folder or remove it"
            )
        text = json.dumps(vars(self.config), indent=4)
        with own_folder(folder), manifest.rewritten(folder) as files:
            with atomic_file(folder / TORCH) as file:
                torch.save(tensors, file)
            write_text(folder / CONFIG, text)
            files += [TORCH, CONFIG]


def _open_own(
    kind: type[MambaLMHeadModel], path: Path, values: dict[str, Any], dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[MambaLMHeadModel, Iterator[tuple[str, Tensor]]]:
    """A model without weights, and the weights of a folder in the published format; takes any `MambaConfig`."""
    names = [field.name for field in dataclasses.fields(MambaConfig)]
    config = MambaConfig(**{name: values[name] for name in names if name in values})
    weights = open_weights(path)
    stored = {name: tensor.shape for name, tensor in weights.stored().items()}
    if isinstance(config.n_layer, int) and config.n_layer > len(stored):
        raise CheckpointError(
            f"{path} holds {len(stored)} tensors, too few for the {config.n_layer} layers of {CONFIG}"
        )
    try:
        model = kind(config, device="meta", dtype=dtype, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        stored.pop("lm_head.weight", None)
        wanted.pop("lm_head.weight")
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise CheckpointError(
                f"{path} does not hold the model of its {CONFIG}: {name} must have shape "
                f"{wanted.get(name, 'none, there is no such tensor')}, got {stored.get(name, 'none')}"
            )
    return model, weights.read(wanted)


def _open_other(
    kind: type[MambaLMHeadModel], path: Path, dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[MambaLMHeadModel, Iterator[tuple[str, Tensor]]]:
    """The same for a checkpoint in another format, if these classes can hold its model."""
    checkpoint = open_checkpoint(path)
    foreign = ORIGINAL.foreign_options(checkpoint.config)
    if foreign:
        raise CheckpointError(f"the format state-spaces cannot hold this model: {', '.join(foreign)}")
    model = kind(MambaConfig(**ORIGINAL.to_fields(checkpoint.config)), device="meta", dtype=dtype, **options)
    wide = dict.fromkeys(checkpoint.stored, torch.promote_types(dtype or torch.float32, torch.float32))
    return model, ((ORIGINAL.name(name), ORIGINAL.encode(name, t)) for name, t in checkpoint.tensors(dtypes=wide))
