"""Training on 1, 2, 4 and 8 GPUs: one row over all of them, sharded models of up to 2.8 billion parameters, and both.

python -m benchmarks.several_gpus [--json FILE] [--gpus 1 2 4 8] [--parts rows shards both] [--fit FOUND.json]

Starts torchrun once for each number of GPUs. Steps are those of `benchmarks.distributed`, which measures what the model
of `benchmarks.scaling_model` is fitted to; with --fit its times stand beside the measured ones. A row is trained where
its memory, planned from shorter rows, fits. Bytes are those that a rank sends for scans and convolutions, counted in a
step. Without a GPU, tiny models run with gloo, which tries the script and measures nothing.

python -m benchmarks.several_gpus --read FILE ... --fit FOUND.json makes the tables of files of --json.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anymamba.models.presets import preset
from anymamba.ops.groups import transport
from benchmarks.distributed import GPU, LIMIT, LOWER, Found, Part, Rank, launched, longest_row, measured, work
from benchmarks.scaling_model import Links, Rates, Step, fitted, links_of, seconds
from benchmarks.timing import table

ROW_MODELS = ("mamba-130m", "mamba-370m") if GPU else ("nano",)
ROW_LENGTHS = (1 << 17, 1 << 20) if GPU else (1 << 8, 1 << 10)
SHARDED = ("mamba-370m", "mamba-1.4b", "mamba-2.8b") if GPU else ("nano",)
"""The models whose weights are sharded."""
RECOMPUTED = ("mamba-1.4b", "mamba-2.8b", "nano")
"""Of those, the ones whose blocks are computed again in the backward pass."""
SHAPE = (16, 2048) if GPU else (2, 64)
"""Rows for each GPU, and their length."""
BOTH_MODEL, BOTH_LENGTH = "mamba-370m" if GPU else "nano", 1 << 17 if GPU else 1 << 8
"""Of rows that are split, of which there are as many as GPUs."""


# ------------------------------------------------------------------------------------------ on each rank


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the bytes that this rank sends to others for scans and convolutions."""
    sent = [0]
    gather, exchange = transport.all_gather_single, dist.batch_isend_irecv

    def all_gather(whole: Tensor, own: Tensor, **options: Any) -> Any:
        sent[0] += (whole.numel() - own.numel()) * own.element_size()
        return gather(whole, own, **options)

    def batch_isend_irecv(operations: list[Any]) -> Any:
        sent[0] += sum(op.tensor.numel() * op.tensor.element_size() for op in operations if op.op is dist.isend)
        return exchange(operations)

    transport.all_gather_single, dist.batch_isend_irecv = all_gather, batch_isend_irecv
    try:
        yield sent
    finally:
        transport.all_gather_single, dist.batch_isend_irecv = gather, exchange


