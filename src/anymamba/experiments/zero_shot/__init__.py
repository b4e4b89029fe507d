"""Zero-shot tasks on the models of `scaling` (arXiv:2312.00752, table 3), which shows that the pipeline works."""

from __future__ import annotations

from anymamba.experiments.zero_shot.arms import arms_at
from anymamba.experiments.zero_shot.figures import accuracy
from anymamba.experiments.zero_shot.findings import sections, thresholds
from anymamba.experiments.zero_shot.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
The tasks of table 3 of [Mamba](https://arxiv.org/abs/2312.00752), run by lm-eval with this package's model type.
The task files are our own; prompts and metrics are lm-eval's. The models are those of 7 million parameters that
`scaling` has trained on books, read byte by byte. The paper's models have 130 million parameters and more, and have
read the Pile.

Models as small as ours are expected near chance. The table shows that the pipeline works; `anymamba reproduce` runs
it on published weights. LAMBADA's perplexity is that of its last word. The files are the test set of LAMBADA, the first
1,000 documents of HellaSwag's validation set, and the validation sets of the others. The paper has the test sets of
ARC.
"""

EXPERIMENT = Experiment(
    name="zero-shot",
    title="Zero-shot tasks: the form of table 3",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"accuracy": accuracy},
    has_seeds=False,
)
