"""Pairs of commands on one folder at once, some of them killed, and what must hold after each pair.

As a program: python -m tests.cli.two_commands FOLDER PAIRS SEED. PAIRS is a number of random pairs, or the JSON of a
list of (first, second, which one is killed, what the folder is before). Prints one JSON object: the problems, and how
the commands ended.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  what children need is imported before they are forked
import matplotlib.figure  # noqa: F401
import torch
import torch.distributed.checkpoint
import torch.utils.tensorboard

from anymamba.base.files import own_file, own_folder, sweep
from anymamba.cli import main
from anymamba.cli.app import MODULES
from anymamba.data.tokenizer import load_tokenizer
from anymamba.experiments import EXPERIMENTS
from anymamba.lab.experiment import Arm, Experiment, Threshold
from anymamba.lab.results import read_results
from anymamba.models.checkpoints import load_pretrained
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.training.trainer import Silent, read_config, train
from tests.training.test_trainer import assert_same_run

STEPS = 6
SIZES = ["--model.d-model", "8", "--model.n-layers", "1", "--batch-size", "2", "--context", "16", "--threads", "1"]
CADENCE = ["--steps", STEPS, "--checkpoint-every", 3, "--eval-every", 3, "--log-every", 1, "--eval-tokens", 100]
HELD_OUT = ["--data.held-out-fraction", 0.3]
ARMS = 4
TRAINING, CONVERTING = ("is in use by", "exists; resume it"), ("is in use by", "exists already", "not empty")
REFUSALS = {
    "train-1": TRAINING,
    "train-2": TRAINING,
    "resume": ("is in use by", "is not a run folder"),
    "convert": CONVERTING,
    "gguf": CONVERTING,
    "experiment": (),
    "save": ("is in use by",),
    "generate": ("no model", "No such", "is not", "has no", "lacks"),
}
"""What an error may say, by command; `experiment` waits."""


@dataclass
class Surroundings:
    """What all pairs share."""

    root: Path
    texts: Path
    models: dict[str, LanguageModel]

    def command(self, name: str, folder: Path) -> list[str] | Callable[[], None]:
        """The command line of that name for a folder, or a call of the library."""
        if name == "save":
            return lambda: self.models["saved"].save_pretrained(folder, load_tokenizer(None))
        words: dict[str, list[Any]] = {
            **{f"train-{i}": ["train", "--data", self.texts, "--out", folder, "--seed", i] for i in (1, 2)},
            "resume": ["train", "--resume", folder],
            "convert": ["convert", self.root / "converted", folder, "--to", "hf"],
            "gguf": ["convert", self.root / "converted", folder.with_suffix(".gguf"), "--to", "gguf"],
            "experiment": ["experiment", "dice", "--out", folder],
            "generate": ["generate", "--model", folder, "--prompt", "a", "--max-new-tokens", 2],
        }
        more = [*SIZES, *CADENCE, *HELD_OUT] if name in ("train-1", "train-2") else []
        return [str(word) for word in (*words[name], *more)]


NAMES = ("train-1", "train-2", "resume", "convert", "gguf", "experiment", "save", "generate")
WEIGHTS = (4, 3, 3, 2, 1, 2, 2, 1)


def roll(settings: Any, context: Any) -> dict[str, float]:
    """The measurement of an arm."""
    time.sleep(0.05)
    return {"roll": torch.rand(()).item()}


@dataclass(frozen=True)
class NoSettings:
    """An arm has none."""


def install_experiment() -> None:
    """An experiment `dice` whose arms cost nothing."""
    module = types.ModuleType("anymamba.experiments.dice")
    module.EXPERIMENT = Experiment(  # type: ignore[attr-defined]
        name="dice",
        title="Dice",
        protocol="A roll is a random number.",
        arms=lambda scale: [Arm("roll", NoSettings(), seeds=ARMS)],
        measure=roll,
        thresholds=lambda results: [Threshold("rolls", [len(results.records)], at_least=ARMS)],
        sections=lambda results: {},
        figures={},
    )
    sys.modules["anymamba.experiments.dice"] = module
    EXPERIMENTS["dice"] = "chance"


def start(
    command: list[str] | Callable[[], None], log: Path, delay: float = 0.0, gate: tuple[int, int] | None = None
) -> int:
    """Run a command in a forked process that writes to a log, and return the process.

    Args:
        gate: a pipe; the command starts, after the delay, when its writing end is closed.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        if gate is not None:
            os.close(gate[1])
            os.read(gate[0], 1)
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        time.sleep(delay)
        if callable(command):
            sys.argv = ["saver"]
            command()
            code = 0
        else:
            sys.argv = ["anymamba", *command]
            code = main(command)
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"error: {error}\n".encode())
        code = 1
    os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a process; negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class StopAtFour(Silent):
    """Ends a run as a crash would, after its first checkpoint with a step."""

    def on_step(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 4:
            raise RuntimeError("crash")


def prepare(root: Path) -> Surroundings:
    """Texts, two models, finished runs of two seeds to compare with, and one that was interrupted."""
    texts = root / "texts"
    texts.mkdir(parents=True)
    for i in range(12):
        (texts / f"{i}.txt").write_text(f"line {i} of a text\n" * (5 + i))
    models = {}
    for i, name in enumerate(("converted", "saved")):
        torch.manual_seed(i)
        models[name] = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=257))
    models["converted"].save_pretrained(root / "converted", load_tokenizer(None))
    surroundings = Surroundings(root, texts, models)
    for seed in (1, 2):
        code = wait(start(surroundings.command(f"train-{seed}", root / f"run-{seed}"), root / "log"))
        assert code == 0, (root / "log").read_text()
    config = replace(read_config(root / "run-1"), seed=1)

    def crash() -> None:
        with suppress(RuntimeError):
            train(config, root / "half", StopAtFour())

    assert wait(start(crash, root / "log")) == 0, (root / "log").read_text()
    return surroundings


