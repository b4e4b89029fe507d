"""The zero-shot tasks of table 3 of the paper, from local files, through lm-eval; the paper's numbers beside ours.

The tasks have the prompts and metrics of lm-eval's own. `write_tasks` makes a folder for `lm-eval --include_path`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from anymamba.base.files import write_text
from anymamba.lab.charts import table

PREFIX = "anymamba_"
"""Of the names of the tasks, so that lm-eval's own keep theirs."""
Document = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task: its file, what lm-eval is told, and what counts."""

    words: str
    file: str
    metric: str
    """acc, or acc_norm, which divides a choice's log-probability by its bytes."""
    chance: float
    """Accuracy of a guess, in percent."""
    config: Mapping[str, Any] = field(default_factory=dict)
    labels: str | None = None
    """A file with the label of each document, if they are not in the documents."""


CHOICE = {"output_type": "multiple_choice"}
QUESTION = {
    **CHOICE,
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
}
BEFORE = "sentence[:sentence.index('_')]"
TASKS = {
    "lambada": Task(
        "LAMBADA",
        "lambada_openai_test.jsonl",
        "acc",
        0.0,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        },
    ),
    "hellaswag": Task(
        "HellaSwag",
        "hellaswag_val_1000.jsonl",
        "acc_norm",
        25.0,
        {**CHOICE, "doc_to_text": "{{query}}", "doc_to_target": "{{gold}}", "doc_to_choice": "choices"},
    ),
    "piqa": Task(
        "PIQA",
        "piqa_valid.jsonl",
        "acc",
        50.0,
        {
            **CHOICE,
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "{{[sol1, sol2]}}",
        },
        "piqa_valid_labels.lst",
    ),
    "arc_easy": Task("ARC-E", "arc_easy_validation.jsonl", "acc", 25.0, QUESTION),
    "arc_challenge": Task("ARC-C", "arc_challenge_validation.jsonl", "acc_norm", 25.0, QUESTION),
    "winogrande": Task(
        "WinoGrande",
        "winogrande_xl_validation.jsonl",
        "acc",
        50.0,
        {
            **CHOICE,
            "doc_to_text": "{{answer|int - 1}}",
            "doc_to_target": "{{sentence[sentence.index('_') + 1:]|trim}}",
            "doc_to_choice": f"{{{{[{BEFORE} ~ option1, {BEFORE} ~ option2]}}}}",
        },
    ),
}
"""By name, in the order of the paper's columns."""
METRICS = {
    "loglikelihood": (("perplexity", "perplexity", False), ("acc", "mean", True)),
    "multiple_choice": (("acc", "mean", True), ("acc_norm", "mean", True)),
}
"""Name, aggregation, and whether higher is better, by kind of task."""

PAPER: dict[str, tuple[float, ...]] = {
    "Pythia-160M": (38.10, 33.0, 30.2, 61.4, 43.2, 24.1, 51.9),
    "Mamba-130M": (16.07, 44.3, 35.3, 64.5, 48.0, 24.3, 51.9),
    "Pythia-410M": (10.84, 51.4, 40.6, 66.9, 52.1, 24.6, 53.8),
    "Mamba-370M": (8.14, 55.6, 46.5, 69.5, 55.1, 28.0, 55.3),
    "Pythia-1B": (7.92, 56.1, 47.2, 70.7, 57.0, 27.1, 53.5),
    "Mamba-790M": (6.02, 62.7, 55.1, 72.1, 61.2, 29.5, 56.1),
    "Pythia-1.4B": (6.08, 61.7, 52.1, 71.0, 60.5, 28.5, 57.2),
    "Mamba-1.4B": (5.04, 64.9, 59.1, 74.2, 65.5, 32.8, 61.5),
    "Pythia-2.8B": (5.04, 64.7, 59.3, 74.0, 64.1, 32.9, 59.7),
    "Mamba-2.8B": (4.23, 69.2, 66.1, 75.2, 69.7, 36.3, 63.5),
}
"""Table 3: perplexity of LAMBADA, then the accuracy of each task in percent."""


