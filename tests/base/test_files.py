"""Atomic writes: complete or not there, with the umask's permissions; what killed writers left is swept."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anymamba.base import files, locks
from anymamba.base.files import atomic_file, atomic_folder, own_file, own_folder, remove_folder, sweep, write_text

posix = pytest.mark.skipif(sys.platform == "win32", reason="sends signals, or sets a umask, as Windows does not")

WRITERS = {"save_file", "savefig", "write_text", "write_bytes", "mkstemp", "mkdtemp", "NamedTemporaryFile"}

WRITE_AND_DIE = """
    import os, signal, sys
    from pathlib import Path
    from anymamba.base.files import atomic_file, atomic_folder
    folder = Path(sys.argv[1])
    with atomic_file(folder / "model.safetensors") as a, atomic_folder(folder / "step") as b:
        a.write_bytes(bytes(1000))
        b.mkdir()
        (b / "state.json").write_text("{}")
        if len(sys.argv) > 2:
            print("writing", flush=True)
            sys.stdin.readline()
        else:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def umask():
    """Sets the umask for one test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def test_a_file_is_there_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert temporary.name == "a.json" and path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_block_that_fails_leaves_what_there_was(tmp_path: Path, write) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError, match="full"), write(tmp_path / "a") as temporary:
        temporary.mkdir()
        raise RuntimeError("full")
    assert names(tmp_path) == {"a"}


def test_a_folder_replaces_an_empty_one_or_any_when_told_to(tmp_path: Path) -> None:
    def write(text: str, **options: bool) -> None:
        with atomic_folder(tmp_path / "a", **options) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)

    (tmp_path / "a").mkdir()
    with own_folder(tmp_path / "a"):
        write("1")
    with pytest.raises(OSError) as info:
        write("2")
    assert info.value.errno in (errno.ENOTEMPTY, errno.EEXIST) or sys.platform == "win32"
    assert (tmp_path / "a" / "file").read_text() == "1"
    write("3", replace=True)
    assert (tmp_path / "a" / "file").read_text() == "3" and names(tmp_path) == {"a"}
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == set()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as info:
        write_text(tmp_path / "no" / "a.json", "")
    assert info.value.filename == str(tmp_path / "no")


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_disk_too_full_for_the_lock_keeps_no_temporary_folder(tmp_path: Path, monkeypatch, write) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left") as info, write(tmp_path / "a"):
            raise AssertionError("nothing can be written")
    assert info.value.filename == str(tmp_path)
    assert names(tmp_path) == {"a"} and locks._held == {}


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, umask, mask: int) -> None:
    """safetensors makes its files readable by their owner alone."""
    umask(mask)
    tensors = {"a": torch.zeros(2)}
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "b.safetensors")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    file, folder = 0o666 & ~mask, 0o777 & ~mask
    assert modes == {"a.safetensors": file, "folder": folder, "b.safetensors": file}


@posix
def test_the_next_owner_sweeps_what_a_killed_writer_left(tmp_path: Path) -> None:
    process = python(WRITE_AND_DIE, tmp_path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2 and all(str(process.pid) in name for name in left)
    with own_file(tmp_path / "step"):
        assert names(tmp_path) == {name for name in left if "model" in name} | {".step.lock"}
    with own_folder(tmp_path):
        assert names(tmp_path) == {files.LOCK}
    python(WRITE_AND_DIE, tmp_path).communicate()
    write_text(tmp_path / "model.safetensors", "")
    remaining = names(tmp_path)
    assert len(remaining) == 2, "the next writer of a file sweeps what is left of that file"
    sweep(tmp_path, "ste")
    assert names(tmp_path) == remaining


def test_what_a_live_writer_is_writing_is_never_swept(tmp_path: Path) -> None:
    process = python(WRITE_AND_DIE, tmp_path, "alive")
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    with own_folder(tmp_path), atomic_file(tmp_path / "model.safetensors") as temporary:
        temporary.write_text("ours")
        sweep(tmp_path)
        assert temporary.exists()
    process.communicate("\n")
    assert process.returncode == 0 and names(tmp_path) == {"model.safetensors", "step"}
    assert (tmp_path / "model.safetensors").read_bytes() == bytes(1000), "the last one to end"


@posix
def test_the_lock_files_of_killed_processes_are_swept_and_no_others(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from anymamba.base.files import own_file
        with own_file(Path(sys.argv[1])):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    python(code, tmp_path / "arm").communicate()
    for other, text in ((".theirs.lock", ""), (".soft.lock", "4711\n")):
        (tmp_path / other).write_text(text)
    with own_file(tmp_path / "mine"):
        assert names(tmp_path) == {".arm.lock", ".mine.lock", ".theirs.lock", ".soft.lock"}
        with own_folder(tmp_path):
            assert names(tmp_path) == {".lock", ".mine.lock", ".theirs.lock", ".soft.lock"}
    assert (tmp_path / ".soft.lock").read_text() == "4711\n"


def test_temporary_files_of_the_time_before_locks_go_by_their_process(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getppid()):
        (tmp_path / f".model.safetensors.{pid}.tmp").write_bytes(b"half")
    (tmp_path / f".step-00000002.{ended.pid}.tmp").mkdir()
    for other in (".hidden", "a.tmp", ".a.tmp", ".a.1x.tmp", "file"):
        (tmp_path / other).touch()
    with own_folder(tmp_path):
        pass
    assert names(tmp_path) == {
        *(".hidden", "a.tmp", ".a.tmp", ".a.1x.tmp", "file"),
        f".model.safetensors.{os.getppid()}.tmp",
    }


def written_by(path: Path) -> set[str]:
    """The names of functions that write a file, of those that a module calls."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        module = getattr(getattr(node.func, "value", None), "id", "")
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        nowhere = any(getattr(a, "attr", "") == "devnull" for a in node.args)
        opened = name == "open" and not nowhere and any(re.fullmatch("[wax]b?", mode) for mode in modes)
        if opened or name in WRITERS or (module, name) == ("torch", "save"):
            found.add(name)
    return found


def test_every_module_that_writes_files_writes_them_atomically():
    """By what it imports: a writer that asks `base.files` for nothing leaves halves, and permissions of its own."""
    source = Path(files.__file__).parents[1]
    writing = {path: found for path in source.rglob("*.py") if (found := written_by(path))}
    assert len(writing) > 8
    careless = {
        str(path.relative_to(source)): found
        for path, found in writing.items()
        if "anymamba.base.files import" not in path.read_text(encoding="utf-8") and path != Path(files.__file__)
    }
    assert careless == {}
    assert not [path for path, found in writing.items() if found & {"mkstemp", "mkdtemp", "NamedTemporaryFile"}]
