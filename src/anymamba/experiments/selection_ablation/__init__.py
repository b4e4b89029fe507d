"""What must be selective, and what a larger state is worth then (arXiv:2312.00752, tables 7 and 10).

Protocol. Table 7: Mamba in which none, one or all of Δ, B and C depend on the input; what does not is a parameter of
the layer, as in S4D. It is measured on selective copying (accuracy) and on a byte-level language model of the source
and documentation of the Python standard library (held-out nats and bits a byte). Table 10, on the language model alone:
N from 1 to 16 with constant and with selective B and C, Δ selective. Three cells are in both tables and measured once:
"Δ" is N = 16 with constant B and C, "all" is N = 16 with selective ones. A Transformer++ of about as many parameters
learns the same language model.

All arms of a task have the same data, optimiser and number of steps. The language model sees windows of the training
files from random places, and is judged on fixed windows of files that are held out by a hash of their names; every
window starts from an empty state, so that the first bytes of each count with no context. The corpus is that of the
running Python: its size is reported.

The paper's models have 350 million parameters, 7 billion tokens of the Pile and contexts of 2048; its perplexities are
shown as gaps in nats, ln of their ratio. A gap below 0.01 nats is a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anymamba.experiments.experiment import Arm, Context, Experiment, Results, Scale
from anymamba.experiments.selection_ablation.arms import arms_at
from anymamba.experiments.selection_ablation.measure import measure
from anymamba.experiments.selection_ablation.report import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SelectionAblation(Experiment):
    """Tables 7 and 10 of the paper."""

    name = "selection-ablation"
    title = "Ablation: which of Δ, B and C must be selective, and what a larger state is worth"

    def arms(self, scale: Scale) -> Sequence[Arm]:
        return arms_at(scale)

    def measure(self, arm: Arm, context: Context) -> dict[str, Any]:
        return measure(arm.settings, context)

    def figures(self, results: Results) -> dict[str, Figure]:
        from anymamba.experiments.selection_ablation.figures import figures

        return figures(results)

    def report(self, results: Results) -> str:
        return report(results)


EXPERIMENT = SelectionAblation()
