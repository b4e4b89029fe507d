"""The tokenizer that goes with a model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from anymamba.data.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from anymamba.models.checkpoints.hub import local_path
from anymamba.models.checkpoints.reading import open_checkpoint


def model_tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer | None:
    """The tokenizer.json beside a model, or a .gguf file's own tokenizer; None without any.

    Args:
        name, revision: of the model, as `load_pretrained` takes them.
    """
    path = local_path(name, revision)
    folder = path if path.is_dir() else path.parent
    if (folder / FILE_NAME).is_file():
        return load_tokenizer(folder)
    if path.is_dir() and (path / "config.json").exists():
        return None
    specification = open_checkpoint(path).tokenizer()
    if specification is None:
        return None
    with tempfile.TemporaryDirectory() as own:  # the file's name is the tokenizer's
        file = Path(own) / f"{path.stem}.json"
        file.write_text(json.dumps(specification), encoding="utf-8")
        return load_tokenizer(file)
