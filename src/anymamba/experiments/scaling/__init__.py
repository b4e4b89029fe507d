"""Scaling laws: loss against parameters and operations, for Mamba and three others (arXiv:2312.00752, figure 4)."""

from __future__ import annotations

from anymamba.experiments.scaling.arms import arms_at
from anymamba.experiments.scaling.figures import against_operations, against_parameters
from anymamba.experiments.scaling.findings import sections, thresholds
from anymamba.lab.experiment import Experiment
from anymamba.lab.language import measure_language

PROTOCOL = """
Figure 4 of [Mamba](https://arxiv.org/abs/2312.00752), with models of bytes in place of its 125 million to 1.3 billion
parameters. Mamba, Transformer++, H3++ and Hyena learn the same bytes in the same order: about 20 for each parameter, as
in the paper, and 1.5 at the scale cpu.
They have the paper's improved recipe: AdamW with betas of 0.9 and 0.95, weight decay of 0.1, a clipped norm of 1, a
tenth of the steps as warm-up, a cosine down to 1e-5, RMSNorm, no dropout. Linear maps have no biases, but for Hyena's
projections. H3++ has 1.5 times the layers, MLPs and heads of 8. Hyena has the shape of H3++; with this recipe the paper
calls it Hyena+. MLPs are so wide that all models of a size have the parameters of Mamba within 3 %.

The rate of each architecture is the best of three at the second size, and is used at all sizes. Every row is a window
from a random place and starts from an empty state. The loss is that of fixed windows of books by authors of whom
training has seen nothing, in nats a byte. Parameters include the embedding, which has 257 rows. Operations are counted
in a run of each layer, three times forward, with the convolutions by FFT.

Gaps are of means over the seeds. The paper's are in nats a token; a token of its tokenizer has about 4.2 bytes.
"""

EXPERIMENT = Experiment(
    name="scaling",
    title="Scaling laws: loss against parameters and operations",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure_language,
    thresholds=thresholds,
    sections=sections,
    figures={"parameters": against_parameters, "operations": against_operations},
)
