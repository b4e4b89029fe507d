"""The experiments behind the paper's claims, one folder each: arms, measurement, findings, charts.

To add one, write a folder whose `EXPERIMENT` is an `Experiment`, and add its name to EXPERIMENTS.
"""

from __future__ import annotations

import importlib

from anymamba.lab.experiment import Experiment

EXPERIMENTS = {
    "selective-copying": "which block and which inner layer can remember tokens and skip noise",
    "induction-heads": "recall the token after a trigger, at lengths far beyond training",
    "associative-recall": "many keys and values: where states of fixed size fail and attention helps",
    "scaling": "loss against parameters and operations, of Mamba, Transformer++, H3++ and Hyena",
    "language-ablations": "language models: block and layer, what is selective, A, the rank of the step, the state",
    "zero-shot": "the form of table 3: LAMBADA, HellaSwag, PIQA, ARC and WinoGrande on the models of scaling",
    "selection-ablation": "which of the step, B and C must be selective for selective copying",
    "dna-size": "models of genomes: loss against parameters, of Mamba, Hyena and Transformer++",
    "dna-length": "models of genomes: loss against the length of the context, and a row of a million bases",
    "great-apes": "which of four great apes a window of DNA is from, by the length of the window",
    "promoters": "promoters or not: a CNN, Hyena and Mamba on short human sequences",
    "speed": "time of scan, convolution and attention by length; prefill, training and decoding of whole models",
}
"""Each experiment by name, with a line on what it shows."""


def load_experiment(name: str) -> Experiment:
    """The experiment with that name.

    Raises ValueError for an unknown name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; the experiments are {', '.join(EXPERIMENTS)}")
    module = importlib.import_module(f"anymamba.experiments.{name.replace('-', '_')}")
    experiment = module.EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment
