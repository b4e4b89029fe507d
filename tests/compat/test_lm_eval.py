"""lm-eval on our models: the scores of its own type `hf` on the same weights, packed and in batches of any size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra 'lm-eval' installs lm-eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from anymamba import LanguageModel, ModelConfig
from anymamba.base.errors import CheckpointError
from anymamba.compat.lm_eval import AnymambaLM, scoring
from anymamba.compat.lm_eval.scoring import Row, batches, score
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.checkpoints import convert
from tests.compat.lm_eval_local import TASKS, write_model, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_data):
    return write_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "gpt-neox-20b.tokenizer.json")


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=512)


@pytest.fixture(scope="module")
def ours(folder) -> AnymambaLM:
    return AnymambaLM(str(folder), device="cpu", max_length=512)


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_the_same_scores_on_five_tasks(tmp_path, shared_data, ours, theirs):
    """acc, acc_norm and perplexity, and the log-likelihood of every request."""
    manager = TaskManager(include_path=str(write_tasks(tmp_path / "tasks", shared_data / "eval", 16)))
    found = [
        lm_eval.simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity="ERROR"
        )
        for model in (ours, theirs)
    ]
    for task in TASKS:
        got, want = (results["results"][task] for results in found)
        metrics = [name for name, value in want.items() if isinstance(value, float)]
        assert metrics, want
        for name in metrics:
            assert got[name] == pytest.approx(want[name], rel=1e-3), (task, name)
        for a, b in zip(found[0]["samples"][task], found[1]["samples"][task], strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                assert float(x[0]) == pytest.approx(float(y[0]), abs=1e-3) and str(x[1]) == str(y[1])


TEXTS = ["", "a", "The quick brown fox jumps over the lazy dog. " * 90, "x y z"]


def test_rolling(ours, theirs):
    """One text is longer than the windows."""
    asked = requests("loglikelihood_rolling", *((text,) for text in TEXTS[1:]))
    got, want = ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-3)


def test_contexts_that_are_empty_shared_or_too_long(ours, theirs):
    pairs = [
        *(("The capital of France is", f" {word}") for word in ("Paris", "a large city", "London")),
        ("", "Hello"),
        (TEXTS[2], " and runs"),
        ("A question ", "with a space before it"),
    ]
    asked = requests("loglikelihood", *pairs)
    got, want = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [a[0] for a in got] == pytest.approx([b[0] for b in want], abs=1e-3)
    assert [a[1] for a in got] == [bool(b[1]) for b in want]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_batch_size_gives_the_same(folder, ours, batch_size):
    asked = requests("loglikelihood", *((f"word {i} " * (i + 1), f" number{i}") for i in range(7)))
    single = AnymambaLM(str(folder), device="cpu", batch_size=batch_size, max_length=512)
    got, want = single.loglikelihood(asked), ours.loglikelihood(asked)
    assert [a[0] for a in got] == pytest.approx([b[0] for b in want], abs=1e-4)
    assert [a[1] for a in got] == [b[1] for b in want]


def test_generation_with_stop_strings(ours, theirs):
    """Greedy, batched, each request with its own stop strings; the texts of `hf`."""
    prompts = ["def f(x):", "Once upon a time", "1 2 3", "A"]
    free = ours.generate_until(requests("generate_until", *((p, {"max_gen_toks": 24, "until": []}) for p in prompts)))
    stops = [text[5:8] for text in free]
    asked = requests(
        "generate_until", *((p, {"max_gen_toks": 24, "until": [s]}) for p, s in zip(prompts, stops, strict=True))
    )
    got, want = ours.generate_until(asked), theirs.generate_until(asked)
    assert got == want
    assert all(text == whole[: whole.index(stop)] for text, whole, stop in zip(got, free, stops, strict=True))
    same = {"max_gen_toks": 12, "until": ["\n\n"]}
    together = ours.generate_until(requests("generate_until", *((p, same) for p in prompts)))
    assert together == [ours.generate_until(requests("generate_until", (p, same)))[0] for p in prompts]


def test_generation_options(ours):
    def asked(**options):
        return ours.generate_until(requests("generate_until", ("abc", {"max_gen_toks": 8, "until": []} | options)))

    torch.manual_seed(1)
    first = asked(do_sample=True, temperature=1.5)
    assert asked(do_sample=True, temperature=1.5) == first
    torch.manual_seed(2)
    assert asked(do_sample=True, temperature=1.5) != first
    with pytest.raises(ValueError, match="unknown generation options length_penalty; anymamba has until, max_gen_toks"):
        asked(length_penalty=2.0)
    with pytest.raises(ValueError, match="max_gen_toks must be below max_length=512, got 512"):
        asked(max_gen_toks=512)


THEIR_TYPE = """
import json, sys
import anymamba.compat
anymamba.compat.activate()
from lm_eval.api.instance import Instance
from lm_eval.models.mamba_lm import MambaLMWrapper
model, tokenizer, pairs, prompt = json.loads(sys.argv[1])
harness = MambaLMWrapper(pretrained=model, tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=1)
asked = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
free = Instance("generate_until", {}, (prompt, {"max_gen_toks": 12, "until": ["\\n\\n"]}), 0)
print(json.dumps([harness.loglikelihood(asked), harness.generate_until([free])]))
"""


def test_its_own_type_for_mamba_ssm_runs_on_the_drop_in(tmp_path, folder, ours):
    convert(folder, tmp_path / "original", "state-spaces")
    pairs, prompt = [("The capital of France is", " Paris"), ("a b c", " d e f"), ("x", " yes")], "def f(x):"
    given = json.dumps([str(tmp_path / "original"), str(folder), pairs, prompt])
    done = subprocess.run([sys.executable, "-c", THEIR_TYPE, given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    likelihoods, texts = json.loads(done.stdout.strip().splitlines()[-1])
    want = ours.loglikelihood(requests("loglikelihood", *pairs))
    assert [a[0] for a in likelihoods] == pytest.approx([b[0] for b in want], abs=1e-3)
    assert texts == ours.generate_until(requests("generate_until", (prompt, {"max_gen_toks": 12, "until": ["\n\n"]})))


@pytest.mark.parametrize("mixer", ["mamba", "h3-s4d"])
@pytest.mark.parametrize("pass_tokens", [scoring.PASS_TOKENS, 4])
def test_packed_scores_are_those_of_single_sequences(mixer, pass_tokens, monkeypatch):
    """Shared contexts, single ones, continuations of one token and of many, in pieces: each as it is alone. Layers
    make no states that nobody reads, only those from which a continuation or the next piece starts."""
    torch.manual_seed(0)
    monkeypatch.setattr(scoring, "PASS_TOKENS", pass_tokens)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=40, mixers=(mixer,))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(40, (n,), generator=generator).tolist()

    shared = ids(9)
    rows = [Row(ids(5), ids(3)), *(Row(shared, ids(n)) for n in (1, 4, 2)), Row(ids(1), ids(1)), Row(shared, ids(6))]
    parts = [rows] if pass_tokens > 4 else [[row] for row in rows]
    got = [found for part in parts for found in score(model, part)]
    for (log_probability, greedy), row in zip(got, rows, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.context + row.continuation[:-1]])).logits[0, len(row.context) - 1 :]
        wanted = torch.tensor(row.continuation)
        assert log_probability == pytest.approx(
            logits.log_softmax(-1)[range(len(wanted)), wanted].sum().item(), abs=1e-4
        )
        assert greedy == bool((logits.argmax(-1) == wanted).all())
    if pass_tokens > 4:
        assert [len(batch) for batch in batches(rows, 4)] == [4, 2] and sum(map(len, batches(rows, 1))) == 6


def test_a_model_and_a_tokenizer_from_python():
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257))
    harness = AnymambaLM(model, ByteTokenizer())
    (log_probability, _), *_ = harness.loglikelihood(requests("loglikelihood", ("ab", "c")))
    with torch.no_grad():
        want = model(torch.tensor([[97, 98]])).logits[0, -1].log_softmax(-1)[99].item()
    assert log_probability == pytest.approx(want, abs=1e-4)
    assert harness.eot_token_id == 256 and harness.tokenizer_name.startswith("bytes-")
    for option in ({"dtype": "float32"}, {"verify": False}):
        with pytest.raises(ValueError, match="revision, weights and verify apply only when a model is loaded"):
            AnymambaLM(model, ByteTokenizer(), **option)


@pytest.mark.parametrize("weights", ["", ",weights=float32"])
def test_a_changed_file_is_refused_unless_verify_is_false(tmp_path, weights):
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257))
    model.save_pretrained(tmp_path, ByteTokenizer())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    arguments = f"pretrained={tmp_path},device=cpu{weights}"
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or was replaced"):
        AnymambaLM.create_from_arg_string(arguments)
    AnymambaLM.create_from_arg_string(f"{arguments},verify=false")


def test_packed_weights(tmp_path):
    LanguageModel(ModelConfig(d_model=32, n_layers=1, vocab_size=257)).save_pretrained(tmp_path, ByteTokenizer())
    pairs = requests("loglikelihood", ("ab", "c"), ("abcd", "efg"))
    plain, packed = AnymambaLM(tmp_path), AnymambaLM(tmp_path, weights="int8")
    scores = ([score for score, _ in harness.loglikelihood(pairs)] for harness in (plain, packed))
    assert next(scores) == pytest.approx(next(scores), rel=0.01)
    assert packed.get_model_info() == {**plain.get_model_info(), "model_dtype": "bfloat16, q8_0"}
    with pytest.raises(ValueError, match="dtype=bfloat16 and weights=int8 both choose the format of the weights; give"):
        AnymambaLM(tmp_path, weights="int8", dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int4"}, ValueError, "dtype must be one of auto, float32"),
        ({"batch_size": 0}, ValueError, 'batch_size must be an integer of at least 1 or "auto", got 0'),
        ({"max_length": "x"}, ValueError, "max_length must be an integer of at least 1, got 'x'"),
        ({"tokenizer": "nowhere"}, FileNotFoundError, "no tokenizer at nowhere"),
        ({"device": "cuda:77"}, ValueError, "device 'cuda:77' cannot be used here"),
    ],
)
def test_misuse(folder, options, error, message):
    with pytest.raises(error, match=message):
        AnymambaLM(str(folder), **options)


def test_the_tokenizer_is_found_as_by_the_other_verbs(tmp_path):
    for vocab_size in (300, 256):
        LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=vocab_size)).save_pretrained(
            tmp_path / f"m{vocab_size}"
        )
    with pytest.raises(
        FileNotFoundError, match=r"m300 has no tokenizer that can be read.* \(tokenizer=FILE for lm-eval\)"
    ):
        AnymambaLM(str(tmp_path / "m300"), device="cpu")
    assert AnymambaLM(str(tmp_path / "m256"), device="cpu").tokenizer.eos_id is None


def test_defaults_that_suit_a_cpu(folder):
    made = AnymambaLM.create_from_arg_string(f"pretrained={folder}", {"device": "cuda:0", "batch_size": "auto"})
    assert made.model.embedding.weight.dtype == torch.float32
    assert made.model.embedding.weight.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    made = AnymambaLM.create_from_arg_string(f"pretrained={folder},dtype=bfloat16,max_length=99")
    assert made.model.embedding.weight.dtype == torch.bfloat16 and made.max_length == 99
