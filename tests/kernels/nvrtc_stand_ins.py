"""What stands in for cuda.bindings in the tests of `nvrtc`, and a kernel for them."""

from __future__ import annotations

import importlib
import types

from anymamba.base import optional
from anymamba.runtimes import nvrtc

SOURCE = nvrtc.Source("one.cu", '#include "one.cuh"\nextern "C" __global__ void one(float* x) { *x = ONE; }', ())
VARIANT = nvrtc.Variant(SOURCE._replace(headers=(("one.cuh", "#pragma once"),)), "one", (("ONE", 1),))
CUBIN = b"a cubin of some length" * 50


class Bindings:
    """cuda.bindings in place of what is installed: modules, or errors that importing them raises."""

    def __init__(self, monkeypatch, **modules):
        def import_module(name):
            if not name.startswith("cuda.bindings."):
                return importlib.import_module(name)
            found = modules.get(name.rpartition(".")[2], ModuleNotFoundError(f"No module named {name!r}", name=name))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(optional, "importlib", types.SimpleNamespace(import_module=import_module))
        self.caches = caches()
        self.clear()

    def clear(self):
        for function in self.caches:
            function.cache_clear()


def caches():
    """What this process knows about the machine."""
    functions = (
        nvrtc._compiler,
        nvrtc._driver,
        nvrtc._reason,
        nvrtc._refuses_gpu,
        nvrtc.version,
        nvrtc.architecture,
        nvrtc.device,
    )
    return [f for f in functions if hasattr(f, "cache_clear")]


def compiler(known=(75, 80, 86, 89, 90, 100, 120)):
    """A module that looks like cuda.bindings.nvrtc."""
    success = types.SimpleNamespace(name="NVRTC_SUCCESS")
    return types.SimpleNamespace(
        nvrtcResult=types.SimpleNamespace(NVRTC_SUCCESS=success),
        nvrtcVersion=lambda: (success, 13, 0),
        nvrtcGetSupportedArchs=lambda: (success, len(known), list(known)),
    )


class Driver:
    """A module that looks like cuda.bindings.driver, with GPUs of these compute capabilities."""

    def __init__(self, capabilities: list[int], cuda: int = 13000) -> None:
        self.CUresult = types.SimpleNamespace(CUDA_SUCCESS=types.SimpleNamespace(name="CUDA_SUCCESS"))
        names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", *nvrtc.DEVICE_ATTRIBUTES)
        self.CUdevice_attribute = types.SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{n}": n for n in names})
        self.capabilities, self.cuda = capabilities, cuda

    def cuInit(self, _):
        return (self.CUresult.CUDA_SUCCESS,)

    def cuDriverGetVersion(self):
        return self.CUresult.CUDA_SUCCESS, self.cuda

    def cuDeviceGet(self, index):
        return self.CUresult.CUDA_SUCCESS, index

    def cuDeviceGetAttribute(self, attribute, index):
        tens, ones = divmod(self.capabilities[index], 10)
        values = {"COMPUTE_CAPABILITY_MAJOR": tens, "COMPUTE_CAPABILITY_MINOR": ones}
        return self.CUresult.CUDA_SUCCESS, values.get(attribute, 100)