def rows_of(here: Rank, limit: float) -> Found:
    """One row over all ranks, for each model: the longest, and the time of each length that fits."""
    found: Found = {}
    for name in ROW_MODELS:
        model, optimizer = here.model(name, recompute=True, cp=here.size)
        longest = longest_row(here, model, optimizer, limit)
        own: Found = {"longest": longest}
        for length in ROW_LENGTHS:
            if length <= longest["length"]:
                own[str(length)] = timed(here, model, optimizer, 1, length // here.size)
        found[name] = own
        del model, optimizer
        free()
    return found


def timed(here: Rank, model: Any, optimizer: Any, rows: int, length: int) -> Found:
    """The time of a step, the bytes that this rank sends in it, and its memory."""
    here.peak()
    step = here.step(model, optimizer, rows, length)
    with counted() as sent:
        step()
    taken = here.seconds(step, 1, 2 if rows * length > 1 << 18 else 4)
    tokens = rows * length * here.size
    sent_most = int(here.largest(sent[0]))
    return {"seconds": taken, "tokens_per_second": tokens / taken, "sent": sent_most, "peak": here.peak()}


def free() -> None:
    """Free the memory of models that refer to themselves, as sharded ones do."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def shards(here: Rank) -> Found:
    """Tokens per second and memory of sharded models."""
    found: Found = {}
    for name in SHARDED:
        again = name in RECOMPUTED
        model, optimizer = here.model(name, recompute=again, reshard_after_forward=again)
        found[name] = timed(here, model, optimizer, *SHAPE)
        del model, optimizer
        free()
    return found


def both(here: Rank) -> Found:
    """As many rows as ranks, with every number of ranks for a row."""
    found: Found = {}
    cp = 1
    while cp <= here.size:
        model, optimizer = here.model(BOTH_MODEL, recompute=True, cp=cp)
        found[f"{here.size // cp} x {cp}"] = timed(here, model, optimizer, cp, BOTH_LENGTH // cp)
        del model, optimizer
        free()
        cp *= 2
    return found


PARTS: dict[str, Part] = {"shards": shards, "both": both, "rows": lambda here: rows_of(here, LIMIT)}
AGAIN: dict[str, Part] = {"rows": lambda here: rows_of(here, LOWER)}
"""What is tried once where ranks ran out of memory."""


# ------------------------------------------------------------------------------------------ the driver


Model = Callable[[Step], str]
"""Says what the model of the time of a step predicts."""


def predictor(path: Path | None) -> Model:
    """The model fitted to a file of `benchmarks.distributed`; without one, no predictions."""
    if path is None:
        return lambda step: "-"
    measured = json.loads(path.read_text())
    links: Links = links_of(measured, Links())
    rates: Rates = fitted(measured, links)
    return lambda step: f"{1e3 * seconds(step, rates, links)['total']:,.0f}"


def report(found: dict[int, dict[str, Found]], predicted: Model) -> str:
    """The tables."""
    parts = [row_table(found, predicted), longest_table(found), shard_table(found, predicted)]
    return "\n\n".join([*parts, both_table(found, predicted)])


def of_part(found: dict[int, dict[str, Found]], part: str) -> Iterator[tuple[int, str, Found]]:
    """Each number of GPUs with the model, or the degrees, and what was found."""
    for size in sorted(found):
        for name, values in found[size].get(part, {}).items():
            yield size, name, values


def row_table(found: dict[int, dict[str, Found]], predicted: Model) -> str:
    """One row: its time beside that on the fewest GPUs where it fits."""
    rows = [
        (int(length), model, size, own)
        for size, model, values in of_part(found, "rows")
        for length, own in values.items()
        if length.isdigit()
    ]
    lines, base = [], dict[tuple[int, str], float]()
    for length, model, size, own in sorted(rows, key=lambda row: row[:3]):
        cost = size * own["seconds"]
        share = base.setdefault((length, model), cost) / cost
        step = Step(preset(model), length, cp=size, recompute=True)
        lines.append([model, f"{length:,}", f"{size}", *numbers(own), predicted(step), f"{100 * share:.0f} %"])
    head = ["model", "tokens", "GPUs", *HEAD, "predicted ms", "of the fewest GPUs' speed"]
    return f"One row over all GPUs\n\n{table(head, lines)}"


HEAD = ("ms", "tokens per second", "MB sent", "peak GiB")


def numbers(own: Found) -> list[str]:
    """The columns of HEAD."""
    return [
        f"{1e3 * own['seconds']:,.0f}",
        f"{own['tokens_per_second']:,.0f}",
        f"{own['sent'] / 1e6:.1f}",
        f"{own['peak'] / 2**30:.1f}",
    ]


def longest_table(found: dict[int, dict[str, Found]]) -> str:
    """The longest rows."""
    lines, base = [], dict[str, float]()
    rows = sorted(of_part(found, "rows"), key=lambda row: (row[1], row[0]))
    for size, model, values in rows:
        own = values["longest"]
        each = own["length"] / size
        length, peak = f"{own['length']:,}", f"{own['peak'] / 2**30:.1f}"
        times = each / base.setdefault(model, each)
        lines.append([model, f"{size}", length, f"{own['seconds']:.1f}", peak, f"{times:.2f}"])
    head = ["model", "GPUs", "tokens", "seconds of the step", "peak GiB", "for each GPU, times the fewest"]
    return f"The longest row that trains\n\n{table(head, lines)}"


def tokens_of(own: Found) -> int:
    """The tokens of a step."""
    return round(own["tokens_per_second"] * own["seconds"])


def shard_table(found: dict[int, dict[str, Found]], predicted: Model) -> str:
    """Rows for each GPU, with sharded weights."""
    lines, base = [], dict[str, float]()
    for size, name, own in sorted(of_part(found, "shards"), key=lambda row: (row[1], row[0])):
        speed = own["tokens_per_second"] / size
        step = Step(preset(name), tokens_of(own), dp=size, recompute=name in RECOMPUTED)
        share = speed / base.setdefault(name, speed)
        lines.append([name, f"{size}", *numbers(own), predicted(step), f"{100 * share:.0f} %"])
    head = ["model", "GPUs", *HEAD, "predicted ms", "of linear"]
    return f"Rows of every GPU's own, weights sharded\n\n{table(head, lines)}"


def both_table(found: dict[int, dict[str, Found]], predicted: Model) -> str:
    """As many rows as GPUs, with each number of GPUs for a row."""
    lines = []
    for size, name, own in of_part(found, "both"):
        dp, cp = map(int, name.split(" x "))
        step = Step(preset(BOTH_MODEL), tokens_of(own), size, dp=dp, cp=cp, recompute=True)
        lines.append([f"{size}", name, *numbers(own), predicted(step)])
    head = ["GPUs", "dp x cp", *HEAD, "predicted ms"]
    return f"As many rows of {BOTH_MODEL} as GPUs\n\n{table(head, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where all numbers are written")
    parser.add_argument("--gpus", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--fit", type=Path, help="a file of benchmarks.distributed, for predictions")
    parser.add_argument("--read", nargs="+", type=Path, help="files of --json; nothing is measured")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(AGAIN if options.again else PARTS, options.parts, Path(options.worker))
        return
    found: dict[int, dict[str, Found]] = {}
    if options.read:
        for path in options.read:
            for size, values in json.loads(path.read_text()).items():
                found.setdefault(int(size), {}).update(values)
    else:

        def launch(size: int) -> dict[str, Found]:
            return launched(size, options.parts, again_of=AGAIN, module="benchmarks.several_gpus")

        found = measured(options.gpus, options.json, launch)
    print(report(found, predictor(options.fit)))


if __name__ == "__main__":
    main()
