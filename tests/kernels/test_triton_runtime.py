"""Where Triton serves and why not, and its kernels on tensors of different dtypes, in Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from scan_cases import assert_close, run_scan, scan_inputs
from test_conv import conv_inputs
from test_conv import run as run_conv
from torch import Tensor

from anymamba import causal_conv1d_step, selective_scan_step
from anymamba.runtimes import triton

ROOT = Path(__file__).resolve().parents[2]
MISSING = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(MISSING, reason="the package triton is not installed (extra test)")
compiles = pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET is set")
interprets = pytest.mark.skipif(
    MISSING or not triton.interpreted(), reason="needs triton, with TRITON_INTERPRET=1; test_different_dtypes runs it"
)


# ------------------------------------------------------------------------------------------------- reasons


@pytest.fixture(autouse=True)
def asked_anew():
    """What is found here is found once a process; tests look again, and leave nothing."""
    answers = (triton._no_header, triton._not_importable)
    for answer in answers:
        answer.cache_clear()
    yield
    for answer in answers:
        answer.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Triton is there and can be imported."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton, "_not_importable", lambda: None)
    monkeypatch.delenv("CC", raising=False)
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)


def program(folder: Path, name: str) -> Path:
    """A program that does nothing."""
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@compiles
@pytest.mark.parametrize("given", ["", "ccache gcc", "/nonexistent/cc", "no-such-compiler"])
def test_triton_starts_what_CC_names_and_nothing_else(installed, monkeypatch, tmp_path, given):
    program(tmp_path, "gcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", given)
    found = str(triton.unavailable("cuda"))
    assert f"none called {given!r}" in found and "without arguments, or unset it and install gcc" in found


@compiles
def test_a_compiler_that_triton_finds(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "_no_header", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install gcc, or set CC" in str(triton.unavailable("cuda"))
    own = program(tmp_path, "mycc")
    for given in ("mycc", str(own)):
        monkeypatch.setenv("CC", given)
        assert triton.unavailable("cuda") is None
    monkeypatch.delenv("CC")
    program(tmp_path, "clang")
    assert triton.unavailable("cuda") is None


@compiles
def test_a_compiler_that_was_found_is_not_looked_for_again(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "_no_header", lambda: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, "gcc")
    assert triton.unavailable("cuda") is None
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "which", None)
        assert triton.unavailable("cuda") is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "install gcc" in str(triton.unavailable("cuda"))


@compiles
@needs_triton
@pytest.mark.parametrize("given", [None, "", "ccache gcc", "/nonexistent/cc", "gcc"])
def test_the_check_agrees_with_triton(monkeypatch, tmp_path, given):
    from triton.runtime.build import _build

    program(tmp_path, "gcc").write_text("#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    monkeypatch.delenv("CC", raising=False)
    if given is not None:
        monkeypatch.setenv("CC", given)
    if triton._no_compiler() is None:
        _build("m", "m.c", str(tmp_path), [], [], [], [])
    else:
        with pytest.raises(OSError):
            _build("m", "m.c", str(tmp_path), [], [], [], [])


@compiles
def test_the_headers_of_python(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "_no_compiler", lambda: None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    package = f"python3.{sys.version_info.minor}-dev"
    found = str(triton.unavailable("cuda"))
    assert f"{tmp_path / 'include'} does not have it" in found and f"apt install {package}" in found
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("C_INCLUDE_PATH", f"/nonexistent{os.pathsep}{tmp_path}")
    triton._no_header.cache_clear()
    assert triton.unavailable("cuda") is None


BROKEN = {
    "raise ImportError('libtriton.so: undefined symbol\\nand more')": "libtriton.so: undefined symbol",
    "raise RuntimeError": "RuntimeError",
    "import no_such_module": "No module named 'no_such_module'",
}


@pytest.mark.parametrize(("source", "words"), BROKEN.items(), ids=BROKEN.values())
def test_a_triton_that_cannot_be_imported_is_a_line_of_the_report(tmp_path, source, words):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(source)
    script = "from anymamba.ops import dispatch\nfor line in dispatch.report('cpu'): print(line.backend, line.reason)"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-1000:]
    lines = [line for line in found.stdout.splitlines() if line.startswith("triton ")]
    assert len(lines) == 2 and all(f"the package triton cannot be imported ({words});" in line for line in lines)


@compiles
def test_triton_is_imported_once_and_only_where_it_would_serve(monkeypatch):
    imports = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton, "imported", lambda *names: imports.append(names) or "broken")
    monkeypatch.setattr(triton, "_no_compiler", lambda: "no compiler")
    for device in ("cpu", "mps", "cuda"):
        assert triton.unavailable(device) != "broken"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in str(triton.unavailable("cuda")) and imports == []
    assert triton.unavailable("cpu") == triton.unavailable("cpu") == "broken" and len(imports) == 1


# ------------------------------------------------------------------------------------------------- dtypes


@compiles
@needs_triton
def test_different_dtypes():
    """In a process of its own, as in test_triton.py."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-k", "float64_beside_bfloat16 or is_traced"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def in_bfloat16(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    """The inputs with these tensors, if they are there, in bfloat16."""
    return inputs | {k: inputs[k].bfloat16() for k in names if inputs[k] is not None}


def assert_rounded_once(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """All is computed in float64; to bfloat16 the interpreter rounds towards zero, and torch to the nearest number."""
    assert got.keys() == want.keys() and {t.dtype for t in want.values()} == {torch.float64, torch.bfloat16}
    for name, value in want.items():
        tolerance = 1e-13 if value.dtype == torch.float64 else torch.finfo(torch.bfloat16).eps
        assert_close({name: got[name]}, {name: value}, tolerance)


TOKENS = ("u", "delta", "B", "C", "z")


@interprets
@pytest.mark.parametrize("lengths", [None, [4, 0, 3]], ids=["batch", "packed"])
@pytest.mark.parametrize("wide", [(), ("delta",), ("u",), ("z", "B")], ids=["parameters", "delta", "u", "z, B"])
def test_the_scan_of_float64_beside_bfloat16(lengths, wide):
    inputs = scan_inputs(1, 7, 3, 2, lengths=lengths)
    inputs = in_bfloat16(inputs, *(name for name in TOKENS if name not in wide))
    assert_rounded_once(run_scan(inputs, "triton"), run_scan(inputs, "reference"))


@interprets
@pytest.mark.parametrize("options", [{"d_state": 17, "length": 2}, {"length": 66, "d_inner": 1}], ids=str)
def test_more_launches_of_float64_beside_bfloat16(options):
    inputs = in_bfloat16(scan_inputs(**{"batch": 1, "d_inner": 2, "d_state": 1} | options), *TOKENS)
    assert_rounded_once(run_scan(inputs, "triton"), run_scan(inputs, "reference"))


@interprets
def test_one_token_of_float64_beside_bfloat16():
    inputs = in_bfloat16(scan_inputs(2, 1, 6, 5, B=2, C="constant"), *TOKENS)
    state, _ = inputs.pop("initial_state"), inputs.pop("cu_seqlens")
    now = {k: v[:, 0] if k in ("u", "delta", "z", "B") else v for k, v in inputs.items()}
    got, want = (
        dict(zip("yh", selective_scan_step(state, **now, backend=b), strict=True)) for b in ("triton", "reference")
    )
    assert_rounded_once(got, want)


@interprets
@pytest.mark.parametrize("narrow", [("x", "initial_state"), ("weight", "bias")], ids=["tokens", "parameters"])
@pytest.mark.parametrize("options", [{}, {"batch": 1, "lengths": [1, 0, 7, 3]}], ids=["batch", "packed"])
def test_the_convolution_of_float64_beside_bfloat16(options, narrow):
    inputs = in_bfloat16(conv_inputs(**options), *narrow)
    assert_rounded_once(run_conv(inputs, "triton"), run_conv(inputs, "reference"))


@interprets
def test_one_token_of_the_convolution_of_float64_beside_bfloat16():
    inputs = in_bfloat16(conv_inputs(length=1), "x", "initial_state")
    given = (inputs["initial_state"], inputs["x"][:, 0], inputs["weight"], inputs["bias"])
    (got, got_state), (want, want_state) = (causal_conv1d_step(*given, backend=b) for b in ("triton", "reference"))
    assert got.dtype == torch.bfloat16 and torch.equal(got_state, want_state)
    assert_close({"y": got}, {"y": want}, torch.finfo(torch.bfloat16).eps)


@interprets
def test_the_choice_of_triton_is_traced():
    """torch.compile cannot trace how a package is imported."""
    given = (torch.zeros(2, 3, 5), torch.ones(2, 5), torch.ones(5, 4))
    step = torch.compile(lambda *t: causal_conv1d_step(*t, backend="triton")[0], fullgraph=True, backend="eager")
    assert torch.equal(step(*given), causal_conv1d_step(*given, backend="reference")[0])