def read_documents(folder: Path, names: Sequence[str], n_documents: int | None = None) -> dict[str, list[Document]]:
    """The first documents of each task, all by default.

    Raises FileNotFoundError for a file that is missing, ValueError for one that is damaged; both name it.
    """
    found = {}
    for name in names:
        task = TASKS[name]
        for file in filter(None, (task.file, task.labels)):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"the task {name} needs {folder / file}; choose the folder with that file")
        documents = read_lines(folder / task.file, json.loads)
        if task.labels is not None:
            labels = read_lines(folder / task.labels, int)
            if len(labels) != len(documents):
                raise ValueError(
                    f"{folder / task.labels} must have a label for each document of {folder / task.file}, got "
                    f"{len(labels)} labels and {len(documents)} documents; copy both again"
                )
            documents = [document | {"label": label} for document, label in zip(documents, labels, strict=True)]
        found[name] = documents[:n_documents]
    return found


def read_lines(path: Path, parse: Callable[[str], Any]) -> list[Any]:
    """Every line of a file, parsed.

    Raises ValueError, which names the file and the line, if one cannot be parsed or there is none.
    """
    found: list[Any] = []
    try:
        with open(path, encoding="utf-8") as lines:
            found.extend(map(parse, lines))
    except ValueError as error:
        raise ValueError(f"line {len(found) + 1} of {path} cannot be read ({error}); copy the file again") from error
    if not found:
        raise ValueError(f"{path} is empty; copy the file again")
    return found


def write_tasks(folder: Path, documents: Mapping[str, list[Document]]) -> None:
    """Write each task's documents and its file for lm-eval; YAML reads JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in documents.items():
        data = folder / f"{name}.jsonl"
        write_text(data, "".join(json.dumps(document) + "\n" for document in own))
        config = TASKS[name].config
        metrics = [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": higher}
            for metric, aggregation, higher in METRICS[config["output_type"]]
        ]
        values = {
            "task": f"{PREFIX}{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.absolute())}},
            "test_split": "test",
            **config,
            "metric_list": metrics,
            "metadata": {"version": 1.0},
        }
        write_text(folder / f"{name}.yaml", json.dumps(values, indent=1) + "\n")


def evaluate(
    model: str | Path, tasks: Path, names: Sequence[str], device: str, verify: bool = True
) -> dict[str, float]:
    """Accuracies by task, in percent, and `perplexity`, that of LAMBADA, of a model on tasks that were written.

    Args:
        model: a folder, a .gguf file, or a name on the hub.
        tasks: the folder that `write_tasks` made.
        verify: compare the model's files with their digests.
    Raises ImportError, which names the extra, if lm-eval is missing.
    """
    from anymamba.compat.lm_eval import AnymambaLM

    import lm_eval  # isort: skip  # after the module that says which extra has it
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = lm_eval.simple_evaluate(
        model=AnymambaLM(str(model), device=device, verify=verify),
        tasks=[f"{PREFIX}{name}" for name in names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )["results"]
    found = {name: 100 * results[f"{PREFIX}{name}"][f"{TASKS[name].metric},none"] for name in names}
    if "lambada" in names:
        found["perplexity"] = results[f"{PREFIX}lambada"]["perplexity,none"]
    return found


def table_3(ours: Mapping[str, Mapping[str, float]], papers: Sequence[str] = tuple(PAPER)) -> str:
    """Our rows, the rows of the paper, and what a guess gets, in the form of table 3."""
    header = ("model", "LAMBADA, ppl", *(f"{task.words}, %" for task in TASKS.values()), "average, %")
    rows = [[label, *cells(scores)] for label, scores in ours.items()]
    for name in papers:
        scores = dict(zip(("perplexity", *TASKS), PAPER[name], strict=True))
        rows.append([f"{name}, paper", *cells(scores)])
    chance = {name: task.chance for name, task in TASKS.items()}
    return table(header, [*rows, ["a guess", *cells(chance)]])


def cells(scores: Mapping[str, float]) -> list[str]:
    """The perplexity, the accuracies and their average, which needs all."""
    accuracies = [f"{scores[name]:.1f}" if name in scores else "" for name in TASKS]
    whole = all(name in scores for name in TASKS)
    average = f"{mean(scores[name] for name in TASKS):.1f}" if whole else ""
    return [f"{scores['perplexity']:.2f}" if "perplexity" in scores else "", *accuracies, average]
