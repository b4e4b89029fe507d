"""Products with packed weights: the public functions and their contract."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from anymamba.kernels.packed_linear import cpu, cuda, formats, writing
from anymamba.kernels.packed_linear.formats import PackedWeight
from anymamba.ops import dispatch, observers
from anymamba.ops.packed_linear.checks import checked, checked_matrix, checked_weight

OP = "packed_linear"


def packed_linear(
    x: Float[Tensor, "*rows n_in"],
    weight: PackedWeight,
    bias: Float[Tensor, " n_out"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*rows n_out"]:
    """Multiply by a packed weight: y = x W^T + bias.

    The compiled kernels read the weights as they lie in memory. They round x to bfloat16 for bfloat16 weights, and for
    block formats on a CPU to int8 with a scale for each 32 columns of a row, on a GPU to bfloat16; sums are float32. On
    a CPU a row gives the same bits alone, in any batch and for any number of threads. Gradients and tracers use torch
    operations on the unpacked weight, which do not round x; the weight has no gradient.

    Args:
        x: (..., n_in), floating point. Where it is infinite or NaN, block formats give NaN for the whole row.
        weight: (n_out, n_in) in any of FORMATS.
        bias: (n_out,).
        backend: as in `selective_scan`.
    Returns y in the dtype of x.
    Raises ValueError for wrong shapes, TypeError for wrong dtypes, RuntimeError if a named backend cannot serve.
    """
    arguments = checked(x, weight, bias)
    name = dispatch.resolve(OP, x.device.type, backend, arguments)
    tensors = arguments.tensors
    if not observers.plain(*tensors) or observers.differentiable(*tensors) or observers.has_tangent(*tensors):
        name = dispatch.transparent(OP, "forward", arguments)
    dispatch.count(OP, name, "forward")
    with dispatch.without_autocast(x.device.type):
        y = dispatch.kernel(OP, name).forward(arguments)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.n_out)


def no_kernels(device_type: str) -> str | None:
    """Why packed weights have no kernels on a kind of device, where they would only be unpacked; None if they have.

    A CPU always serves: without the compiled kernels the matrices are unpacked one by one.
    """
    if device_type == "cpu":
        return None
    return "packed weights have kernels on cpu and cuda" if device_type != "cuda" else cuda.unavailable(device_type)


def pack(matrix: Float[Tensor, "n_out n_in"], format: str) -> PackedWeight:
    """Convert a matrix to a format.

    Q8_0 and Q4_0 are bit for bit those of GGUF's own quantisers. The K-quants search for the scales with the least
    squared error.

    Args:
        matrix: (n_out, n_in), finite for block formats.
        format: any of FORMATS but q5_k.
    Raises ValueError for an unknown format, for one that is only read, and where rows are not a whole number of blocks.
    """
    checked_matrix(matrix, format)
    if cpu.unavailable(matrix.device.type) is None:
        return cpu.pack(matrix, format)
    return PackedWeight(writing.pack(matrix.detach().float(), format), format, matrix.shape[1])


def unpack(weight: PackedWeight) -> Float[Tensor, "n_out n_in"]:
    """The matrix of a packed weight in float32.

    Raises ValueError or TypeError if the data does not have the size that the format needs.
    """
    checked_weight(weight)
    kind = weight.data.device.type
    if not observers.plain(weight.data):
        return formats.unpack(weight.data, weight.format)
    if cpu.unavailable(kind) is None:
        return cpu.unpack(weight)
    if weight.format in cuda.BLOCKS and cuda.unavailable(kind) is None and cuda.refuses_gpu(weight.data) is None:
        return cuda.unpack(weight)
    return formats.unpack(weight.data, weight.format)


def unpack_rows(weight: PackedWeight, index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows n_in"]:
    """Rows of a packed weight in float32, as an embedding looks them up; the other rows are not read.

    Args:
        weight: (n_out, n_in) in any of FORMATS.
        index: integers in [0, n_out), of any shape.
    """
    return formats.unpack(weight.data[index], weight.format)
