"""The token tables of a run: training documents, and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from anymamba.data.table import TokenTable, build_token_table
from anymamba.data.tokenizer import Tokenizer
from anymamba.training.config import DataConfig


def open_tables(
    config: DataConfig, tokenizer: Tokenizer, progress: Callable[[int, int | None], None] | None = None
) -> tuple[TokenTable, TokenTable | None]:
    """The training table, and the held-out one (None if nothing is held out)."""
    if not config.paths:
        raise ValueError("no training data: name files, folders or globs in data.paths (--data PATH)")

    def table(paths: tuple[str, ...]) -> TokenTable:
        return build_token_table(
            list(paths), tokenizer, text_field=config.text_field, cache_dir=config.cache_dir, progress=progress
        )

    training = table(config.paths)
    if config.eval_paths:
        return training, table(config.eval_paths)
    if config.held_out_fraction == 0 or training.n_documents < 2:
        return training, None
    training, held_out = training.split(lambda name: is_held_out(name, config.held_out_fraction))
    if training.n_documents == 0:
        raise ValueError("held_out_fraction leaves no document to train on; lower it or give eval_paths")
    return training, held_out if held_out.n_documents else None


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a document is held out. A hash of its name decides, so adding or removing others does not change it."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
