"""Models by name: a local path, else a repository on the Hugging Face hub. Its cache and offline mode are respected."""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf))?")
SMALL_FILES = ["*.json", "tokenizer.model"]
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # in this order; the second only if the first matches nothing


def local_path(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The path of a local model, or of one from the hub, which is downloaded into its cache.

    Args:
        name: a folder, a .gguf file, a hub repository `owner/name`, or a file in one, `owner/name/file.gguf`.
        revision: of the hub's repository; defaults to its main branch.
        weights: whether to download a repository's weights, too; False downloads only its configuration and tokenizer.
    Raises FileNotFoundError if there is no such model, or if it is not in the cache while offline.
    """
    path = Path(name)
    found = HUB_NAME.fullmatch(path.as_posix())
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for names on the hub, but {path} is local; leave it out")
        return path
    if found is None or str(name).startswith("."):
        raise FileNotFoundError(f"no model folder {path}; give a folder that holds config.json and model.safetensors")
    try:
        return _download(found["repository"], found["file"], revision, WEIGHTS if weights else ())
    except (OSError, ValueError) as error:  # the hub raises OSError, and ValueError for invalid names
        why = " ".join(str(error).split()).split(". ")[0][:200]
        raise FileNotFoundError(f"no model folder {path} here, and none from the hub: {why}") from error


def _download(repository: str, file: str | None, revision: str | None, weights: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    if file is not None:
        return Path(hf_hub_download(repository, file, revision=revision))
    if not weights:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=SMALL_FILES))
    for pattern in weights:
        allowed = [*SMALL_FILES, pattern]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=allowed))
        if any(folder.glob(pattern)):
            return folder
    raise FileNotFoundError(
        f"{repository} has neither {' nor '.join(WEIGHTS)}; for a GGUF file give {repository}/NAME.gguf"
    )
