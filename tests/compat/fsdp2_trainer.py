"""What each rank of torchrun does to try transformers' `Trainer` with FSDP2. Rank 0 prints what it found as JSON.

More than one rank shard the model; one rank trains it as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from anymamba.compat.transformers import wrap
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

ROWS, LENGTH, STEPS = 32, 64, 4
FSDP = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["Block"]}


def main(precision: str, folder: Path) -> None:
    trainer = trainer_of(precision, folder / "run")
    trainer.train()
    found: dict[str, Any] = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "evaluated": trainer.evaluate()["eval_loss"],
        "sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
    }
    trainer.save_model(str(folder / "saved"))
    straight = weights(trainer.model)
    resumed = trainer_of(precision, folder / "run")
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{STEPS // 2}"))
    found["resumed differ"] = different(straight, weights(resumed.model))
    if trainer.is_world_process_zero():
        found["saved differ"] = different(straight, weights(wrap(LanguageModel.from_pretrained(folder / "saved"))))
        print(json.dumps(found), flush=True)


def trainer_of(precision: str, run: Path) -> transformers.Trainer:
    torch.manual_seed(0)
    model = wrap(LanguageModel(ModelConfig(d_model=64, n_layers=2, vocab_size=256)))
    size = transformers.TrainingArguments(str(run)).world_size
    arguments = transformers.TrainingArguments(
        str(run),
        bf16=precision == "bf16",
        fsdp=size > 1,
        fsdp_config=dict(FSDP) if size > 1 else None,
        per_device_train_batch_size=4 // size,
        per_device_eval_batch_size=4 // size,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    if size > 1:
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:8])


def rows() -> list[dict[str, list[int]]]:
    """Tokens of only sixteen kinds, so that there is something to learn at once."""
    draw = torch.randint(16, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in draw.tolist()]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    state = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}
    return {name: p.detach().float().cpu().clone() for name, p in state.items()}


def different(want: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are missing or not the same bits."""
    return [name for name, tensor in want.items() if name not in got or not torch.equal(tensor, got[name])]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
