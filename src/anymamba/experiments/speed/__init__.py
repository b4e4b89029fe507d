"""Speed: scan, convolution and attention against the length, and whole models (arXiv:2312.00752, figure 8).

Protocol. Operators, forward only, one row, equal width: the fused selective scan (whatever backend serves the device),
the convolution by FFT that time-invariant layers train with, causal attention of torch, and the scan in plain torch
over tensors (batch, length, channels, states). As in the paper, projections are left out, and so is the making of the
convolution's kernel; its transform is not. Models: a Mamba and a Transformer++ of equal width and about as many
parameters, each reading a prompt (logits of the last position), in a training step (forward and backward, without an
optimiser), and writing one token after a context (the model's step, with its cache).

One length is one arm. Its candidates take turns and each has the smallest time of its turns, so a ratio is of one run
on one machine. Before a candidate runs at a length its memory is estimated, and its time from lengths 4, 16, ... times
shorter; what exceeds the caps of the scale is not run, and the report says so.

Not measured here: the right half of figure 8, throughput against the batch size. The paper's factor 5 there comes from
batches that fit into memory beside a state of constant size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anymamba.experiments.experiment import Arm, Context, Experiment, Results, Scale
from anymamba.experiments.speed.arms import OperatorSettings, arms_at
from anymamba.experiments.speed.operators import measure_operators
from anymamba.experiments.speed.report import report
from anymamba.experiments.speed.whole_models import measure_models

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Speed(Experiment):
    """Figure 8 of the paper, on this machine."""

    name = "speed"
    title = "Speed: scan, convolution and attention against the length; whole models"

    def arms(self, scale: Scale) -> Sequence[Arm]:
        return arms_at(scale)

    def measure(self, arm: Arm, context: Context) -> dict[str, Any]:
        if isinstance(arm.settings, OperatorSettings):
            return measure_operators(arm.settings, context)
        return measure_models(arm.settings, context)

    def figures(self, results: Results) -> dict[str, Figure]:
        from anymamba.experiments.speed.figures import figures

        return figures(results)

    def report(self, results: Results) -> str:
        return report(results)


EXPERIMENT = Speed()
