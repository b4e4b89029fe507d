"""Twenty SIGKILLs at random moments, half of them while a checkpoint is written, and a bit-identical result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from anymamba.base.schema import config_to_dict
from anymamba.training.config import TrainConfig
from tests.training.test_trainer import assert_same_run

DRIVER = """
import json, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed.checkpoint, torch.utils.tensorboard, datasets, matplotlib.figure
from anymamba.base.schema import config_from_dict
from anymamba.training.config import TrainConfig
from anymamba.training.trainer import resume, train

torch.set_num_threads(1)  # forking a process with threads is not safe
config = config_from_dict(TrainConfig, json.loads(sys.argv[1]))
folder, kills = Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random(0)

def die_at(call):
    # SIGKILL at the n-th call of a function that writes a checkpoint
    count = 0
    def deadly(function):
        def wrapper(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapper
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)

def child(run, workers, call=None):
    pid = os.fork()
    if pid:
        return pid
    try:
        if call is not None:
            die_at(call)
        if (run / "train_config.json").exists():
            resume(run)
        else:
            train(replace(config, data=replace(config.data, workers=workers)), run)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)

def wait(pid):
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a child failed"
    return os.WIFSIGNALED(status)

start = time.time(); wait(child(folder / "straight", 0)); whole = time.time() - start
start = time.time(); wait(child(folder / "straight", 0)); startup = time.time() - start
killed = 0
for i in range(kills):
    if i % 2:
        killed += wait(child(folder / "killed", 1, call=draw.randint(1, 16)))
    else:
        pid = child(folder / "killed", 1)
        time.sleep(draw.uniform(0, startup + whole / 20))
        os.kill(pid, signal.SIGKILL)
        killed += wait(pid)
assert not wait(child(folder / "killed", 1)), "the last run was not killed"
print(killed)
"""


def event_steps(run: Path) -> list[tuple[str, int]]:
    return [
        (value.tag, event.step)
        for file in sorted((run / "tensorboard").glob("events*"))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]


def test_twenty_kills_and_equal_bits(config: TrainConfig, tmp_path: Path) -> None:
    import json
    from dataclasses import replace

    config = replace(config, steps=150, checkpoint_every=3, eval_every=10)
    command = [sys.executable, "-c", DRIVER, json.dumps(config_to_dict(config)), str(tmp_path), "20"]
    out, err = tmp_path / "out.txt", tmp_path / "err.txt"  # files: a pipe would wait for any process that outlives it
    with out.open("w") as stdout, err.open("w") as stderr:
        done = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=500)
    assert done.returncode == 0, err.read_text()[-3000:]
    assert int(out.read_text()) >= 18, "most children die before they finish"
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 150)
    steps = event_steps(tmp_path / "killed")
    assert len(steps) == len(set(steps)), "an event stands twice"
    assert sorted(steps) == sorted(event_steps(tmp_path / "straight"))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))
