"""The weights of a model as the kernels of a step on a GPU take them, and which models these kernels serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.kernels.model_step import cuda as kernels
from anymamba.kernels.model_step.cuda import Matrix, Norm, Packed, Recurrence, Short
from anymamba.kernels.model_step.cuda.call import ALIGNMENT, MOST_STATES, MOST_TAPS, PACKED
from anymamba.kernels.packed_linear.cuda import is_aligned
from anymamba.kernels.packed_linear.formats import DTYPES
from anymamba.layers.mamba import Mamba
from anymamba.models.inference.obstacles import reasons_by_block
from anymamba.models.language_model import Block, LanguageModel
from anymamba.ops.packed_linear import unpack
from anymamba.parts.bare import is_bare
from anymamba.parts.norm import LayerNorm, RMSNorm
from anymamba.parts.packed import PackedEmbedding, PackedLinear
from anymamba.runtimes import nvrtc


class Projections(NamedTuple):
    """The matrices of a layer, and the norm before the output projection."""

    in_proj: Matrix | Packed
    x_proj: Matrix | None
    """Few outputs; in blocks it would keep few multiprocessors busy."""
    output_norm: Norm | None
    out_proj: Matrix | Packed


class Layer(NamedTuple):
    """The weights of a block."""

    norm: Norm
    projections: Projections | None
    """None if the kernels for few rows do not serve a matrix."""
    short: Short
    recurrence: Recurrence


class StepWeights(NamedTuple):
    """The weights of a model."""

    table: Matrix | None
    """The embedding; None if it is packed in blocks of integers."""
    layers: list[Layer]
    norm: Norm
    head: Matrix | Packed | None
    """None if the kernels for few rows do not serve it."""

    def fit(self, index: int, rows: int) -> bool:
        """Whether a GPU's kernels for few rows serve all layers, and so many rows fit into a block's shared memory."""
        served = all(layer.projections for layer in self.layers)
        return served and all(kernels.fits(index, matrix, rows) for matrix in self.matrices())

    def matrices(self) -> Iterator[Matrix | Packed]:
        """The matrices of the products of few rows."""
        for layer in self.layers:
            if layer.projections is not None:
                yield from (m for m in layer.projections if isinstance(m, Matrix | Packed))
        if self.head is not None:
            yield self.head


def padded(size: int) -> int:
    """The stride of rows of activations."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def gather(model: LanguageModel) -> StepWeights:
    """The weights of a model that has no obstacles. Matrices are not copied, unless their columns must be padded."""
    norm = _norm(model.norm)
    assert norm is not None
    head = _matrix(model.embedding if model.head is None else model.head)
    head = head if head is not None and kernels.serves(head, norm) else None
    table = _matrix(model.embedding)
    layers = [_layer(block) for block in model.blocks]
    return StepWeights(table if isinstance(table, Matrix) else None, layers, norm, head)


def _layer(block: Any) -> Layer:
    mixer, norm = block.mixer, _norm(block.norm)
    assert norm is not None
    in_proj, out_proj = _matrix(mixer.in_proj), _matrix(mixer.out_proj)
    projections, output_norm = None, _norm(mixer.output_norm)
    if in_proj is not None and out_proj is not None:
        x_proj = None if mixer.x_proj is None else _plain_matrix(mixer.x_proj)
        found = Projections(in_proj, x_proj, output_norm, out_proj)
        projections = found if kernels.serves(in_proj, norm) and kernels.serves(out_proj, output_norm) else None
    short = Short(mixer.conv.weight.detach().T.contiguous(), _vector(mixer.conv.bias))
    return Layer(norm, projections, short, _recurrence(mixer))


def _recurrence(mixer: Mamba) -> Recurrence:
    ssm = mixer.ssm
    inner = [mixer.dt_norm, mixer.B_norm, mixer.C_norm]
    present = [norm for norm in inner if norm is not None]
    weights = tuple(None if norm is None else _vector(norm.weight) for norm in inner)
    return Recurrence(
        dt_proj=None if mixer.dt_proj is None else _plain_matrix(mixer.dt_proj),
        A=ssm.A().detach().contiguous(),
        D=_aligned(ssm.D.detach().contiguous()),
        delta_bias=_aligned(ssm.delta_bias.detach().contiguous()),
        B=None if ssm.B is None else ssm.constant("B").detach().contiguous(),
        C=None if ssm.C is None else ssm.constant("C").detach().contiguous(),
        zoh=mixer.b_discretization == "zoh",
        norms=weights if present else None,  # type: ignore[arg-type]
        eps=present[0].eps if present else 0.0,
    )


