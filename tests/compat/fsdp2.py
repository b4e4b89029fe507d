"""What each rank of torchrun does to try accelerate's FSDP2 on a wrapped model. Rank 0 prints the losses as JSON."""

from __future__ import annotations

import json
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from anymamba.compat.transformers import wrap
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel


def main(precision: str) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        reshard_after_forward=True,
        mixed_precision_policy=MixedPrecisionPolicy(),  # autocast narrows what may be narrow
    )
    accelerator = Accelerator(mixed_precision=precision, fsdp_plugin=plugin)
    torch.manual_seed(0)
    model = wrap(LanguageModel(ModelConfig(d_model=64, n_layers=2, vocab_size=256)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (4, 64), generator=draw).to(accelerator.device)
    rank, size = accelerator.process_index, accelerator.num_processes
    mine = ids[rank * 4 // size : (rank + 1) * 4 // size]
    losses = []
    for _ in range(3):
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    sharded = [name for name, p in model.named_parameters() if type(p).__name__ == "DTensor"]
    if accelerator.is_main_process:
        print(json.dumps({"losses": losses, "sharded": len(sharded), "size": size}), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1])
