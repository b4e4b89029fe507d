"""The time of a training step on N GPUs, from products, scan and bytes over links; fitted to one and two GPUs.

python -m benchmarks.scaling_model FOUND.json [--gpus 1 2 8 64 1024] [--gpus-per-machine 8]

FOUND.json is what `benchmarks.distributed --json` writes. A step of a model is

    products      operations / rate        all matrix products, three passes, four with recomputation
    scan          channels / rate          everything else of the layers, in proportion to tokens * d_inner * n_layers
    optimizer     parameters / rate        AdamW, on the parameters of a rank
    overhead      seconds                  what does not depend on the length: launches, Python
    links         bytes / bandwidth + messages * latency, less what runs beside the products

or, if that is more, the time of Python, which launches the kernels: for each layer and pass, and for each exchange of
context parallelism.

Parameters that a fit finds: the rate of the scan, the overhead, the share of a scan that context parallelism adds, the
share of FSDP's bytes that is not hidden, and the times of Python with several GPUs, where a step is bound by it.
Parameters that are assumed: the rate of products (PRODUCTS), that of the optimizer, and `Links`. The model is a sum of
these terms, so it leaves out stragglers, congestion between machines, and kernels that are slower on short parts; its
predictions are best cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anymamba.models.config import ModelConfig
from anymamba.models.presets import preset
from benchmarks.timing import table

FORWARD_AND_BACKWARD, RECOMPUTED = 3, 4
"""Passes over the products of a step, in units of a forward pass."""
PRODUCTS = 580e12
"""Operations per second of the products of a step alone on an H200 (`benchmarks.gpu_models`: 573e12 at 130m, 600e12 at
370m)."""
OPTIMIZER = 4.3e12 / 28
"""Parameters per second of AdamW: 28 bytes of each are read or written, at the memory's 4.3 TB/s."""
STATE_BYTES = 4
"""Of a number of a state or of a gradient on its way."""


@dataclass(frozen=True)
class Links:
    """How GPUs are joined. The defaults are those of an H200 machine and of one 400 Gb/s adapter for each GPU."""

    inside: float = 300e9
    """Bytes per second of a ring inside a machine, for each GPU; measured if FOUND.json has it."""
    between: float = 40e9
    """Bytes per second between machines, for each GPU."""
    latency_inside: float = 20e-6
    """Seconds of a collective of a few bytes inside a machine."""
    latency_between: float = 60e-6
    """The same between machines."""
    per_machine: int = 8

    def seconds(self, n_bytes: float, size: int, messages: int = 1) -> float:
        """The time of collectives over `size` GPUs: the slowest link carries all bytes."""
        if size == 1:
            return 0.0
        inside = size <= self.per_machine
        bandwidth, latency = (self.inside, self.latency_inside) if inside else (self.between, self.latency_between)
        return n_bytes / bandwidth + messages * latency

    def seconds_of_fsdp(self, step: Step) -> float:
        """The time of the bytes of FSDP in a step, if nothing ran beside them."""
        return self.seconds(step.fsdp_bytes, step.size, 3 * step.model.n_layers)


@dataclass(frozen=True)
class Rates:
    """How fast one GPU is, and what a second one adds."""

    scan: float
    """Tokens * channels per second of all passes that are not products."""
    overhead: float
    """Seconds of a step that do not depend on its size."""
    products: float = PRODUCTS
    """Operations per second."""
    optimizer: float = OPTIMIZER
    """Parameters per second."""
    state_pass: float = 0.0
    """What the state-only passes of context parallelism add, as a share of the scan."""
    visible: float = 1.0
    """The share of the bytes of FSDP that does not run beside the products."""
    host: float = 0.0
    """Seconds of Python for a layer and pass."""
    host_exchange: float = 0.0
    """The same for an exchange of context parallelism."""