def _matrix(module: Any) -> Matrix | Packed | None:
    """A matrix as the kernels for few rows take it; None if they do not."""
    if module.format in DTYPES:
        return None if module.format == "float16" else _plain_matrix(module)
    if module.format not in PACKED or not is_aligned(module.format, module.n_in):
        return None
    return Packed(
        _aligned(module.weight.contiguous()), _vector(getattr(module, "bias", None)), module.n_in, module.format
    )


def _plain_matrix(module: Any) -> Matrix:
    """A matrix in float32 or bfloat16; one in another format is unpacked to bfloat16."""
    if module.format in ("float32", "bfloat16"):
        weight = module.weight.contiguous().view(DTYPES[module.format])
    else:
        weight = unpack(module.packed).bfloat16()
    missing = -module.n_in % ALIGNMENT
    weight = F.pad(weight, (0, missing)) if missing else weight
    return Matrix(_aligned(weight), _vector(getattr(module, "bias", None)), module.n_in)


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _aligned(tensor.detach().contiguous())


def _aligned(tensor: Tensor) -> Tensor:
    """The same tensor, at a multiple of 16 bytes; a graph keeps its address."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _norm(module: Any) -> Norm | None:
    if module is None:
        return None
    weight, bias = (_padded_vector(getattr(module, name, None)) for name in ("weight", "bias"))
    return Norm(weight, bias, module.eps, isinstance(module, LayerNorm))


def _padded_vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else F.pad(tensor.detach(), (0, -len(tensor) % ALIGNMENT))


# ----------------------------------------------------------------------------------------------- what is served


def obstacles(model: LanguageModel) -> dict[int, str]:
    """The reasons why the kernels do not serve a model: by block index, or WHOLE for the model; empty if they do."""
    return reasons_by_block(model, _of_model, _of_block)


def _of_model(model: LanguageModel) -> str | None:
    device = next(model.parameters()).device
    why = nvrtc.reason() or nvrtc.refuses_gpu(device.index or 0)
    if why is not None:
        return why
    if model.positions is not None:
        return "it has a table of positions"
    if not is_bare(model.embedding, PackedEmbedding):
        return f"embedding is a {type(model.embedding).__name__}"
    if model.head is not None and not is_bare(model.head, PackedLinear):
        return f"head is a {type(model.head).__name__}"
    return _of_norms({"norm": model.norm})


def _of_block(block: Any) -> str | None:
    mixer = block.mixer
    if not is_bare(block, Block) or not is_bare(mixer, Mamba):
        return f"its mixer is {type(mixer).__name__}, and the kernels of a step are for a plain Mamba"
    if mixer.ssm.is_complex:
        return "A is complex"
    if mixer.d_conv > MOST_TAPS or mixer.d_state > MOST_STATES:
        return f"the kernels take up to {MOST_TAPS} taps and {MOST_STATES} states, got {mixer.d_conv}, {mixer.d_state}"
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        if getattr(mixer, name) is not None and not is_bare(getattr(mixer, name), PackedLinear):
            return f"{name} is a {type(getattr(mixer, name)).__name__}"
    names = ("dt_norm", "B_norm", "C_norm", "output_norm")
    return _of_norms({"norm": block.norm} | {name: getattr(mixer, name) for name in names})


def _of_norms(modules: dict[str, nn.Module | None]) -> str | None:
    for name, module in modules.items():
        if module is not None and not is_bare(module, RMSNorm) and not is_bare(module, LayerNorm):
            return f"{name} is a {type(module).__name__}"
    return None


def activation_dtype(model: LanguageModel) -> torch.dtype:
    """The dtype of activations in products of many rows: float32 if the projections are, else bfloat16."""
    formats = {m.format for m in model.modules() if isinstance(m, PackedLinear)}
    return torch.float32 if formats <= {"float32"} else torch.bfloat16


def require_bfloat16(model: LanguageModel, device: torch.device) -> None:
    """Raise ValueError if a GPU is too old for the products of a model."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 and activation_dtype(model) == torch.bfloat16:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and products in bfloat16 "
            'need 8.0 or newer; take weights="float32"'
        )
