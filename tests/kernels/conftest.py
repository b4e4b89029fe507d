"""The tests of the kernels share the inputs of the ops' tests, and stand-ins for what NVRTC needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from nvrtc_stand_ins import CUBIN, Bindings

from anymamba.runtimes import cubins, nvrtc

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))


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


@pytest.fixture
def bindings(monkeypatch):
    made: list[Bindings] = []
    yield lambda **modules: made.append(Bindings(monkeypatch, **modules))
    for one in made:
        one.clear()
