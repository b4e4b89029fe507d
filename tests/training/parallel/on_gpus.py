"""What each rank of torchrun does to try sharded models on GPUs with NCCL. Rank 0 prints what it found as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.training.checkpoint import checkpoint_folder, load_checkpoint
from anymamba.training.config import OptimizerConfig, ParallelConfig, TrainConfig
from anymamba.training.optimizer import build_optimizer, optimizer_tensors
from anymamba.training.parallel import clip_gradients, parallelize, sum_over_ranks
from anymamba.training.parallel.launch import read_launch
from anymamba.training.parallel.several import SeveralProcesses
from anymamba.training.snapshot import Progress, restore, snapshot

CONFIG = ModelConfig(d_model=128, n_layers=3, vocab_size=512)
ROWS, LENGTH = 4, 512


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    found: dict[str, Any] = {}
    for name in ("dp_shard", "dp_replicate", "cp"):
        for recompute in (False, True):
            found[f"{name}, {'recomputed' if recompute else 'kept'}"] = worst_error(name, recompute)
    found["param_dtype changes"] = changed_by_param_dtype()
    found["checkpoint differs"] = through_a_checkpoint()
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(CONFIG, device="cuda")


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(512, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1)).cuda()
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def worst_error(name: str, recompute: bool) -> float:
    """The largest error of loss, norm and gradients in float32, as a fraction of the largest entry."""
    ids, labels = tokens()
    whole = model()
    want_loss = whole.loss(ids, labels).loss / ids.numel()
    want_loss.backward()
    want = {name: p.grad for name, p in whole.named_parameters()}
    sharded: Any = model()
    sharded.activation_checkpointing = recompute
    size, rank = dist.get_world_size(), dist.get_rank()
    parallelize(sharded, init_device_mesh("cuda", (size,), mesh_dim_names=(name,)))
    dim = 1 if name == "cp" else 0
    part = [t.chunk(size, dim)[rank] for t in (ids, labels)]
    loss = sharded.loss(*part).loss / ids.numel()
    loss.backward()
    errors = [abs(sum_over_ranks(loss.item())[0] - want_loss.item()) / want_loss.item()]
    for key, p in sharded.named_parameters():
        errors.append(((full(p.grad) - want[key]).abs().max() / want[key].abs().max()).item())
    norm = torch.nn.utils.get_total_norm(list(want.values())).item()
    errors.append(abs(clip_gradients(sharded, 1e9) - norm) / norm)
    return max(errors)


def changed_by_param_dtype() -> list[str]:
    """Gradients that gathering the projections in bfloat16 changes: none."""
    ids, labels = tokens()
    found = []
    for dtype in (torch.bfloat16, None):
        sharded: Any = model()
        mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        parallelize(sharded, mesh, param_dtype=dtype)
        with torch.autocast("cuda", torch.bfloat16):
            loss = sharded.loss(ids, labels).loss / ids.numel()
        loss.backward()
        found.append({name: full(p.grad) for name, p in sharded.named_parameters()})
    return [name for name, grad in found[0].items() if not torch.equal(grad, found[1][name])]


def through_a_checkpoint() -> list[str]:
    """Tensors that are not the same bits after a checkpoint, which a thread writes: none."""
    config = TrainConfig(model=CONFIG, batch_size=ROWS, context=LENGTH, parallel=ParallelConfig(), device="cuda")
    processes = SeveralProcesses(read_launch(), config)
    run = Path(processes.from_first(tempfile.mkdtemp))
    source = model() if processes.is_first else None
    sharded = processes.spread(source, lambda: LanguageModel(CONFIG, device="meta"))
    optimizer = build_optimizer(sharded, OptimizerConfig())
    (sharded.loss(*tokens()).loss / (ROWS * LENGTH)).backward()
    optimizer.step()
    before = state(sharded, optimizer)
    tensors, values = snapshot(sharded, optimizer, None, Progress(step=1))
    with processes.owning(run):
        processes.save(run, 1, tensors, values, 1, lambda folder: None)
        optimizer.step()  # the tensors change while the thread writes
        processes.written()
    loaded, values = load_checkpoint(checkpoint_folder(run, 1), processes.empty(sharded))
    restore(processes.incoming(loaded), values, sharded, optimizer)
    after = state(sharded, optimizer)
    return [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


def state(sharded: Any, optimizer: Any) -> dict[str, Tensor]:
    tensors = dict(sharded.named_parameters()) | optimizer_tensors(sharded, optimizer)
    return {name: full(t.detach()).clone() for name, t in tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
