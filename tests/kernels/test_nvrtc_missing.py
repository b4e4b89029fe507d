"""What NVRTC needs and does not find is said in words."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from nvrtc_stand_ins import VARIANT, caches, compiler

from anymamba.ops import dispatch
from anymamba.runtimes import nvrtc


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
