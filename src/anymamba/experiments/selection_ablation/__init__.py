"""Which of Δ, B and C must be selective, and what a larger state then gains (arXiv:2312.00752, tables 7 and 10)."""

from __future__ import annotations

from anymamba.experiments.selection_ablation.arms import arms_at
from anymamba.experiments.selection_ablation.figures import selection, state
from anymamba.experiments.selection_ablation.findings import sections, thresholds
from anymamba.experiments.selection_ablation.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
Tables 7 and 10 of [Mamba](https://arxiv.org/abs/2312.00752). In table 7 none, one or all of Δ, B and C depend on the
input; what does not is a parameter of the layer, as in S4D. In table 10 the state grows from N = 1 to 16 with constant
and with selective B and C, while Δ is selective. Three cells are in both tables and measured once: Δ is N = 16 with
constant B and C, all is N = 16 with selective ones.

Table 7 is measured on selective copying (accuracy, by two blocks) and, like table 10, on a language model of bytes: the
source and documentation of the Python standard library, of the Python that runs the experiment. The model sees windows
of the training files from random places. It is judged on fixed windows of files that are held out by a hash of their
names; every window starts from an empty state, so the first bytes of each count without context. A Transformer++ of
about as many parameters learns the same language model. All arms of a task have the same data, optimiser (AdamW) and
number of steps.

Everything is judged by means over the seeds, and a difference of at most 0.01 nats is a tie. The paper's models have
350 million parameters, 7 billion tokens of the Pile and contexts of 2048; its gaps are ln of ratios of perplexity.
"""

EXPERIMENT = Experiment(
    name="selection-ablation",
    title="Ablation: which of Δ, B and C must be selective, and what a larger state is worth",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"selection": selection, "state": state},
)
