"""The cost of each layer at equal width: parameters, operations per token, bytes of state. Counted, not timed.

python -m benchmarks.layer_costs
"""

from __future__ import annotations

import argparse

from anymamba import ModelConfig
from anymamba.models.costs import layer_cost
from anymamba.models.mixers import MIXERS
from anymamba.parts.options import HyenaOptions
from benchmarks.timing import machine, table

D_MODEL, LENGTHS = 256, (512, 4096)
CONFIG = ModelConfig(d_model=D_MODEL, n_layers=1, hyena=HyenaOptions(max_length=max(LENGTHS)))


def run() -> str:
    """Count and return the Markdown of the results."""
    rows = []
    for name in MIXERS:
        costs = [layer_cost(name, CONFIG, length) for length in LENGTHS]
        flops = [f"{cost.flops_per_token / 1e6:.2f}" for cost in costs]
        rows.append([name, f"{costs[0].parameters:,}", *flops, *(f"{cost.state_bytes:,}" for cost in costs)])
    short, long = LENGTHS
    header = ["layer", "parameters", f"Mflop a token, length {short}", f"length {long:,}"]
    return table([*header, f"state bytes, after {short}", f"after {long:,}"], rows) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine(), "\n")
    print(run())
