"""`anymamba download`: downloads a model of the Hugging Face hub into its cache, and checks it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from anymamba.console.flags import read_flags
from anymamba.console.output import print_facts, print_json

if TYPE_CHECKING:
    from anymamba.models.checkpoints import Checkpoint

SCHEME = "hf://"


@dataclass(frozen=True)
class DownloadOptions:
    """Download a model of the Hugging Face hub into the hub's cache, and check that it can be loaded.

    Every command with a flag --model then takes the same name, also without a network (HF_HUB_OFFLINE=1).
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """owner/name, or owner/name/file.gguf for a GGUF file."""
    revision: str | None = None
    """A branch, tag or commit; defaults to the main branch."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba download`."""
    options = read_flags(DownloadOptions, "download", arguments)
    from anymamba.models.checkpoints import local_path, open_checkpoint
    from anymamba.models.checkpoints.hub import hub_name

    name = SCHEME + options.name.removeprefix(SCHEME)
    found = hub_name(name)
    if found is None:
        raise ValueError(f"{options.name!r} is no name on the hub; give owner/name, or owner/name/file.gguf")
    if found["file"] is None:
        require_model(local_path(name, options.revision, weights=False))
    checkpoint = open_checkpoint(local_path(name, options.revision))
    facts = collect(options.name, checkpoint)
    if options.json:
        print_json(facts)
    else:
        print_facts(readable(facts))


def require_model(folder: Path) -> None:
    """Raise CheckpointError if a folder has the config of another kind of model, before its weights are downloaded."""
    from anymamba.models.checkpoints.formats.files import CONFIG, read_json
    from anymamba.models.checkpoints.formats.folder import read_config

    if (folder / CONFIG).is_file():
        read_config(read_json(folder / CONFIG), folder / CONFIG)


def collect(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What is printed about a model."""
    from anymamba.models.checkpoints import find_tokenizer

    path = checkpoint.path
    try:
        tokenizer: str | None = find_tokenizer(checkpoint).name
    except FileNotFoundError:
        tokenizer = None
    return {
        "name": name,
        "path": str(path),
        "format": checkpoint.format,
        "parameters": sum(math.prod(tensor.shape) for tensor in checkpoint.stored.values()),
        "vocabulary": checkpoint.config.vocab_size,
        "tokenizer": tokenizer,
        "bytes": sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()) if file.is_file()),
    }


def readable(facts: dict[str, Any]) -> dict[str, str]:
    """The same, one line each."""
    lines = {name: str(value) for name, value in facts.items()}
    lines["parameters"], lines["vocabulary"] = f"{facts['parameters']:,}", f"{facts['vocabulary']:,}"
    lines["bytes"] = f"{facts['bytes']:,}"
    lines["tokenizer"] = facts["tokenizer"] or "none that can be read; name one with --tokenizer"
    return lines
