"""CUDA C++ compiled at first use by NVRTC, kept in a folder for later processes, and launched; no toolchain is needed.

Compiling needs no GPU: `compile_for` makes a cubin for any architecture that NVRTC knows. Kept cubins are found by
their source, options, architecture and NVRTC's version; a folder of them may be carried to another machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anymamba.base.optional import first_line, imported
from anymamba.runtimes import cubins
from anymamba.runtimes.cubins import cache_folder

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The numbers of cuda/device.cuh."""

OLDEST = 80
"""Compute capability from which kernels run, times ten: asynchronous copies and barriers came with it."""

HEADERS = Path(__file__).parent / "cuda"
"""What the kernels of all ops share."""


def _requirements() -> str:
    """What `pip install` takes to install the compiler, of the CUDA version that torch was built for."""
    major = (torch.version.cuda or "13").partition(".")[0]
    library = f"nvidia-cuda-nvrtc-cu{major}" if int(major) < 13 else f"nvidia-cuda-nvrtc=={major}.*"
    return f'"cuda-bindings=={major}.*" "{library}"'


class Source(NamedTuple):
    """A file of CUDA C++ and the headers that it may include."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]


class Variant(NamedTuple):
    """One compilation of a source: its kernel's name and the macros that are defined."""

    source: Source
    kernel: str
    options: tuple[tuple[str, int], ...] = ()

    def flags(self) -> tuple[str, ...]:
        """The options of NVRTC."""
        return ("--std=c++17", "-default-device", *(f"-D{k}={v}" for k, v in self.options))


class Device(NamedTuple):
    """What plans depend on, of a GPU."""

    capability: int
    n_multiprocessors: int
    shared_of_block: int
    """Bytes of shared memory that a block can have."""
    shared_of_multiprocessor: int


DEVICE_ATTRIBUTES = (
    "MULTIPROCESSOR_COUNT",
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
)
"""The driver's names for the fields of Device after the first."""


@cache
def source(path: Path, *folders: Path) -> Source:
    """A .cu file with the headers that it includes, of its folder, of others and of HEADERS."""
    text, headers = path.read_text("utf-8"), {}
    wanted = included(text)
    while wanted:
        name = wanted.pop()
        place = next((f / name for f in (path.parent, *folders, HEADERS) if (f / name).exists()), None)
        if place and name not in headers:
            headers[name] = place.read_text("utf-8")
            wanted += included(headers[name])
    return Source(path.name, text, tuple(sorted(headers.items())))


def included(text: str) -> list[str]:
    """The names that a source includes in quotes."""
    return re.findall(r'^#include "(.*)"', text, re.MULTILINE)


# ------------------------------------------------------------------------------------------------ what there is


@cache
def _compiler() -> Any:
    """The module cuda.bindings.nvrtc, or in words why it does not work."""
    nvrtc = _bindings("nvrtc")
    if isinstance(nvrtc, str):
        return nvrtc
    try:
        _check_nvrtc(nvrtc, nvrtc.nvrtcVersion())
    except Exception as error:  # what a missing library raises depends on the version of cuda-bindings
        return f"NVRTC cannot be loaded ({first_line(error)}); pip install {_requirements()}"
    return nvrtc


@cache
def _driver() -> Any:
    """The module cuda.bindings.driver, or in words why it does not work."""
    driver = _bindings("driver")
    if isinstance(driver, str):
        return driver
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:
        return f"there is no NVIDIA driver ({first_line(error)}); install one that fits torch.version.cuda"
    if status != driver.CUresult.CUDA_SUCCESS:
        return f"the NVIDIA driver does not start ({status.name}); install one that fits torch.version.cuda"
    return driver


def _bindings(name: str) -> Any:
    """A module of cuda.bindings, or in words why it cannot be imported."""
    return imported(f"cuda.bindings.{name}", "cuda-bindings", _requirements())


def cannot_compile() -> str | None:
    """Why CUDA C++ cannot be compiled here, in words; None where it can."""
    found = _compiler()
    return found if isinstance(found, str) else None


