"""`anymamba convert`: writes a checkpoint in another format, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from anymamba.base.sizes import require_at_least
from anymamba.console.flags import read_flags
from anymamba.console.output import progress_bar, say, told_warnings

WITHOUT = "none"


@dataclass(frozen=True)
class ConvertOptions:
    """Write a checkpoint in another format. Memory stays within one shard for models of any size.

    An option of the model that the format cannot hold is an error, which names it.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A model folder (Hugging Face's or state-spaces), a .gguf file, or a name on the Hugging Face hub."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder; for gguf also a path that ends in .gguf."""
    to: Literal["hf", "state-spaces", "gguf", "anymamba"]
    """The format: Hugging Face's mamba or falcon_mamba, the original one, llama.cpp's, our own."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_0", "q4_k", "q6_k"] | None = None
    """Dtype of the weights; defaults to the stored one (of blocks in hf and state-spaces: float32). A_log, D and the
    step's bias stay float32. The last four are llama.cpp's blocks of integers, for gguf only."""
    weights: Literal["int8", "int4"] | None = None
    """Blocks of integers in hf, anymamba or gguf, as `generate --weights` packs them. In a folder only anymamba reads
    them."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; "none" leaves it out. Defaults to
    the source's own."""
    adapter: str | None = None
    """A LoRA adapter in PEFT's format (a folder or a name on the hub), which is merged into the weights."""
    shard_bytes: int = 5_000_000_000
    """Weights beyond this many bytes are written in several files (hf, anymamba)."""
    no_verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read the source without comparing its files with their digests."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba convert`."""
    options = read_flags(ConvertOptions, "convert", arguments)
    import torch

    from anymamba.models.checkpoints import convert

    require_at_least("--shard-bytes", options.shard_bytes, 1)
    if options.dtype and options.weights:
        raise ValueError("--dtype and --weights both choose the format of the weights; give one")
    dtype = getattr(torch, options.dtype or "", options.dtype)  # a torch.dtype, or the name of a block format
    with progress_bar("converting") as show, told_warnings():
        convert(
            options.source,
            options.out,
            options.to,
            dtype=dtype,
            weights=options.weights,
            tokenizer=None if options.tokenizer == WITHOUT else options.tokenizer,
            without_tokenizer=options.tokenizer == WITHOUT,
            shard_bytes=options.shard_bytes,
            verify=not options.no_verify,
            adapter=options.adapter,
            progress=lambda done, total: show(done, total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"),
        )
    say(f"wrote {options.out}")
