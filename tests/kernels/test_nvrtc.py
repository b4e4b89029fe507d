"""Compiled CUDA kernels are kept and found again, whatever happens to their folder; and which GPUs are served."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import warnings

import pytest
import torch
from nvrtc_stand_ins import CUBIN, SOURCE, VARIANT, Driver, compiler

from anymamba.ops import dispatch
from anymamba.runtimes import cubins, nvrtc

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


# ------------------------------------------------------------------------------------------------- which GPUs


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
