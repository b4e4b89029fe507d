"""A folder of compiled kernels that cannot keep them is known before, is said once, and stops nothing."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path

import pytest

from anymamba.runtimes import cubins, nvrtc

VARIANT = nvrtc.Variant(nvrtc.Source("one.cu", "a kernel", ()), "one")
CUBIN = b"a cubin of some length" * 50

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs modes, links or a list of users, as of POSIX")


@pytest.fixture
def kept_in(tmp_path, monkeypatch):
    """Moves the folder of compiled kernels; the current folder is an empty one."""
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(cubins, "unkept", {})
    monkeypatch.setattr(nvrtc, "compile_anew", lambda *_: (CUBIN, ""))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "cannot_compile", lambda: None)

    def move(folder: Path | str) -> None:
        monkeypatch.setenv(cubins.CACHE_VARIABLE, str(folder))

    return move


@pytest.fixture
def nobody(monkeypatch):
    """A process without HOME, whose user has no entry in the list of users, as in some containers."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", cubins.CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def said_once() -> str:
    """What is said when a kernel is compiled and not kept; a second one must be silent."""
    with pytest.warns(RuntimeWarning) as said:
        assert nvrtc.compile_for(VARIANT, 90) == CUBIN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nvrtc.compile_for(VARIANT, 100) == CUBIN
    (one,) = said
    return str(one.message)


# ------------------------------------------------------------------------------------------------- no home folder


@posix
@pytest.mark.parametrize("wanted", [None, "~/x", "~nobody-of-that-name/x"])
def test_without_a_home_folder_kernels_run_and_the_variable_is_named(wanted, kept_in, nobody):
    if wanted:
        kept_in(wanted)
    where = wanted or "~/.cache/anymamba/cuda"
    assert nvrtc.description().endswith(f"not kept: {where} cannot be written")
    message = said_once()
    assert where in message and "home folder is not known" in message
    assert f"set {cubins.CACHE_VARIABLE} to a folder" in message
    assert os.listdir() == [], "a folder named ~ was made"


@posix
def test_a_folder_of_the_name_of_an_unknown_home_is_not_read(kept_in, nobody):
    path = Path("~", "x", "one.cubin")
    cubins.keep(path.absolute(), CUBIN)
    assert cubins.read(path.absolute()) == CUBIN and cubins.read(path) is None


@posix
def test_a_known_home_folder_serves(kept_in, tmp_path, monkeypatch):
    monkeypatch.delenv(cubins.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cubins.cache_folder() == tmp_path / ".cache" / "anymamba" / "cuda" and cubins.can_keep()
    kept_in("~/x")
    assert cubins.cache_folder() == tmp_path / "x" and cubins.can_keep()


# ------------------------------------------------------------------------------------------------- what can keep


def test_a_folder_that_is_there_or_can_be_made_can_keep(kept_in, tmp_path):
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "newer", "relative/new"):
        kept_in(folder)
        assert cubins.can_keep() and "kernels kept in" in nvrtc.description()
        nvrtc.compile_for(VARIANT, 90)
        assert len(list(Path(folder).glob("*.cubin"))) == 1


@posix
def test_a_link_to_a_folder_can_keep(kept_in, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "current")
    kept_in(tmp_path / "link" / "new")
    assert cubins.can_keep()
    nvrtc.compile_for(VARIANT, 90)
    assert len(list((tmp_path / "current" / "new").iterdir())) == 1


@posix
@pytest.mark.parametrize(
    "folder",
    ["file", "file/below", "dangling", "dangling/below", "loop", "loop/below", "x" * 300, "x" * 300 + "/below"],
    ids=lambda folder: folder.replace("x" * 300, "long"),
)
def test_what_is_no_folder_and_cannot_become_one_cannot_keep(folder, kept_in, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    kept_in(tmp_path / folder)
    before = nvrtc.description()
    assert not cubins.can_keep() and "not kept" in before
    assert cubins.CACHE_VARIABLE in said_once()
    assert nvrtc.description() == before, "it was known before"


@posix
@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
@pytest.mark.parametrize("folder", ["", "below/it"])
def test_a_folder_needs_both_rights(lacking, folder, kept_in, tmp_path, monkeypatch):
    """Simulated: root has all rights everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path or not mode & lacking)
    kept_in(tmp_path / folder)
    assert not cubins.can_keep()


@posix
@pytest.mark.parametrize("private", ["what is above", "where a link leads"])
def test_a_folder_that_may_not_be_looked_into_cannot_keep(private, kept_in, tmp_path, monkeypatch):
    """Simulated: root may look everywhere."""
    (tmp_path / "link").symlink_to(tmp_path / "current")
    kept_in(tmp_path / "link")
    assert cubins.can_keep()
    stat, lstat = os.stat, os.lstat

    def may_look(path: object, follow_symlinks: bool) -> None:
        if str(path) == str(tmp_path / "link") and (follow_symlinks or private == "what is above"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def guarded_stat(path: object, *, follow_symlinks: bool = True, **options: int) -> os.stat_result:
        may_look(path, follow_symlinks)
        return stat(path, follow_symlinks=follow_symlinks, **options)

    def guarded_lstat(path: object, **options: int) -> os.stat_result:
        may_look(path, False)
        return lstat(path, **options)

    monkeypatch.setattr(os, "stat", guarded_stat)
    monkeypatch.setattr(os, "lstat", guarded_lstat)
    assert not cubins.can_keep() and "not kept" in nvrtc.description()


# ------------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_forgotten_when_there_is_room_again(kept_in, tmp_path, monkeypatch):
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept_in(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert "No space left" in said_once()
        assert not cubins.can_keep() and list((tmp_path / "kept").iterdir()) == []
    nvrtc.compile_for(VARIANT, 90)
    assert cubins.can_keep() and "kernels kept in" in nvrtc.description()
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".cubin"]
