"""The step of a whole model as one compiled call (csrc/stack.cpp).

It serves models whose blocks are all Mamba with real A, in float32 or with packed weights. Activations and state are
float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from anymamba.kernels.packed_linear.formats import DTYPES
from anymamba.layers.mamba import Mamba
from anymamba.layers.s6 import SSMParameters
from anymamba.models.inference.obstacles import reasons_by_block
from anymamba.models.language_model import Block, LanguageModel, LanguageModelOutput, LanguageModelState
from anymamba.ops import dispatch, observers
from anymamba.ops.packed_linear import FORMATS
from anymamba.parts.bare import is_bare
from anymamba.parts.conv import ShortConvolution
from anymamba.parts.norm import LayerNorm, RMSNorm
from anymamba.parts.packed import PackedEmbedding, PackedLinear
from anymamba.parts.state import MambaState
from anymamba.runtimes import native

SMALL = 1 << 23  # bytes of weights that one thread reads sooner than it can wake another one


class NativeStep:
    """The step of a whole model as one compiled call. Make it with `NativeStep.of`.

    It reads weights where they are. It keeps what is derived from them (A, the convolution's weight, dt_proj) and makes
    it again when their versions or addresses change; writing through `weight.data` changes neither. The weights of a
    packed model must not change.
    """

    @classmethod
    def of(cls, model: LanguageModel) -> NativeStep | dict[int, str]:
        """The step of a model, or the reasons why it has none: by block index, or WHOLE for the model."""
        reasons = obstacles(model)
        return reasons or cls(model)

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        groups = (group for module in model.modules() for group in (module._parameters, module._buffers))
        self._weights = [group for group in groups if group]  # those of each module, which may be replaced
        self._shapes = [(b.mixer.d_conv - 1, b.mixer.d_inner, b.mixer.d_state) for b in model.blocks]
        self.n_logits = model.config.padded_vocab_size
        self._is_packed = isinstance(model.embedding, PackedEmbedding)
        self._trains = any(p.requires_grad for p in model.parameters())
        self._build()

    def _build(self) -> None:
        builder = _Builder(self.model)
        self._stack, self._alive = builder.stack, builder.alive
        self._is_small = sum(t.nbytes for group in self._weights for t in group.values() if t is not None) < SMALL
        self._versions = self._read_versions()

    @property
    def stack(self) -> Any:
        """The compiled record of the model with its weights as they are now."""
        if not self._is_packed and self._read_versions() != self._versions:
            self._build()
        return self._stack

    def threads(self, rows: int) -> int:
        """How many threads to use for so many tokens."""
        return 1 if self._is_small and rows < 4 else torch.get_num_threads()

    def kept_sizes(self) -> list[int]:
        """How many numbers a replay needs of each token, by layer: three per channel and the selective B."""
        mixers = [block.mixer for block in self.model.blocks]
        return [3 * mixer.d_inner + mixer.x_proj_rows[1] for mixer in mixers]

    def _read_versions(self) -> list[tuple[int, int]]:
        return [
            (t.data_ptr(), 0 if t.is_inference() else t._version)
            for group in self._weights
            for t in group.values()
            if t is not None
        ]

    def serves(self, token_ids: Tensor, state: LanguageModelState) -> bool:
        """Whether `step` can take these arguments: one dense row of ids on the CPU and a state of this model, without
        autograd, transforms and tracers, and with compiled kernels allowed by `anymamba.backend`."""
        return (
            type(token_ids) is Tensor
            and token_ids.is_cpu
            and token_ids.ndim == 1
            and token_ids.dtype in (torch.int64, torch.int32)
            and type(state) is LanguageModelState
            and len(state.layers) == len(self._shapes)
            and not (self._trains and torch.is_grad_enabled())
            and observers.plain(token_ids)
            and self._fits(state, token_ids.shape[0])
            and dispatch.resolve("selective_scan", "cpu", None) == "cpu"
        )

    def _fits(self, state: LanguageModelState, rows: int) -> bool:
        """Whether a state is one of this model, in dense float32 tensors."""
        for layer, (before, d_inner, d_state) in zip(state.layers, self._shapes, strict=True):
            if type(layer) is not MambaState:
                return False
            conv, ssm = layer
            if not (
                type(conv) is Tensor
                and type(ssm) is Tensor
                and conv.dtype == ssm.dtype == torch.float32
                and conv.shape == (rows, before, d_inner)
                and ssm.shape == (rows, d_inner, d_state)
                and ssm.is_cpu
                and not (conv.requires_grad or ssm.requires_grad)
            ):
                return False
        return True

    @torch.no_grad()
    def step(
        self, token_ids: Int[Tensor, " batch"], state: LanguageModelState, *, reuse: bool = False
    ) -> LanguageModelOutput:
        """`LanguageModel.step`, for arguments that it `serves`.

        Args:
            token_ids: (batch,).
            state: one row per sequence.
            reuse: write the new state into the memory of the given one.
        Raises IndexError for an id outside the vocabulary.
        """
        stack = self.stack
        token_ids, addresses = token_ids.to(torch.int64).contiguous(), []
        after = []
        for conv, ssm in state.layers:
            before = MambaState(conv.contiguous(), ssm.contiguous())
            new = before if reuse else MambaState(torch.empty_like(before.conv), torch.empty_like(before.ssm))
            addresses += [t.data_ptr() for t in (*before, *new)]
            after.append((before, new))
        rows = token_ids.shape[0]
        logits = torch.empty(rows, self.n_logits)
        stack.step(token_ids.data_ptr(), rows, self.threads(rows), addresses, logits.data_ptr())
        return LanguageModelOutput(logits, LanguageModelState(tuple(new for _, new in after), state.positions))


class _Builder:
    """The compiled record of a model. `alive` holds the tensors that it points to and that no module holds."""

    def __init__(self, model: LanguageModel) -> None:
        self.native, self.alive = native.module(), list[Tensor]()
        self.stack = self.native.Stack()
        self.stack.d_model = model.config.d_model
        self.stack.norm = self._norm(model.norm)
        self.stack.embedding = self._matrix(model.embedding)
        self.stack.head = self._matrix(model.embedding if model.head is None else model.head)
        for block in model.blocks:
            self.stack.add(self._layer(block))

    def _layer(self, block: Any) -> Any:
        mixer, layer = block.mixer, self.native.Layer()
        layer.d_inner, layer.d_state, layer.d_conv = mixer.d_inner, mixer.d_state, mixer.d_conv
        layer.dt_rows, layer.B_rows, layer.C_rows = mixer.x_proj_rows
        layer.zoh = mixer.b_discretization == "zoh"
        layer.norm = self._norm(block.norm)
        for name in ("dt_norm", "B_norm", "C_norm", "output_norm"):
            setattr(layer, name, self._norm(getattr(mixer, name)))
        for name in ("in_proj", "x_proj", "out_proj"):
            if getattr(mixer, name) is not None:
                setattr(layer, name, self._matrix(getattr(mixer, name)))
        if mixer.dt_proj is not None:
            self._set_dt_proj(layer, mixer.dt_proj)
        A = mixer.ssm.A().detach()
        layer.largest_A = float(A.abs().max())
        vectors = {
            "in_bias": mixer.in_proj.bias,
            "out_bias": mixer.out_proj.bias,
            "conv_weight": mixer.conv.weight.T,
            "conv_bias": mixer.conv.bias,
            "A": A,
            "D": mixer.ssm.D,
            "delta_bias": mixer.ssm.delta_bias,
            "B": mixer.ssm.B,
            "C": mixer.ssm.C,
        }
        for name, vector in vectors.items():
            setattr(layer, name, self._address(name, vector))
        return layer

    def _set_dt_proj(self, layer: Any, module: Any) -> None:
        """The step projection: floats are copied in blocks of channels (csrc/stack.h), others stay where they are."""
        weight, size = module.weight.detach(), self.native.CHANNEL_BLOCK
        if isinstance(module, PackedLinear):
            if module.format not in DTYPES:
                layer.dt_proj = self._matrix(module)
                return
            weight = weight.contiguous().view(DTYPES[module.format])
        blocks = F.pad(weight, (0, 0, 0, -len(weight) % size)).unflatten(0, (-1, size)).mT
        layer.dt_dtype, layer.dt_blocks = native.DTYPES[weight.dtype], self._address("dt_proj", blocks)

    def _norm(self, module: Any) -> Any:
        norm = self.native.Norm()
        if module is not None:
            norm.present, norm.subtract_mean, norm.eps = True, isinstance(module, LayerNorm), module.eps
            norm.weight = self._address("weight", module.weight)
            norm.bias = self._address("bias", getattr(module, "bias", None))
        return norm

    def _matrix(self, module: Any) -> Any:
        weight = module.weight
        if isinstance(module, PackedLinear | PackedEmbedding):
            code, n_out, n_in = FORMATS[module.format].code, module.n_out, module.n_in
        else:
            code, (n_out, n_in) = FORMATS["float32"].code, weight.shape
        address = self._address("weight", weight)
        return self.native.Packed(address, code, n_out, n_in, weight.stride(0) * weight.itemsize)

    def _address(self, name: str, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor; 0 for None."""
        if tensor is None:
            return 0
        contiguous = tensor.detach().contiguous()
        self.alive.append(contiguous)
        return native.address(name, contiguous)


# ----------------------------------------------------------------------------------------------- what has a step


def obstacles(model: LanguageModel) -> dict[int, str]:
    """The reasons why a model has no compiled step: by block index, or WHOLE for the model; empty if it has one."""
    return reasons_by_block(model, _of_model, _of_block)


def _of_model(model: LanguageModel) -> str | None:
    if native.unavailable("cpu") is not None:
        return native.unavailable("cpu")
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    if devices != {"cpu"}:
        return f"it runs on the CPU, and the model is on {', '.join(sorted(devices))}"
    if model.positions is not None:
        return "it has no table of positions"
    for name, module in (("embedding", model.embedding), ("head", model.head)):
        why = None if module is None else _of_matrix(module)
        if why is not None:
            return f"{name} is {why}"
    return _of_vectors({"norm": model.norm})


def _of_block(block: Any) -> str | None:
    mixer = block.mixer
    if not is_bare(block, Block) or not is_bare(mixer, Mamba):
        return f"its mixer is {type(mixer).__name__}, and only a plain Mamba is compiled"
    if mixer.ssm.is_complex:
        return "A is complex"
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        why = None if getattr(mixer, name) is None else _of_matrix(getattr(mixer, name))
        if why is not None:
            return f"{name} is {why}"
    names = ("dt_norm", "B_norm", "C_norm", "output_norm", "conv", "ssm")
    return _of_vectors({"norm": block.norm} | {name: getattr(mixer, name) for name in names})


def _of_matrix(module: nn.Module) -> str | None:
    """Why a matrix does not fit, in words that complete "it is"."""
    if is_bare(module, PackedLinear) or is_bare(module, PackedEmbedding):
        return None
    if not is_bare(module, nn.Linear) and not is_bare(module, nn.Embedding):
        return f"a {type(module).__name__}"
    dtype = module.weight.dtype
    return None if dtype == torch.float32 else f"{dtype} with activations in {dtype}; use for_inference"


def _of_vectors(modules: dict[str, Any]) -> str | None:
    """Why one of the small modules does not fit."""
    kinds = (RMSNorm, LayerNorm, ShortConvolution, SSMParameters)
    for name, module in modules.items():
        if module is None:
            continue
        if not any(is_bare(module, kind) for kind in kinds):
            return f"{name} is a {type(module).__name__}"
        if any(p.dtype != torch.float32 for p in module.parameters()):
            return f"{name} is not in float32; use for_inference"
    return None
