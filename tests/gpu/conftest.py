"""The tests on a GPU share the inputs and random calls of the tests without one."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "ops"), str(TESTS / "kernels")]
