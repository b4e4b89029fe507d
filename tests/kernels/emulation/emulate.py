"""CUDA kernels run on the processor: compiled by g++ with emulated.h, which runs the threads of a block as fibers."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from anymamba.runtimes import nvrtc, replaying

HERE = Path(__file__).parent

LAUNCHER = """
extern "C" int launch_{kernel}(const Parameters* p, i64 blocks, int threads, u64 shared, int backwards) {{
    return emulated::launch([&] {{ {kernel}(*p); }}, blocks, threads, shared, backwards, {cluster});
}}
"""

KERNEL = r"^(?:KERNEL|CLUSTERED_KERNEL\((\w+),).*?\) (\w+)\("
"""The blocks of a cluster, if there are clusters, and the name of a kernel."""

SIZE = """
extern "C" u64 size_of_parameters() { return sizeof(Parameters); }
"""


def missing() -> str | None:
    """Why kernels cannot be emulated here."""
    return None if shutil.which("g++") else "there is no g++"


@cache
def folder() -> Path:
    """Where this process keeps what it compiles."""
    return Path(tempfile.mkdtemp(prefix="emulated-"))


@cache
def library(variant: nvrtc.Variant) -> ctypes.CDLL:
    """All kernels of a variant's source, with its options, as a shared library."""
    if variant.kernel:
        return library(variant._replace(kernel=""))
    name = hashlib.sha256(repr(variant).encode()).hexdigest()[:16]
    path = folder() / f"{name}.cpp"
    kernels = re.findall(KERNEL, variant.source.text, re.MULTILINE)
    launchers = (LAUNCHER.format(kernel=kernel, cluster=cluster or 1) for cluster, kernel in kernels)
    path.write_text("".join([variant.source.text, *launchers, SIZE]))
    for header, text in variant.source.headers:
        (folder() / header).write_text(text)
    defines = [f"-D{k}={v}" for k, v in variant.options]
    flags = ["-std=c++17", "-O1", "-g1", "-w", "-shared", "-fPIC", "-DANYMAMBA_EMULATED", f"-I{HERE}", *defines]
    target = path.with_suffix(".so")
    subprocess.run(["g++", *flags, str(path), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


class Kernel:
    """What `nvrtc.kernel` returns, on the processor."""

    backwards = False
    """Whether the threads of a warp run in the other order between synchronisations."""

    def __init__(self, variant: nvrtc.Variant) -> None:
        self._variant = variant

    def launch(self, n_blocks: int, threads: int, shared: int, parameters: bytes, early: bool = False) -> None:
        assert shared <= nvrtc.device(0).shared_of_block, f"a block of this GPU has no {shared} bytes of shared memory"
        compiled = library(self._variant)
        compiled.size_of_parameters.restype = ctypes.c_uint64
        assert compiled.size_of_parameters() == len(parameters), "call.py and the header disagree about Parameters"
        status = getattr(compiled, f"launch_{self._variant.kernel}")(
            parameters,
            ctypes.c_int64(n_blocks),
            ctypes.c_int(threads),
            ctypes.c_uint64(shared),
            ctypes.c_int(self.backwards),
        )
        assert status == 0, f"{self._variant.source.name} {self._variant.options}: see stderr"


def patch(monkeypatch, n_multiprocessors: int = 4) -> None:
    """Have the backends run on tensors of the processor."""
    device = nvrtc.Device(90, n_multiprocessors, 227 << 10, 228 << 10)
    monkeypatch.setattr(nvrtc, "kernel", lambda variant, index: Kernel(variant))
    monkeypatch.setattr(nvrtc, "prepare", lambda variants, index: None)
    monkeypatch.setattr(nvrtc, "device", lambda index: device)
    monkeypatch.setattr(replaying, "_plans", {})  # those of other kernels and devices
