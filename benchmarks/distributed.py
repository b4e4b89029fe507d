"""Training on one and two GPUs: one long row, the longest row, data parallelism, and memory of sharded weights.

python -m benchmarks.distributed [--json FILE] [--gpus 1 2] [--parts row longest data more memory]

Starts torchrun once for each number of GPUs. A step is forward, loss, backward and fused AdamW under autocast to
bfloat16, with random tokens. On one GPU the model is not sharded. The JSON file is what `benchmarks.scaling_model` is
fitted to. Without a GPU, tiny models run with gloo, which tries the script and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from anymamba.ops.groups import context_parallel
from anymamba.parts.state import without_last_states
from anymamba.training.parallel import parallelize
from anymamba.training.parallel.sharding import narrow_parameters, units
from benchmarks.timing import table

GPU = torch.cuda.is_available()
BF16 = torch.bfloat16
ROW_MODEL, DATA_MODEL = ("mamba-130m", "mamba-370m") if GPU else ("nano", "nano")
ROW_LENGTH = 1 << 17 if GPU else 1 << 8
DATA_SHAPE = (16, 2048) if GPU else (2, 64)
"""Rows for each GPU, and their length."""
WARM_UP, STEPS = 2, 4
TARGETS = {"row": 1.6, "longest": 1.9, "data": 1.9, "more": 1.9}
"""Times one GPU, at least."""
LIMIT, LOWER = 0.94, 0.88
"""The shares of a GPU's memory that the longest row is planned for: at first, and after ranks that ran out of it. The
rest is what no plan knows: NCCL's buffers, and what the allocator cannot use."""
BYTES_KEPT, BYTES_PEAK = 12, 16
"""Of each parameter: the weight and AdamW's moments in float32; and its gradient beside them."""
BYTES_OF_UNIT, BYTES_OF_REST = 10, 8
"""Of each gathered parameter at most: two units in bfloat16 (the next one is on its way) with the gradients of one in
bfloat16 and float32; and what is gathered in float32 for the whole step, with its gradient."""

Found = dict[str, Any]


# ------------------------------------------------------------------------------------------ on each rank


def config_of(name: str) -> ModelConfig:
    return preset(name)


