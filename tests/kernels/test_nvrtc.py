"""Compiled CUDA kernels are kept and found again, whatever happens to their folder; and what is missing is said."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import re
import sys
import threading
import types
import warnings
from contextlib import nullcontext

import pytest
import torch

from anymamba.base import optional
from anymamba.ops import dispatch
from anymamba.runtimes import cubins, nvrtc

SOURCE = nvrtc.Source("one.cu", '#include "one.cuh"\nextern "C" __global__ void one(float* x) { *x = ONE; }', ())
VARIANT = nvrtc.Variant(SOURCE._replace(headers=(("one.cuh", "#pragma once"),)), "one", (("ONE", 1),))
CUBIN = b"a cubin of some length" * 50


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of its own for what is compiled."""
    monkeypatch.setenv(cubins.CACHE_VARIABLE, str(tmp_path / "kept"))
    monkeypatch.setattr(cubins, "unkept", {})
    return tmp_path / "kept"


@pytest.fixture
def compiled(folder, monkeypatch):
    """A compiler that writes down what it is asked for."""
    asked: list[tuple[nvrtc.Variant, int]] = []

    def compile_anew(variant: nvrtc.Variant, architecture: int, *flags: str) -> tuple[bytes, str]:
        asked.append((variant, architecture))
        return CUBIN, ""

    monkeypatch.setattr(nvrtc, "compile_anew", compile_anew)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "cannot_compile", lambda: None)
    return asked


needs_compiler = pytest.mark.skipif(nvrtc.cannot_compile() is not None, reason=str(nvrtc.cannot_compile()))


# ------------------------------------------------------------------------------------------------- keeping


def test_what_is_compiled_is_kept(compiled, folder):
    assert nvrtc.compile_for(VARIANT, 90) == nvrtc.compile_for(VARIANT, 90) == CUBIN
    assert len(compiled) == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


@pytest.mark.parametrize("what", ["text", "name", "header", "option", "architecture", "version"])
def test_every_part_of_a_compilation_is_its_name(what, compiled, monkeypatch):
    nvrtc.compile_for(VARIANT, 90)
    source, architecture = VARIANT.source, 90
    other = {
        "text": VARIANT._replace(source=source._replace(text=source.text + " ")),
        "name": VARIANT._replace(source=source._replace(name="two.cu")),
        "header": VARIANT._replace(source=source._replace(headers=(("one.cuh", "#pragma once\n"),))),
        "option": VARIANT._replace(options=(("ONE", 2),)),
    }.get(what, VARIANT)
    if what == "architecture":
        architecture = 100
    if what == "version":
        monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    nvrtc.compile_for(other, architecture)
    assert len(compiled) == 2


def test_kernels_of_one_compilation_share_it(compiled):
    nvrtc.compile_for(VARIANT, 90)
    nvrtc.compile_for(VARIANT._replace(kernel="another"), 90)
    assert len(compiled) == 1


