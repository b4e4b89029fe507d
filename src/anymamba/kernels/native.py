"""The compiled CPU module: loaded once, and why it is absent."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The numbers of csrc/args.h."""

ISA_VARIABLE = "ANYMAMBA_ISA"
"""Environment variable that forces one of the instruction sets that the machine has."""


@cache
def load() -> Any | None:
    """The compiled module, or None where it is not installed.

    Raises ValueError when ANYMAMBA_ISA names an instruction set that the machine or the module does not have.
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
    """The compiled module, which must be there."""
    found = load()
    assert found is not None, "dispatch asks for reason() first"
    return found


@cache
def reason() -> str | None:
    """Why the compiled module is absent, in words; None where it is there."""
    if load() is not None:
        return None
    try:
        build_info = importlib.import_module("anymamba._build_info")
    except ImportError:
        return "the package was not built with it; install it with pip"
    return build_info.REASON or "the compiled module cannot be imported; install the package anew"


def unavailable(device_type: str) -> str | None:
    """Why the compiled kernels cannot serve a device, in words; None where they can."""
    return _REASON if device_type == "cpu" else "it serves tensors on the CPU"


def description() -> str:
    """Compiler, instruction set and threads of the loaded module."""
    build_info = importlib.import_module("anymamba._build_info")
    others = ", ".join(name for name in module().instruction_sets() if name != module().instruction_set())
    threads = "the process's OpenMP" if module().shares_openmp() else "threads of its own"
    return f"{build_info.COMPILER}, {module().instruction_set()} (also {others or 'none'}), {threads}"


PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that are what they seem: anything else may have no memory, or other values than its memory holds."""


def address(name: str, tensor: Tensor) -> int:
    """Where a dense real tensor's values lie. Every pointer that compiled code gets comes from here.

    Raises TypeError for a tensor whose memory does not hold its values: of a tracer or a fake mode, a subclass, one on
    another device, a sparse or lazily negated one.
    """
    kind = type(tensor)
    ours = kind is Tensor or kind is nn.Parameter or _computes_as_a_tensor(kind)
    if ours and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_neg():
        place = tensor.data_ptr()
        if place or not tensor.numel():  # what has values but no memory has the address 0
            return place
    raise TypeError(
        f"{name} must be a dense tensor with values in memory for compiled code, got {kind.__name__} on "
        f'{tensor.device}, {tensor.layout}; take backend "portable"'
    )


def _computes_as_a_tensor(kind: type[Tensor]) -> bool:
    """Whether a subclass leaves what operations compute to torch, and only names or wraps their results."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


LARGE = 1 << 22  # bytes from which a tensor gets large pages


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor on the CPU, of the shape and dtype of another one unless they are given."""
    tensor = torch.empty(shape or like.shape, dtype=dtype or like.dtype, device="cpu")
    if tensor.nbytes >= LARGE:
        module().use_large_pages(address("a result", tensor), tensor.nbytes)
    return tensor


class Call:
    """The arguments of one call of the module; it keeps what they point to alive."""

    def __init__(self, args: Any, dtype: torch.dtype) -> None:
        self.args = args
        self.dtype = dtype
        self._alive: list[Tensor] = []
        self._Rows = module().Rows
        args.is_double = dtype == torch.float64
        args.n_threads = torch.get_num_threads()

    def rows(self, **tensors: Tensor | None) -> None:
        """Pass (b, l, d) or (b, l, g, n) with their dtypes and strides; a copy where the last dimension is strided."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype not in DTYPES:
                known = ", ".join(str(dtype) for dtype in DTYPES)
                raise TypeError(f'{name} is {tensor.dtype}, backend "cpu" takes {known}; convert it or take "portable"')
            strides = tensor.stride()
            if strides[-1] != 1 and tensor.shape[-1] > 1:
                tensor = tensor.contiguous()
                strides = tensor.stride()
            self._alive.append(tensor)
            group = strides[2] if len(strides) == 4 else 0
            place = (address(name, tensor), DTYPES[tensor.dtype], strides[0], strides[1], group)
            setattr(self.args, name, self._Rows(*place))

    def vectors(self, **tensors: Tensor | None) -> None:
        """Pass tensors as dense ones of the working dtype."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype != self.dtype or not tensor.is_contiguous():
                tensor = tensor.to(self.dtype).contiguous()
            self._alive.append(tensor)
            setattr(self.args, name, address(name, tensor))

    def pointers(self, **tensors: Tensor | None) -> None:
        """Pass dense tensors as they are; null where one is absent."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self._alive.append(tensor)
                setattr(self.args, name, address(name, tensor))

    def offsets(self, cu_seqlens: Tensor | None) -> None:
        """Pass the offsets of packed sequences."""
        if cu_seqlens is not None:
            self.args.n_sequences = cu_seqlens.numel() - 1
            self.pointers(offsets=cu_seqlens.to("cpu", torch.int64).contiguous())


_REASON = reason()  # asked once, so that torch.compile can trace `unavailable`
