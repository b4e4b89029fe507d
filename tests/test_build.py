"""Building and installing: with a compiler, without one, with one that fails, and from a wheel without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASK = "from anymamba.ops import dispatch; print(dispatch.report('cpu')[0])"
SCAN = """
import torch, anymamba
from anymamba.ops import dispatch
u = torch.ones(1, 40, 3)
y = anymamba.selective_scan(u, u, -torch.ones(3, 2), torch.ones(1, 40, 2), torch.ones(1, 40, 2), backend="cpu").y
print(anymamba.__file__, y.isfinite().all().item(), *dispatch.calls)
"""
BROKEN = """#!/bin/sh
case "$*" in
  *{what}*) echo "$0: error: sorry, no vectors today" >&2; exit 1;;
  *) exec {compiler} "$@";;
esac
"""


def wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Build a wheel into a folder from a copy of the sources, with the build tools that are installed."""
    source = folder / "source"
    source.mkdir()
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    surroundings = {k: v for k, v in os.environ.items() if k != "ANYMAMBA_NATIVE"} | environment
    return subprocess.run(command, env=surroundings, capture_output=True, text=True)


def installed(folder: Path, code: str) -> str:
    """Install the folder's wheel into a separate place, and run Python code with it, without a compiler."""
    (file,) = folder.glob("*.whl")
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(file)]
    subprocess.run(pip, check=True, capture_output=True)
    lines = f"import sys; sys.path.insert(0, {str(target)!r}); sys.meta_path[:] = [f for f in sys.meta_path "
    lines += "if 'Editable' not in type(f).__name__ and 'Redirecting' not in type(f).__name__]\n"
    surroundings = os.environ | {"PATH": "", "CXX": str(folder / "nowhere")}
    result = subprocess.run([sys.executable, "-c", lines + code], env=surroundings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(target) in result.stdout or "anymamba" not in code.split("print")[-1]
    return result.stdout


def test_without_a_compiler_the_package_installs_and_says_so(tmp_path):
    built = wheel(tmp_path, CXX=str(tmp_path / "nowhere"))
    assert built.returncode == 0, built.stderr
    assert "available=False" in (line := installed(tmp_path, ASK)) and "no C++ compiler was found" in line


def test_left_out_on_request(tmp_path):
    assert wheel(tmp_path, ANYMAMBA_NATIVE="off").returncode == 0
    assert "left out by ANYMAMBA_NATIVE=off" in installed(tmp_path, ASK)
    assert (tmp_path / "site" / "anymamba" / "serving" / "page" / "files" / "index.html").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="the failing compiler is a shell script")
@pytest.mark.parametrize("what", ["scan.cpp"])
def test_a_compiler_that_fails_is_quoted(tmp_path, what):
    compiler = tmp_path / "compiler"
    compiler.write_text(BROKEN.format(what=what, compiler=shutil.which("c++")))
    compiler.chmod(0o755)
    built = wheel(tmp_path, CXX=str(compiler))
    assert built.returncode == 0, built.stderr
    assert "last error was: " in (line := installed(tmp_path, ASK)) and "sorry, no vectors today" in line


def test_required_makes_a_missing_compiler_an_error(tmp_path):
    built = wheel(tmp_path, CXX=str(tmp_path / "nowhere"), ANYMAMBA_NATIVE="required")
    assert built.returncode != 0
    assert "ANYMAMBA_NATIVE=required, but no C++ compiler" in built.stdout + built.stderr


def test_a_wheel_works_where_there_is_no_compiler(tmp_path):
    built = wheel(tmp_path, ANYMAMBA_NATIVE="required")
    assert built.returncode == 0, built.stderr
    (file,) = tmp_path.glob("*.whl")
    tags = file.stem.split("-")[2:]
    assert tags[0].startswith("cp") and tags[-1] != "any"
    assert (tags[1] == "abi3") == (sys.version_info >= (3, 12)), "the stable ABI is from Python 3.12 on"
    place, finite, *calls = installed(tmp_path, SCAN).split(maxsplit=2)
    assert str(tmp_path) in place and finite == "True" and "'cpu'" in " ".join(calls)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' runtimes differ elsewhere")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_are_clean_under_sanitizers(tmp_path, sanitizers):
    flags = [f"-fsanitize={sanitizers}", *(["-fno-sanitize-recover=all"] if "undefined" in sanitizers else [])]
    result = subprocess.run([ROOT / "tests/native/run", tmp_path, *flags], capture_output=True, text=True)
    assert result.returncode == 0 and " 0 wrong values" in result.stdout, result.stdout + result.stderr