@cache
def _reason() -> str | None:
    if torch.version.hip:
        return "it is for NVIDIA GPUs, and this torch is built for those of AMD"
    if cannot_compile():
        return cannot_compile()
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if isinstance(_driver(), str):
        return _driver()
    return _old_driver() or _every_gpu_too_old()


def reason() -> str | None:
    """Why kernels cannot be compiled and run in this process, in words; None where they run on some GPU."""
    return _reason()


def _old_driver() -> str | None:
    """A driver runs what NVRTC compiles for its own major version of CUDA and for older ones."""
    driver = _require(_driver())
    status, newest = driver.cuDriverGetVersion()
    if status == driver.CUresult.CUDA_SUCCESS and newest // 1000 < version()[0]:
        return (
            f"the NVIDIA driver is for CUDA {newest // 1000}.{newest % 1000 // 10} and does not run what "
            f"NVRTC {_version_in_words()} compiles; install a newer driver, or a torch built for CUDA {newest // 1000}"
        )
    return None


def _every_gpu_too_old() -> str | None:
    refused = [refuses_gpu(i) for i in range(torch.cuda.device_count())]
    return None if None in refused else refused[0]


@cache
def _refuses_gpu(index: int) -> str | None:
    why = _no_architecture(device(index).capability)
    return None if why is None else f"{torch.cuda.get_device_name(index)}: {why}"


def refuses_gpu(index: int) -> str | None:
    """Why kernels do not run on a GPU by its number, in words; None where they do."""
    return _refuses_gpu(index)


# What torch.compiler.assume_constant_result sets; calling that would import the compiler, which takes two seconds.
_constant: Any
for _constant in (reason, refuses_gpu):
    _constant._dynamo_marked_constant = True


def _no_architecture(capability: int) -> str | None:
    if capability < OLDEST:
        return f"the GPU has compute capability {capability / 10}, these kernels need {OLDEST / 10} or newer"
    try:
        architecture(capability)
    except RuntimeError as error:
        return str(error)
    return None


@cache
def device(index: int) -> Device:
    """What plans depend on, of a GPU by its number."""
    driver = _require(_driver())
    attribute, found = driver.CUdevice_attribute, []
    status, handle = driver.cuDeviceGet(index)
    for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", *DEVICE_ATTRIBUTES):
        status, value = driver.cuDeviceGetAttribute(getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), handle)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the NVIDIA driver does not tell {name} of GPU {index}: {status.name}")
        found.append(value)
    return Device(10 * found[0] + found[1], *found[2:])


@cache
def version() -> tuple[int, int]:
    """NVRTC's version."""
    nvrtc = _require(_compiler())
    return _check_nvrtc(nvrtc, nvrtc.nvrtcVersion())


def _version_in_words() -> str:
    return ".".join(map(str, version()))


