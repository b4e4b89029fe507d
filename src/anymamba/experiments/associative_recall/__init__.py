"""Associative recall (MQAR): many keys and values, where states of fixed size fail, and what attention repairs.

The counterpart to selective copying and induction heads, where Mamba shines. A row holds pairs of a key and a value and
then asks for each key once (`data/synthetic/recall.py`): what must be remembered grows with the number of pairs, and
nothing in it can be skipped.

Protocol. Rows are made on the fly; a model learns from the answers alone, with the same rows, optimiser and number of
steps in every arm of one task, and stops early when 99.8 % of the answers of a validation set are right. It is judged
by the share of right answers (recall) on 256 test rows for each number of pairs, the same for all arms and seeds, that
neither training nor stopping has seen. Blocks have no MLP. Attention has rotary positions and a short convolution of
width 4 on queries, keys and values, as Mamba has on its input: without one a first layer is spent on joining a key to
its value. Where several learning rates are tried the best on the validation set counts, as the task's authors do it.

The size of a state is measured: the bytes of all tensors that a model carries after a row, for one sequence.

Sources: Zoology (arXiv:2312.04927) for the task and the sizes (64 tokens with 4 pairs, 128 with 8, 256 with 16, 512
with 64); Mamba-2 (arXiv:2405.21060), figure 8, for Mamba's recall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anymamba.experiments.associative_recall.arms import arms_at
from anymamba.experiments.associative_recall.measure import measure
from anymamba.experiments.associative_recall.report import report
from anymamba.experiments.experiment import Arm, Context, Experiment, Results, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AssociativeRecall(Experiment):
    """Recall against the size of the state."""

    name = "associative-recall"
    title = "Associative recall: where states of fixed size fail, and what attention repairs"

    def arms(self, scale: Scale) -> Sequence[Arm]:
        return arms_at(scale)

    def measure(self, arm: Arm, context: Context) -> dict[str, Any]:
        return measure(arm.settings, context)

    def figures(self, results: Results) -> dict[str, Figure]:
        from anymamba.experiments.associative_recall.figures import figures

        return figures(results)

    def report(self, results: Results) -> str:
        return report(results)


EXPERIMENT = AssociativeRecall()