@dataclass(frozen=True)
class Step:
    """A training step: a model, its tokens, and how they are spread."""

    model: ModelConfig
    tokens: int
    """Tokens of all GPUs."""
    rows: int = 1
    """Rows of all GPUs."""
    dp: int = 1
    """GPUs that have rows of their own; weights are sharded over dp * cp."""
    cp: int = 1
    """GPUs that share a row."""
    recompute: bool = False

    @property
    def size(self) -> int:
        return self.dp * self.cp

    @property
    def d_inner(self) -> int:
        return int(self.model.mamba.expand * self.model.d_model)

    @property
    def passes(self) -> int:
        """Over the layers, in units of a forward pass."""
        return RECOMPUTED if self.recompute else FORWARD_AND_BACKWARD

    @property
    def projections(self) -> int:
        """Numbers in the projections of a block."""
        d, d_inner, n = self.model.d_model, self.d_inner, self.model.mamba.d_state
        rank = self.model.mamba.dt_rank or -(-d // 16)
        return 3 * d * d_inner + d_inner * (rank + 2 * n) + rank * d_inner

    @property
    def head(self) -> int:
        return self.model.padded_vocab_size * self.model.d_model

    @property
    def parameters(self) -> int:
        """The model's, without those that are small."""
        return self.model.n_layers * self.projections + self.head

    @property
    def operations(self) -> float:
        """Of the products of one GPU. The head is never recomputed as a block."""
        each = 2 * (self.passes * self.model.n_layers * self.projections + RECOMPUTED * self.head)
        return each * self.tokens / self.size

    @property
    def channels(self) -> float:
        """Tokens * channels * layers * passes of one GPU."""
        return self.passes * self.tokens / self.size * self.d_inner * self.model.n_layers

    @property
    def fsdp_bytes(self) -> float:
        """What one GPU receives: projections in bfloat16 in the forward and in the backward pass, the rest in float32
        once, and gradients in float32."""
        share = (self.size - 1) / self.size
        blocks = self.model.n_layers * self.projections
        return share * (2 * 2 * blocks + 4 * self.head + 4 * (blocks + self.head))

    @property
    def context_bytes(self) -> float:
        """What one GPU receives for the scans and convolutions: the states of all parts, and the halo."""
        if self.cp == 1:
            return 0.0
        rows = self.rows / self.dp
        state = STATE_BYTES * self.d_inner * (2 * self.model.mamba.d_state + 1) * (self.cp - 1)
        halo = 2 * 2 * (self.model.mamba.d_conv - 1) * self.d_inner
        passes = 3 / 2 if self.recompute else 1
        return rows * self.model.n_layers * passes * (state + halo)

    @property
    def messages(self) -> int:
        """Collectives of a step: two in a layer and pass for context parallelism, and those of FSDP."""
        passes = (3 if self.recompute else 2) if self.cp > 1 else 0
        return 2 * passes * self.model.n_layers


def seconds(step: Step, rates: Rates, links: Links) -> dict[str, float]:
    """The parts of the time of a step."""
    parts = {
        "products": step.operations / rates.products,
        "scan": step.channels / rates.scan * (1 + (rates.state_pass if step.cp > 1 else 0)),
        "optimizer": step.parameters / step.size / rates.optimizer,
        "overhead": rates.overhead,
        "FSDP": rates.visible * links.seconds_of_fsdp(step),
        "context": links.seconds(step.context_bytes, step.cp, step.messages),
    }
    parts["Python"] = max(0.0, host_seconds(step, rates) - sum(parts.values()))
    return {**parts, "total": sum(parts.values())}


def host_seconds(step: Step, rates: Rates) -> float:
    """The time of Python with several GPUs, of which the GPU's work hides all or a part. One GPU's is always hidden."""
    if step.size == 1:
        return 0.0
    return rates.host * step.model.n_layers * step.passes + rates.host_exchange * step.messages


# ------------------------------------------------------------------------------------------ fitting


def measured_steps(found: dict[str, Any], size: int) -> list[tuple[Step, float]]:
    """The steps of a file of `benchmarks.distributed` on `size` GPUs, with their seconds."""
    steps = []
    parts = found.get(str(size), {})
    if "row" in parts:
        model = preset(parts["row"]["model"])
        for name in ("half", "whole"):
            row = parts["row"][name]
            steps.append((Step(model, row["length"], cp=size, recompute=True), row["seconds"]))
    if "data" in parts:
        data = parts["data"]
        rows = data["rows"] * size
        steps.append((Step(preset(data["model"]), rows * data["length"], rows, dp=size), data["seconds"]))
    return steps


def fitted(found: dict[str, Any], links: Links) -> Rates:
    """The rates that explain one GPU, then what two GPUs add."""
    one = measured_steps(found, 1)
    if len(one) < 3:
        raise ValueError(f"a fit needs the parts row and data on one GPU, got {sorted(found.get('1', {}))}; run both")
    left = np.array([time - step.operations / PRODUCTS - step.parameters / OPTIMIZER for step, time in one])
    terms = np.array([[step.channels, 1.0] for step, _ in one])
    shares = 1 / np.array([[time] for _, time in one])  # errors count as shares of a step
    cost, overhead = nonnegative(terms * shares, left * shares[:, 0])
    rates = Rates(1 / max(float(cost), 1e-30), float(overhead))
    return with_second(rates, one, measured_steps(found, 2), links)


Pair = tuple[tuple[Step, float], tuple[Step, float]]
"""A step of a kind with its seconds, on one GPU and on two."""
BOUND = 0.75
"""A step is bound by Python if a longer one of its kind takes less than this of the time that its length asks for."""


def with_second(rates: Rates, one: list[tuple[Step, float]], two: list[tuple[Step, float]], links: Links) -> Rates:
    """The rates with what two GPUs add to the steps of the same kind on one, whose errors of the fit are left out."""
    pairs: list[Pair] = list(zip(one, two, strict=False))
    rates = with_sharding(rates, [pair for pair in pairs if pair[1][0].cp == 1], links)
    return with_context(rates, [pair for pair in pairs if pair[1][0].cp > 1], links)


def with_sharding(rates: Rates, pairs: list[Pair], links: Links) -> Rates:
    """The visible share of FSDP's bytes; what is more than all of them is Python's."""
    hidden = dataclasses.replace(rates, visible=0.0)
    for alone, (step, time) in pairs:
        share = extra(hidden, alone, (step, time), links) / links.seconds_of_fsdp(step)
        host = time / (step.model.n_layers * step.passes) if share > 1 else 0.0
        rates = dataclasses.replace(rates, visible=min(1.0, max(0.0, share)), host=host)
    return rates


def with_context(rates: Rates, pairs: list[Pair], links: Links) -> Rates:
    """What exchanges take in Python, from a row that is bound by it; and what the scan of a part takes more."""
    if len(pairs) > 1:
        (_, (short, fast)), (_, (long, slow)) = pairs[0], pairs[-1]
        if slow / fast < BOUND * long.tokens / short.tokens:
            left = fast - host_seconds(short, rates)
            rates = dataclasses.replace(rates, host_exchange=max(0.0, left / short.messages))
            pairs = pairs[-1:]
    quick = dataclasses.replace(rates, host=0.0, host_exchange=0.0)
    passes = [
        max(0.0, extra(quick, alone, step, links) / seconds(step[0], quick, links)["scan"]) for alone, step in pairs
    ]
    return dataclasses.replace(rates, state_pass=sum(passes) / len(passes) if passes else 0.0)


def extra(rates: Rates, alone: tuple[Step, float], several: tuple[Step, float], links: Links) -> float:
    """Seconds that a step on several GPUs takes beyond the model, of whose error on one GPU it has its share."""
    error = alone[1] / seconds(alone[0], rates, links)["total"]
    parts = seconds(several[0], rates, links)
    sent = parts["context"] + parts["FSDP"]
    return (several[1] - sent) / error - (parts["total"] - sent)


def nonnegative(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients: those that would be negative are left out."""
    kept = list(range(terms.shape[1]))
    while True:
        scale = np.abs(terms[:, kept]).max(0)
        found = np.linalg.lstsq(terms[:, kept] / scale, wanted, rcond=None)[0] / scale
        if (found >= 0).all():
            result = np.zeros(terms.shape[1])
            result[kept] = found
            return result
        kept.remove(kept[int(np.argmin(found * scale))])


def links_of(found: dict[str, Any], links: Links) -> Links:
    """The links with the bandwidth and the latency that were measured."""
    measured = found.get("2", {}).get("links")
    if measured is None:
        return links
    return dataclasses.replace(links, inside=measured["bytes_per_second"], latency_inside=measured["latency"])


# ------------------------------------------------------------------------------------------ predictions


def predictions(rates: Rates, links: Links, sizes: list[int], row_tokens: int, data_tokens: int) -> str:
    """Tables: one row over more and more GPUs, and rows for each GPU."""
    small, middle = preset("mamba-130m"), preset("mamba-370m")
    long, wide = [], []
    base_row = seconds(Step(small, row_tokens, recompute=True), rates, links)["total"]
    base_data = data_tokens / seconds(Step(middle, data_tokens, data_tokens // 2048), rates, links)["total"]
    for size in sizes:
        parts = seconds(Step(small, row_tokens, cp=size, recompute=True), rates, links)
        speed_up = base_row / parts["total"]
        grown = seconds(Step(small, row_tokens * size, cp=size, recompute=True), rates, links)
        long.append(
            [
                f"{size:,}",
                f"{1e3 * parts['total']:.1f}",
                f"{speed_up:.2f}",
                f"{1e3 * grown['total']:.1f}",
                f"{100 * base_row / grown['total']:.0f} %",
            ]
        )
        tokens = data_tokens * size
        step = seconds(Step(middle, tokens, tokens // 2048, dp=size), rates, links)
        rate = tokens / step["total"]
        wide.append([f"{size:,}", f"{rate:,.0f}", f"{rate / base_data:.1f}", f"{100 * rate / base_data / size:.0f} %"])
    head = [
        "GPUs",
        f"{row_tokens:,} tokens: ms",
        "times one GPU",
        f"{row_tokens:,} tokens for each GPU: ms",
        "of one GPU's speed",
    ]
    return "\n\n".join(
        [
            f"One row of mamba-130m, with recomputation\n\n{table(head, long)}",
            f"Rows of 2,048 tokens of mamba-370m, {data_tokens:,} tokens for each GPU\n\n"
            + table(["GPUs", "tokens per second", "times one GPU", "of linear"], wide),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", metavar="FOUND.json")
    parser.add_argument("--gpus", nargs="*", type=int, default=[1, 2, 8, 64, 1024])
    parser.add_argument("--gpus-per-machine", type=int, default=Links.per_machine)
    options = parser.parse_args()
    found = json.loads(Path(options.found).read_text())
    links = links_of(found, Links(per_machine=options.gpus_per_machine))
    rates = fitted(found, links)
    print(f"fitted: {rates}\nlinks: {links}\n")
    checks = [
        [f"{step.size}", f"{step.tokens:,}", f"{1e3 * time:.1f}", f"{1e3 * seconds(step, rates, links)['total']:.1f}"]
        for size in (1, 2)
        for step, time in measured_steps(found, size)
    ]
    print(table(["GPUs", "tokens", "measured ms", "model ms"], checks) + "\n")
    print(predictions(rates, links, options.gpus, 1 << 17, 1 << 15))


if __name__ == "__main__":
    main()
