"""The experiments that carry the paper's argument, one folder each: arms, measurement, findings, charts.

To add one, write a folder whose `EXPERIMENT` is an `Experiment`, and name it in EXPERIMENTS.
"""

from __future__ import annotations

import importlib

from anymamba.lab.experiment import Experiment

EXPERIMENTS = {
    "selective-copying": "which block and which inner layer can select: remember tokens, skip noise",
    "induction-heads": "recall what followed a token, at lengths far beyond training",
    "associative-recall": "many keys and values: where states of fixed size fail, and what attention repairs",
    "selection-ablation": "which of the step, B and C must be selective, and what a larger state is worth then",
    "speed": "scan, convolution and attention against the length; prefill, training and decoding of whole models",
}
"""Names and what each shows."""


def load_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises ValueError for a name that does not exist.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    module = importlib.import_module(f"anymamba.experiments.{name.replace('-', '_')}")
    experiment = module.EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment
