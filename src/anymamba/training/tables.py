"""The token tables of a run: training documents, and held-out ones."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable

from anymamba.base.errors import DataWarning
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
            list(paths),
            tokenizer,
            text_field=config.text_field,
            exclude=config.exclude,
            on_bad_row=config.on_bad_row,
            cache_dir=config.cache_dir,
            progress=progress,
        )

    training = table(config.paths)
    if config.eval_paths:
        return training, table(config.eval_paths)
    if config.held_out_fraction == 0:
        return training, None
    rest, held_out = training.split(lambda name: is_held_out(name, config.held_out_fraction))
    if held_out.n_documents == 0 or training.n_documents < 2:
        warnings.warn(
            f"nothing is held out, so there is no evaluation: held_out_fraction is {config.held_out_fraction} and "
            f"there are {training.n_documents:,} documents; raise it (--data.held-out-fraction), or name files to "
            f"evaluate on with eval_paths (--data.eval-paths)",
            DataWarning,
            stacklevel=2,
        )
        return training, None
    if rest.n_documents == 0:
        raise ValueError("held_out_fraction leaves no document to train on; lower it or give eval_paths")
    return rest, held_out


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a document is held out. A hash of its name decides, so adding or removing others does not change it."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