def problems_after(
    surroundings: Surroundings,
    folder: Path,
    before: str,
    names: tuple[str, str],
    codes: tuple[int, int],
    logs: list[str],
) -> list[str]:
    """What does not hold after a pair of commands."""
    found = []
    killed = any(code == -signal.SIGKILL for code in codes)
    done = {name for name, code in zip(names, codes, strict=True) if code == 0}
    for name, code, log in zip(names, codes, logs, strict=True):
        if code in (1, 2):
            last = log.strip().splitlines()[-1]
            if (
                "Traceback" in log
                or not last.startswith("error: ")
                or not any(words in last for words in REFUSALS[name])
            ):
                found.append(f"{name} said {log[-500:]!r}")
        elif code not in (0, -signal.SIGKILL):
            found.append(f"{name} ended with {code}: {log[-500:]!r}")
    if len(done & {"train-1", "train-2", "convert"}) > 1 or done == {"train-1", "train-2"}:
        found.append(f"{sorted(done)} both say that the new folder is theirs")
    if before == "nothing" and not killed and set(names) - {"resume", "generate"} and not done - {"generate"}:
        found.append("all are refused")
    if before != "nothing" and not killed and names == ("resume", "resume") and not done:
        found.append("the run cannot be resumed")
    left = hidden(folder) + [p.name for p in folder.parent.glob(".*")]
    if left and not killed:
        found.append(f"left behind: {left}")
    found += problems_of_run(surroundings, folder, done) if (folder / "train_config.json").exists() else []
    if not (folder / "train_config.json").exists():
        if done & {"train-1", "train-2"}:
            found.append("the run that says it is finished is not there")
        if done & {"convert", "save"}:
            found += problems_of_model(surroundings, folder, "saved" if "save" in done else "converted")
    if "gguf" in done:
        found += problems_of_model(surroundings, folder.with_suffix(".gguf"), "converted")
    if "experiment" in done:
        results = read_results(folder)
        if results is None or len(results.records) != ARMS or not (folder / "report.md").exists():
            found.append(f"results are missing: {results}")
    with own_folder(folder), own_file(folder.with_suffix(".gguf")):
        sweep(folder / "checkpoints")
    left = hidden(folder) + [p.name for p in folder.parent.glob(".*") if p.suffix == ".tmp"]
    return [*found, *([f"not swept: {left}"] if left else [])]


