"""Flags that other programs have, and what they are called here."""

from __future__ import annotations

from collections.abc import Sequence

_TRAIN = {
    "--learning-rate": "--lr --optimizer.lr",
    "--optimizer.min-learning-rate": "--min-lr --lr-min",
    "--optimizer.warmup-steps": "--warmup --warmup-steps --num-warmup-steps",
    "--optimizer.weight-decay": "--wd --weight-decay",
    "--optimizer.clip-norm": "--clip --grad-clip --clip-norm --max-grad-norm --gradient-clip-val",
    "--optimizer.betas": "--betas --adam-betas",
    "--steps": "--max-steps --num-steps --iters --iterations --max-iters --train-steps --epochs --num-epochs "
    "--num-train-epochs",
    "--batch-size": "--batch --bs --per-device-train-batch-size --micro-batch-size --train-batch-size",
    "--context": "--seq-len --seq-length --sequence-length --max-length --max-seq-length --block-size --ctx "
    "--context-length",
    "--accumulation": "--grad-accum --gradient-accumulation --gradient-accumulation-steps --accumulate",
    "--data": "--input --dataset --train-data --train-file --train --files --corpus",
    "--data.eval-paths": "--val-data --eval-data --validation --validation-file --test-data --eval-paths --val",
    "--data.held-out-fraction": "--val-split --validation-split --held-out-fraction",
    "--data.workers": "--workers --num-workers --dataloader-num-workers",
    "--out": "--output --output-dir --out-dir --save-dir --run --run-dir -o",
    "--from": "--model-name --model-name-or-path --base-model --pretrained --init-from --finetune --checkpoint",
    "--resume": "--resume-from-checkpoint --continue --restart",
    "--preset": "--size --model-size --arch",
    "--model.d-model": "--d-model --hidden-size --dim --width --n-embd",
    "--model.n-layers": "--layers --n-layers --n-layer --num-layers --depth --num-hidden-layers",
    "--model.mamba.d-state": "--d-state --state-size",
    "--precision": "--dtype --bf16 --amp --mixed-precision",
    "--activation-checkpointing": "--gradient-checkpointing --grad-checkpointing --checkpointing",
    "--checkpoint-every": "--save-every --save-steps --save-interval --checkpoint-interval",
    "--keep-checkpoints": "--save-total-limit",
    "--eval-every": "--eval-steps --eval-interval --val-every",
    "--log-every": "--log-interval --logging-steps --log-steps",
    "--log": "--logger --report-to --wandb --tensorboard --mlflow --trackio --tracker",
    "--lora": "--lora-r --lora-rank --rank",
    "--lora-targets": "--target-modules --lora-target-modules",
    "--max-minutes": "--max-time --time-limit --minutes",
    "--data.cache-dir": "--cache-dir",
    "--threads": "--num-threads --cpus",
}
_MODEL = {
    "--model": "--model-path --checkpoint --ckpt --pretrained --model-name -m",
    "--no-verify": "--skip-verify",
    "--weights": "--quantize --quantization --quant --load-in-8bit --load-in-4bit",
}
_GENERATE = _MODEL | {
    "--max-new-tokens": "--max-tokens --num-tokens --length --n-predict --max-length -n",
    "--temperature": "--temp -t",
    "--prompt": "--text --input -p",
    "--prompt-file": "--file --input-file -f",
    "--num-beams": "--beams --beam-size",
    "--speculate": "--num-speculative-tokens --prompt-lookup-num-tokens --draft-max --speculative",
    "--draft": "--draft-model --model-draft --assistant-model --speculative-model",
    "--repetition-penalty": "--repeat-penalty",
    "--stop": "--stop-string --stop-sequence",
}
_EVAL = _MODEL | {"--data": "--input --dataset --files --eval-data", "--chunk": "--chunk-size --batch-size --context"}
_CONVERT = {
    "--to": "--format --output-format",
    "--dtype": "--precision --outtype",
    "--weights": "--quantize --quantization --quant",
}
_LISTS = {"train": _TRAIN, "generate": _GENERATE, "eval": _EVAL, "convert": _CONVERT}

SYNONYMS: dict[str, dict[str, str]] = {
    verb: {other: flag for flag, others in table.items() for other in others.split()} for verb, table in _LISTS.items()
}
"""For each verb its flag for every name that another program has for it."""


def with_synonym(verb: str, arguments: Sequence[str]) -> str | None:
    """What to say about the first argument that is another program's name of a flag; None if there is none."""
    known = SYNONYMS.get(verb, {})
    for argument in arguments:
        given = argument.partition("=")[0]
        flag = known.get(given.replace("_", "-"))
        if flag is not None:
            return f"unknown: {given}; did you mean {flag}? anymamba {verb} --help lists the flags"
    return None