def test_the_folder_moves_with_its_variable(compiled, folder, tmp_path, monkeypatch):
    nvrtc.compile_for(VARIANT, 90)
    monkeypatch.setenv(cubins.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    nvrtc.compile_for(VARIANT, 90)
    assert len(list((tmp_path / "elsewhere").iterdir())) == len(list(folder.iterdir())) == 1
    assert str(tmp_path / "elsewhere") in nvrtc.description()
    monkeypatch.delenv(cubins.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of-user"))
    assert cubins.cache_folder() == tmp_path / "of-user" / "anymamba" / "cuda" or os.name == "nt"


def test_a_carried_folder_needs_no_compiler(compiled, folder, monkeypatch):
    nvrtc.compile_for(VARIANT, 90)
    folder.rename(folder.parent / "carried")
    monkeypatch.setenv(cubins.CACHE_VARIABLE, str(folder.parent / "carried"))
    assert nvrtc.compile_for(VARIANT, 90) == CUBIN
    assert len(compiled) == 1


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "only its hash": lambda content: content[:32],
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "another's hash": lambda content: bytes(32) + content[32:],
    "longer": lambda content: content + b"x",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_compiled_anew(how, compiled, folder):
    nvrtc.compile_for(VARIANT, 90)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[how](whole))
    assert nvrtc.compile_for(VARIANT, 90) == CUBIN
    assert len(compiled) == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_once(compiled, folder):
    folder.write_text("a file lies where the folder would")
    with pytest.warns(RuntimeWarning, match=cubins.CACHE_VARIABLE):
        assert nvrtc.compile_for(VARIANT, 90) == CUBIN
    assert "not kept" in nvrtc.description()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nvrtc.compile_for(VARIANT._replace(options=()), 90) == CUBIN


def test_a_full_disk_leaves_nothing_behind(compiled, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert nvrtc.compile_for(VARIANT, 90) == CUBIN
    assert list(folder.iterdir()) == []


def write_and_read(path) -> int:
    """How often a file that others write was not there or not whole."""
    bad = 0
    for _ in range(200):
        cubins.keep(path, CUBIN)
        bad += cubins.read(path) != CUBIN
    return bad


def test_many_processes_write_one_file(tmp_path):
    with multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn").Pool(4) as pool:
        assert pool.map(write_and_read, [tmp_path / "kept" / "one.cubin"] * 4) == [0] * 4
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["one.cubin"]


# ------------------------------------------------------------------------------------------------- what is missing


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


@pytest.fixture
def bindings(monkeypatch):
    made: list[Bindings] = []
    yield lambda **modules: made.append(Bindings(monkeypatch, **modules))
    for one in made:
        one.clear()


def compiler(known=(75, 80, 86, 89, 90, 100, 120)):
    """A module that looks like cuda.bindings.nvrtc."""
    success = types.SimpleNamespace(name="NVRTC_SUCCESS")
    return types.SimpleNamespace(
        nvrtcResult=types.SimpleNamespace(NVRTC_SUCCESS=success),
        nvrtcVersion=lambda: (success, 13, 0),
        nvrtcGetSupportedArchs=lambda: (success, len(known), list(known)),
    )


def broken_library():
    raise RuntimeError("Failure finding libnvrtc.so\nand much more")


def test_without_bindings_the_package_is_named(bindings):
    bindings()
    assert "cuda-bindings is not installed" in nvrtc.reason()
    assert 'pip install "cuda-bindings==' in nvrtc.reason() and "nvidia-cuda-nvrtc" in nvrtc.reason()
    with pytest.raises(RuntimeError, match="cuda-bindings is not installed"):
        nvrtc.compile_anew(VARIANT, 90)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A folder that is searched first, as that of a script is; nothing called cuda has been imported."""
    known = [name for name in sys.modules if name.partition(".")[0] == "cuda"]
    with monkeypatch.context() as patch:
        for name in known:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(tmp_path))
        for function in caches():
            function.cache_clear()
        yield tmp_path
        for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
            del sys.modules[name]  # `patch` puts back what was there before
    for function in caches():
        function.cache_clear()


def missing(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("error", [missing("cuda"), missing("cuda.bindings"), "the module"], ids=str)
@pytest.mark.parametrize("module", ["nvrtc", "driver"])
def test_not_installed_is_said_of_a_package_that_is_not_there(module, error, bindings):
    error = missing(f"cuda.bindings.{module}") if error == "the module" else error
    bindings(**{module: error})
    found = nvrtc._compiler() if module == "nvrtc" else nvrtc._driver()
    assert re.fullmatch(r'the package cuda-bindings is not installed; pip install "cuda-b.*nvidia-cuda-nvrtc.*', found)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libstdc++.so.6: version GLIBCXX_3.4.32 not found\nand much more"),
        missing("numpy"),
        missing("cuda.bindings.cynvrtc"),
        missing("cuda.bin"),
        RuntimeError("a setting is wrong\nand much more"),
        OSError(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("module", ["nvrtc", "driver"])
def test_bindings_that_cannot_be_imported_say_why(module, error, bindings):
    bindings(**{module: error})
    found = nvrtc._compiler() if module == "nvrtc" else nvrtc._driver()
    line = str(error).partition("\n")[0] or "OSError"
    assert found.startswith(f"the package cuda-bindings cannot be imported ({line}); install what it lacks")
    assert "not installed" not in found and "pip install --force-reinstall" in found and "\n" not in found


@pytest.mark.parametrize("content", ["x = 1", "raise SystemExit('the script ran twice')"])
def test_a_script_called_cuda_is_named_and_not_run(content, script):
    (script / "cuda.py").write_text(content)
    for found in (nvrtc.cannot_compile(), nvrtc._driver()):
        assert found.startswith(f"{script / 'cuda.py'} is found in place of the package cuda-bindings")
        assert found.endswith("rename it")
    assert "cuda" not in sys.modules


def test_a_script_called_cuda_that_was_imported_is_named(script, monkeypatch):
    (script / "cuda.py").write_text("")
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    sys.modules["cuda"].__file__ = str(script / "cuda.py")
    assert nvrtc.cannot_compile().startswith(f"{script / 'cuda.py'} is found in place of")


def test_bindings_that_raise_while_they_are_imported_are_told_in_the_report(script, monkeypatch):
    (script / "cuda" / "bindings").mkdir(parents=True)
    for name in ("__init__.py", "bindings/__init__.py"):
        (script / "cuda" / name).write_text("")
    (script / "cuda" / "bindings" / "nvrtc.py").write_text("raise RuntimeError('no such release')")
    monkeypatch.setattr(torch.version, "hip", None)
    lines = [line for line in dispatch.report("cuda") if line.backend == "cuda"]
    assert lines and not any(line.available for line in lines)
    assert all("cuda-bindings cannot be imported (no such release)" in line.reason for line in lines)


def test_without_the_library_its_package_is_named(bindings):
    module = compiler()
    module.nvrtcVersion = broken_library
    bindings(nvrtc=module)
    assert "NVRTC cannot be loaded (Failure finding libnvrtc.so)" in nvrtc.reason()
    assert "nvidia-cuda-nvrtc" in nvrtc.reason()


def test_without_a_gpu_that_is_said(bindings, monkeypatch):
    bindings(nvrtc=compiler())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvrtc.reason() == "torch sees no NVIDIA GPU"


@pytest.mark.parametrize("driver", [ImportError("libcuda.so.1"), "fails", "raises"])
def test_without_a_driver_that_is_said(driver, bindings, monkeypatch):
    success = types.SimpleNamespace(name="CUDA_SUCCESS")
    module = types.SimpleNamespace(CUresult=types.SimpleNamespace(CUDA_SUCCESS=success))
    module.cuInit = (lambda _: (types.SimpleNamespace(name="NO_DEVICE"),)) if driver == "fails" else broken_library
    if driver == "raises":
        module.cuInit = lambda _: broken_library()
    bindings(nvrtc=compiler(), driver=driver if isinstance(driver, Exception) else module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "install" in nvrtc.reason()


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


@pytest.fixture
def gpus(bindings, monkeypatch):
    """Makes this a machine with GPUs."""

    def make(*capabilities: int, cuda: int = 13000) -> None:
        bindings(nvrtc=compiler(), driver=Driver(list(capabilities), cuda))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")

    return make


def test_a_gpu_is_refused_by_name_and_others_serve(gpus):
    gpus(75, 90)
    assert nvrtc.reason() is None and nvrtc.refuses_gpu(1) is None
    assert nvrtc.refuses_gpu(0) == "card 0: the GPU has compute capability 7.5, these kernels need 8.0 or newer"
    gpus(75)
    assert nvrtc.reason() == nvrtc.refuses_gpu(0)


def test_the_report_says_which_gpus_are_refused(gpus):
    def words() -> set[str]:
        return {line.reason for line in dispatch.report("cuda") if line.backend == "cuda" and line.available}

    gpus(75, 90, 60)
    (found,) = words()
    assert all(f"; not on cuda:{i} ({nvrtc.refuses_gpu(i)})" in found for i in (0, 2)) and "cuda:1" not in found
    gpus(90, 90)
    (found,) = words()
    assert found.startswith("CUDA C++: NVRTC 13.0, compiled kernels") and "not on" not in found


def test_a_driver_of_an_older_cuda_is_said_before_anything_is_compiled(gpus):
    gpus(90, cuda=12080)
    assert re.search(r"driver is for CUDA 12\.8 and does not run what NVRTC 13\.0 .* newer driver", nvrtc.reason())
    gpus(90, cuda=13010)
    assert nvrtc.reason() is None


def test_a_torch_for_amd_is_said(gpus, monkeypatch):
    gpus(90)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "AMD" in nvrtc.reason()


def test_what_calls_need_is_compiled_at_once(gpus, compiled, monkeypatch):
    """A file of several kernels once, and what is loaded already not at all."""
    gpus(90)
    loaded: list[tuple[nvrtc.Variant, bytes]] = []
    monkeypatch.setattr(nvrtc, "_kernels", {})
    monkeypatch.setattr(nvrtc, "Kernel", lambda variant, index, cubin: loaded.append((variant, cubin)))
    wanted = [VARIANT, VARIANT._replace(kernel="two"), VARIANT._replace(options=())]
    nvrtc.prepare(wanted, 0)
    assert len(compiled) == 2 and loaded == [(v, CUBIN) for v in wanted]
    nvrtc.prepare(wanted, 0)
    assert len(loaded) == 3


def test_a_source_has_the_headers_that_it_includes(tmp_path):
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include "device.cuh"\n')
    (tmp_path / "b.cuh").write_text('#include "c.cuh"\n')
    for name in ("c.cuh", "d.cuh"):
        (tmp_path / name).write_text("")
    assert [name for name, _ in nvrtc.source(tmp_path / "a.cu").headers] == ["b.cuh", "c.cuh", "device.cuh"]


@pytest.mark.parametrize(
    ("capability", "expected"), [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (100, 100), (103, 100), (121, 120)]
)
def test_a_gpu_gets_the_newest_code_that_it_runs(capability, expected, bindings):
    bindings(nvrtc=compiler())
    assert nvrtc.architecture(capability) == expected
    assert nvrtc._no_architecture(capability) is None


@pytest.mark.parametrize(("capability", "words"), [(75, "8.0 or newer"), (130, "newer CUDA")])
def test_a_gpu_too_old_or_too_new_is_said(capability, words, bindings):
    bindings(nvrtc=compiler())
    assert words in nvrtc._no_architecture(capability)
    assert str(capability / 10) in nvrtc._no_architecture(capability)


class Launching(Driver):
    """A driver that also loads and launches kernels of one GPU."""

    def __init__(self, loads: str = "CUDA_SUCCESS", gets: str = "CUDA_SUCCESS", cuda: int = 13000) -> None:
        super().__init__([90], cuda)
        self.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
        name = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        self.CUfunction_attribute = types.SimpleNamespace(**{name: name})
        self.loads, self.gets, self.mode, self.allowed, self.n_set = loads, gets, "global", 48 << 10, 0

    def status(self, name):
        success = self.CUresult.CUDA_SUCCESS
        return success if name == success.name else types.SimpleNamespace(name=name)

    def cuCtxGetCurrent(self):
        return self.status("CUDA_SUCCESS"), 1

    def cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.mode = self.mode, mode
        return self.status("CUDA_SUCCESS"), before

    def cuModuleLoadData(self, cubin):
        return self.status(self.loads), None

    def cuModuleGetFunction(self, module, name):
        return self.status(self.gets), None

    def cuFuncSetAttribute(self, function, attribute, value):
        self.allowed, self.n_set = value, self.n_set + 1
        return (self.status("CUDA_SUCCESS"),)

    def cuLaunchKernel(self, function, *sizes_and_more):
        return (self.status("CUDA_SUCCESS" if sizes_and_more[6] <= self.allowed else "CUDA_ERROR_INVALID_VALUE"),)


@pytest.fixture
def made(bindings, monkeypatch):
    """Makes a kernel of a driver that stands in for NVIDIA's."""

    def make(driver: Launching) -> nvrtc.Kernel:
        bindings(nvrtc=compiler(), driver=driver)
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: types.SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(nvrtc, "_raw_stream", lambda index: 0)
        monkeypatch.setattr(nvrtc, "_thread", threading.local())
        return nvrtc.Kernel(VARIANT, 0, CUBIN)

    return make


def test_a_driver_too_old_for_the_compiler_is_said(made):
    with pytest.raises(
        RuntimeError, match=r"by NVRTC 13\.0 .*is for CUDA 12\.4, install one at least as new.*portable"
    ):
        made(Launching(loads="CUDA_ERROR_UNSUPPORTED_PTX_VERSION", cuda=12040))


def test_a_full_gpu_is_said_and_not_blamed_on_the_driver(made):
    with pytest.raises(
        RuntimeError, match=r"the memory of cuda:0 is full.*one\.cu.*OUT_OF_MEMORY.*; free some"
    ) as error:
        made(Launching(loads="CUDA_ERROR_OUT_OF_MEMORY"))
    assert "install" not in str(error.value)


@pytest.mark.parametrize("fails", ["loads", "gets", None])
def test_the_capture_mode_of_a_thread_is_put_back(fails, made):
    driver = Launching(**({fails: "CUDA_ERROR_INVALID_IMAGE"} if fails else {}))
    with pytest.raises(RuntimeError, match="INVALID_IMAGE") if fails else nullcontext():
        made(driver)
    assert driver.mode == "global"


def test_threads_may_launch_a_kernel_with_different_shared_memory(made):
    """While the driver allows one thread more, another asks for less."""
    small, large = 60000, 120000
    driver = Launching()
    kernel = made(driver)
    allowed, go_on = threading.Event(), threading.Event()
    set_attribute, launched, errors = driver.cuFuncSetAttribute, [], []

    def slowly(function, attribute, value):
        status = set_attribute(function, attribute, value)
        if value == large and not allowed.is_set():
            allowed.set()
            go_on.wait(10)
        return status

    def launch(shared):
        try:
            kernel.launch(1, 32, shared, bytes(8))
            launched.append(shared)
        except RuntimeError as error:
            errors.append(error)

    driver.cuFuncSetAttribute = slowly
    threads = [threading.Thread(target=launch, args=(shared,)) for shared in (large, small)]
    threads[0].start()
    assert allowed.wait(10)
    threads[1].start()
    threads[1].join(0.3)  # without a lock it ends here
    go_on.set()
    for thread in threads:
        thread.join(10)
    launch(large)
    assert not errors and sorted(launched) == [small, large, large]
    assert driver.allowed == large and driver.n_set == 1


def test_shared_memory_is_asked_for_once_and_without_waiting(made, monkeypatch):
    driver = Launching()
    kernel = made(driver)
    for shared in (100, 48 << 10, 60000, 50000, 60000):
        kernel.launch(1, 32, shared, bytes(8))
    assert driver.n_set == 1
    monkeypatch.setattr(nvrtc, "_shared_lock", None)  # nothing is to be set, so no lock is taken
    kernel.launch(1, 32, 60000, bytes(8))


# ------------------------------------------------------------------------------------------------- the compiler itself


@needs_compiler
def test_a_compiled_kernel_is_a_cubin(folder):
    cubin = nvrtc.compile_for(VARIANT, 90)
    assert cubin.startswith(b"\x7fELF") and b"one" in cubin
    assert [bytes([i])[0] for i in range(256)] == list(range(256)), "an empty log was written into a shared object"


@needs_compiler
def test_errors_of_the_compiler_are_shown(folder):
    broken = VARIANT._replace(source=SOURCE._replace(text="no kernel"))
    with pytest.raises(RuntimeError, match=r"one\.cu for sm_90:\n.*one\.cu\(1\): error"):
        nvrtc.compile_for(broken, 90)
    assert not folder.exists()
