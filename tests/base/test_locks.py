"""Locks: one holder, named to the others, gone with its process however that ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anymamba.base import locks
from anymamba.base.errors import InUseError
from anymamba.base.files import LOCK, contents, own_file, own_folder
from anymamba.base.locks import Lock

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks, or sends signals, as Windows does not")

HOLD = """
    import sys, time
    from pathlib import Path
    from anymamba.base.files import own_folder
    with own_folder(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs this code; closing its stdin lets it go on."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that owns the folder `run`."""
    process = python(HOLD, tmp_path / "run")
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_owner_is_told_who_is_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InUseError) as info, own_folder(tmp_path / "run", wait=0):
        raise AssertionError("two owners")
    message = str(info.value)
    assert message.startswith(f"{tmp_path / 'run'} is in use by `-c ")
    assert f"process {holder.pid} on " in message and "since 20" in message and f"kill {holder.pid}" in message
    record = json.loads((tmp_path / "run" / LOCK).read_text())
    assert record["pid"] == holder.pid and set(record) == {"pid", "host", "command", "since"}


def test_an_owner_that_ends_is_waited_for(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    threading.Timer(0.3, holder.communicate, ["\n"]).start()
    with own_folder(tmp_path / "run", wait=30):
        assert holder.wait(timeout=30) == 0


def test_waiting_has_an_end(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    with pytest.raises(InUseError, match=f"process {holder.pid}"), own_folder(tmp_path / "run", wait=0.2):
        raise AssertionError("two owners")
    assert 0.2 <= time.monotonic() - start < 5


def test_who_waits_long_is_told_why(tmp_path: Path, holder: subprocess.Popen[str], caplog, monkeypatch) -> None:
    monkeypatch.setattr(locks, "_LOG_AFTER", 0.05)
    with pytest.raises(InUseError), own_folder(tmp_path / "run", wait=0.3):
        raise AssertionError("two owners")
    (line,) = caplog.messages
    assert line.startswith(f"waiting for {tmp_path / 'run'}, in use by") and str(holder.pid) in line


@posix
def test_a_killed_owner_owns_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists(), "its lock file is left"
    with own_folder(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


@posix
def test_the_lock_does_not_live_on_in_the_children_of_a_killed_owner(tmp_path: Path) -> None:
    """A worker of a data loader, say, which notices the death of its parent only seconds later."""
    code = """
        import os, sys, time
        from pathlib import Path
        from anymamba.base.files import own_folder
        with own_folder(Path(sys.argv[1])):
            child = os.fork()
            if child == 0:
                os.close(1)
                time.sleep(60)
            print(child, flush=True)
            time.sleep(60)
    """
    process = python(code, tmp_path / "run")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # is alive
        with own_folder(tmp_path / "run", wait=1):  # the child may be about to close what it inherited
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@posix
def test_a_forked_child_neither_holds_nor_releases_its_parents_lock(tmp_path: Path) -> None:
    with own_folder(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            lock = Lock(tmp_path / "run" / LOCK)
            lock.release()
            os._exit(1 if lock.try_acquire() else 0)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / "run" / LOCK).exists()


def test_a_thread_owns_a_folder_as_often_as_it_likes(tmp_path: Path) -> None:
    with own_folder(tmp_path / "run"):
        with own_folder(tmp_path / "run"), own_folder(tmp_path / "x" / ".." / "run"):
            pass
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists()


def test_another_thread_is_another_owner(tmp_path: Path) -> None:
    def own() -> str:
        try:
            with own_folder(tmp_path / "run", wait=0):
                return "owned"
        except InUseError as error:
            return str(error)

    with ThreadPoolExecutor(1) as pool:
        with own_folder(tmp_path / "run"):
            assert "in use by another thread of this process" in pool.submit(own).result()
        assert pool.submit(own).result() == "owned"


def test_never_two_owners(tmp_path: Path) -> None:
    """Eight processes take turns a hundred times each; the lock file is made and removed all the time."""
    code = """
        import os, sys
        from pathlib import Path
        from anymamba.base.files import own_folder
        run, turns = Path(sys.argv[1]), 0
        while turns < 100:
            with own_folder(run, wait=60):
                os.mkdir(run / "taken")
                os.rmdir(run / "taken")
                turns += 1
        print(turns)
    """
    processes = [python(code, tmp_path / "run") for _ in range(8)]
    assert [process.communicate(timeout=100)[0] for process in processes] == ["100\n"] * 8
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("own", [own_folder, lambda run: own_file(run / "file")], ids=["folder", "file"])
@pytest.mark.parametrize("when", ["before it is seen", "before it is locked"])
def test_a_folder_that_another_owner_removes_is_made_again(tmp_path: Path, monkeypatch, own, when: str) -> None:
    run, seen = tmp_path / "run", []
    mkdir, acquire = Path.mkdir, Lock.acquire

    def mkdir_too_early(self: Path, *arguments: object, **options: object) -> None:
        seen.append(self)
        if len(seen) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        mkdir(self, *arguments, **options)

    def acquire_too_late(self: Lock, *arguments: object) -> None:
        seen.append(self.path)
        if len(seen) == 1:
            run.rmdir()
        acquire(self, *arguments)

    if when == "before it is seen":
        monkeypatch.setattr(Path, "mkdir", mkdir_too_early)
    else:
        monkeypatch.setattr(Lock, "acquire", acquire_too_late)
    with own(run):
        assert run.is_dir()
    assert len(seen) >= 2


def test_a_new_folder_that_stays_empty_goes_and_others_stay(tmp_path: Path) -> None:
    with own_folder(tmp_path / "a" / "new"):
        assert contents(tmp_path / "a" / "new") == []
    assert not (tmp_path / "a" / "new").exists()
    (tmp_path / "old").mkdir()
    with own_folder(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()
    with own_folder(tmp_path / "filled"):
        (tmp_path / "filled" / "file").touch()
    assert contents(tmp_path / "filled") == [tmp_path / "filled" / "file"]


def test_what_cannot_be_owned(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(OSError), own_folder(folder):
            pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(PermissionError) as info, own_folder(tmp_path / "run"):
        pass
    assert info.value.filename == str(tmp_path / "run")


def full(descriptor: int, content: bytes) -> int:
    """What os.write does on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_lock_whose_record_cannot_be_written_is_not_held(tmp_path: Path, monkeypatch) -> None:
    lock, descriptors = Lock(tmp_path / LOCK), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: descriptors.append(descriptor) or full(0, content))
        with pytest.raises(OSError, match="No space left"):
            lock.try_acquire()
    assert locks._held == {} and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptors[0])
    assert lock.try_acquire(again=False)
    lock.release()


@posix
@pytest.mark.parametrize("fails", ["flock", "stat"])
def test_a_lock_that_cannot_be_taken_is_not_left_open(tmp_path: Path, monkeypatch, fails: str) -> None:
    descriptors = []

    def fail(*arguments: object) -> None:
        descriptors.append(arguments[0])
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(*{"flock": ("fcntl.flock", fail), "stat": (locks, "_is_open_file", fail)}[fails])
        with pytest.raises(OSError, match="Input/output"):
            Lock(tmp_path / LOCK).try_acquire()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptors[0])
    with own_folder(tmp_path, wait=0):
        pass


@pytest.mark.parametrize("own", [own_folder, lambda run: own_file(run / "file")], ids=["folder", "file"])
def test_who_cannot_own_for_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch, own) -> None:
    (tmp_path / "old").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for name in ("new", "old"):
            with pytest.raises(OSError, match="No space left"), own(tmp_path / name):
                raise AssertionError("owned")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_a_record_that_is_written_in_parts_is_whole(tmp_path: Path, monkeypatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
        assert Lock(tmp_path / LOCK).try_acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    Lock(tmp_path / LOCK).release()


def test_files_have_owners_too(tmp_path: Path) -> None:
    with own_file(tmp_path / "a.gguf"), own_file(tmp_path / "b.gguf"):
        with ThreadPoolExecutor(1) as pool, pytest.raises(InUseError, match=r"a\.gguf is in use"):
            pool.submit(lambda: own_file(tmp_path / "a.gguf", wait=0).__enter__()).result()
        assert {path.name for path in tmp_path.iterdir()} == {".a.gguf.lock", ".b.gguf.lock"}
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.parametrize("record", ["", "{", "[1]", '{"pid": 1}', None], ids=["empty", "cut", "list", "part", "dead"])
def test_a_file_system_without_locks_goes_by_the_record(tmp_path: Path, monkeypatch, record: str | None) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with own_folder(tmp_path / "run"):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = locks.asdict(locks.Holder.this_process())
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / LOCK
    lock.write_text(json.dumps({**mine, "pid": ended.pid}) if record is None else record)
    with own_folder(tmp_path / "run"):
        pass
    lock.write_text(json.dumps({**mine, "pid": os.getppid()}))
    with pytest.raises(InUseError, match=f"process {os.getppid()} "), own_folder(tmp_path / "run", wait=0):
        pass


def test_the_record_names_the_command(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/lib/anymamba/__main__.py", "train", "--out", "my run"])
    assert locks.Holder.this_process().command == "anymamba train --out 'my run'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anymamba", *(["--data"] * 100)])
    assert len(locks.Holder.this_process().command) == 200
