"""The kinds of device that torch can use: which one is chosen, and why another is missing here."""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import torch

ORDER = ("cuda", "xpu", "mps", "cpu")
"""Kinds of device; "auto" takes the first one that can be used. ROCm's devices are named cuda, too."""
SITE = "https://pytorch.org/get-started/locally"


class DeviceKind(NamedTuple):
    """One kind of device."""

    kind: str
    names: list[str]
    """The devices of this kind with their models, such as "cuda:0 NVIDIA H100"; empty if none can be used."""
    reason: str | None
    """Why none can be used, and what to install; None if one can."""


def device_kinds() -> list[DeviceKind]:
    """All kinds, in the order of `ORDER`."""
    return [
        DeviceKind(kind, _names(kind), None) if is_available(kind) else DeviceKind(kind, [], _why_not(kind))
        for kind in ORDER
    ]


def is_available(kind: str) -> bool:
    """Whether torch can use a device of this kind here."""
    module: Any = torch.backends.mps if kind == "mps" else getattr(torch, kind)
    return kind == "cpu" or module.is_available()


def best_device() -> torch.device:
    """The first device of the first kind that can be used."""
    return torch.device(next(kind for kind in ORDER if is_available(kind)))


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; None and "auto" give `best_device`.

    Raises ValueError if torch cannot use a device of that name here.
    """
    if name is None or name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        kind = str(name).partition(":")[0]
        known = _why_not(kind) if kind in ORDER and not is_available(kind) else None
        reason = known or _first_sentence(error)
        raise ValueError(f"device {str(name)!r} cannot be used here ({reason}); leave it out, or take auto") from error
    return device


def _names(kind: str) -> list[str]:
    if kind == "cpu":
        return [f"cpu {torch.backends.cpu.get_cpu_capability()}"]
    if kind == "mps":
        return ["mps"]
    module: Any = getattr(torch, kind)
    return [f"{kind}:{i} {module.get_device_name(i)}" for i in range(module.device_count())]


def _why_not(kind: str) -> str:
    """Why no device of this kind can be used, and the way out."""
    if kind == "cuda":
        return _why_no_cuda()
    if kind == "xpu":
        if getattr(torch.version, "xpu", None) is None:
            way_out = "for an Intel GPU: pip install torch --index-url https://download.pytorch.org/whl/xpu"
            return f"torch {torch.__version__} is built without XPU; {way_out}"
        return "no Intel GPU with a driver; for the driver see https://dgpu-docs.intel.com"
    if platform.system() != "Darwin":
        return "only on Macs with Apple silicon"
    if platform.machine() != "arm64":
        return "needs Apple silicon and a Python for arm64; this one is for " + platform.machine()
    return "needs macOS 14 or newer, and torch as built for it: pip install --upgrade torch"


def _why_no_cuda() -> str:
    if platform.system() == "Darwin":
        return "not on Macs"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA and ROCm; for an NVIDIA or AMD GPU see {SITE}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{_first_sentence(error)}; install the GPU's driver, or check CUDA_VISIBLE_DEVICES"
    return "no GPU is visible; check CUDA_VISIBLE_DEVICES"


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].removesuffix(".")
