"""`anymamba generate`: every flag, streaming, and prompts that cannot be read."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from anymamba.cli import evaluate
from anymamba.cli import generate as verb
from anymamba.console.sampling import SamplingFlags
from anymamba.data.tokenizer import load_tokenizer
from anymamba.generation.beam import beam_search
from anymamba.generation.generate import generate
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.language_model import LanguageModel

SAMPLING_FLAGS = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.9,
    "repetition_penalty": 1000.0,
}
PROMPT = "".join(
    map(chr, range(32, 127))
)  # an untrained model's logits are nearly equal: a penalty shows only with many seen ids


@pytest.fixture
def results(run, model_folder):
    """Runs `generate --json` and returns its results."""

    def call(*arguments: object) -> list[dict]:
        code, out, err = run("generate", "--model", model_folder, "--json", "--max-new-tokens", 12, *arguments)
        assert code == 0, err
        return json.loads(out)["results"]

    return call


@pytest.fixture(scope="module")
def expected(model_folder):
    """What the Python interface gives."""
    model, tokenizer = LanguageModel.from_pretrained(model_folder).eval(), load_tokenizer(model_folder)

    def call(prompts: list[str], **options) -> list[str]:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        return generate(model, ids, tokenizer, **({"max_new_tokens": 12} | options)).texts or []

    return call


def test_one_prompt_is_printed_with_its_continuation(run, model_folder, expected):
    code, out, err = run("generate", "--model", model_folder, "--prompt", "def ", "--max-new-tokens", 12)
    assert code == 0
    assert re.fullmatch(r"generated \d+ tokens? in [\d.]+ s, the first after [\d.]+ s: [\d.,]+ tokens/s\n", err)
    assert out == "def " + expected(["def "])[0] + "\n"


def test_the_flags_have_the_defaults_of_the_sampling_config():
    flags = {f.name: f.default for f in dataclasses.fields(SamplingFlags)}
    for field in dataclasses.fields(SamplingConfig):
        assert flags[field.name] == field.default


@pytest.mark.parametrize(("name", "value"), SAMPLING_FLAGS.items())
def test_sampling_flags_are_those_of_the_config(results, expected, name, value):
    assert set(SAMPLING_FLAGS) == {field.name for field in dataclasses.fields(SamplingConfig)}
    (got,) = results("--prompt", PROMPT, "--" + name.replace("_", "-"), value)
    assert got["text"] == expected([PROMPT], sampling=SamplingConfig(**{name: value}))[0]
    assert got["text"] != expected([PROMPT])[0]


def test_greedy(results, expected):
    first, second = (results("--prompt", "ab", "--temperature", 0, "--seed", seed) for seed in (0, 1))
    assert first == second
    assert first[0]["text"] == expected(["ab"], sampling=SamplingConfig(temperature=0))[0]


def test_seeds_reproduce(results):
    assert results("--prompt", "ab", "--seed", 3) == results("--prompt", "ab", "--seed", 3)
    assert results("--prompt", "ab", "--seed", 3) != results("--prompt", "ab", "--seed", 4)


def test_max_new_tokens(results):
    (got,) = results("--prompt", "ab", "--max-new-tokens", 5)
    assert got["n_tokens"] <= 5 and (got["n_tokens"] == 5) == (got["finish_reason"] == "length")


def test_stop_strings(results, expected):
    text = expected(["ab"], sampling=SamplingConfig(temperature=0))[0]
    stop = text[4]
    (got,) = results("--prompt", "ab", "--temperature", 0, "--stop", "never there", "--stop", stop)
    assert got["text"] == text[: text.index(stop)] and got["finish_reason"] == "stop"


def test_several_prompts_are_one_batch_printed_one_after_the_other(run, model_folder, expected):
    arguments = ["--prompt", "def ", "--prompt", "a longer prompt", "--max-new-tokens", 12]
    code, out, _ = run("generate", "--model", model_folder, *arguments)
    first, second = expected(["def ", "a longer prompt"])
    assert code == 0
    assert out == f"==> 1 of 2: def <==\ndef {first}\n==> 2 of 2: a longer prompt <==\na longer prompt{second}\n"


def test_beam_search(results, model_folder):
    model, tokenizer = LanguageModel.from_pretrained(model_folder).eval(), load_tokenizer(model_folder)
    ((best, *_),) = beam_search(model, [tokenizer.encode("ab")], tokenizer, num_beams=3, max_new_tokens=12)
    (got,) = results("--prompt", "ab", "--num-beams", 3)
    assert (got["text"], got["finish_reason"]) == (best.text, best.finish_reason)


@pytest.mark.parametrize(("name", "value"), [*SAMPLING_FLAGS.items(), ("seed", 1), ("num_samples", 2)])
def test_beam_search_refuses_what_it_would_ignore(refused, model_folder, name, value):
    flag = "--" + name.replace("_", "-")
    line = refused(2, "generate", "--model", model_folder, "--prompt", "a", "--num-beams", 2, flag, value)
    assert flag in line


def test_prompt_from_a_file_byte_for_byte(results, expected, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"a\r\nb\xff")
    (got,) = results("--prompt-file", path, "--seed", 2)
    assert got["prompt"] == "a\r\nb\ufffd"
    assert got["text"] == expected([b"a\r\nb\xff"], seed=2)[0]


def test_prompt_from_stdin(results, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
    assert results("--prompt-file", "-")[0]["text"] == expected(["from stdin"])[0]


def test_a_prompt_from_a_file_is_not_printed(run, model_folder, expected, tmp_path):
    (tmp_path / "p").write_text("prompt")
    code, out, _ = run("generate", "--model", model_folder, "--prompt-file", tmp_path / "p", "--max-new-tokens", 12)
    assert (code, out) == (0, expected(["prompt"])[0] + "\n")


def test_a_prompt_that_begins_with_a_dash(results):
    assert results("--prompt=--steps")[0]["prompt"] == "--steps"


@pytest.fixture
def rows(tmp_path):
    """A JSONL file of three prompts."""
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "one", "name": "first"}, {"prompt": "two", "id": 7, "other": None}, {"prompt": "t\ud800"}]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_prompts_from_jsonl(results, expected, rows):
    got = results("--prompts", rows)
    assert [result["name"] for result in got] == ["first", "7", f"{rows}:5"]
    assert [result["prompt"] for result in got] == ["one", "two", "t\ufffd\ufffd\ufffd"]
    assert [result["text"] for result in got] == expected(["one", "two", b"t\xed\xa0\x80"])


def test_prompts_from_stdin_and_another_field(results, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"question": "ab", "prompt": 3}')))
    (got,) = results("--prompts", "-", "--prompt-field", "question")
    assert (got["name"], got["text"]) == ("stdin:1", expected(["ab"])[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not a line of JSON"),
        ("[1]", ":2: wanted an object such as"),
        ('{"text": "a", "b": 1}', ":2: no field 'prompt'; the fields there are 'text', 'b'; choose one with"),
        ('{"prompt": null}', ":2: the field 'prompt' must be a string, got null"),
    ],
)
def test_rows_without_a_prompt(refused, model_folder, not_loaded, tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert message in refused(2, "generate", "--model", model_folder, "--prompts", tmp_path / "rows.jsonl")


def test_results_have_the_order_of_the_command_line(run, model_folder, rows, tmp_path):
    (tmp_path / "p.txt").write_text("file")
    arguments = ["--prompt-file", tmp_path / "p.txt", "--prompt", "text", f"--prompts={rows}", "--prompt_file=-"]
    code, out, _ = run("generate", "--model", model_folder, *arguments[:-1], "--prompt=last", "--max-new-tokens", 1)
    assert code == 0
    names = [str(tmp_path / "p.txt"), "text", "first", "7", f"{rows}:5", "last"]
    assert re.findall("==> (.*) <==", out) == [f"{i} of 6: {name}" for i, name in enumerate(names, 1)]


def test_stdin_is_read_once(refused, model_folder):
    assert "stdin" in refused(2, "generate", "--model", model_folder, "--prompt-file", "-", "--prompts", "-")


def test_batches_do_not_change_the_texts(results):
    prompts = [f"--prompt={'ab' * i}" for i in range(1, 8)]
    whole = results(*prompts)
    assert results(*prompts, "--batch-size", 3) == whole
    assert len({result["text"] for result in whole}) == 7


def test_several_samples_of_each_prompt(results, run, model_folder):
    prompts = ["--prompt", "ab", "--prompt", "longer"]
    got = results(*prompts, "--num-samples", 3, "--batch-size", 4)
    assert [(result["name"], result["sample"]) for result in got] == [
        (n, i) for n in ("ab", "longer") for i in (1, 2, 3)
    ]
    assert len({result["text"] for result in got}) == 6
    assert [result for result in got if result["sample"] == 1] == results(*prompts)
    code, out, _ = run("generate", "--model", model_folder, "--prompt", "ab", "--num-samples", 2, "--max-new-tokens", 1)
    assert code == 0 and re.findall("==> (.*) <==", out) == ["1 of 1: ab, sample 1 of 2", "1 of 1: ab, sample 2 of 2"]


def test_greedy_samples_would_be_the_same(refused, model_folder, not_loaded):
    arguments = ["--prompt", "a", "--num-samples", 2, "--temperature", 0]
    assert "gives the same text 2 times" in refused(2, "generate", "--model", model_folder, *arguments)


def test_nothing_heavy_is_imported_for_the_first_token(model_folder):
    """Importing any of these takes from a tenth of a second to several."""
    heavy = ["torch._dynamo", "torch._inductor", "sympy", "transformers", "datasets", "pyarrow", "rich"]
    script = (
        "import sys; from anymamba.cli import main\n"
        f"assert main(['generate', '--model', {str(model_folder)!r}, '--prompt', 'a', '--max-new-tokens', '1']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_text_is_streamed(model_folder):
    """The first characters are printed long before the last ones."""
    command = [sys.executable, "-m", "anymamba", "generate", "--model", str(model_folder)]
    arguments = ["--prompt", "def ", "--max-new-tokens", "1000000000", "--threads", "1"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"def "
        assert process.poll() is None
    finally:
        process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 143), err  # 0: the end of the text was drawn in time


def test_threads_and_dtype(run, model_folder):
    import torch

    arguments = ["--prompt", "a", "--max-new-tokens", 2, "--threads", 1, "--dtype", "bfloat16", "--device", "cpu"]
    assert run("generate", "--model", model_folder, *arguments)[0] == 0
    assert torch.get_num_threads() == 1


# ------------------------------------------------------------------------------------------------- errors


def test_no_prompt(refused, model_folder):
    assert "--prompt" in refused(2, "generate", "--model", model_folder)


def test_no_prompt_file(refused, model_folder, tmp_path):
    assert "none.txt" in refused(2, "generate", "--model", model_folder, "--prompt-file", tmp_path / "none.txt")


@pytest.fixture
def not_loaded(monkeypatch):
    """Fails the test if the weights of a model are loaded."""

    def load_model(*arguments):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(verb, "load_model", load_model)
    monkeypatch.setattr(evaluate, "load_model", load_model)


@pytest.mark.parametrize("prompt", ["apple", "other"], ids=["an id beyond the vocabulary", "an id within"])
def test_a_tokenizer_of_another_model(refused, model_folder, big_tokenizer, not_loaded, texts, prompt):
    line = refused(2, "generate", "--model", model_folder, "--tokenizer", big_tokenizer, "--prompt", prompt)
    assert "the tokenizer words has 5,001 ids and the model a vocabulary of 257" in line and "--tokenizer" in line
    assert line == refused(2, "eval", "--model", model_folder, "--tokenizer", big_tokenizer, "--data", texts)


def test_a_prompt_that_the_tokenizer_cannot_read(refused, model_folder, not_loaded, tmp_path):
    (tmp_path / "p").write_bytes(b"\xff")
    words = Tokenizer(models.WordLevel({"apple": 5, "other": 0}, unk_token="other"))
    words.save(str(tmp_path / "words.json"))
    arguments = ["--tokenizer", tmp_path / "words.json", "--prompt-file", tmp_path / "p"]
    assert "UTF-8" in refused(2, "generate", "--model", model_folder, *arguments)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", -1),
        ("--top-k", 0),
        ("--top-p", 0),
        ("--min-p", 2),
        ("--repetition-penalty", 0),
        ("--max-new-tokens", -1),
        ("--num-beams", 0),
        ("--num-samples", 0),
        ("--batch-size", 0),
        ("--threads", 0),
        ("--seed", -1),
        ("--stop", ""),
    ],
)
def test_values_out_of_range(refused, model_folder, not_loaded, flag, value):
    """They are told before the model is loaded."""
    line = refused(2, "generate", "--model", model_folder, "--prompt", "a", f"{flag}={value}")
    assert flag.strip("-").replace("-", "_") in line.replace("-", "_")


def test_an_unknown_device(refused, model_folder, not_loaded):
    assert "abacus" in refused(2, "generate", "--model", model_folder, "--prompt", "a", "--device", "abacus")


@pytest.mark.parametrize("verb", ["generate", "eval", "train"])
def test_a_model_without_a_tokenizer(refused, texts, tmp_path, verb):
    """Every verb gives the same error and takes the same flag."""
    pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    from anymamba.models.config import ModelConfig

    model = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=300))
    model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m.gguf", format="gguf")
    for name in (tmp_path / "m", tmp_path / "m.gguf"):
        line = refused(
            2,
            *{
                "generate": ["generate", "--model", name, "--prompt", "a"],
                "eval": ["eval", "--model", name, "--data", texts],
                "train": ["train", "--from", name, "--data", texts, "--out", tmp_path / "run", "--steps", 1],
            }[verb],
        )
        assert f"{name} has no tokenizer that can be read, and its vocabulary of 300 is not bytes" in line
        assert "--tokenizer FILE" in line
    assert not (tmp_path / "run").exists()


def test_a_model_of_256_bytes(run, tmp_path):
    """Its vocabulary has no id that ends documents."""
    from anymamba.models.config import ModelConfig

    LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=256)).save_pretrained(tmp_path / "m")
    code, out, err = run("generate", "--model", tmp_path / "m", "--prompt", "ab", "--max-new-tokens", 5, "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["n_tokens"] == 5
    (tmp_path / "a.txt").write_text("some text")
    code, out, err = run("eval", "--model", tmp_path / "m", "--data", tmp_path / "a.txt", "--json")
    assert code == 0, err
    assert json.loads(out)["n_tokens"] == 8
