"""The kernels of a token through a model whose blocks are Mamba, for graphs on NVIDIA GPUs.

They take what changes from step to step (the number of rows, where states and logits are) from a record in the GPU's
memory, so that a captured graph serves any states. `embed` writes the record and is launched outside the graph.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from anymamba.kernels.model_step.cuda import call as calls
from anymamba.kernels.model_step.cuda.call import ADD, LOGITS, MOST_ROWS, STORE
from anymamba.kernels.model_step.cuda.weights import Matrix, Norm, Packed, Recurrence, Short
from anymamba.kernels.packed_linear import cuda as packed_linear
from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, aligned

__all__ = ["ADD", "LOGITS", "MOST_ROWS", "STORE", "Matrix", "Norm", "Packed", "Recurrence", "Short", "Start"]


def new_record(device: torch.device) -> Tensor:
    """Memory for what changes from step to step."""
    return torch.zeros(calls.STEP_BYTES // 8, dtype=torch.int64, device=device)


class Start:
    """Begins every step of a bucket: writes the record, and the rows of the table for the ids. An id outside the table
    gives NaN.

    Args:
        record: what `new_record` gave.
        table: the embedding; None if the rows are looked up elsewhere.
        residual: (bucket, padded d_model), float32, where they go.
    """

    def __init__(self, record: Tensor, table: Matrix | None, residual: Tensor) -> None:
        self._call = call = Call(calls.LAYOUT, residual)
        self._n_blocks = residual.shape[0]
        call.set(step=record.data_ptr())
        call.strided(y=residual)
        if table is not None:
            dtype = nvrtc.DTYPES[table.weight.dtype]
            call.set(table=table.weight.data_ptr(), table_dtype=dtype, n_ids=len(table.weight))
            call.set(n_in=table.weight.shape[1], size=table.n_in)

    def __call__(
        self, ids: Int[Tensor, " rows"], old: tuple[int, int], new: tuple[int, int], logits: Tensor | None
    ) -> None:
        """Queue it.

        Args:
            ids: int64 or int32, contiguous, at most as many as the bucket.
            old, new: addresses of conv (n_layers, rows, taps - 1, d_inner) and ssm (n_layers, rows, d_inner, d_state)
                of all layers, before and after the step; they may be the same.
            logits: (rows, n_out) where `product` stores logits; None if it stores none.
        """
        call = self._call
        call.set(ids=ids.data_ptr(), ids_are_long=ids.dtype == torch.int64, rows=ids.shape[0])
        call.set(conv=old[0], ssm=old[1], new_conv=new[0], new_ssm=new[1])
        call.set(logits=0 if logits is None else logits.data_ptr())
        call.launch(calls.rows("embed", torch.float32), self._n_blocks, calls.THREADS)


def serves(matrix: Matrix | Packed, norm: Norm | None) -> bool:
    """Whether `product` and `in_proj` serve a matrix after a norm."""
    plain = norm is None or not (norm.subtract_mean or norm.bias is not None)
    return plain or isinstance(matrix, Matrix)


def fits(device: int, matrix: Matrix | Packed, rows: int) -> bool:
    """Whether the rows have a place in the shared memory of a block, for `product`."""
    if isinstance(matrix, Packed):
        shared = calls.packed_launch(matrix.format, rows, matrix.n_in, len(matrix.data)).shared
    else:
        shared = calls.shared_of_product(matrix.weight.dtype, rows, matrix.weight.shape[1])
    return shared <= nvrtc.device(device).shared_of_block


def prepare(device: int, matrices: Iterable[Matrix | Packed], rows: int, weights: Recurrence) -> None:
    """Compile what a step of few rows needs, on several cores at once.

    Args:
        matrices: of the products.
        rows: the bucket, 1, 2, 4 or 8.
        weights: of any layer.
    """
    dtype = torch.float32 if weights.dt_proj is None else weights.dt_proj.weight.dtype
    wanted = {calls.recurrence("recur", dtype, weights.A.shape[1], weights.zoh)}
    for matrix in matrices:
        wanted |= {_variant(kernel, matrix, rows) for kernel in ("product", "in_proj")}
    nvrtc.prepare(list(wanted), device)


def product(
    record: Tensor,
    x: Tensor,
    matrix: Matrix | Packed,
    norm: Norm | None,
    y: Tensor | None,
    target: int = STORE,
) -> None:
    """y = norm(x) W^T + bias for up to 8 rows.

    Args:
        x: (bucket, padded n_in), float32, with zeros after n_in; the bucket is 1, 2, 4 or 8.
        y: (bucket, at least n_out), float32.
        target: STORE, ADD to what y holds, or LOGITS: store where the record says, and y is None.
    """
    call = _product(record, x, matrix, norm)
    call.set(target=target)
    call.strided(y=y)
    _launch_product(call, "product", x, matrix)


def in_proj(
    record: Tensor,
    layer: int,
    x: Tensor,
    matrix: Matrix | Packed,
    norm: Norm,
    short: Short,
    u: Tensor,
    z: Tensor,
) -> None:
    """u = silu(convolution of the first half of in_proj(norm(x))), and z = silu of the second half.

    Args:
        x: as in `product`.
        u, z: (bucket, padded d_inner), float32.
    """
    call = _product(record, x, matrix, norm)
    _set_convolution(call, layer, short)
    call.strided(u=u, z=z)
    _launch_product(call, "in_proj", x, matrix)


def recur(
    record: Tensor, layer: int, weights: Recurrence, u: Tensor, z: Tensor, projected: Tensor | None, y: Tensor
) -> None:
    """The recurrence with dt_proj, softplus and gate, for few rows.

    Args:
        u, z: as `in_proj` writes them.
        projected: (bucket, ...), float32, the output of x_proj; None if nothing is selective.
        y: (bucket, padded d_inner), float32.
    """
    call = _recurrence(record, layer, weights)
    dt_proj = weights.dt_proj
    call.strided(u=u, z=z, projected=projected, y=y)
    if weights.norms is not None:
        dt_norm, B_norm, C_norm = weights.norms
        call.dense(dt_norm=dt_norm, B_norm=B_norm, C_norm=C_norm)
        call.set(inner_norms=True, eps=_bits(weights.eps))
    padded = 0
    if dt_proj is not None:
        padded = dt_proj.weight.shape[1]
        call.set(weight=dt_proj.weight.data_ptr(), n_in=padded, dt_rank=dt_proj.n_in)
    shared = calls.STEP_BYTES + 4 * (padded + 2 * call["d_state"])
    dtype = torch.float32 if dt_proj is None else dt_proj.weight.dtype
    variant = calls.recurrence("recur", dtype, call["d_state"], weights.zoh)
    call.launch(variant, u.shape[0] * _blocks_of_row(call, "recur"), calls.RECURRENCE_THREADS, shared, early=True)


def convolve_rows(record: Tensor, layer: int, x: Tensor, short: Short, u: Tensor) -> None:
    """u = silu(convolution of x), for any number of rows, in their dtype: float32 or bfloat16."""
    call = Call(calls.LAYOUT, x)
    call.set(step=record.data_ptr())
    _set_convolution(call, layer, short)
    call.strided(x=x, u=u)
    n_rows, d_inner = x.shape[0], call["d_inner"]
    width = 4 if d_inner % 4 == 0 and aligned(x, 4) and aligned(u, 4) else 1
    rows = calls.rows_of_convolution(n_rows, d_inner, width, call.n_multiprocessors)
    variant = calls.rows("convolve_rows", x.dtype, call["taps"], width, rows)
    n_blocks = -(-(-(-n_rows // rows) * d_inner // width) // calls.THREADS)
    call.launch(variant, n_blocks, calls.THREADS, calls.STEP_BYTES, early=True)


def recur_rows(
    record: Tensor,
    layer: int,
    weights: Recurrence,
    u: Tensor,
    z: Tensor,
    dt: Tensor | None,
    delta: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    y: Tensor,
) -> None:
    """The recurrence with softplus and gate, for any number of rows.

    Args:
        u, z: (bucket, d_inner), float32 or bfloat16; z is before SiLU.
        dt: (bucket, dt_rank), the input of dt_proj, if `projects` says so.
        delta: (bucket, d_inner) before its bias; None for zeros, or where `dt` is given.
        B, C: (bucket, d_state), None where they are constant.
        y: (bucket, d_inner). All have the dtype of u.
    """
    call = _recurrence(record, layer, weights)
    call.strided(u=u, z=z, projected=dt, delta=delta, B=B, C=C, y=y)
    if dt is not None:
        assert weights.dt_proj is not None
        call.set(weight=weights.dt_proj.weight.data_ptr(), n_in=dt.shape[1])
    blocks = _blocks_of_row(call, "recur_rows")
    d_state = call["d_state"]
    rows = calls.rows_of_recurrence(len(u), blocks, d_state, call.n_multiprocessors)
    is_aligned = _copied_by_16(u, z, delta, B, C)
    variant = calls.recurrence("recur_rows", u.dtype, d_state, weights.zoh, is_aligned, rows)
    shared, threads = calls.shared_of_recurrence(u.dtype, rows, d_state, call["n_in"]), calls.RECURRENCE_THREADS
    n_blocks = -(-len(u) // (calls.SETS * rows)) * blocks
    call.launch(variant, n_blocks, calls.SETS * threads, shared, early=True)


def projects(weights: Recurrence, u: Tensor, z: Tensor, dt: Tensor, B: Tensor | None, C: Tensor | None) -> bool:
    """Whether `recur_rows` can compute dt_proj, too; arguments as there."""
    if weights.dt_proj is None or weights.A.shape[1] % calls.WIDTH:
        return False
    dtypes, most = {u.dtype, weights.dt_proj.weight.dtype}, calls.ROWS_OF_THREAD[0]
    if dtypes != {torch.bfloat16} or not _copied_by_16(u, z, dt, B, C):
        return False
    shared = calls.shared_of_recurrence(u.dtype, most, weights.A.shape[1], dt.shape[1])
    return shared <= nvrtc.device(u.device.index or 0).shared_of_block


def _copied_by_16(*tensors: Tensor | None) -> bool:
    """Whether copies of 16 bytes fit the rows of all tensors."""
    return all(t is None or aligned(t, 16 // t.itemsize) for t in tensors)


def _bits(value: float) -> int:
    """A double as the integer with the same bits."""
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return bits


def _product(record: Tensor, x: Tensor, matrix: Matrix | Packed, norm: Norm | None) -> Call:
    call = Call(calls.LAYOUT, x)
    call.set(step=record.data_ptr(), size=matrix.n_in, bucket=x.shape[0])
    if isinstance(matrix, Packed):
        n_out, row_bytes = matrix.data.shape
        launch = calls.packed_launch(matrix.format, x.shape[0], matrix.n_in, n_out)
        call.set(weight=matrix.data.data_ptr(), n_out=n_out, n_in=matrix.n_in)
        call.set(row_bytes=row_bytes, x_stride=launch.x_stride)
    else:
        n_out, n_in = matrix.weight.shape
        call.set(weight=matrix.weight.data_ptr(), n_out=n_out, n_in=n_in)
        call.set(ways=calls.ways(matrix.weight.dtype, x.shape[0], n_out, n_in, call.n_multiprocessors))
    call.strided(x=x)
    call.dense(bias=matrix.bias)
    if norm is not None:
        call.set(has_norm=True, subtract_mean=norm.subtract_mean, eps=_bits(norm.eps))
        call.dense(norm_weight=norm.weight, norm_bias=norm.bias)
    return call


def _launch_product(call: Call, kernel: str, x: Tensor, matrix: Matrix | Packed) -> None:
    rows, n_out = x.shape[0], call["n_out"]
    variant = _variant(kernel, matrix, rows)
    if isinstance(matrix, Packed):
        launch = calls.packed_launch(matrix.format, rows, matrix.n_in, n_out)
        n_blocks = packed_linear.blocks_of(launch, n_out, nvrtc.device(x.device.index or 0))
        call.launch(variant, n_blocks, 32 * launch.n_warps, launch.shared, early=True)
        return
    tasks = -(-n_out // calls.outputs(rows))
    most = call.n_multiprocessors * calls.BLOCKS_OF_MULTIPROCESSOR
    n_blocks = min(-(-tasks * call["ways"] // calls.WARPS), most)
    shared = calls.shared_of_product(matrix.weight.dtype, rows, call["n_in"])
    call.launch(variant, n_blocks, calls.THREADS, shared, early=True)


def _variant(kernel: str, matrix: Matrix | Packed, rows: int) -> nvrtc.Variant:
    if isinstance(matrix, Packed):
        return calls.packed_product(kernel, matrix.format, matrix.n_in)
    return calls.product(kernel, matrix.weight.dtype, rows)


def _set_convolution(call: Call, layer: int, short: Short) -> None:
    taps, d_inner = short.weight.shape
    call.set(layer=layer, taps=taps, d_inner=d_inner)
    call.dense(conv_weight=short.weight, conv_bias=short.bias)


def _recurrence(record: Tensor, layer: int, weights: Recurrence) -> Call:
    call = Call(calls.LAYOUT, weights.A)
    d_inner, d_state = weights.A.shape
    call.set(step=record.data_ptr(), layer=layer, d_inner=d_inner, d_state=d_state)
    call.dense(A=weights.A, D=weights.D, delta_bias=weights.delta_bias)
    call.dense(constant_B=weights.B, constant_C=weights.C)
    return call


def _blocks_of_row(call: Call, kernel: str) -> int:
    return -(-call["d_inner"] * calls.lanes(kernel, call["d_state"]) // calls.RECURRENCE_THREADS)
