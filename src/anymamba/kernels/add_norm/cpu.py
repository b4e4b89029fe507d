"""The norm of a sum in C++ (csrc/norm.cpp). This module passes pointers and adds up partial sums."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.runtimes import native

NAME = "cpu"
TRANSPARENT: frozenset[str] = frozenset()

ROWS = 16  # per task
ROWS_BACKWARD = 64  # per task; each task writes a partial sum of the gradients of weight and bias


def unavailable(device_type: str) -> str | None:
    return native.unavailable(device_type)


def refuses(arguments: NormArguments) -> str | None:
    return None


def description() -> str:
    return f"compiled C++: {native.description()}"


def saved_shape(a: NormArguments) -> tuple[int, ...]:
    """Of what backward needs of forward: the scale of each row and, where it is subtracted, its mean."""
    return 1 + a.subtract_mean, a.n_rows


def forward(a: NormArguments, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, x + residual (nothing where there is no residual), and the statistics of the rows (or nothing)."""
    y = native.empty(a.x, dtype=a.y_dtype)
    total = a.x.new_empty(0) if a.residual is None else native.empty(a.x, dtype=a.total_dtype)
    saved = a.x.new_empty(saved_shape(a), dtype=a.dtype) if save else None
    if not save and a.x.numel() and all(map(_is_plain, (*a.tensors, y))):
        _of_floats(a, y, total)
    elif a.x.numel():
        call = _Call(a, ROWS)
        call.rows(y=y, total=None if a.residual is None else total)
        call.pointers(statistics=saved)
        native.module().norm_forward(call.args)
    return y, total, saved


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())


def _of_floats(a: NormArguments, y: Tensor, total: Tensor) -> None:
    """The same in one call: this runs in every block of every token."""
    tensors = {"x": a.x, "residual": a.residual, "weight": a.weight, "bias": a.bias, "total": total, "y": y}
    places = (0 if t is None or not t.numel() else native.address(name, t) for name, t in tensors.items())
    sizes = (a.n_rows, a.size, ROWS, a.eps, a.subtract_mean)
    native.module().norm_of_floats(*places, *sizes, torch.get_num_threads())


def backward(dy: Tensor, dtotal: Tensor | None, a: NormArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of x, residual, weight and bias (None where the input is absent)."""
    dx = native.empty(a.x)
    dresidual = None if a.residual is None else native.empty(a.residual)
    n_parts = -(-a.n_rows // ROWS_BACKWARD)
    dweight, dbias = (
        None if t is None else a.x.new_zeros((n_parts, a.size), dtype=a.dtype) for t in (a.weight, a.bias)
    )
    if a.x.numel():
        call = _Call(a, ROWS_BACKWARD)
        call.rows(dy=_plain(dy), dx=dx)
        if dresidual is not None:
            call.rows(dtotal=_plain(a.total_gradient(dtotal)), dresidual=dresidual)
        call.pointers(statistics=saved, dweight_parts=dweight, dbias_parts=dbias)
        native.module().norm_backward(call.args)
    sums = (None if t is None else t.sum(0) for t in (dweight, dbias))
    given = (a.weight, a.bias)
    return [
        dx,
        dresidual,
        *(None if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, given, strict=True)),
    ]


def _plain(cotangent: Tensor) -> Tensor:
    """Autograd may negate a gradient lazily."""
    return cotangent.resolve_neg()


class _Call(native.Call):
    """Takes tensors (..., size) as the (1, rows, size) of compiled code."""

    def __init__(self, a: NormArguments, rows: int) -> None:
        super().__init__(native.module().NormArgs(a.n_rows, a.size, rows, a.eps, a.subtract_mean), a.dtype)
        self._shape = (1, a.n_rows, a.size)
        self.args.total_dtype = native.DTYPES[a.total_dtype]
        self.args.is_plain = True
        self.rows(x=a.x, residual=a.residual)
        self.vectors(weight=a.weight, bias=a.bias)

    def rows(self, **tensors: Tensor | None) -> None:
        given = {name: tensor.reshape(self._shape) for name, tensor in tensors.items() if tensor is not None}
        self.args.is_plain &= all(tensor.dtype == torch.float32 for tensor in given.values())
        super().rows(**given)
