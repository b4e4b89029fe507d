"""Load the compiled CPU module once, or say why it is missing, and pass tensors to it."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The dtype codes of csrc/args.h."""

ISA_VARIABLE = "ANYMAMBA_ISA"
"""Environment variable that selects one of the machine's instruction sets."""


@cache
def load() -> Any | None:
    """The compiled module, or None if it is not installed.

    Raises ValueError if ANYMAMBA_ISA names an instruction set that the machine or the module does not have.
    """
    try:
        module = importlib.import_module("anymamba._native")
    except ImportError:
        return None
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        known = module.instruction_sets()
        if wanted not in known:
            raise ValueError(f"{ISA_VARIABLE} must be one of {', '.join(known)} on this machine, got {wanted!r}")
        module.choose_instruction_set(wanted)
    return module


def module() -> Any:
    """The compiled module, which must be installed."""
    found = load()
    assert found is not None, "dispatch must check reason() first"
    return found


@cache
def reason() -> str | None:
    """The reason why the compiled module is missing, or None if it is installed."""
    if load() is not None:
        return None
    try:
        build_info = importlib.import_module("anymamba._build_info")
    except ImportError:
        return "the package was not built with the compiled module; install the package with pip"
    return build_info.REASON or "the compiled module cannot be imported; reinstall the package"


def unavailable(device_type: str) -> str | None:
    """The reason why the compiled kernels cannot serve a device, or None if they can."""
    return _REASON if device_type == "cpu" else "it serves tensors on the CPU"


def description() -> str:
    """Compiler, instruction set and threads of the loaded module."""
    build_info = importlib.import_module("anymamba._build_info")
    others = ", ".join(name for name in module().instruction_sets() if name != module().instruction_set())
    threads = "the process's OpenMP" if module().shares_openmp() else "its own threads"
    return f"{build_info.COMPILER}, {module().instruction_set()} (also {others or 'none'}), {threads}"


PLAIN = (Tensor, nn.Parameter)
"""Tensor types whose values are in their memory. Other types may have no memory, or values that differ from it."""


def address(name: str, tensor: Tensor) -> int:
    """The memory address of a dense real tensor. All pointers for compiled code come from this function.

    Raises TypeError for a tensor whose CPU memory does not hold its values: one of a tracer or a fake mode, a subclass,
    a tensor on another device, a sparse or a lazily negated one.
    """
    kind = type(tensor)
    ours = kind is Tensor or kind is nn.Parameter or _computes_as_a_tensor(kind)
    if ours and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_neg():
        place = tensor.data_ptr()
        if place or not tensor.numel():  # a tensor that has values but no memory has the address 0
            return place
    raise TypeError(
        f"{name} must be a dense tensor with values in memory for compiled code, got {kind.__name__} on "
        f'{tensor.device}, {tensor.layout}; use backend "portable"'
    )


def _computes_as_a_tensor(kind: type[Tensor]) -> bool:
    """Whether torch computes operations on a subclass as on a plain tensor; the subclass may only wrap the results."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


LARGE = 1 << 22  # tensors of at least this many bytes get large pages


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor on the CPU; its shape and dtype default to those of `like`."""
    tensor = torch.empty(shape or like.shape, dtype=dtype or like.dtype, device="cpu")
    if tensor.nbytes >= LARGE:
        module().use_large_pages(address("a result", tensor), tensor.nbytes)
    return tensor


class Call:
    """The arguments of one call of the compiled module. Keeps the tensors that they point to alive."""

    def __init__(self, args: Any, dtype: torch.dtype) -> None:
        self.args = args
        self.dtype = dtype
        self._alive: list[Tensor] = []
        self._Rows = module().Rows
        args.is_double = dtype == torch.float64
        args.n_threads = torch.get_num_threads()

    def rows(self, **tensors: Tensor | None) -> None:
        """Pass (b, l, d) or (b, l, g, n) with dtype and strides. If the last dimension is strided, a copy is passed."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype not in DTYPES:
                known = ", ".join(str(dtype) for dtype in DTYPES)
                raise TypeError(f'{name} is {tensor.dtype}, backend "cpu" takes {known}; convert it or use "portable"')
            strides = tensor.stride()
            if strides[-1] != 1 and tensor.shape[-1] > 1:
                tensor = tensor.contiguous()
                strides = tensor.stride()
            self._alive.append(tensor)
            group = strides[2] if len(strides) == 4 else 0
            place = (address(name, tensor), DTYPES[tensor.dtype], strides[0], strides[1], group)
            setattr(self.args, name, self._Rows(*place))

    def vectors(self, **tensors: Tensor | None) -> None:
        """Pass tensors as contiguous ones of the working dtype."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype != self.dtype or not tensor.is_contiguous():
                tensor = tensor.to(self.dtype).contiguous()
            self._alive.append(tensor)
            setattr(self.args, name, address(name, tensor))

    def pointers(self, **tensors: Tensor | None) -> None:
        """Pass contiguous tensors without conversion; None becomes a null pointer."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self._alive.append(tensor)
                setattr(self.args, name, address(name, tensor))

    def offsets(self, cu_seqlens: Tensor | None) -> None:
        """Pass the offsets of packed sequences."""
        if cu_seqlens is not None:
            self.args.n_sequences = cu_seqlens.numel() - 1
            self.pointers(offsets=cu_seqlens.to("cpu", torch.int64).contiguous())


_REASON = reason()  # computed once, so that torch.compile can trace `unavailable`
