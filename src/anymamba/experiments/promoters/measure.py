"""Trains a classifier of promoters and measures it on the test sequences."""

from __future__ import annotations

from typing import Any

import torch

from anymamba.evaluation.dna.metrics import classification_metrics
from anymamba.experiments.promoters.arms import PromoterSettings, build
from anymamba.experiments.promoters.data import Labelled, held_out, held_out_files, labelled, training_batches
from anymamba.lab.classifiers import Classifier
from anymamba.lab.experiment import Context
from anymamba.lab.learning import learn
from anymamba.lab.optimization import Optimization, autocast


def measure(settings: PromoterSettings, context: Context) -> dict[str, Any]:
    """Train an arm. Returns the values of `learn` on the valid sequences; accuracy, MCC and AUROC on `valid`, `test`
    and each held-out file; the rate, the bases that were read, the digest of the split and the sequences of each part.
    """
    parts, digest = labelled(settings.source, context.data, context.device)
    files = held_out_files(settings.source, context.data)
    held_out_sets = {file.name: held_out(file, context.data, context.device) for file in files}
    model, how = build(settings).to(context.device), settings.optimization
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    values = learn(
        model,
        how,
        training_batches(parts["train"]),
        (parts["valid"].ids, parts["valid"].labels[:, None]),
        context,
        every=settings.judge_every,
        resumable=True,
    )
    on_files = {
        name: {**measured(model, new, how), "sequences": len(new.ids), "left_out": left_out}
        for name, (new, left_out) in held_out_sets.items()
    }
    return {
        **values,
        **({"held_out": on_files} if on_files else {}),
        "learning_rate": how.learning_rate,
        "read_bases": values["steps"] * how.batch_size * parts["train"].ids.shape[1],
        "valid": measured(model, parts["valid"], how),
        "test": measured(model, parts["test"], how),
        "split": digest,
        "sequences": {name: len(own.ids) for name, own in parts.items()},
    }


def measured(model: Classifier, some: Labelled, how: Optimization, rows: int = 512) -> dict[str, float | None]:
    """Accuracy, MCC and AUROC on some sequences."""
    model.eval()
    with autocast(how, some.ids.device):
        found = torch.cat([model.probabilities(ids)[:, 0] for ids in some.ids.split(rows)])
    return classification_metrics(found.cpu().numpy(), some.labels.cpu().numpy())