class Rank:
    """This process: its device, its number, and models that all ranks share."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")
        if GPU:
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", timeout=timedelta(minutes=2))

    def model(self, name: str, recompute: bool, cp: int = 1, **how: Any) -> tuple[Any, Any]:
        """A model, sharded over more than one rank, `cp` of which share a row; and its optimizer."""
        torch.manual_seed(0)
        model: Any = LanguageModel(config_of(name), device=self.device)
        model.activation_checkpointing = recompute
        self.row_group = None
        if self.size > 1:
            sizes = {"dp_shard": self.size // cp, "cp": cp}
            degrees = {name: n for name, n in sizes.items() if n > 1}
            mesh = init_device_mesh(self.device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
            self.row_group = mesh["cp"].get_group() if cp > 1 else None
            parallelize(model, mesh, param_dtype=BF16, **how)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, model: Any, optimizer: Any, rows: int, length: int) -> Callable[[], None]:
        """One step on random tokens, `length` of each row on this rank; ranks that share a row have equal parts."""
        tokens = torch.randint(250 if not GPU else 50000, (2, rows, length), device=self.device)
        count = rows * length * self.size
        group = self.row_group

        def step() -> None:
            context = nullcontext() if group is None else context_parallel(group, [length] * group.size())
            with context, without_last_states(), torch.autocast(self.device.type, BF16):
                loss = model.loss(tokens[0], tokens[1]).loss / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def seconds(self, step: Callable[[], None], warm_up: int = WARM_UP, steps: int = STEPS) -> float:
        """The mean time of a step, of the slowest rank."""
        for _ in range(warm_up):
            step()
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        self.wait()
        return self.largest((time.perf_counter() - start) / steps)

    def wait(self) -> None:
        if GPU:
            torch.cuda.synchronize()
        dist.barrier(device_ids=[self.device.index] if GPU else None)

    def largest(self, value: float) -> float:
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def peak(self) -> float:
        """The most bytes of tensors on a GPU since the last call."""
        peak = torch.cuda.max_memory_allocated() if GPU else 0
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self.largest(peak)


def row(here: Rank) -> Found:
    """The time of a step with one row, at two lengths, and the memory that each takes."""
    model, optimizer = here.model(ROW_MODEL, recompute=True, cp=here.size)
    found: Found = {"model": ROW_MODEL}
    for name, whole in (("half", ROW_LENGTH // 2), ("whole", ROW_LENGTH)):
        here.peak()
        seconds = here.seconds(here.step(model, optimizer, 1, whole // here.size))
        found[name] = {"length": whole, "seconds": seconds, "peak": here.peak()}
    return found


def longest(here: Rank, limit: float = LIMIT) -> Found:
    """The longest row that trains: planned from the memory of two lengths, then trained once."""
    model, optimizer = here.model(ROW_MODEL, recompute=True, cp=here.size)
    return longest_row(here, model, optimizer, limit)


def longest_row(here: Rank, model: Any, optimizer: Any, limit: float) -> Found:
    """The same of a model with recomputation, whose rows all ranks share."""
    peaks = []
    part = ROW_LENGTH // 2
    for length in (part, 2 * part):
        here.peak()
        here.seconds(here.step(model, optimizer, 1, length), 1, 1)
        peaks.append(here.peak())
    slope = max(1.0, (peaks[1] - peaks[0]) / part)
    memory = limit * torch.cuda.mem_get_info()[1] if GPU else 2 * peaks[1] + 1024.0
    length = -int(here.largest(-int((memory - peaks[0]) / slope) - part)) // 1024 * 1024 if GPU else 4 * part
    here.peak()
    seconds = here.seconds(here.step(model, optimizer, 1, length), 0, 1)
    return {"length": length * here.size, "seconds": seconds, "peak": here.peak(), "planned": memory}


def data(here: Rank, rows: int = DATA_SHAPE[0]) -> Found:
    """Tokens per second where each GPU has rows of its own."""
    model, optimizer = here.model(DATA_MODEL, recompute=False, reshard_after_forward=False)
    length = DATA_SHAPE[1]
    here.peak()
    seconds = here.seconds(here.step(model, optimizer, rows, length))
    tokens = rows * length * here.size
    return {
        "model": DATA_MODEL,
        "rows": rows,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak": here.peak(),
    }


def more(here: Rank) -> Found:
    """The same with twice as many rows, which hide the time of Python."""
    return data(here, 2 * DATA_SHAPE[0])


def memory(here: Rank) -> Found:
    """Bytes of weights, gradients and optimizer after a step, beside those computed from the parameters; and the peak,
    which has gathered weights and their gradients, too."""
    model, optimizer = here.model(DATA_MODEL, recompute=True)
    parameters = sum(p.numel() for p in model.parameters())
    here.seconds(here.step(model, optimizer, 1, 64), 1, 1)
    here.peak()
    kept = here.largest(torch.cuda.memory_allocated() if GPU else 0)
    tokens = torch.randint(250, (2, 1, 64), device=here.device)
    with torch.autocast(here.device.type, BF16):
        model.loss(tokens[0], tokens[1]).loss.backward()
    with_gradients = here.largest(torch.cuda.memory_allocated() if GPU else 0)
    return {
        "model": DATA_MODEL,
        "parameters": parameters,
        "kept": kept,
        "kept computed": BYTES_KEPT * parameters / here.size,
        "with gradients": with_gradients,
        "with gradients computed": BYTES_PEAK * parameters / here.size,
        "peak": here.peak(),
        "peak computed": BYTES_PEAK * parameters / here.size + gathered_bytes(model, parameters),
    }


def gathered_bytes(model: Any, parameters: int) -> float:
    """What a sharded model gathers at a time at most; activations are not counted."""
    n_units = sum(1 for _ in units(model)) - 1  # and the model itself
    if n_units < 1:
        return 0.0
    narrow = sum(p.numel() for block in model.blocks for p in narrow_parameters(block))
    return BYTES_OF_UNIT * narrow / n_units + BYTES_OF_REST * (parameters - narrow)


def longest_of_less(here: Rank) -> Found:
    """The same in less memory, after ranks that ran out of it."""
    return longest(here, LOWER)


Part = Callable[[Rank], Found]
PARTS: dict[str, Part] = {"row": row, "data": data, "more": more, "memory": memory, "longest": longest}
AGAIN: dict[str, Part] = {"longest": longest_of_less}
"""What is tried once where a part ended the ranks."""


def work(functions: Mapping[str, Part], parts: list[str], path: Path) -> None:
    """Measure the parts on all ranks; rank 0 writes what they found after each."""
    here = Rank()
    found: dict[str, Found] = {"links": links(here)} if here.size > 1 else {}
    for name in parts:
        start = time.perf_counter()
        found[name] = functions[name](here)
        gc.collect()  # a sharded model refers to itself, and its memory would count in the next part
        if GPU:
            torch.cuda.empty_cache()
        if here.rank == 0:
            words = f"{here.size} ranks, {name}: {time.perf_counter() - start:.1f} s, {json.dumps(found[name])}"
            print(words, file=sys.stderr, flush=True)
            path.write_text(json.dumps(found))
    dist.destroy_process_group()


def links(here: Rank) -> Found:
    """The bytes per second of an all-gather of 256 MiB, and the time of one of a few bytes."""

    def gather(numbers: int) -> float:
        part = torch.zeros(numbers, device=here.device)
        whole = torch.empty(numbers * here.size, device=here.device)
        return here.seconds(lambda: dist.all_gather_into_tensor(whole, part), 3, 10)

    big = 1 << (26 if GPU else 12)
    return {"bytes_per_second": 4 * big * (here.size - 1) / gather(big), "latency": gather(16)}


# ------------------------------------------------------------------------------------------ the driver


def launched(
    size: int,
    parts: list[str],
    *,
    again: bool = False,
    again_of: Collection[str] = AGAIN,
    module: str = "benchmarks.distributed",
) -> dict[str, Found]:
    """What `size` ranks of a module find; what ended them is tried once again where there is another way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command += ["-m", module, "--worker", str(path), "--parts", *parts, *["--again"] * again]
        done = subprocess.run(command, env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ})
        if done.returncode:
            print(f"{size} ranks ended with exit code {done.returncode}; the parts before are kept", file=sys.stderr)
        found = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in parts if name in again_of and name not in found]
    if missing and not again:
        found |= launched(size, missing, again=True, module=module)
    return found


