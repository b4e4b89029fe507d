"""`anymamba bench`: how fast a model reads and generates here, beside the limits of the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from anymamba.base.sizes import require_at_least
from anymamba.console.flags import read_flags
from anymamba.console.output import print_facts, print_json, say, size
from anymamba.console.runtime import set_threads

if TYPE_CHECKING:
    import torch

    from anymamba.models.inference import InferenceModel


@dataclass(frozen=True)
class BenchOptions:
    """Measure tokens per second of reading a prompt and of generating, and memory.

    Beside each figure is the limit of this machine: bytes of weights and state over the measured bandwidth, or the
    operations of the products over the measured rate of products.
    """

    model: Path | None = None
    """Folder of a model (a run folder is one), a .gguf file, or a name on the Hugging Face hub."""
    preset: str | None = None
    """Name of a size, such as mamba-130m, with random weights; in place of --model."""
    weights: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """The format of the weights; defaults to that of the file, and to float32 for a preset."""
    batch: str = "1"
    """Numbers of rows that generate at once, such as 1,8,64."""
    prompt: int = 512
    """Tokens of the prompt that is read."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU of NVIDIA if its kernels can be used here, else the CPU."""
    threads: int | None = None
    """CPU threads; defaults to torch's choice, the number of cores."""
    invariant: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run so that a row's logits are the same bits in any batch and any cut of its text."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba bench`."""
    options = read_flags(BenchOptions, "bench", arguments)
    facts = collect(options, checked_batches(options))
    if options.json:
        print_json(facts)
    else:
        print_facts(readable(facts))


def checked_batches(options: BenchOptions) -> list[int]:
    """The numbers of rows. Raises ValueError for a flag that is out of range or misspelt."""
    if (options.model is None) == (options.preset is None):
        raise ValueError("give --model or --preset, one of them")
    require_at_least("--prompt", options.prompt, 1)
    try:
        batches = [int(word) for word in options.batch.split(",")]
    except ValueError:
        raise ValueError(f"--batch must be numbers of rows, such as 1,8,64, got {options.batch!r}") from None
    for batch in batches:
        require_at_least("--batch", batch, 1)
    return batches


def collect(options: BenchOptions, batches: list[int]) -> dict[str, Any]:
    """Everything that `bench` prints. The machine is measured last, as that takes memory."""
    set_threads(options.threads)
    import torch

    from anymamba.evaluation.inference_speed import measure_limits, measure_speed, speed_limit, weight_bytes
    from anymamba.parts.state import state_bytes
    from anymamba.training.outline import peak_bytes

    device = chosen_device(options)
    model = load(options, device)
    say("measuring the model")
    speeds = measure_speed(model, batches, options.prompt)
    peak = peak_bytes(device)
    say("measuring the machine")
    limits = measure_limits(list(model.weight_formats.values()), device)
    report = model.report()
    return {
        "model": str(options.model or options.preset),
        "device": device_name(device),
        "parameters": model.n_parameters(),
        "weights": counted(model.weight_formats.values()),
        "weight_bytes": weight_bytes(model),
        "state_bytes": state_bytes(model.init_state(1)),
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        "limits": asdict(limits),
        "speeds": [asdict(speed) | {"limit": speed_limit(model, limits, speed)} for speed in speeds],
        "native_blocks": sum(block.native for block in report),
        "other_blocks": counted(f"{block.mixer}: {block.reason}" for block in report if not block.native),
    }


def chosen_device(options: BenchOptions) -> torch.device:
    """The device of the flags. Raises ValueError if packed weights have no kernels there."""
    import torch

    from anymamba.ops.devices import usable_device
    from anymamba.ops.packed_linear import no_kernels

    device = usable_device(options.device)
    why = no_kernels(device.type)
    if why is None:
        return device
    if options.device == "auto":
        return torch.device("cpu")
    raise ValueError(f"--device {options.device} cannot be measured: {why}; take --device cpu")


def device_name(device: torch.device) -> str:
    """The kind of a device, and the model of a GPU."""
    import torch

    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def load(options: BenchOptions, device: torch.device) -> InferenceModel:
    """The model of the flags; one of a preset has random weights."""
    from anymamba.models.inference import InferenceModel
    from anymamba.models.presets import preset

    invariant = options.invariant
    if options.model is not None:
        return InferenceModel.from_pretrained(options.model, options.weights, device, invariant=invariant)
    assert options.preset is not None
    weights = options.weights or "float32"
    return InferenceModel.random(preset(options.preset), weights, device=device, invariant=invariant)


def counted(values: Iterable[str]) -> dict[str, int]:
    """How often each value is there."""
    return dict(Counter(values))


def readable(facts: dict[str, Any]) -> dict[str, str]:
    """The same facts as one line each."""
    limits, kinds = facts["limits"], ", ".join(f"{count} {name}" for name, count in facts["weights"].items())
    moves = "reads" if facts["device"] == "cpu" else "copies"
    lines = {
        "model": f"{facts['model']}, {facts['parameters']:,} parameters",
        "weights": f"{size(facts['weight_bytes'])}; matrices: {kinds}",
        "state": f"{size(facts['state_bytes'])} a row",
        "peak memory": "not known" if facts["peak_bytes"] is None else size(facts["peak_bytes"]),
        "machine": f"{facts['device']}, {facts['threads']} threads, "
        f"{moves} {limits['bytes_per_second'] / 1e9:,.1f} GB/s, multiplies "
        f"{limits['operations_per_second'] / 1e9:,.0f} billion operations/s ({limits['fastest_product']})",
    }
    for speed in facts["speeds"]:
        what = f"a prompt of {speed['rows']}" if speed["what"] == "read" else f"batch {speed['rows']}"
        rate, limit = speed["tokens_per_second"], speed["limit"]
        lines[f"{speed['what']}, {what}"] = (
            f"{rate:,.1f} tokens/s; the limit is {limit:,.1f}, {limit / rate:.2f} times as many"
        )
    together = "one compiled call" if facts["device"] == "cpu" else "one CUDA graph"
    lines["blocks"] = f"{facts['native_blocks']} in {together}"
    for reason, count in facts["other_blocks"].items():
        lines["blocks"] += f"; {count} one by one ({reason})"
    return lines
