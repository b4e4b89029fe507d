"""`anymamba`, one rank of which (1, or VICTIM) kills itself at step 4 unless torchrun has started it again."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from anymamba.cli import main
from anymamba.training.parallel.several import SeveralProcesses

clip = SeveralProcesses.clip


def deadly_clip(self: Any, *arguments: Any) -> float:
    deadly_clip.steps += 1
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and not self.launch.begun
    victim = int(os.environ.get("VICTIM", 1))
    if is_first and self.rank == victim and deadly_clip.steps == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(self, *arguments)


deadly_clip.steps = 0

if __name__ == "__main__":
    SeveralProcesses.clip = deadly_clip
    sys.exit(main())
