"""How tests on several GPUs start torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(size: int, *words: str) -> list[str]:
    """The command."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return [*launcher, *words]


def environment() -> dict[str, str]:
    """The variables, with the package that need not be installed."""
    before = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *before])}
