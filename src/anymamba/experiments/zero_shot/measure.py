"""Evaluates one model on its tasks."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.experiments.zero_shot.arms import TOY, Settings
from anymamba.lab.experiment import Context
from anymamba.lab.saving import OutOfTime
from anymamba.lab.zero_shot import evaluate, read_documents, write_tasks
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """`scores`, by task in percent and the perplexity of LAMBADA, and `documents`, their number by task.

    Raises ValueError if the folder of the data is missing, and FileNotFoundError if a file or the model is.
    """
    with TemporaryDirectory() as temporary:
        model, tasks = Path(temporary) / "model", Path(temporary) / "tasks"
        if settings.folder is None:
            documents = {name: TOY[name] for name in settings.tasks}
            new = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257))
            new.save_pretrained(model, ByteTokenizer())
        else:
            model, data = model_folder(settings.folder, context)
            documents = read_documents(data, settings.tasks, settings.n_documents)
        write_tasks(tasks, documents)
        scores: dict[str, float] = {}
        for number, name in enumerate(settings.tasks):
            if context.saving and context.saving.is_late():
                raise OutOfTime
            context.progress(number, len(settings.tasks), f"{name}: {len(documents[name]):,} documents")
            scores |= evaluate(model, tasks, (name,), str(context.device))
    return {"scores": scores, "documents": {name: len(own) for name, own in documents.items()}}


def model_folder(name: str, context: Context) -> tuple[Path, Path]:
    """The folder of the model, and that of the tasks' files."""
    if context.data is None:
        raise ValueError("give the folder with the tasks' files, and the models in its folder models, with --data")
    folder = context.data / "models" / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the model {folder} does not exist; `scaling --scale gpu` writes it beside its results"
        )
    return folder, context.data
