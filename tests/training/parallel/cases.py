"""What the ranks of a test run. It is imported once, by the server that the ranks are forked from."""

from __future__ import annotations

import errno
import functools
import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from anymamba.cli.app import main
from anymamba.console.signals import SignalHandler
from anymamba.data.table import TokenTable
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.options import MambaOptions
from anymamba.parts.state import map_state, state_tensors
from anymamba.training.checkpoint import checkpoint_folder, load_checkpoint, save_checkpoint
from anymamba.training.config import OptimizerConfig, ParallelConfig, TrainConfig
from anymamba.training.data import open_data
from anymamba.training.lora import save_model
from anymamba.training.optimizer import build_optimizer, optimizer_tensors
from anymamba.training.parallel import (
    clip_gradients,
    copy_from_first_rank,
    parallelize,
    reduce_gradients,
    sharding,
    sum_over_ranks,
    watch,
    whole_tensors,
)
from anymamba.training.parallel.launch import read_launch
from anymamba.training.parallel.several import SeveralProcesses
from anymamba.training.parallel.sharding import units
from anymamba.training.parallel.writer import Writer
from anymamba.training.report import Silent
from anymamba.training.snapshot import Progress, restore, snapshot
from anymamba.training.trainer import resume, train

CONFIG = ModelConfig(d_model=12, n_layers=2, vocab_size=257, mamba=MambaOptions(d_state=4))
ROWS, LENGTH = 4, 24


def model(dtype: torch.dtype = torch.float64, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**{**CONFIG.__dict__, **options})).to(dtype)


