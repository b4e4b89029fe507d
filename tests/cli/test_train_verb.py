"""`anymamba train`: flags, config files, runs, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest

from anymamba.base.schema import config_to_dict
from anymamba.cli import train
from anymamba.models.presets import PRESETS
from anymamba.training.config import ParallelConfig, TrainConfig

SMALL = ["--model.d-model", "16", "--model.n-layers", "1", "--batch-size", "2", "--context", "32", "--threads", "1"]


def options(*arguments: object) -> train.TrainOptions:
    return train.read_options([str(a) for a in arguments])


@pytest.fixture
def new(texts, tmp_path):
    """The beginning of a command line that trains something small into a new folder."""
    return ["train", "--data", texts, "--out", tmp_path / "run", *SMALL]


# ------------------------------------------------------------------------------------------------- flags


def test_flags_reach_the_config():
    config = options(
        *("--data", "a", "b", "--data", "c", "--out", "x", "--steps", 7, "--batch-size", 3, "--context", 11),
        *("--learning-rate", 0.5, "--optimizer.betas", 0.1, 0.2, "--text-field", "body", "--tokenizer", "t.json"),
        *("--seed", 5, "--precision", "bfloat16", "--no-carry-state", "--model.mamba.d-state", 4),
    ).train
    assert config.data.paths == ("a", "b", "c")
    assert (config.steps, config.batch_size, config.context, config.seed) == (7, 3, 11, 5)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (0.5, (0.1, 0.2))
    assert (config.data.text_field, config.data.tokenizer) == ("body", "t.json")
    assert (config.precision, config.carry_state, config.model.mamba.d_state) == ("bfloat16", False, 4)


def test_defaults_are_those_of_the_config():
    config = options("--data", "a", "--out", "x", "--device", "cpu").train
    assert config == TrainConfig(data=config.data, device="cpu") and config.data.paths == ("a",)


def test_the_device_is_chosen_where_none_is_named():
    import torch

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert options("--data", "a", "--out", "x").train.device == expected


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    assert options("--data", "a", "--out", "x", "--preset", name).train.model == PRESETS[name]


def test_a_preset_with_caches_says_how_it_trains(refused):
    err = refused(2, "train", "--data", "a", "--out", "x", "--preset", "transformer-125m")
    assert "let the caches of attention grow from batch to batch; set carry_state to false (--no-carry-state)" in err


def test_a_hybrid_trains_and_is_evaluated_from_the_command_line(run, texts, tmp_path):
    small = ["--model.d-model", 16, "--model.n-layers", 2, "--model.mixers", "mamba", "attention"]
    words = ["--steps", 3, "--context", 32, "--batch-size", 2, "--eval-every", 2, "--no-carry-state"]
    code, _, err = run("train", "--data", texts, "--out", tmp_path / "run", *small, *words)
    assert code == 0, err
    code, _, err = run("generate", "--model", tmp_path / "run", "--prompt", "a", "--max-new-tokens", 4)
    assert code == 0, err


def test_the_case_of_a_preset_does_not_matter():
    assert options("--data", "a", "--out", "x", "--preset", "Mamba-130M").train.model == PRESETS["mamba-130m"]


def test_model_flags_override_the_preset():
    model = options("--data", "a", "--out", "x", "--preset=small", "--model.n-layers", 3).train.model
    assert (model.d_model, model.n_layers) == (PRESETS["small"].d_model, 3)


def test_unknown_preset(refused):
    assert "mamba-130m" in refused(2, "train", "--data", "a", "--out", "x", "--preset", "mamba-131m")


def test_every_field_of_the_config_has_a_flag(run):
    text = run("train", "--help-all")[1]

    def names(values: dict, prefix: str):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    short = {"data.paths": "data", "data.text_field": "text-field", "data.tokenizer": "tokenizer"}
    short |= {"data.exclude": "exclude", "data.on_bad_row": "on-bad-row"}
    short |= {"optimizer.learning_rate": "learning-rate", "start_from": "from"}
    short |= {"parallel.dp_replicate": "dp-replicate", "parallel.dp_shard": "dp-shard", "parallel.cp": "cp"}
    for name in names(config_to_dict(TrainConfig()), ""):
        flag = short.get(name, name.replace("_", "-"))
        group, _, last = flag.rpartition(".")
        assert f"--{flag} " in text or f"--{flag}\n" in text or f"--{flag}," in text, flag
        assert group is not None and last


# ------------------------------------------------------------------------------------------------- config files

TOML = '[data]\npaths = ["a"]\n[model]\nd_model = 24\n[optimizer]\nlearning_rate = 0.25\n'


@pytest.fixture(params=["toml", "json"])
def config_file(request, tmp_path):
    path = tmp_path / f"config.{request.param}"
    values = {"steps": 9, "data": {"paths": ["a"]}, "model": {"d_model": 24}, "optimizer": {"learning_rate": 0.25}}
    path.write_text("steps = 9\n" + TOML if request.param == "toml" else json.dumps(values))
    return path


def test_config_file(config_file):
    config = options("--config", config_file, "--out", "x").train
    assert (config.steps, config.model.d_model, config.optimizer.learning_rate) == (9, 24, 0.25)
    assert config.data.paths == ("a",)


def test_flags_override_the_file(config_file):
    config = options("--out", "x", "--steps", 4, "--data", "b", "--model.d-model", 8, f"--config={config_file}").train
    assert (config.steps, config.data.paths, config.model.d_model) == (4, ("b",), 8)
    assert config.optimizer.learning_rate == 0.25


def test_a_preset_overrides_the_file(config_file):
    assert options("--out", "x", "--config", config_file, "--preset", "nano").train.model == PRESETS["nano"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"stepps": 3}', "did you mean 'steps'"),
        ('{"optimizer": {"learning_rat": 3}}', "did you mean 'learning_rate'"),
        ('{"steps": "many"}', "steps"),
        ('{"steps": 0}', "steps"),
        ("[]", "table of keys and values"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_config_file(refused, tmp_path, text, words):
    path = tmp_path / "c.json"
    path.write_text(text)
    assert words in refused(2, "train", "--config", path, "--data", tmp_path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_not_there(refused, tmp_path):
    assert "none.toml" in refused(2, "train", "--config", tmp_path / "none.toml", "--out", tmp_path / "run")


def test_a_config_file_of_another_kind(refused, tmp_path):
    assert ".toml" in refused(2, "train", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run")


# ------------------------------------------------------------------------------------------------- running


def test_train_and_its_result(run, new, tmp_path):
    code, out, err = run(*new, "--steps", 3, "--data.held-out-fraction", 0, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["run"], result["steps"], result["tokens"]) == (str(tmp_path / "run"), 3, 3 * 2 * 32)
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "train_config.json",
        "metrics.jsonl",
        "loss.png",
    ]:
        assert (tmp_path / "run" / name).is_file()
    assert "step 3/3" in err and "bits per byte" in err and "tokens/s" in err and "left" in err
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["steps"] == 3


def test_text_result_names_the_run(run, new, tmp_path):
    code, out, _ = run(*new, "--steps", 2)
    assert code == 0 and str(tmp_path / "run") in out and "bits per byte" in out


def test_the_saved_config_is_a_config_file(run, new, tmp_path):
    assert run(*new, "--steps", 2)[0] == 0
    saved = tmp_path / "run" / "train_config.json"
    again = options("--config", saved, "--out", "y").train
    assert {"format_version": 1, **config_to_dict(again)} == json.loads(saved.read_text())


def test_a_run_folder_is_never_overwritten(run, refused, new, tmp_path):
    assert run(*new, "--steps", 2)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "exists" in refused(2, *new, "--steps", 3)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_resume_after_the_end_changes_nothing(run, new, tmp_path):
    assert run(*new, "--steps", 2)[0] == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, out, _ = run("train", "--resume", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["steps"] == 2
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


def test_more_steps_of_a_finished_run(run, refused, new, tmp_path):
    """Also where they are the number that is the default of a new run."""
    assert run(*new, "--steps", 2)[0] == 0
    code, out, err = run("train", "--resume", tmp_path / "run", "--steps", 4, "--json")
    assert code == 0 and json.loads(out)["steps"] == 4 and "4 steps of 64 tokens, 2 of them done" in err
    assert "has done 4 steps" in refused(2, "train", "--resume", tmp_path / "run", "--steps", 3)
    parsed = train.read_options(["--resume", "x", "--steps", "1000"])
    assert parsed.new_steps == 1000 and train.read_options(["--resume", "x"]).new_steps is None


def test_what_a_run_tells(run, new, texts, tmp_path):
    code, out, err = run(*new, "--steps", 6, "--sample-tokens", 5, "--data.eval-paths", texts / "0.txt", "--json")
    assert code == 0, err
    result, said = json.loads(out), err.splitlines()
    assert f"model: {result['n_parameters']:,} parameters" in said
    (data,) = [line for line in said if line.startswith("data: ")]
    assert re.fullmatch(r"data: [\d,]+ tokens to train on, [\d,]+ held out", data)
    (device,) = [line for line in said if line.startswith("device: ")]
    assert "cpu with 1 threads; memory: 0.1 MB for weights, gradients and optimizer, and activations" in device
    (time,) = [line for line in said if line.startswith("time: ")]
    assert re.fullmatch(
        r"time: about \d+:\d\d left, evaluations not counted; memory: \d+\.\d+ [GM]B at most so far", time
    )
    assert "step 6: a sample" in said
    assert result["best_step"] == 6 and (tmp_path / "run" / "best" / "model.safetensors").exists()


def test_lora_from_the_command_line(run, texts, model_folder, tmp_path):
    pytest.importorskip("peft", reason="the extra 'lora' installs peft")
    out = tmp_path / "run"
    small = ["--steps", 3, "--context", 16, "--batch-size", 2, "--threads", 1, "--learning-rate", 0.1]
    lora = ["--lora", 2, "--lora-targets", "in_proj", "out_proj"]
    code, _, err = run("train", "--from", model_folder, "--data", texts, "--out", out, *small, *lora)
    assert code == 0 and "of which" in err, err
    adapter = ["--adapter", out / "adapter"]
    code, _, err = run("convert", model_folder, tmp_path / "merged", "--to", "hf", *adapter)
    assert code == 0, err
    prompt = ["--prompt", "line", "--max-new-tokens", 8, "--temperature", 0, "--json"]

    def text(*words: object) -> str:
        code, printed, err = run("generate", *words, *prompt)
        assert code == 0, err
        return json.loads(printed)["results"][0]["text"]

    places = (["--model", out], ["--model", model_folder, *adapter], ["--model", tmp_path / "merged"])
    assert len({text(*words) for words in places}) == 1
    newest = sorted((out / "checkpoints").iterdir())[-1]
    code, _, err = run("eval", "--model", newest, "--data", texts)
    assert code == 0, err


def test_lora_needs_a_model(refused, new):
    assert "name it with start_from (--from)" in refused(2, *new, "--lora", 4)


def test_fine_tuning_takes_sizes_and_tokenizer_from_the_model(run, texts, model_folder, tmp_path):
    out = tmp_path / "run"
    code, _, err = run(
        *("train", "--from", model_folder, "--data", texts, "--out", out, "--steps", 1, "--context", 16),
        *("--learning-rate", 1e-9, "--optimizer.min-learning-rate", 0),
    )
    assert code == 0, err
    saved = json.loads((out / "train_config.json").read_text())
    assert saved["start_from"] == str(model_folder) and saved["model"]["d_model"] == 16
    from anymamba import LanguageModel

    before, after = (LanguageModel.from_pretrained(folder).state_dict() for folder in (model_folder, out))
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)


def test_fine_tuning_takes_the_tokenizer_wherever_it_lies(run, texts, tmp_path):
    """That of a folder or of a .gguf file; a run that goes on reads the same."""
    pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from anymamba.data.tokenizer import JsonTokenizer, load_tokenizer
    from anymamba.models.config import ModelConfig
    from anymamba.models.language_model import LanguageModel

    theirs = Tokenizer(models.WordLevel({"line": 7, "text": 8, "other": 0}, unk_token="other"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.save(str(tmp_path / "words.json"))
    model = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=300))
    words = JsonTokenizer(tmp_path / "words.json")
    model.save_pretrained(tmp_path / "folder", words)
    with pytest.warns(UserWarning, match=r"x\.gguf"):
        model.save_pretrained(tmp_path / "x.gguf", words, format="gguf")
    small = ("--steps", 2, "--batch-size", 2, "--context", 16, "--data", texts)
    for name in ("folder", "x.gguf"):
        out = tmp_path / f"run-{name.removesuffix('.gguf')}"
        code, _, err = run("train", "--from", tmp_path / name, "--out", out, *small)
        assert code == 0, err
        assert load_tokenizer(out).to_json() == words.to_json()
        saved = json.loads((out / "train_config.json").read_text())
        assert saved["data"]["tokenizer"] == saved["start_from"] == str(tmp_path / name)
        code, _, err = run("train", "--resume", out)
        assert code == 0, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_run_to_resume(new, tmp_path, cache, interruptible, number, code):
    command = [sys.executable, "-m", "anymamba", *map(str, new), "--steps", "100000"]
    with interruptible():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1].endswith(f"resume with: anymamba train --resume {tmp_path / 'run'}")
    step = max(int(p.name.removeprefix("step-")) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert step > 0


# ------------------------------------------------------------------------------------------------- what is refused


def test_no_out(refused, texts):
    assert "--out" in refused(2, "train", "--data", texts)


def test_no_data(refused, tmp_path):
    assert "--data" in refused(2, "train", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_takes_no_other_flags(refused, tmp_path):
    assert "leave the other flags out" in refused(2, "train", "--resume", tmp_path, "--seed", 3)


def test_from_takes_no_sizes(refused, texts, model_folder, tmp_path):
    line = refused(2, "train", "--from", model_folder, "--preset", "nano", "--data", texts, "--out", tmp_path / "run")
    assert "--from takes" in line


def test_resume_of_what_is_not_a_run(refused, tmp_path):
    assert "not a run folder" in refused(2, "train", "--resume", tmp_path / "nothing")


def test_resume_refuses_a_planted_pickle(run, refused, new, tmp_path):
    assert run(*new, "--steps", 2)[0] == 0
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.pt").write_bytes(pickle.dumps({}))
    assert "pickle" in refused(1, "train", "--resume", tmp_path / "run")


def test_resume_of_a_truncated_checkpoint(run, refused, new, tmp_path):
    assert run(*new, "--steps", 2)[0] == 0
    (tensors,) = (tmp_path / "run" / "checkpoints" / "step-00000002").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "truncated" in refused(1, "train", "--resume", tmp_path / "run")


BAD_DATA = {
    "an empty file": ("a.txt", b"", "empty"),
    "a binary file": ("a.txt", b"\x7fELF\0\0\0", "not text"),
    "a missing field": ("a.jsonl", b'{"body": "x"}\n', "'body'"),
    "no JSON": ("a.jsonl", b"x\n", "JSON"),
    "proteins by name": ("a.faa", b">p\nMVLS\n", "is not read as text"),
    "FASTA by content": ("a.txt", b">chr1\nACGT\n", "is not read as text"),
}


@pytest.mark.parametrize(("name", "content", "words"), BAD_DATA.values(), ids=BAD_DATA)
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_bad_data(refused, tmp_path, model_folder, verb, name, content, words):
    (tmp_path / name).write_bytes(content)
    rest = ["--out", tmp_path / "run", *SMALL] if verb == "train" else ["--model", model_folder]
    assert words in refused(2, verb, "--data", tmp_path / name, *rest)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_no_readable_file(refused, tmp_path, model_folder, verb):
    rest = ["--out", tmp_path / "run"] if verb == "train" else ["--model", model_folder]
    assert "no such file" in refused(2, verb, "--data", tmp_path / "none.txt", *rest)
    (tmp_path / "folder").mkdir()
    assert "no readable file" in refused(2, verb, "--data", tmp_path / "folder", *rest)
    assert "matches no file" in refused(2, verb, "--data", tmp_path / "*.md", *rest)
    (tmp_path / "folder" / "a.json").write_text("x")
    assert "found 1 .json;" in refused(2, verb, "--data", tmp_path / "folder", *rest)
    assert not (tmp_path / "run").exists()


def test_an_unknown_device(refused, new, tmp_path):
    assert "device" in refused(2, *new, "--device", "abacus")
    assert not (tmp_path / "run").exists()


def test_disk_errors_are_failures(refused, new, monkeypatch):
    import errno

    from anymamba.training.parallel import processes

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    monkeypatch.setattr(processes, "save_checkpoint", full)
    assert refused(1, *new, "--steps", 2) == "error: runs/x: No space left on device"


def test_parents_of_the_run_folder_are_made(run, texts, tmp_path):
    assert run("train", "--data", texts, "--out", tmp_path / "a" / "b", *SMALL, "--steps", 1)[0] == 0
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_resume_takes_other_degrees_of_parallelism():
    found = options("--resume", "runs/x", "--dp-shard", "-1", "--cp", "2")
    assert found.new_parallel == ParallelConfig(cp=2) and found.new_steps is None
    assert options("--resume", "runs/x", "--dp_replicate", "2").new_parallel == ParallelConfig(dp_replicate=2)
    assert options("--resume", "runs/x").new_parallel is None
    with pytest.raises(ValueError, match="but for --steps, --max-minutes, --dp-replicate, --dp-shard and --cp"):
        options("--resume", "runs/x", "--cp", "2", "--batch-size", "4")


def test_only_rank_0_prints(monkeypatch, tmp_path, capsys):
    """Another rank of torchrun says nothing, also when it fails."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        train.command(["--data", str(tmp_path), "--batch-size", "0", "--out", "x"])
    assert end.value.code == 1 and capsys.readouterr() == ("", "")
