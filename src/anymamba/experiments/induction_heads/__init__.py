"""Induction heads: recall the token after a trigger, far beyond the training length (arXiv:2312.00752, 4.1.2)."""

from __future__ import annotations

from anymamba.experiments.induction_heads.arms import arms_at
from anymamba.experiments.induction_heads.figures import learning, lengths
from anymamba.experiments.induction_heads.findings import sections, thresholds
from anymamba.experiments.induction_heads.measure import measure
from anymamba.lab.experiment import Experiment

PROTOCOL = """
The task of section 4.1.2 and appendix E.1 of [Mamba](https://arxiv.org/abs/2312.00752). A sequence consists of ordinary
tokens, uniform and independent, and of one trigger that occurs twice, the second time at the end. The answer is the
token after the first trigger, and the loss is that of the last position alone. Sequences are made on the fly.

A model of two blocks learns at one length, by AdamW without decay. It is judged now and then on a fixed validation set;
training ends after `perfect_in_a_row` judgements in a row without a mistake, or with its last step. Then it is asked at
every power of two from 2^6 on. Models with a state of fixed size read the sequences in pieces with the state carried,
in the same memory at every length; attention is asked as far as memory allows. Arms of one placement are asked the same
sequences.

The paper does not say where the first trigger stands, nor whether its 16 ids include the trigger. Here they do not: 17
ids, and a guess is right at 6.25 %. Mamba is measured with the first trigger at any position that leaves room
(uniform) and among the first ten (first-ten), in training as in the tests; the other systems with uniform ones. An
absolute position that training never saw has an untrained row in the table of positions.

Two settings are not the paper's. Where `lengths_before` names lengths, training begins there and goes on to the next,
with a new Adam, when `grow_at` of that length's validation set is right. Where `cycles` is above 1, training is so many
rounds of `steps` steps with warm restarts: Adam and its rate begin anew in each, the model does not. Steps and minutes
are those of all rounds.
"""

EXPERIMENT = Experiment(
    name="induction-heads",
    title="Induction heads: recall far beyond the training length",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"lengths": lengths, "learning": learning},
)
