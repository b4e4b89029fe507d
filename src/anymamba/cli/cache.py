"""`anymamba cache`: shows the cached tables of tokens and packed genomes, and deletes them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from anymamba.base.errors import InUseError
from anymamba.console.flags import read_flags
from anymamba.console.output import print_facts, print_json, say

if TYPE_CHECKING:
    from anymamba.data.cache import CachedTable

DAY = 86_400.0
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class CacheOptions:
    """Show the cached tables of tokens that `train` and `eval` have made of texts, and the packed genomes, the last
    used one first.

    A table that is deleted is made again when it is needed. Delete none that a run is reading.
    """

    stale: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only tables that no command will use again, because their files have changed or are gone."""
    older_than: float | None = None
    """Only tables that have not been used for this many days."""
    clean: tyro.conf.FlagCreatePairsOff[bool] = False
    """Delete these tables, and what killed commands have left."""
    folder: Path | None = None
    """The folder of the cache; defaults to the user's."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba cache`."""
    options = read_flags(CacheOptions, "cache", arguments)
    if options.older_than is not None and not options.older_than >= 0:
        raise ValueError(f"--older-than must be at least 0 days, got {options.older_than}")
    from anymamba.data.cache import cached_tables, default_cache

    cache = options.folder or default_cache()
    if options.folder is not None and not cache.is_dir():
        raise FileNotFoundError(f"no folder {cache}; leave --folder out for the user's cache")
    tables = [table for table in cached_tables(cache) if is_chosen(table, options)]
    if options.clean:
        tables = clean(cache, tables)
    if options.json:
        print_json({"folder": str(cache), "deleted": options.clean, "tables": [as_object(table) for table in tables]})
    else:
        print_facts(readable(cache, tables, options.clean))


def is_chosen(table: CachedTable, options: CacheOptions) -> bool:
    """Whether the flags name a table."""
    unused = time.time() - table.last_used
    return (table.stale is not None or not options.stale) and unused >= (options.older_than or 0) * DAY


def clean(cache: Path, tables: Sequence[CachedTable]) -> list[CachedTable]:
    """Delete tables and what killed processes left, and return the tables that were deleted."""
    from anymamba.base.files import sweep
    from anymamba.data.cache import remove_table

    sweep(cache)
    deleted = []
    for table in tables:
        try:
            remove_table(table)
        except InUseError as error:
            say(f"kept {table.folder.name}: {error}")
            continue
        deleted.append(table)
    return deleted


def readable(cache: Path, tables: Sequence[CachedTable], deleted: bool) -> dict[str, str]:
    """The tables, one line each, after a line about all of them."""
    count = f"{len(tables)} table{'' if len(tables) == 1 else 's'}, {size(sum(table.n_bytes for table in tables))}"
    lines = {"folder": str(cache), "deleted" if deleted else "all": count}
    return lines | {table.folder.name[:12]: in_words(table) for table in tables}


def in_words(table: CachedTable) -> str:
    """A table in one line."""
    days = int(max(0.0, time.time() - table.last_used) / DAY)
    words = [size(table.n_bytes), "used today" if days == 0 else f"used {days} day{'' if days == 1 else 's'} ago"]
    if table.sources is not None:
        sources = table.sources
        more = f" and {len(sources.files) - 1:,} more files" if len(sources.files) > 1 else ""
        words += [f"{sources.n_tokens:,} tokens ({sources.tokenizer})", f"{sources.files[0]}{more}"]
    if table.stale is not None:
        words.append(f"stale: {table.stale}")
    return ", ".join(words)


def size(n_bytes: float) -> str:
    """A number of bytes with a unit."""
    unit = 0
    while n_bytes >= 1000 and unit < len(UNITS) - 1:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.1f} {UNITS[unit]}" if unit else f"{n_bytes} B"


def as_object(table: CachedTable) -> dict[str, Any]:
    """What --json prints of a table."""
    sources = {} if table.sources is None else table.sources._asdict()
    sources.pop("options", None)
    return {
        "folder": str(table.folder),
        "bytes": table.n_bytes,
        "last_used": table.last_used,
        "stale": table.stale,
        **sources,
    }
