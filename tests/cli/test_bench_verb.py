"""`anymamba bench`, and the flag --weights of the verbs that run a model."""

from __future__ import annotations

import json

import pytest

from anymamba.console.runtime import Runtime, check_weights
from anymamba.evaluation import inference_speed
from anymamba.models.inference import InferenceModel
from anymamba.runtimes import nvrtc


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A figure is the median of three short runs, and little memory is read."""
    monkeypatch.setattr(inference_speed, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(inference_speed, "LEAST_LIMIT_SECONDS", 0.0)
    monkeypatch.setattr(inference_speed, "READ_BYTES", 1 << 20)


def test_bench_of_a_preset(run):
    code, out, err = run("bench", "--preset", "nano", "--weights", "int8", "--batch", "1,3", "--prompt", 40, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert [(s["what"], s["rows"]) for s in facts["speeds"]] == [("read", 40), ("generate", 1), ("generate", 3)]
    assert all(s["tokens_per_second"] > 0 and s["limit"] > 0 for s in facts["speeds"])
    assert facts["weights"] == {"q8_0": 7, "bfloat16": 2} and facts["native_blocks"] == 2 and not facts["other_blocks"]
    assert facts["weight_bytes"] < 2 * facts["parameters"] and facts["limits"]["bytes_per_second"] > 0


def test_bench_of_a_file(run, model_folder):
    code, out, err = run("bench", "--model", model_folder, "--prompt", 8, "--invariant")
    assert code == 0, err
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert "float32" in lines["weights"] and "times as many" in lines["generate, batch 1"]
    assert "1 in one compiled call" in lines["blocks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --model or --preset, one of them"),
        (("--preset", "nano", "--model", "x"), "give --model or --preset, one of them"),
        (("--preset", "nano", "--batch", "1,x"), "--batch must be numbers of rows, such as 1,8,64, got '1,x'"),
        (("--preset", "nano", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("--preset", "nano", "--prompt", "0"), "--prompt must be at least 1, got 0"),
        (("--preset", "mega"), "unknown preset 'mega'"),
        (("--model", "nowhere"), "no model folder nowhere"),
        (("--preset", "nano", "--device", "meta"), "--device meta cannot be measured: packed weights have kernels on"),
    ],
)
def test_misuse(refused, arguments, message):
    assert message in refused(2, "bench", *arguments)


# ------------------------------------------------------------------------------------------ --weights


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_verbs_take_weights(run, model_folder, texts, weights):
    flags = ("--model", model_folder, "--weights", weights)
    code, out, err = run("generate", *flags, "--prompt", "ab", "--max-new-tokens", 4, "--json")
    assert code == 0 and json.loads(out)["results"][0]["n_tokens"] == 4, err
    code, out, err = run("eval", *flags, "--data", texts, "--json")
    packed = json.loads(out)["bits_per_byte"]
    code, out, err = run("eval", "--model", model_folder, "--data", texts, "--json")
    assert packed == pytest.approx(json.loads(out)["bits_per_byte"], rel=0.02)


def test_a_file_in_blocks_runs_in_its_blocks(run, tmp_path, model_folder, monkeypatch):
    loaded, original = [], InferenceModel.from_pretrained
    keep = staticmethod(lambda *a, **k: loaded.append(original(*a, **k)) or loaded[-1])
    monkeypatch.setattr(InferenceModel, "from_pretrained", keep)
    for out, flags in (("x.gguf", ("--to", "gguf", "--dtype", "q8_0")), ("x", ("--to", "hf", "--weights", "int4"))):
        code, _, err = run("convert", model_folder, tmp_path / out, *flags)
        assert code == 0, err
        code, text, err = run("generate", "--model", tmp_path / out, "--prompt", "ab", "--max-new-tokens", 3)
        assert code == 0 and text.startswith("ab"), err
        assert "q8_0" in loaded[-1].weight_formats.values()
    code, _, err = run(
        "generate", "--model", tmp_path / "x", "--dtype", "float32", "--prompt", "a", "--max-new-tokens", 1
    )
    assert code == 0 and len(loaded) == 2, err  # --dtype asks for plain numbers


def test_weights_that_a_device_cannot_run(refused, model_folder, monkeypatch):
    both = refused(2, "generate", "--model", model_folder, "--weights", "int8", "--dtype", "bfloat16", "--prompt", "a")
    assert "--weights and --dtype both choose the format of the weights; give one" in both
    with pytest.raises(
        ValueError, match="int8 cannot run on mps: packed weights have kernels on cpu and cuda; take --weights bfloat16"
    ):
        check_weights(Runtime(weights="int8"), "mps")
    monkeypatch.setattr(nvrtc, "reason", lambda: "torch sees no NVIDIA GPU")
    with pytest.raises(ValueError, match="int4 cannot run on cuda: torch sees no NVIDIA GPU; take --weights bfloat16"):
        check_weights(Runtime(weights="int4"), "cuda")
    monkeypatch.setattr(nvrtc, "reason", lambda: None)
    check_weights(Runtime(weights="int4"), "cuda")
    check_weights(Runtime(weights="bfloat16"), "mps")