def measured(
    sizes: list[int], path: str | None, launch: Callable[[int], dict[str, Found]]
) -> dict[int, dict[str, Found]]:
    """What each number of GPUs finds; written to the file after each."""
    found = {}
    for size in sizes:
        found[size] = launch(size)
        if path:
            Path(path).write_text(json.dumps(found, indent=1))
    return found


def ratio(found: dict[int, dict[str, Found]], part: str) -> float | None:
    """How many times one GPU the largest number of GPUs is, in the number that the part's target is about."""
    one, several = (found[size].get(part) for size in (min(found), max(found)))
    try:
        assert one is not None and several is not None
        if part == "row":
            return one["whole"]["seconds"] / several["whole"]["seconds"]
        key = "length" if part == "longest" else "tokens_per_second"
        return several[key] / one[key]
    except (AssertionError, KeyError):
        return None


def report(found: dict[int, dict[str, Found]]) -> str:
    """The tables."""
    sizes = sorted(found)
    lines = []
    for part, target in TARGETS.items():
        times = ratio(found, part) if len(sizes) > 1 else None
        lines.append([part, "-" if times is None else f"{times:.2f}", f"{target}"])
    head = table(["part", f"{max(sizes)} GPUs, times one", "at least"], lines)
    rows = [[f"{size}", part, json.dumps(values)] for size in sizes for part, values in found[size].items()]
    return f"{head}\n\n{table(['GPUs', 'part', 'found'], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="where all numbers are written")
    parser.add_argument("--gpus", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(AGAIN if options.again else PARTS, options.parts, Path(options.worker))
        return
    print(report(measured(options.gpus, options.json, lambda size: launched(size, options.parts))))


if __name__ == "__main__":
    main()
