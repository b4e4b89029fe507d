"""Is it a promoter? Classification of short human sequences with models of our own."""

from __future__ import annotations

from anymamba.experiments.promoters.arms import arms_at
from anymamba.experiments.promoters.figures import quality
from anymamba.experiments.promoters.findings import sections, thresholds
from anymamba.experiments.promoters.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
Human promoters without a TATA box, and other human sequences, 251 bases each, from [Genomic
Benchmarks](https://github.com/ML-Bioinfo-CEITEC/genomic_benchmarks). Only its test split was to be had: 9,034
sequences, 4,915 of them promoters. They are split again by a hash of each sequence: a fifth is for the test, a tenth
chooses the rate, and the rest is for training. A sequence and its reverse complement have the same hash. Published
accuracies belong to another split, and cannot be compared with these.

Three models with about as many parameters begin from random weights: a convolutional network, Hyena, and Mamba. The
head of each reads the mean over all positions. All have the same number of steps, batches and seeds; half of the
sequences of training are read on the other strand. The rate is the one with the lowest loss on the valid sequences.

Other files `human_nontata_promoters_*.csv` beside it, compressed or not, are held-out sets: after its training every
arm is judged on them, too. `anymamba dna classify` makes the same split of the same file for models of its own, and
applies them to other files.
"""

EXPERIMENT = Experiment(
    name="promoters",
    title="DNA: promoters",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"quality": quality},
)
