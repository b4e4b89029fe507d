"""DNA models by size: loss at 1,024 bases, for Mamba, Hyena and Transformer++ (arXiv:2312.00752, figure 5, left)."""

from __future__ import annotations

from anymamba.experiments.dna_size.arms import arms_at
from anymamba.experiments.dna_size.figures import size
from anymamba.experiments.dna_size.findings import sections, thresholds
from anymamba.lab.experiment import Experiment
from anymamba.lab.genome_models import measure_genomes

PROTOCOL = """
Figure 5, left, of [Mamba](https://arxiv.org/abs/2312.00752): causal models of single bases in windows of one length,
by size. The paper reads the human genome; here it is the first chromosomes of three species of *Arabidopsis*, 111
million bases: thaliana 1 (TAIR10.1), lyrata 1 and 2, arenosa 1 and the beginning of 2. The paper reads 10 billion
bases a run.

The species are colinear, so one rule splits all of them by position: the first 3 million bases of chromosome 1 (4
million of lyrata, whose chromosome is longer) are held out, the next million or so are a buffer that nothing reads,
and the rest is for training. Chromosomes 2 are for training. Of the held-out 24-mers, 1.6 % in thaliana, 8.5 % in
lyrata and 3.6 % in arenosa occur in training: repeats and related genes, as in every genome. With a split that
ignores the other species it would be 21 to 46 %. A training window begins anywhere, and half of the windows are read
on the other strand. Runs of 1,000 N and more are cut out; shorter ones are read, but no N is predicted. Lower case,
which marks repeats, is read as upper case.

All models of a size have the parameters of Mamba within 3 %: Hyena and Transformer++ have half of Mamba's blocks,
each with an MLP. The recipe is the paper's: AdamW with betas of 0.9 and 0.95, weight decay of 0.1, a clipped norm of
1, no dropout, a tenth of the steps as warm-up, then a cosine. The rate of each architecture is the best at the
smallest size. The loss is in nats a base; two bits are 1.386 nats.
"""

EXPERIMENT = Experiment(
    name="dna-size",
    title="DNA: loss against parameters",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure_genomes,
    thresholds=thresholds,
    sections=sections,
    figures={"size": size},
)
