"""`anymamba lm-eval`: lm-eval's own command line with our model type."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from anymamba.cli import lm_eval as verb
from anymamba.cli.app import main


def test_help_answers_without_lm_eval(capsys):
    assert main(["lm-eval", "--help"]) == 0
    assert "All arguments are lm-eval's own" in capsys.readouterr().out
    assert main(["lm-eval"]) == 2
    code = "import sys; sys.modules['lm_eval'] = None; from anymamba.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "lm-eval", "ls"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: lm-eval is needed here")
    assert 'pip install "anymamba[lm-eval]"' in done.stderr and done.stderr.count("\n") == 1


def test_defaults_are_added_where_nothing_is_said(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' installs lm-eval")
    ours = ["--model", "anymamba", "--batch_size", "auto"]
    assert verb.complete(["--tasks", "x"]) == ["run", *ours, "--tasks", "x"]
    assert verb.complete(["run", "--tasks", "x", "-b", "4"]) == ["run", *ours[:2], "--tasks", "x", "-b", "4"]
    assert verb.complete(["--model", "hf"]) == ["run", "--model", "hf"]
    assert verb.complete(["ls", "tasks"]) == ["ls", "tasks"]
    (tmp_path / "x.yaml").write_text("model: hf\ntasks: [x]\n")
    config = ["--config", str(tmp_path / "x.yaml")]
    assert verb.complete(config) == ["run", *config]


def test_a_task_from_the_command_line(tmp_path, shared_data, model_folder):
    """A model of bytes on a local task, in a process of its own; the results are written where lm-eval writes them."""
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' installs lm-eval")
    from tests.compat.lm_eval_local import write_tasks

    tasks = write_tasks(tmp_path / "tasks", shared_data / "eval", 6)
    command = [
        *(sys.executable, "-m", "anymamba", "lm-eval", "--tasks", "local_piqa", "--include_path", str(tasks)),
        *("--model_args", f"pretrained={model_folder},device=cpu", "--output_path", str(tmp_path / "out.json")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_piqa" in done.stdout and "acc_norm" in done.stdout
    (written,) = tmp_path.glob("out_*.json")
    results = json.loads(written.read_text())
    assert 0 <= results["results"]["local_piqa"]["acc,none"] <= 1 and results["config"]["model"] == "anymamba"


def test_a_model_that_is_not_there(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' installs lm-eval")
    command = [sys.executable, "-m", "anymamba", "lm-eval", "--tasks", "piqa", "--model_args", "pretrained=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "error: no model folder /nowhere" in done.stderr
