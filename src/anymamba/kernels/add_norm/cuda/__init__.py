"""The norm of a sum in CUDA C++ for NVIDIA GPUs: `fast.cu` has the formulas, `general.cu` serves what it does not.

Nothing here waits for the GPU, and every sum has an order of its own.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.kernels.add_norm.cuda import call as calls
from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, aligned, resolved
from anymamba.runtimes.replaying import replayed

NAME = "cuda"
TRANSPARENT: frozenset[str] = frozenset()


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve tensors on a device, in words; None where it can."""
    return "it serves tensors on an NVIDIA GPU" if device_type != "cuda" else nvrtc.reason()


def refuses(arguments: NormArguments) -> str | None:
    device = arguments.x.device
    return nvrtc.refuses_gpu(device.index) if device.type == "cuda" else None


def description() -> str:
    return f"CUDA C++: {nvrtc.description()}"


def saved_shape(a: NormArguments) -> tuple[int, ...]:
    """Of what backward needs of forward: the scale of each row and, where it is subtracted, its mean."""
    return 1 + a.subtract_mean, a.n_rows


def forward(a: NormArguments, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, x + residual (nothing where there is no residual), and the statistics of the rows (or nothing)."""
    y, total, saved = replayed("norm", a.tensors, (*a.options, save), lambda: _forward(a, save))
    return y, total, saved


def _forward(a: NormArguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = a.x.new_empty(a.x.shape, dtype=a.y_dtype)
    total = a.x.new_empty((0,) if a.residual is None else a.x.shape, dtype=a.total_dtype)
    saved = a.x.new_empty(saved_shape(a) if save else (0,), dtype=a.dtype)
    if a.x.numel():
        call = _start(a)
        _rows(call, a, y=y, total=None if a.residual is None else total)
        call.dense(statistics=saved if save else None)
        if calls.is_fast(a):
            threads, rows_of_block = _block(a)
            n_blocks, kernel = -(-a.n_rows // rows_of_block), "forward"
            if a.subtract_mean and threads // rows_of_block > 32:  # a warp alone waits little
                n_blocks, kernel = min(n_blocks, _places(call, a)), "forward_many"
            call.launch(_fast(kernel, a), n_blocks, threads, calls.SLOTS)
        else:
            call.launch(calls.general("forward", a.dtype), a.n_rows, calls.THREADS, _shared_of_sums(a))
    return y, total, saved


def backward(dy: Tensor, dtotal: Tensor | None, a: NormArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of x, residual, weight and bias (None where the input is absent)."""
    dy, dtotal = resolved(dy), resolved(dtotal)
    tensors = (dy, dtotal, saved, *a.tensors)
    return list(replayed("norm backward", tensors, a.options, lambda: _backward(dy, dtotal, a, saved)))


def _backward(dy: Tensor, dtotal: Tensor | None, a: NormArguments, saved: Tensor) -> list[Tensor | None]:
    dx, dresidual, dweight, dbias = (None if t is None else t.new_empty(t.shape) for t in a.tensors)
    if a.x.numel() == 0:
        return [dx, dresidual, *(None if t is None else t.zero_() for t in (dweight, dbias))]
    call = _start(a)
    dtotal = None if a.residual is None or dtotal is None else dtotal.to(a.total_dtype)
    _rows(call, a, dy=dy.to(a.y_dtype), dtotal=dtotal)
    _rows(call, a, dx=dx, dresidual=dresidual)
    call.dense(statistics=saved)
    call.typed(dweight=dweight, dbias=dbias)
    sums = dweight is not None or dbias is not None
    if calls.is_fast(a):
        threads, rows_of_block = _block(a)
        n_parts, shared = min(-(-a.n_rows // rows_of_block), _places(call, a)), calls.SLOTS + 8 * a.size * sums
        _parts(call, a, n_parts, torch.float32) if sums else None
        call.launch(_fast("backward", a), n_parts, threads, shared)
        variant = _fast("sum_parts", a)
    else:
        call.launch(calls.general("backward", a.dtype), a.n_rows, calls.THREADS, _shared_of_sums(a))
        variant = calls.general("sum_parts", a.dtype)
        if sums:
            n_parts = -(-a.n_rows // calls.ROWS_OF_PART)
            _parts(call, a, n_parts, a.dtype)
            call.launch(calls.general("weights", a.dtype), -(-n_parts * a.size // calls.THREADS), calls.THREADS)
    if sums:
        threads = 32 * calls.WAYS
        call.launch(variant, 2 * -(-a.size // 32), threads, threads * a.dtype.itemsize)
    return [dx, dresidual, dweight, dbias]


def _start(a: NormArguments) -> Call:
    call = Call(calls.LAYOUT, a.x)
    (eps,) = struct.unpack("q", struct.pack("d", a.eps))
    call.set(rows=a.n_rows, size=a.size, eps=eps, subtract_mean=a.subtract_mean)
    call.set(total_dtype=nvrtc.DTYPES[a.total_dtype], rows_of_part=calls.ROWS_OF_PART)
    call.set(warps=calls.warps_of_row(a.size))
    _rows(call, a, x=a.x, residual=a.residual)
    call.typed(weight=a.weight, bias=a.bias)
    return call


def _rows(call: Call, a: NormArguments, **tensors: Tensor | None) -> None:
    """Tensors as rows; the fast kernels want them at multiples of four numbers."""
    width = calls.WIDTH if calls.is_fast(a) else 1
    rows = {name: None if t is None else t.reshape(a.n_rows, a.size) for name, t in tensors.items()}
    call.strided(**{name: t if aligned(t, width) or t is None else t.clone() for name, t in rows.items()})


def _block(a: NormArguments) -> tuple[int, int]:
    """Threads of a block of the fast kernels, and the rows on which it works at a time."""
    warps = calls.warps_of_row(a.size)
    threads = max(calls.THREADS, 32 * warps)
    return threads, threads // 32 // warps


def _fast(kernel: str, a: NormArguments) -> nvrtc.Variant:
    return calls.fast(kernel, calls.chunks_of_lane(a.size))


def _places(call: Call, a: NormArguments) -> int:
    """Blocks of many rows that the device works on at a time."""
    return call.n_multiprocessors * calls.THREADS_OF_MULTIPROCESSOR[calls.chunks_of_lane(a.size)] // _block(a)[0]


def _parts(call: Call, a: NormArguments, n_parts: int, dtype: torch.dtype) -> None:
    call.set(n_parts=n_parts)
    call.scratch("parts", n_parts, 2, a.size, dtype=dtype)


def _shared_of_sums(a: NormArguments) -> int:
    return calls.THREADS // 32 * a.dtype.itemsize
