"""Which of Δ, B and C must be selective for selective copying (arXiv:2312.00752, the rows of table 7)."""

from __future__ import annotations

from anymamba.experiments.selection_ablation.arms import arms_at
from anymamba.experiments.selection_ablation.figures import selection
from anymamba.experiments.selection_ablation.findings import sections, thresholds
from anymamba.experiments.selection_ablation.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
The rows of table 7 of [Mamba](https://arxiv.org/abs/2312.00752), on selective copying: none, one or all of Δ, B and C
depend on the input; what does not is a parameter of the layer, as in S4D. The models have two blocks. All arms have the
same data, optimiser (AdamW) and number of steps. Everything is judged by means over the seeds.

Tables 6 to 10 on language models are the experiment language-ablations.
"""

EXPERIMENT = Experiment(
    name="selection-ablation",
    title="Ablation: which of Δ, B and C must be selective in selective copying",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"selection": selection},
)