@cache
def architecture(capability: int) -> int:
    """The newest architecture that NVRTC knows and whose cubins a GPU of a compute capability runs.

    Raises RuntimeError where there is none.
    """
    nvrtc = _require(_compiler())
    count, *known = _check_nvrtc(nvrtc, nvrtc.nvrtcGetSupportedArchs(), unpack=False)
    names = known[0] if known else count
    fitting = [a for a in names if a // 10 == capability // 10 and a <= capability]
    if not fitting:
        raise RuntimeError(
            f"NVRTC {_version_in_words()} cannot compile for compute capability {capability / 10}; "
            "install a torch that was built for a newer CUDA"
        )
    return max(fitting)


def description() -> str:
    """The compiler's version, where compiled kernels are kept and which GPUs are refused, or what is missing."""
    if cannot_compile():
        return str(cannot_compile())
    where = f"kept in {cache_folder()}" if cubins.can_keep() else f"not kept: {cache_folder()} cannot be written"
    refused = {} if reason() else {i: refuses_gpu(i) for i in range(torch.cuda.device_count())}
    exceptions = (f"; not on cuda:{i} ({why})" for i, why in refused.items() if why is not None)
    return f"NVRTC {_version_in_words()}, compiled kernels {where}{''.join(exceptions)}"


# ------------------------------------------------------------------------------------------------ compiling


def compile_for(variant: Variant, architecture: int) -> bytes:
    """The cubin of a variant, from the folder of compiled kernels or compiled and put there."""
    path = cache_folder() / f"{_key(variant, architecture)}.cubin"
    cubin = cubins.read(path)
    if cubin is None:
        cubin, _ = compile_anew(variant, architecture)
        cubins.keep(path, cubin)
    return cubin


def _key(variant: Variant, architecture: int) -> str:
    parts = (variant.source.name, variant.source.text, variant.source.headers, variant.flags(), architecture, version())
    name = variant.source.name.removesuffix(".cu")
    return f"{name}-sm_{architecture}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"


def compile_anew(variant: Variant, architecture: int, *flags: str) -> tuple[bytes, str]:
    """The cubin and what the compiler said; `--ptxas-options=-v` among the flags lets it tell what a kernel uses.

    Raises RuntimeError with the compiler's errors.
    """
    nvrtc = _require(_compiler())
    text = variant.source.text.encode()
    headers = [(name.encode(), body.encode()) for name, body in variant.source.headers]
    program = _check_nvrtc(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            text, variant.source.name.encode(), len(headers), [b for _, b in headers], [n for n, _ in headers]
        ),
    )
    try:
        options = [f.encode() for f in (f"--gpu-architecture=sm_{architecture}", *variant.flags(), *flags)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _buffer(_check_nvrtc(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _check_nvrtc(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        said = log.decode(errors="replace").rstrip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            what = f"{variant.source.name} for sm_{architecture}"
            raise RuntimeError(f"NVRTC {_version_in_words()} cannot compile {what}:\n{said}")
        size = _check_nvrtc(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        cubin = _buffer(size)
        _check_nvrtc(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin[:size], said


def _buffer(size: int) -> bytes:
    """Memory that NVRTC may write to: longer than one byte, since Python shares bytes objects of length 0 and 1."""
    return bytes(size + 2)


def _require(found: Any) -> Any:
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _check_nvrtc(nvrtc: Any, result: tuple[Any, ...], unpack: bool = True) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC says {status.name}")
    return values[0] if unpack and len(values) == 1 else tuple(values) if values else None


# ------------------------------------------------------------------------------------------------ launching


_thread = threading.local()  # has_context: whether a context is current in a thread
_shared_lock = threading.Lock()  # for how much shared memory blocks of kernels may have

# A private function of torch that makes no object of the stream: a third of what a launch costs.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)


CLUSTERED = "\nCLUSTERED_KERNEL("
"""What a source has whose blocks run in clusters, on GPUs of the generation that brought them and newer ones."""


class Kernel:
    """A kernel on one device."""

    def __init__(self, variant: Variant, index: int, cubin: bytes | None = None) -> None:
        self._driver = driver = _require(_driver())
        self._index = index
        self._name = variant.kernel
        self._can_start_early = device(index).capability >= 90
        target = architecture(device(index).capability)
        cubin = cubin or compile_for(variant, target)
        with torch.cuda.device(index):
            torch.cuda.current_stream().cuda_stream  # noqa: B018  torch makes the context when it is first needed
            relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED  # a graph may be captured meanwhile
            self._enter()
            before = self._check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
            try:
                self._module = self._load(cubin, variant, target)
                self._function = self._check(driver.cuModuleGetFunction(self._module, variant.kernel.encode()))
                if self._can_start_early and CLUSTERED in variant.source.text:
                    self._balance_clusters()
            finally:  # unchecked: an error of this would hide the first one
                driver.cuThreadExchangeStreamCaptureMode(before)
        self._shared = 48 << 10  # what a block gets without asking

    def launch(self, n_blocks: int, threads: int, shared: int, parameters: bytes, early: bool = False) -> None:
        """Queue the kernel on the device's current stream; its one argument is the struct in `parameters`.

        Args:
            early: start it before the previous kernel ends, on GPUs that can (programmatic dependent launch). It must
                call `wait_for_previous` before it touches what earlier kernels read or write.
        """
        if n_blocks == 0:
            return
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.launch(n_blocks, threads, shared, parameters, early)
        driver = self._driver
        if not getattr(_thread, "has_context", False):
            self._enter()
        if shared > self._shared:
            self._allow(shared)
        content = ctypes.create_string_buffer(parameters, len(parameters))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(content))
        stream = _raw_stream(self._index)
        if early and self._can_start_early:
            config = _early(driver, n_blocks, threads, shared, stream)
            self._check(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))
            return None
        self._check(
            driver.cuLaunchKernel(
                self._function, n_blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0
            )
        )
        return None

    def _balance_clusters(self) -> None:
        """Have clusters go where most is free: up to 7 % faster, where their blocks have different amounts of work."""
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE
        policy = self._driver.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING
        self._driver.cuFuncSetAttribute(self._function, attribute, int(policy))  # unchecked: only a preference

    def _allow(self, shared: int) -> None:
        """Let blocks have more shared memory. Without the lock, a thread that needs less could set less afterwards."""
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with _shared_lock:
            if shared > self._shared:
                self._check(self._driver.cuFuncSetAttribute(self._function, attribute, shared))
                self._shared = shared  # last: other threads read it without the lock

    def _enter(self) -> None:
        """Give this thread torch's context where it has none, as threads of autograd may."""
        status, context = self._driver.cuCtxGetCurrent()
        if status != self._driver.CUresult.CUDA_SUCCESS or not int(context):
            handle = self._check(self._driver.cuDeviceGet(self._index))
            self._check(self._driver.cuCtxSetCurrent(self._check(self._driver.cuDevicePrimaryCtxRetain(handle))))
        _thread.has_context = True

    def _load(self, cubin: bytes, variant: Variant, target: int) -> Any:
        status, module = self._driver.cuModuleLoadData(cubin)
        if status == self._driver.CUresult.CUDA_SUCCESS:
            return module
        if status.name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise RuntimeError(
                f"the memory of cuda:{self._index} is full, so the NVIDIA driver cannot load {variant.source.name} "
                f"({status.name}); free some, with torch.cuda.empty_cache() or by ending other processes on this GPU"
            )
        _, newest = self._driver.cuDriverGetVersion()
        raise RuntimeError(
            f"the NVIDIA driver cannot load {variant.source.name} compiled for sm_{target} by NVRTC "
            f"{_version_in_words()} ({status.name}); the driver is for CUDA {newest // 1000}.{newest % 1000 // 10}, "
            'install one at least as new as NVRTC, or take backend "portable"'
        )

    def _check(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the NVIDIA driver refuses to run {self._name}: {status.name}")
        return values[0] if values else None


@lru_cache(maxsize=1024)
def _early(driver: Any, n_blocks: int, threads: int, shared: int, stream: int) -> Any:
    """The configuration of a launch that may start before the previous kernel of its stream ends. Making one takes 2 µs
    of the processor."""
    attribute, config = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = n_blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
    config.attrs, config.numAttrs = [attribute], 1
    return config


_kernels: dict[tuple[Variant, int], Kernel] = {}
_lock = threading.Lock()


def prepare(variants: Sequence[Variant], index: int) -> None:
    """Compile or load what calls of a device will need, all at once: the compiler runs on several cores."""
    absent = [v for v in variants if (v, index) not in _kernels]
    if not absent:
        return
    target = architecture(device(index).capability)
    files = list({(v.source, v.options): v for v in absent}.values())  # kernels of one file are compiled together
    with ThreadPoolExecutor(len(files)) as pool:
        compiled = pool.map(compile_for, files, [target] * len(files))
        cubins = {(v.source, v.options): cubin for v, cubin in zip(files, compiled, strict=True)}
    with _lock:
        for v in absent:
            if (v, index) not in _kernels:
                _kernels[v, index] = Kernel(v, index, cubins[v.source, v.options])


def kernel(variant: Variant, index: int) -> Kernel:
    """The kernel of a variant on a device by its number; compiled or loaded when it is first asked for."""
    found = _kernels.get((variant, index))
    if found is None:
        with _lock:
            if (variant, index) not in _kernels:
                _kernels[variant, index] = Kernel(variant, index)
            found = _kernels[variant, index]
    return found
