"""Which great ape is it? Classification of windows of chromosome 22 (arXiv:2312.00752, section 4.3.3)."""

from __future__ import annotations

from anymamba.experiments.great_apes.arms import arms_at
from anymamba.experiments.great_apes.figures import lengths
from anymamba.experiments.great_apes.findings import sections, thresholds
from anymamba.experiments.great_apes.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
Section 4.3.3 of [Mamba](https://arxiv.org/abs/2312.00752): say which great ape a window of DNA is from, by the length
of the window. The paper has five species and whole genomes; here it is human, chimpanzee, gorilla and orang-utan
along human chromosome 22, in homologous sequence from an alignment of Ensembl. Four species: a guess is right in 25 %
of cases.

The splits are by human coordinates, the same for all species, in blocks of 250 kb with 70 kb that nothing reads
between different splits. A training window is of a random species at a random place, and half of them are read on the
other strand. All species have the same places. The test has the same loci at every length: homologous stretches of
the longest length, which shorter windows tile. Slices that are shorter are left out. Intervals are 95 %, by a
bootstrap over loci.

N would tell the species: the human sequence has 18 and the gorilla's 9,149. At 2^16 bases every test locus has an N
in at least one species, so such windows cannot be dropped. N are cut out of all sequences, and the bases on both
sides joined.

A model of the next base is trained on the training slices first, and all lengths begin from it (at the scale toy from
random weights). The head reads the last position, as in the paper. In training it also reads every 1,024th position
(256th at the scale cpu), so that a step has the same number of answers at every length. The paper has 64 windows a
step at every length, which is up to 32 times as many bases. The rate is the best on the valid loci at one length. The
test loci are used once, after training.

The baseline is a logistic regression on the frequencies of 6-mers, whose penalty is chosen on the valid loci.

Other things than biology may tell the species apart. The assemblies are of different age and quality, and errors of
sequencing and assembly leave patterns of their own. The orang-utan's sequence may be of either species. The records
are mosaics of aligned columns with a join every 2.3 kb on average, at which some hundred bases are missing in each
species. An accuracy above a guess therefore is no evidence that the model has learned biology.
"""

EXPERIMENT = Experiment(
    name="great-apes",
    title="DNA: telling four great apes apart",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"lengths": lengths},
)
