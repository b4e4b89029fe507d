"""A Redis server that belongs to a test."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """A Redis server of our own on a socket in a folder, which flushes each write: its address and its process."""
    pytest.importorskip("redis", reason="needs the package redis (pip install redis)")
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (apt-get install redis-server)")
    command = ["redis-server", "--port", "0", "--unixsocket", folder / "s", "--dir", folder, "--save", ""]
    server = subprocess.Popen([*command, "--appendonly", "yes", "--appendfsync", "always"], stdout=subprocess.DEVNULL)
    for _ in range(500):
        if (folder / "s").exists():
            break
        time.sleep(0.01)
    yield f"unix://{folder / 's'}", server
    server.terminate()
    server.wait(10)