def hidden(folder: Path) -> list[str]:
    """Locks and temporary files of a folder."""
    return [path.name for path in folder.rglob(".*")]


def problems_of_run(surroundings: Surroundings, folder: Path, done: set[str]) -> list[str]:
    """Whether a run goes on to what it would have been without the other command."""
    seed = read_config(folder).seed
    others = {f"train-{i}" for i in (1, 2)} & done - {f"train-{seed}"}
    log = folder.parent / "resume.log"
    code = wait(start(surroundings.command("resume", folder), log))
    if code != 0:
        return [f"the run cannot be resumed: {log.read_text()[-500:]}"]
    try:
        assert_same_run(surroundings.root / f"run-{seed}", folder, STEPS)
    except AssertionError as error:
        return [f"the run of seed {seed} is not what it would be alone: {str(error)[:300]}"]
    return [f"{sorted(others)} finished, and the folder has the run of seed {seed}"] if others else []


def problems_of_model(surroundings: Surroundings, path: Path, name: str) -> list[str]:
    """Whether a folder or file holds one whole model, the one that is expected."""
    wanted = surroundings.models[name].state_dict()
    try:
        found = load_pretrained(path).state_dict()
    except Exception as error:
        return [f"the model cannot be loaded: {error}"]
    return [f"{key} is not {name}'s" for key in wanted if not torch.equal(wanted[key], found[key])][:1]


def run_pair(
    surroundings: Surroundings,
    place: Path,
    names: tuple[str, str],
    kill: int | None,
    before: str,
    delays: tuple[float, float],
    draw: random.Random,
) -> tuple[list[str], list[str]]:
    """Run one pair in a place of its own; the problems, and how each command ended."""
    place.mkdir()
    folder = place / "x"
    if before != "nothing":
        shutil.copytree(surroundings.root / before, folder)
    if draw.random() < 0.5:  # a new cache, so that both build the same table
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    logs = [place / f"{i}.log" for i in (1, 2)]
    commands, gate = [surroundings.command(name, folder) for name in names], os.pipe()
    pids = [start(c, log, delay, gate) for c, log, delay in zip(commands, logs, delays, strict=True)]
    os.close(gate[0])
    os.close(gate[1])
    if kill is not None:
        time.sleep(draw.uniform(0, 1.5))
        os.kill(pids[kill], signal.SIGKILL)
    codes = (wait(pids[0]), wait(pids[1]))
    texts = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    problems = problems_after(surroundings, folder, before, names, codes, texts)
    os.environ["XDG_CACHE_HOME"] = str(surroundings.root / "cache")
    endings = [
        f"{name}: {'refused' if code in (1, 2) else 'killed' if code < 0 else 'done'}"
        for name, code in zip(names, codes, strict=True)
    ]
    if not problems:
        shutil.rmtree(place)
    return [f"{place.name} {names} on {before}, codes {codes}: {problem}" for problem in problems], endings


def main_program(root: Path, pairs: str, seed: int) -> None:
    """Run the pairs and print what was found."""
    torch.set_num_threads(1)  # so that forked children are sound
    for module in MODULES.values():
        importlib.import_module(module)
    install_experiment()
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    surroundings, draw = prepare(root), random.Random(seed)
    chosen = json.loads(pairs)
    together = not isinstance(chosen, int)
    if isinstance(chosen, int):
        chosen = [(*draw.choices(NAMES, WEIGHTS, k=2), draw.choice((None, None, 0, 1)), None) for _ in range(chosen)]
    problems: list[str] = []
    endings: Counter[str] = Counter()
    for i, (first, second, kill, before) in enumerate(chosen):
        late = 0.0 if together or draw.random() < 0.6 else draw.uniform(0, 1.0)
        delays = draw.choice(((0.0, late), (late, 0.0)))
        before = before or draw.choice(("nothing", "nothing", "nothing", "run-1", "half"))
        found, ended = run_pair(surroundings, root / f"pair-{i}", (first, second), kill, before, delays, draw)
        problems += found
        endings.update(ended)
    print(json.dumps({"problems": problems, "endings": dict(sorted(endings.items()))}))


if __name__ == "__main__":
    main_program(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
