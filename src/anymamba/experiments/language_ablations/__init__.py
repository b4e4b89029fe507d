"""What Mamba's parts are worth in language models (arXiv:2312.00752, tables 6 to 10)."""

from __future__ import annotations

from anymamba.experiments.language_ablations.arms import arms_at
from anymamba.experiments.language_ablations.figures import gaps, state
from anymamba.experiments.language_ablations.findings import sections, thresholds
from anymamba.lab.experiment import Experiment
from anymamba.lab.language import measure_language

PROTOCOL = """
Tables 6 to 10 of [Mamba](https://arxiv.org/abs/2312.00752): the block and its inner layer; which of Δ, B and C depend
on the input; how A is initialised; the rank of the projection to Δ; and the number of states N with constant and with
selective B and C. Each arm changes one thing in the same Mamba, which is in all tables and measured once. One arm is a
Transformer++. All arms read the same bytes in the same order with the same optimiser and rate;
some learn once more at other rates.

S4 is S4D, with a complex or a real A and so many states a channel that it has about the parameters of S6.
Blocks of H3 have heads of one channel and alternate with MLPs. Models with other blocks have the parameters of Mamba
within 3 %. In tables 7 to 10 parameters differ as they do in the paper.

Gaps are in nats a byte, and the paper's in nats a token of about 4.2 bytes; its models have 350 million parameters. A
gap is one of means over the seeds, and one of at most twice the standard deviation between seeds is a tie. The
deviation is pooled over all arms with several seeds; arms with attention, which differ more, are pooled apart.
"""

EXPERIMENT = Experiment(
    name="language-ablations",
    title="Ablations in language models: block, selection, A, rank and state",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure_language,
    thresholds=thresholds,
    sections=sections,
    figures={"gaps": gaps, "state": state},
)
