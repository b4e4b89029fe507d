"""Zero-shot tasks: the scores of lm-eval's own tasks, files that are missing, the table, and the verb `reproduce`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from anymamba.cli import main
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.experiments import load_experiment
from anymamba.lab.experiment import Context
from anymamba.lab.zero_shot import PAPER, TASKS, evaluate, read_documents, table_3, write_tasks
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from tests.experiments.conftest import made_up, rows, verdicts

EXPERIMENT = load_experiment("zero-shot")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, ByteTokenizer())
    return folder


def test_our_tasks_have_the_scores_of_lm_evals_own(tmp_path, shared_data, model):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra 'lm-eval' installs lm-eval")
    from lm_eval.tasks import TaskManager

    from anymamba.compat.lm_eval import AnymambaLM
    from tests.compat import lm_eval_local

    names = ("lambada", "hellaswag", "piqa", "arc_easy", "winogrande")
    write_tasks(tmp_path / "ours", read_documents(shared_data / "eval", names, 12))
    ours = evaluate(model, tmp_path / "ours", names, "cpu")
    theirs_in = lm_eval_local.write_tasks(tmp_path / "theirs", shared_data / "eval", 12)
    theirs = lm_eval.simple_evaluate(
        model=AnymambaLM(str(model), device="cpu"),
        tasks=list(lm_eval_local.TASKS),
        task_manager=TaskManager(include_path=str(theirs_in), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )["results"]
    for name in names:
        assert ours[name] == pytest.approx(100 * theirs[f"local_{name}"][f"{TASKS[name].metric},none"]), name
    assert ours["perplexity"] == pytest.approx(theirs["local_lambada"]["perplexity,none"], rel=1e-6)


def test_the_verb_prints_our_row_beside_the_papers(tmp_path, shared_data, model, capsys):
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' installs lm-eval")
    command = [
        "reproduce",
        "mamba-130m",
        "--model",
        str(model),
        "--data",
        str(shared_data / "eval"),
        "--documents",
        "3",
    ]
    assert main([*command, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = rows(capsys.readouterr().out)
    assert [row[0] for row in printed] == ["mamba-130m, ours", "Mamba-130M, paper", "Pythia-160M, paper", "a guess"]
    assert all(printed[0]) and printed[1][1] == "16.07"
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(written["scores"]) == {*TASKS, "perplexity"} and set(written["documents"].values()) == {3}
    assert {path.suffix for path in (tmp_path / "out" / "tasks").iterdir()} == {".yaml", ".jsonl"}


def test_what_is_missing_is_named(tmp_path, capsys):
    assert main(["reproduce", "mamba-130m", "--data", str(tmp_path)]) == 2
    assert "the task lambada needs" in capsys.readouterr().err
    settings = EXPERIMENT.arms("gpu")[0].settings
    context = Context(torch.device("cpu"), 0, lambda *told: None)
    with pytest.raises(ValueError, match="with --data"):
        EXPERIMENT.measure(settings, context)
    with pytest.raises(FileNotFoundError, match="mamba-7m-seed0 does not exist; `scaling"):
        EXPERIMENT.measure(settings, Context(torch.device("cpu"), 0, lambda *told: None, data=tmp_path))


PIQA, LABELS = (TASKS["piqa"].file, TASKS["piqa"].labels)


@pytest.fixture
def piqa(tmp_path):
    """A folder with three documents and their labels."""
    (tmp_path / PIQA).write_text("".join(f'{{"goal": "{i}"}}\n' for i in range(3)))
    (tmp_path / LABELS).write_text("1\n0\n1\n")
    return tmp_path


def test_documents_with_their_labels(piqa):
    read = [(document["goal"], document["label"]) for document in read_documents(piqa, ["piqa"])["piqa"]]
    assert read == [("0", 1), ("1", 0), ("2", 1)]
    assert len(read_documents(piqa, ["piqa"], 2)["piqa"]) == 2


@pytest.mark.parametrize("labels", ["1\n0\n", "1\n0\n1\n0\n"])
@pytest.mark.parametrize("n_documents", [None, 1])
def test_labels_for_other_documents_are_refused(piqa, labels, n_documents):
    (piqa / LABELS).write_text(labels)
    n_labels = labels.count("\n")
    with pytest.raises(ValueError, match=f"{LABELS} .*{PIQA}, got {n_labels} labels and 3 documents; copy both again"):
        read_documents(piqa, ["piqa"], n_documents)


@pytest.mark.parametrize(
    ("file", "contents", "words"),
    [
        (PIQA, b'{"goal": "0"}\n{"goal": "1', "line 2 of .*{} cannot be read"),
        (PIQA, b'{"goal": "\xc3', "line 1 of .*{} cannot be read"),
        (LABELS, b"1\nx\n0\n", "line 2 of .*{} cannot be read"),
        (PIQA, b"", "{} is empty; copy the file again"),
        (LABELS, b"", "{} is empty; copy the file again"),
    ],
)
def test_a_damaged_file_of_a_task_is_named(piqa, file, contents, words):
    (piqa / file).write_bytes(contents)
    with pytest.raises(ValueError, match=words.format(file)):
        read_documents(piqa, ["piqa"])


def test_the_verb_refuses_a_changed_model_and_no_verify_takes_it(tmp_path, shared_data, model, capsys):
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' installs lm-eval")
    changed = shutil.copytree(model, tmp_path / "changed")
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    command = ["reproduce", "mamba-130m", "--model", str(changed), "--data", str(shared_data / "eval")]
    command += ["--documents", "1", "--device", "cpu"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "model.safetensors is damaged or was replaced" in error and "--no-verify" in error
    assert main([*command, "--no-verify"]) == 0


def test_the_table_has_the_papers_averages():
    table = rows(table_3({}))
    averages = {row[0].removesuffix(", paper"): float(row[-1]) for row in table}
    assert averages["Mamba-130M"] == 44.7 and averages["Mamba-2.8B"] == 63.3 and averages["Pythia-160M"] == 40.6
    assert len(table) == len(PAPER) + 1


def test_thresholds_and_the_report_of_made_up_scores():
    scores = {"perplexity": 900.0, **{name: task.chance + 1 for name, task in TASKS.items()}}
    values = {"scores": scores, "documents": dict.fromkeys(TASKS, 7)}
    results = made_up(EXPERIMENT, "gpu", {"mamba-7m": [values]})
    assert verdicts(EXPERIMENT, results) == ["holds", "holds"]
    assert rows(EXPERIMENT.sections(results)["Table 3"])[0][:3] == ["mamba-7m-seed0", "900.00", "1.0"]
    worse = {**values, "scores": {**scores, "piqa": 30.0, "perplexity": 1e5}}
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {"mamba-7m": [worse]})) == ["fails", "fails"]
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {})) == ["not judged"] * 2
