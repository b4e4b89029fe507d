"""Selective copying: which block and which inner layer can select (arXiv:2312.00752, section 4.1.1 and table 1)."""

from __future__ import annotations

from anymamba.experiments.selective_copying.arms import arms_at
from anymamba.experiments.selective_copying.figures import accuracy, learning
from anymamba.experiments.selective_copying.findings import sections, thresholds
from anymamba.experiments.selective_copying.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
The task of section 4.1.1 of [Mamba](https://arxiv.org/abs/2312.00752). A row holds tokens to remember at random places
among noise, then markers at which they are to be written down in order. Rows are made on the fly, and a model of two
blocks learns from the answers alone. All arms of a task see the same rows and have the same optimiser (AdamW) and
number of steps; in longer noise initial weights are larger. They are judged by the share of answers that are right, on
rows that are the same for all arms of a task and all seeds; the share of rows in which every answer is right is shown,
too.

The eight cells of table 1 are three blocks (no gate, H3, Mamba) around S4 with 64 states a channel, Hyena's filter, or
S6 with 16 states. The control is plain copying, which a fixed delay solves: it tells remembering from selecting.

The paper's numbers are for 16 tokens in noise of 4,096, after 400,000 steps at a rate of 1e-4. It does not say whether
its accuracy is of answers or of rows, nor how its block without a gate is wired.
"""

EXPERIMENT = Experiment(
    name="selective-copying",
    title="Selective copying: which block and which inner layer can select",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"accuracy": accuracy, "learning": learning},
)
