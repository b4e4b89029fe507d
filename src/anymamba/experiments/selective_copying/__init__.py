"""Selective copying: which block and which inner layer can select (arXiv:2312.00752, section 4.1.1 and table 1).

Protocol. Rows are made on the fly (`data/synthetic/copying.py`): M tokens among noise, to be written down in order at M
markers that follow. A model of two blocks learns from the answers alone, with the same rows, optimiser and number of
steps in every arm, and is judged by the share of answers that are right (token accuracy) on 256 rows that are the
same for all arms and seeds. The eight cells of table 1 are three blocks (no gate, H3, Mamba) around S4, Hyena's filter
or S6. The control is plain copying, which a fixed delay solves: it tells remembering from selecting.

The paper does not say whether its accuracy is of tokens or of whole sequences, nor how its block without a gate is
wired: ours are in `layers/no_gate.py`, `layers/h3.py` and `layers/mamba.py`. Both accuracies are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anymamba.experiments.experiment import Arm, Context, Experiment, Results, Scale
from anymamba.experiments.selective_copying.arms import arms_at
from anymamba.experiments.selective_copying.measure import measure
from anymamba.experiments.selective_copying.report import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SelectiveCopying(Experiment):
    """Table 1 of the paper."""

    name = "selective-copying"
    title = "Selective copying: which block and which inner layer can select"

    def arms(self, scale: Scale) -> Sequence[Arm]:
        return arms_at(scale)

    def measure(self, arm: Arm, context: Context) -> dict[str, Any]:
        return measure(arm.settings, context)

    def figures(self, results: Results) -> dict[str, Figure]:
        from anymamba.experiments.selective_copying.figures import figures

        return figures(results)

    def report(self, results: Results) -> str:
        return report(results)


EXPERIMENT = SelectiveCopying()
