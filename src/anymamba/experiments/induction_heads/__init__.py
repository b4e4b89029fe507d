"""Induction heads: recall what followed a token, at lengths far beyond training (arXiv:2312.00752, section 4.1.2).

Protocol (appendix E.1). Sequences of 256 ids are made on the fly (`data/synthetic/induction.py`): 16 ordinary tokens
and a trigger that occurs twice, the second time at the end; the model is to say which token followed the first one.
The loss is that of the last position alone. A model of two blocks learns until it answers a fixed set of 256 sequences
without a mistake several times in a row, or for a fixed number of steps, and is then asked at every power of two from
2^6 on: models with a state of fixed size read the sequences in pieces with the state carried, to 2^20; attention as far
as memory allows.

The paper does not say where the first trigger stands, nor whether its 16 ids include the trigger. Here they do not (17
ids, chance is 1 in 16), and Mamba is measured with both placements that are known: anywhere, and in the first ten
positions. The other systems are measured with the first trigger anywhere. An absolute position that training never
saw has an untrained row in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anymamba.experiments.experiment import Arm, Context, Experiment, Scale
from anymamba.experiments.induction_heads.arms import arms_at
from anymamba.experiments.induction_heads.measure import measure
from anymamba.experiments.induction_heads.report import report
from anymamba.experiments.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class InductionHeads(Experiment):
    """Tables 2 and 11 of the paper."""

    name = "induction-heads"
    title = "Induction heads: recall far beyond the training length"

    def arms(self, scale: Scale) -> Sequence[Arm]:
        return arms_at(scale)

    def measure(self, arm: Arm, context: Context) -> dict[str, Any]:
        return measure(arm.settings, context)

    def figures(self, results: Results) -> dict[str, Figure]:
        from anymamba.experiments.induction_heads.figures import figures

        return figures(results)

    def report(self, results: Results) -> str:
        return report(results)


EXPERIMENT = InductionHeads()
