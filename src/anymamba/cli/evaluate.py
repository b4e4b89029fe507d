"""`anymamba eval`: bits per byte, nats per token and perplexity of a model on files, and what was counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from anymamba.base.sizes import require_at_least
from anymamba.console.flags import read_flags
from anymamba.console.output import print_facts, print_json, progress_bar, told_warnings
from anymamba.console.runtime import Runtime, load_model, open_model

if TYPE_CHECKING:
    from anymamba.evaluation.perplexity import EvaluationResult


@dataclass(frozen=True)
class EvalOptions:
    """Measure a model on files: bits per byte, nats per token, perplexity.

    Each document is read from its beginning with carried state; documents of any length take the same memory.
    """

    model: Path
    """Folder of a model (a run folder is one), a .gguf file, or a name on the Hugging Face hub."""
    data: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
    """Files, folders or globs."""
    text_field: str | None = None
    """The field that holds the text in .jsonl, .csv and .parquet files; defaults to "text"."""
    exclude: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Patterns of files and folders to leave out, such as '*.min.py' or tests; may be repeated."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row of .jsonl, .csv or .parquet that has no text or cannot be read."""
    tokenizer: Path | None = None
    """A tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to the model's own."""
    chunk: int = 2048
    """Tokens processed at once; memory grows with it, the result does not change."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = field(default_factory=Runtime)


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba eval`."""
    options = read_flags(EvalOptions, "eval", arguments)
    result = measure(options)
    if options.json:
        values = result.to_dict()
        print_json({"model": str(options.model)} | {name: finite(value) for name, value in values.items()})
    else:
        print_facts(readable(result))


def measure(options: EvalOptions) -> EvaluationResult:
    """Run the model over the files. The data is read before the weights are loaded, since it may be bad."""
    from anymamba.data.table import build_token_table
    from anymamba.evaluation.perplexity import evaluate

    require_at_least("--chunk", options.chunk, 1)
    checkpoint, tokenizer = open_model(options.model, options.tokenizer, options.runtime)
    with progress_bar("evaluating") as show, told_warnings():
        table = build_token_table(
            [path for group in options.data for path in group],
            tokenizer,
            text_field=options.text_field,
            exclude=[pattern for group in options.exclude for pattern in group],
            on_bad_row=options.on_bad_row,
            progress=lambda done, total: show(done, total, "reading the data"),
        )
        return evaluate(
            load_model(checkpoint, options.runtime),
            table,
            tokenizer.eos_id,
            chunk=options.chunk,
            progress=lambda done, total: show(done, total, f"{done:,} of {total:,} tokens"),
        )


def finite(value: float | None) -> float | None:
    """None (null in JSON) in place of infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readable(result: EvaluationResult) -> dict[str, str]:
    """The measures and what was counted, one line each."""
    bits = result.bits_per_byte
    first = f"the first of each document {'included' if result.counts_first_tokens else 'not counted'}"
    size = "" if result.n_bytes is None else f", {result.n_bytes:,} bytes"
    return {
        "bits per byte": "not known without an end-of-document token" if bits is None else f"{bits:.4f}",
        "nats per token": f"{result.nats_per_token:.4f}",
        "perplexity": f"{result.perplexity:.4f}",
        "counted": f"{result.n_documents:,} documents, {result.n_tokens:,} tokens ({first}){size}; "
        "ends of documents are not counted",
    }
