"""Damaged files of every format of ours load as they were or are refused in one line.

Where a digest, a checksum or an offset can tell the damage, wrong contents are never loaded.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.damage import FORMATS, ends_of


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if not kind.silent])
def test_forty_damaged_copies(name):
    ends = ends_of(name, 40)
    assert ends.total() == 40 and (ends["same"] < 40 or FORMATS[name].rebuilt)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_2500_damaged_copies(name):
    """In a process of their own, so that a signal is an end like others."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.damage", name, "2500"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    print(done.stdout)
