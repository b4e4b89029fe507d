"""A process that saves sessions is killed at random moments: none is broken, and none that was acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anymamba.serving.sessions import DiskSessions, ModelIdentity

N_KILLS = 25
WRITER = """
import os
import sys

import torch
from anymamba.generation.prompts import read_prompts
from anymamba.generation.requests import KeptState
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.serving.sessions import DiskSessions, ModelIdentity

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, whenever it is killed

torch.set_num_threads(1)
model = LanguageModel(ModelConfig(d_model=24, n_layers=2, vocab_size=37))
state = read_prompts(model, [[1]])
for line in sys.stdin:  # each line starts a writer that goes on from this turn until it is killed
    if os.fork() == 0:
        say("pid", os.getpid())
        store, turn = DiskSessions(sys.argv[1], model, ModelIdentity("m", "1")), int(line)
        while True:
            for name in "ab":
                before = KeptState((1,) * (turn - 1), state.model, state.logits) if turn > 1 else None
                store.save("", name, KeptState((1,) * turn, state.model, state.logits, earlier=before))
                say(name, turn)
            turn += 1
    os.wait()
    say("killed", 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is forked, so that each one starts at once")
def test_kills_at_random_moments(model, tmp_path):
    rng, acknowledged = random.Random(1), {"a": 0, "b": 0}
    store = DiskSessions(tmp_path, model, ModelIdentity("m", "1"))
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        for _ in range(N_KILLS):
            process.stdin.write(f"{max(acknowledged.values()) + 1}\n")
            pid, n_saves = int(process.stdout.readline().split()[1]), rng.randrange(8)
            for _ in range(n_saves):
                name, turn = process.stdout.readline().split()
                acknowledged[name] = int(turn)
            time.sleep(rng.uniform(0.0, 0.01))
            os.kill(pid, signal.SIGKILL)
            while (line := process.stdout.readline().split()) != ["killed", "0"]:
                acknowledged[line[0]] = int(line[1])
            for name, turn in acknowledged.items():
                kept = store.load("", name)
                found = 0 if kept is None else len(kept.tokens)
                assert found >= turn, f"turn {turn} of {name} was acknowledged, {found} is there"
        process.stdin.close()
    assert min(acknowledged.values()) > N_KILLS / 2
    DiskSessions(tmp_path, model, ModelIdentity("m", "1"))
    assert not list(Path(tmp_path).rglob(".*")), "a start removes what killed processes have left"