def tokens(batches: int = 1) -> Tensor:
    return torch.randint(0, 257, (2, batches, ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def whole_gradients(whole: LanguageModel, batches: int = 1) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one process."""
    total = 0.0
    for ids, labels in zip(*tokens(batches), strict=True):
        loss = whole.loss(ids, labels).loss / (batches * ROWS * LENGTH)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in whole.named_parameters()}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, as a fraction of its largest entry."""
    return {name: ((got[name] - w).abs().max() / w.abs().max()).item() for name, w in want.items()}


def full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def compare_gradients(
    sizes: dict[str, int], dtype: torch.dtype, options: dict[str, Any], how: dict[str, Any], batches: int = 1
) -> tuple[float, float, float]:
    """The largest errors of loss, gradients and norm of a sharded model, relative to one process."""
    whole = model(dtype, **options)
    whole.activation_checkpointing = False
    want_loss, want = whole_gradients(whole, batches)
    sharded = model(dtype, **options)
    sharded.activation_checkpointing = how.pop("activation_checkpointing", False)
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    parallelize(sharded, mesh, **how)
    cp = sizes.get("cp", 1)
    dp = mesh.size() // cp
    row, part = divmod(mesh.get_rank(), cp)
    rows = slice(row * ROWS // dp, (row + 1) * ROWS // dp)
    span = slice(part * LENGTH // cp, (part + 1) * LENGTH // cp)
    total = 0.0
    for number, (ids, labels) in enumerate(zip(*tokens(batches), strict=True)):
        reduce_gradients(sharded, number == batches - 1)
        out = sharded.loss(ids[rows, span], labels[rows, span])
        (out.loss / (batches * ROWS * LENGTH)).backward()
        total += out.loss.item() / (batches * ROWS * LENGTH)
    [loss] = sum_over_ranks(total)
    got = {name: full(p.grad) for name, p in sharded.named_parameters()}
    want_norm = torch.nn.utils.get_total_norm(list(want.values())).item()
    norm = clip_gradients(sharded, want_norm / 2)
    clipped = {name: full(p.grad) for name, p in sharded.named_parameters()}
    halves = {name: w * (want_norm / 2) / (want_norm + 1e-6) for name, w in want.items()}  # as torch clips
    worst = max(*errors(got, want).values(), *errors(clipped, halves).values())
    return abs(loss - want_loss) / want_loss, worst, abs(norm - want_norm) / want_norm


def count_reductions(batches: int, blocks_per_unit: int | None) -> list[int]:
    """The numbers of gradient reductions after each of several batches, of which only the last needs them."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    sharded = parallelize(model(), mesh, blocks_per_unit=blocks_per_unit)
    counts = []
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # before 2.13
    with mock.patch.object(dist, name, wraps=getattr(dist, name)) as reduce:
        for number, (ids, labels) in enumerate(zip(*tokens(batches), strict=True)):
            reduce_gradients(sharded, number == batches - 1)
            sharded.loss(ids, labels).loss.backward()
            counts.append(reduce.call_count)
    return counts


def blocks_of_units(width: int) -> list[int]:
    """How many of four blocks are in each unit, where two blocks of two bytes a number just fit."""
    four = model(torch.float32, n_layers=4)
    of_block = sum(p.numel() for p in sharding.narrow_parameters(four.blocks[0]))
    with mock.patch.object(sharding, "UNIT_BYTES", 2 * 2 * of_block):
        dtype = torch.bfloat16 if width == 2 else None
        return [len(blocks) for blocks in sharding._together(four.blocks, dtype, None)]


def unit_error() -> str:
    try:
        parallelize(model(), init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",)), blocks_per_unit=0)
    except ValueError as error:
        return str(error)
    return ""


def dtypes_in_bfloat16() -> tuple[dict[str, torch.dtype], dict[str, torch.dtype], torch.dtype]:
    """The dtypes of the parameters inside a forward pass with param_dtype, those of their storage, and that of A."""
    sharded = model(torch.float32)
    seen: dict[str, torch.dtype] = {}
    inside: list[torch.dtype] = []
    ssm = sharded.blocks[0].mixer.ssm
    A = ssm.A

    def watched() -> Tensor:
        seen.update({name: p.dtype for name, p in sharded.blocks[0].named_parameters()})
        inside.append(A().dtype)
        return A()

    ssm.A = watched
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    parallelize(sharded, mesh, param_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        sharded.loss(*tokens()[:, 0]).loss.backward()
    return seen, {name: p.dtype for name, p in sharded.blocks[0].named_parameters()}, inside[0]


def bfloat16_loss(param_dtype: torch.dtype | None) -> tuple[float, dict[str, Tensor]]:
    """The loss and gradients of a sharded model under autocast."""
    sharded = model(torch.float32)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    parallelize(sharded, mesh, param_dtype=param_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = sharded.loss(*tokens()[:, 0])
    out.loss.backward()
    return out.loss.item(), {name: full(p.grad) for name, p in sharded.named_parameters()}


def error_of_narrowed_parameters() -> str:
    """What a model says whose blocks are sharded by a policy that narrows all their parameters."""
    sharded = model(torch.float32)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        sharded.loss(*tokens()[:, 0])
    except TypeError as error:
        return str(error)
    return ""


def loss_without_autocast() -> str:
    sharded = model(torch.float32)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    parallelize(sharded, mesh, param_dtype=torch.bfloat16)
    try:
        sharded.loss(*tokens()[:, 0])
    except RuntimeError as error:
        return str(error)
    return ""


def through_the_meta_device(options: dict[str, Any]) -> bool:
    """Whether a model made on the meta device has the weights of rank 0, whole again, and steps like it."""
    whole = model(torch.float32, **options)
    sharded = LanguageModel(whole.config, device="meta")
    parallelize(sharded, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    copy_from_first_rank(sharded, whole if dist.get_rank() == 0 else None)
    ids = tokens()[0, 0]
    with torch.no_grad():
        step = sharded.step(ids[:, 0], whole.init_state(ROWS)).logits
        want = whole.step(ids[:, 0], whole.init_state(ROWS)).logits
    tensors = whole_tensors(sharded)
    same = tensors is None or all(torch.equal(tensors[name], p) for name, p in whole.named_parameters())
    return same and torch.allclose(step, want, rtol=1e-5, atol=1e-6)


def mesh_error(names: tuple[str, ...]) -> str:
    try:
        parallelize(model(), init_device_mesh("cpu", (2,), mesh_dim_names=names))
    except ValueError as error:
        return str(error)
    return ""


def trained(compile: bool, steps: int = 2) -> list[float]:
    """Losses of a few steps with AdamW."""
    sharded = model(torch.float32, n_layers=1)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True)):
        parallelize(sharded, mesh, compile=compile)
    optimizer = build_optimizer(sharded, OptimizerConfig(learning_rate=1e-2))
    losses = []
    for _ in range(steps):
        out = sharded.loss(*tokens()[:, 0])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


# ---------------------------------------------------------------------------------------------------------- checkpoints


def one_step(sharded: Any, rows: slice) -> torch.optim.Optimizer:
    optimizer = build_optimizer(sharded, OptimizerConfig(learning_rate=1e-2))
    sharded.loss(*tokens()[:, 0, rows]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def carried_rows(rows: slice) -> LanguageModelState:
    """States that tell the row."""
    numbers = torch.arange(ROWS, dtype=torch.float32)[rows]
    return map_state(lambda t: t + numbers.view(-1, *[1] * (t.ndim - 1)), model(torch.float32).init_state(len(numbers)))


def train_config(sizes: dict[str, int] | None = None) -> TrainConfig:
    return TrainConfig(model=CONFIG, batch_size=ROWS, context=LENGTH, parallel=ParallelConfig(**sizes or {}))


def save_one(run: Path, step: int) -> None:
    """What a run of one process saves after a step."""
    whole = model(torch.float32)
    tensors, values = snapshot(whole, one_step(whole, slice(None)), carried_rows(slice(None)), Progress(step=step))
    save_checkpoint(run, step, tensors, values, 9)


def save(run: Path, step: int, sizes: dict[str, int]) -> None:
    """The same from several processes."""
    processes = SeveralProcesses(read_launch(), train_config(sizes))
    sharded = processes.spread(model(torch.float32), lambda: LanguageModel(CONFIG, device="meta"))
    mine = ROWS // processes.dp_size
    rows = slice(processes.dp_rank * mine, (processes.dp_rank + 1) * mine)
    optimizer, carried = one_step(sharded, rows), carried_rows(rows)
    torch.manual_seed(100 + processes.rank)
    tensors, values = snapshot(sharded, optimizer, carried, Progress(step=step))
    done: list[Path] = []
    with processes.owning(run):
        processes.save(run, step, tensors, values, 9, done.append)
        processes.written()
    assert done == [checkpoint_folder(run, step)]


def load(folder: Path, sizes: dict[str, int]) -> tuple[dict[str, Tensor], list[float], Tensor]:
    """The tensors of a checkpoint that several processes restored, whole again; this rank's rows; its random state."""
    processes = SeveralProcesses(read_launch(), train_config(sizes))
    sharded = processes.spread(model(torch.float32), lambda: LanguageModel(CONFIG, device="meta"))
    optimizer = build_optimizer(sharded, OptimizerConfig(learning_rate=1e-2))
    tensors, values = load_checkpoint(folder, processes.empty(sharded))
    carried, _ = restore(processes.incoming(tensors), values, sharded, optimizer)
    assert carried is not None
    found = {f"model.{name}": full(p.detach()) for name, p in sharded.named_parameters()}
    found |= {f"optimizer.{name}": full(t) for name, t in optimizer_tensors(sharded, optimizer).items()}
    rows = next(t[:, 0, 0].tolist() for t in state_tensors(carried))
    return found, rows, torch.get_rng_state()


# ----------------------------------------------------------------------------------------------------------- accelerate


def under_accelerate(precision: str, narrow: bool) -> tuple[float, float, list[str]] | str:
    """The loss of a wrapped model that accelerate's FSDP2 has sharded, that of the same model alone, and the classes of
    the units; or the error of a model whose parameters its policy narrows.

    accelerate itself refuses to shard on a CPU, so its function for models is called with what it reads of an
    `Accelerator`.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    from anymamba.compat.transformers import wrap

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16 if narrow else None),
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=precision,
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
    )
    ids = tokens()[0, 0, 2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    alone, sharded = wrap(model(torch.float32)), wrap(model(torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        want = alone(input_ids=ids, labels=ids).loss.item()
        prepared: Any = fsdp2_prepare_model(accelerator, sharded)
        try:
            loss = prepared(input_ids=ids, labels=ids).loss
        except TypeError as error:
            return str(error)
    loss.backward()
    assert all(p.grad is not None for p in prepared.parameters())
    return loss.item(), want, sorted({type(unit).__name__ for unit in units(prepared)})


# ----------------------------------------------------------------------------------------------------------------- runs


def run_training(config: TrainConfig, run: Path) -> None:
    train(config, run)


def resume_training(run: Path, steps: int) -> None:
    resume(run, steps=steps)


def train_on_a_slow_disk(config: TrainConfig, run: Path) -> tuple[float, float]:
    """Seconds from step 2, at which a checkpoint begins, until it is complete, and until step 4 is done."""
    times: dict[str, float] = {}

    class Times(Silent):
        def on_step(self, metrics: dict[str, Any]) -> None:
            times[f"step {metrics['step']}"] = time.perf_counter()

        def on_checkpoint(self, step: int, folder: Path) -> None:
            times[f"checkpoint {step}"] = time.perf_counter()

    with mock.patch.object(Writer, "_write", slow_writer), mock.patch("anymamba.training.lora.save_model", slow_save):
        train(config, run, Times())
    if dist.get_rank() != 0:
        return 0.0, 0.0
    return times["checkpoint 2"] - times["step 2"], times["step 4"] - times["step 2"]


def other_seed_on_rank_1(*words: str) -> int:
    return command(*words, "--seed", os.environ["RANK"])


def resume_on_rank_1(config_file: str, folder: str) -> int:
    """Train on rank 0 into a new folder, and resume another run on rank 1."""
    old = ("--resume", f"{folder}/old", "--steps", "20")
    return command("train", *(("--config", config_file, "--out", f"{folder}/run"), old)[int(os.environ["RANK"])])


def no_config_on_rank_1(config_file: str, run: str) -> int:
    return command("train", "--config", (config_file, "absent.json")[int(os.environ["RANK"])], "--out", run)


def command(*words: str, patches: dict[str, str] | None = None) -> int:
    """Run `anymamba` as a process of its own would.

    Args:
        patches: functions to replace, by name, with functions of this module.
    """
    torch.set_num_threads(1)
    handler = SignalHandler()
    handler.install()
    with ExitStack() as stack:
        for target, name in (patches or {}).items():
            stack.enter_context(mock.patch(target, globals()[name]))
        return main(words, handler)


def late(connection: Any) -> bytes:
    """What a rank reads that is slower than the others."""
    time.sleep(0.2)
    return received(connection)


def after_a_stranger(address: tuple[str, int], **options: Any) -> Any:
    """A connection to rank 0, which a scanner of ports has found first."""
    with connect(address, **options) as stranger:
        stranger.sendall(b"\x16\x03\x01\xfe\xff\n")
    return connect(address, **options)


def one_gpu_on_machine_1(*words: str) -> int:
    """Run `anymamba` on rank 0 as if the machine had two GPUs, and on rank 1 as if it had one."""
    count = 2 - int(os.environ["RANK"])
    with (
        mock.patch("anymamba.ops.devices.usable_device", return_value=torch.device("cuda")),
        mock.patch.object(torch.cuda, "device_count", return_value=count),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(dist, "init_process_group", functools.partial(without_nccl, dist.init_process_group)),
    ):
        return command(*words)


def without_nccl(init: Any, backend: str, **options: Any) -> None:
    init("gloo", **options)


def run_text(text: str) -> int:
    torch.set_num_threads(1)
    exec(compile(text, "docs/distributed.md", "exec"), {"__name__": "__main__"})
    return 0


def different_rows(*arguments: Any, **options: Any) -> Any:
    """Data that rank 1 reads without its last document."""
    training, held_out = open_data(*arguments, **options)
    if os.environ["RANK"] == "1":
        training = training.select(range(training.n_documents - 1))
    return training, held_out


def full_disk(self: Any, folder: Path, tensors: Any) -> None:
    """What a writer does on a disk that is full on rank 1, from the second checkpoint on."""
    if os.environ["RANK"] == "1" and "step-00000000" not in str(folder):
        with mock.patch("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", no_space):
            return write_parts(self, folder, tensors)
    return write_parts(self, folder, tensors)


def other_text_on_rank_1(*arguments: Any, **options: Any) -> Any:
    """Data whose lengths are the same on rank 1, and of which one letter in the middle is another."""
    training, held_out = open_data(*arguments, **options)
    documents = [np.array(training.read(i, 0, int(n))) for i, n in enumerate(training.lengths)]
    longest = max(documents, key=len)
    longest[len(longest) // 2 :] += np.uint8(os.environ["RANK"] == "1")
    return TokenTable.from_arrays(documents, training.byte_lengths), held_out


def elsewhere(self: Any) -> Path:
    """What rank 0 tells of a folder that this rank's machine does not have."""
    return Path("/nowhere") / told(self).name


def slow_save(model: Any, folder: Path, tokenizer: Any) -> None:
    """A disk that takes a second and a half for a model."""
    time.sleep(1.5)
    save_model(model, folder, tokenizer)


def train_with_slow_models(config: TrainConfig, run: Path) -> None:
    with mock.patch("anymamba.training.lora.save_model", slow_save):
        train(config, run)


def poll_on_rank_1(self: Any) -> None:
    """Rank 0 is inside a step when rank 1 reports that its disk is full."""
    if os.environ["RANK"] == "1":
        poll(self)


def clip_and_get_sigterm(self: Any, *arguments: Any) -> float:
    """Rank 1 gets the signal twice inside a step."""
    if self.rank == 1:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    return clip(self, *arguments)


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def slow_writer(self: Any, folder: Path, tensors: Any) -> None:
    """A disk that takes a second and a half."""
    time.sleep(1.5)
    write_parts(self, folder, tensors)


clip, poll = SeveralProcesses.clip, Writer.poll
write_parts, received, connect = Writer._write, watch._received, socket.create_connection
told = Writer._told
