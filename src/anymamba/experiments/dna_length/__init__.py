"""DNA models by length: loss from 2^10 to 2^17 bases, and a row of 2^20 (arXiv:2312.00752, figure 5, right)."""

from __future__ import annotations

from anymamba.experiments.dna_length.arms import arms_at
from anymamba.experiments.dna_length.figures import length
from anymamba.experiments.dna_length.findings import sections, thresholds
from anymamba.lab.experiment import Experiment
from anymamba.lab.genome_models import measure_genomes

PROTOCOL = """
Figure 5, right, of [Mamba](https://arxiv.org/abs/2312.00752): one small model, rows of different lengths, and the
same number of bases a step. All lengths are judged on the same held-out bases, cut into rows of the length of
training. So a base near the end of a long row has more context, and with a model that uses it the loss falls with the
length.

The bases, their split, the recipe and Hyena are those of the experiment `dna-size`: three species of *Arabidopsis*,
held out by position. Hyena's filter is defined on the length of its rows. The rate of each architecture is the best
at the shortest length. The paper finds 8e-3 for Mamba and 1e-3 for Hyena, whose training is unstable with more.

What to expect: the paper's Mamba gains 0.011 nats from 2^10 to 2^20, on the human genome, after 20,000 steps of 16
million bases, which are thousands of times more than here. A gain that is not larger than twice its standard error is
a null result. It says that this many bases do not show the use of context, not that there is none.

The longest row is a demonstration of memory and time, with the activations of blocks computed again in the backward
pass. It has a row a step, and fewer steps for the same bases, so its loss does not compare with the others.
"""

EXPERIMENT = Experiment(
    name="dna-length",
    title="DNA: loss against the length of the context",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure_genomes,
    thresholds=thresholds,
    sections=sections,
    figures={"length": length},
)
