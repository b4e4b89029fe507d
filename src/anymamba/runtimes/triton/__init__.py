"""Where Triton serves, and how its kernels are launched. Importing this does not import Triton.

Kernels are imported when the first one runs: `triton.jit` decides at import whether it compiles or interprets.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from anymamba.base.optional import imported

OLDEST = (7, 0)
"""Compute capability of NVIDIA GPUs from which Triton compiles."""
OLDEST_BFLOAT16 = (8, 0)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device_type: str) -> str | None:
    """Why Triton cannot serve tensors on a device, in words; None where it can."""
    if device_type not in ("cpu", "cuda", "xpu"):
        return "it serves tensors on a GPU of NVIDIA, AMD or Intel"
    if device_type == "cpu" and not interpreted():
        return "it serves tensors on a GPU, and CPU tensors only with TRITON_INTERPRET=1, for tests"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if not interpreted():
        return _no_compiler() or _no_header() or _not_importable()
    return _not_importable() if device_type == "cpu" else "TRITON_INTERPRET is set, which is for CPU tensors; unset it"


# The same as torch.compiler.assume_constant_result, which would import the compiler and take two seconds.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _not_importable() -> str | None:
    """Asked last, because importing takes time."""
    found = imported("triton.language", "triton", "triton")
    return found if isinstance(found, str) else None


_with_compiler: set[tuple[str | None, str | None]] = set()
"""Values of CC and PATH with which a compiler was found: every call asks, and looking takes 24 µs."""


def _no_compiler() -> str | None:
    """Triton builds a small launcher in C at first use. CC is one program to it, also if it is empty or has spaces."""
    given = os.environ.get("CC")
    environment = (given, os.environ.get("PATH"))
    if environment in _with_compiler:
        return None
    why = _why_no_compiler(given)
    if why is None:
        _with_compiler.add(environment)
    return why


def _why_no_compiler(given: str | None) -> str | None:
    if given is None:
        found = shutil.which("gcc") or shutil.which("clang")
        return None if found else "Triton needs a C compiler for its launcher; install gcc, or set CC"
    if shutil.which(given):
        return None
    return (
        f"Triton builds its launcher with the program that CC names, and there is none called {given!r}; "
        "set CC to the name or path of a C compiler, without arguments, or unset it and install gcc"
    )


@cache
def _no_header() -> str | None:
    """The launcher includes Python.h, which distributions of Linux have in a package of its own."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's; Triton does the same
    folder = sysconfig.get_paths(scheme)["include"]
    of_compiler = os.pathsep.join(os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")).split(os.pathsep)
    if any(each and os.path.isfile(os.path.join(each, "Python.h")) for each in (folder, *of_compiler)):
        return None
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return (
        f"Triton needs Python.h for its launcher, and {folder} does not have it; install the headers of this Python, "
        f"for example with apt install {package} or dnf install python3-devel"
    )


def refuses(device: torch.device, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why Triton cannot serve these tensors on this GPU, in words; None where it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    found = ".".join(map(str, capability))
    if capability < OLDEST:
        return f"it needs an NVIDIA GPU of compute capability 7.0 or newer, this one has {found}"
    if capability < OLDEST_BFLOAT16 and any(t is not None and t.dtype == torch.bfloat16 for t in tensors):
        return f"bfloat16 needs an NVIDIA GPU of compute capability 8.0 or newer, this one has {found}"
    return None


def description() -> str:
    """One line for the report."""
    version = importlib.import_module("triton").__version__
    return f"Triton {version}{', interpreted' if interpreted() else ''}"


def is_nvidia(tensor: Tensor) -> bool:
    """Whether kernels for this tensor may contain PTX."""
    return tensor.device.type == "cuda" and torch.version.hip is None


def lanes(tensor: Tensor) -> int:
    """Threads that a GPU runs together."""
    return 64 if torch.version.hip is not None and tensor.device.type == "cuda" else 32


def launch(kernel: Any, like: Tensor, n_programs: int, **arguments: Any) -> None:
    """Queue a kernel on the device of a tensor."""
    device = like.device
    module: Any = torch.get_device_module(device.type)
    with nullcontext() if device.type == "cpu" else module.device(device):
        kernel[(n_programs,)](**arguments)


def n_multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU, and 0 for the CPU."""
    return 0 if device.type == "cpu" else _n_multiprocessors(device.type, device.index or 0)


@cache
def _n_multiprocessors(device_type: str, index: int) -> int:
    properties: Any = torch.get_device_module(device_type).get_device_properties(index)
    for name in ("multi_processor_count", "max_compute_units", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 64


def sequences(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The offsets, rising and inside the row, and the sequence of each token; nothing is read on the CPU.

    The first sequence starts at 0 and the last one ends at the length, whatever the offsets say.
    """
    offsets = cu_seqlens.to(torch.int64).cummax(0).values.clamp(0, length)
    offsets[0], offsets[-1] = 0, length
    tokens = torch.arange(length, device=offsets.device)
    return offsets, torch.searchsorted(offsets[1:-1], tokens, right=True).to(torch.int32)


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy whose last dimension is contiguous."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()
