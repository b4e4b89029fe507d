"""Speed: scan, convolution and attention by length, and whole models (arXiv:2312.00752, figure 8).

The right half of figure 8, throughput by number of rows, and the memory of training (table 15) are measured at the
scales gpu and paper.
"""

from __future__ import annotations

from typing import Any

from anymamba.experiments.speed.arms import BatchSettings, ModelSettings, OperatorSettings, arms_at
from anymamba.experiments.speed.batches import measure_batches
from anymamba.experiments.speed.figures import model_times, operator_ratios, operator_times
from anymamba.experiments.speed.findings import sections, thresholds
from anymamba.experiments.speed.operators import measure_operators
from anymamba.experiments.speed.whole_models import measure_models
from anymamba.lab.experiment import Context, Experiment

PROTOCOL = """
The left half of figure 8 of [Mamba](https://arxiv.org/abs/2312.00752), on this machine, and whole models.

Operators run forward only, on one row, at equal width: the selective scan, the convolution by FFT that time-invariant
layers train with, causal attention of torch (`scaled_dot_product_attention`), and the unfused scan, which holds the
state of every step: a work-efficient associative scan in torch operations, not a loop over time. As in the paper,
projections are left out, and so is the making of the convolution's kernel; its transform is not. The paper measured on
an A100-80GB with 1,024 channels, 16 states and bfloat16. Equal widths are its comparison; in a Mamba block the scan has
twice the channels that attention has in a Transformer of the same width. The scan runs in the backend that serves the
device; where that is `portable` it is plain torch in chunks, not a fused kernel, and its numbers do not stand beside
the paper's.

Models are a Mamba and a Transformer++ (attention and MLP in turn) of equal width and about as many parameters, with one
row. Reading a prompt gives the logits of the last position. A training step is forward and backward, without an
optimiser. A token is the mean of `tokens` that follow the context, each a call of the model's step, with keys and
values in a cache that is appended to in place.

One length is one arm. Its candidates take turns in one run, and each has the time of its fastest turn; every ratio is
of one run, and of several runs the median is shown, in brackets the least and the most. Before a candidate runs, its
memory is estimated, and its time from shorter lengths; what exceeds `call_seconds` or `memory_bytes` is over the cap
and is not run.
"""


def measure(settings: OperatorSettings | ModelSettings | BatchSettings, context: Context) -> dict[str, Any]:
    """Measure the times at one length, or with one number of rows."""
    if isinstance(settings, BatchSettings):
        return measure_batches(settings, context)
    if isinstance(settings, OperatorSettings):
        return measure_operators(settings, context)
    return measure_models(settings, context)


EXPERIMENT = Experiment(
    name="speed",
    title="Speed: scan, convolution and attention against the length; whole models",
    protocol=PROTOCOL,
    arms=arms_at,
    measure=measure,
    thresholds=thresholds,
    sections=sections,
    figures={"operators": operator_times, "ratios": operator_ratios, "models": model_times},
)
