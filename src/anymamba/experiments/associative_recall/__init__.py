"""Associative recall (MQAR): many keys and values, where states of fixed size fail and attention helps.

Unlike selective copying and induction heads, this task is hard for Mamba. Sources: Zoology (arXiv:2312.04927) for the
task and its sizes; Mamba-2 (arXiv:2405.21060), figure 8, for Mamba's recall.
"""

from __future__ import annotations

from anymamba.experiments.associative_recall.arms import arms_at
from anymamba.experiments.associative_recall.figures import against_pairs, against_state
from anymamba.experiments.associative_recall.findings import sections, thresholds
from anymamba.experiments.associative_recall.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
The task of [Zoology](https://arxiv.org/abs/2312.04927). A row holds pairs of a key and a value, all different within
the row, and then asks for each key once, at gaps that follow a power law: what must be remembered grows with the number
of pairs, and nothing in it can be skipped. The rest of a row is 0. Rows are made on the fly, and a model learns from
the answers alone. All arms of a task see the same rows and have the same optimiser (AdamW) and number of steps; tasks
that are learned together have about as many queries of each, in every batch or, where their rows have different
lengths, in batches that take turns. Training stops early when `enough` of the answers of a validation set are right.
What counts is recall, the share of right answers, on test rows that neither training nor stopping has seen and that are
the same for all arms and seeds.

Blocks have no MLP. Attention has two heads, rotary positions and a short convolution of width 4 on queries, keys and
values, as Mamba has on its input: without one a first layer is spent on joining a key to its value. Where several
learning rates are given they are tried in turn until training ends early, and the best on the validation set counts, as
the task's authors do it: the rate and the steps below are that one's, by seeds, and the seconds are those of all.

The size of a state is measured: the bytes of all tensors that a model carries for one sequence after a row. That of
attention and Hyena grows with the row. What falls short had too small a state or too few steps; arms that differ in the
state alone tell the two apart, others do not.

Published for this task (vocabulary 8192; read off figures): attention near 100 % at all four sizes; at 512 tokens with
64 pairs H3 and Hyena below 40 % even at width 512; Mamba from about 52 % with 8,000 numbers of state to 85 % with
100,000 in Zoology's tables, mostly below 50 % at N = 16 in the paper of [Mamba-2](https://arxiv.org/abs/2405.21060).
The two disagree on how much of this is the size of the state.
"""

EXPERIMENT = Experiment(
    name="associative-recall",
    title="Associative recall: where states of fixed size fail, and what attention repairs",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"state": against_state, "pairs": against_pairs},
)
