"""Models by name: a local path, else a repository on the Hugging Face hub. Its cache and offline mode are respected."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

HUB_NAME = re.compile(r"(?P<scheme>hf:/)?(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf))?")
"""owner/name, or a GGUF file in it; a path of this form may start with hf://, which pathlib makes hf:/."""
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".json")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # in this order; the second only if the first matches nothing


def local_path(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The path of a local model, or of one from the hub, which is downloaded into its cache.

    Args:
        name: a folder, a .gguf file, a hub repository `owner/name`, or a file in one, `owner/name/file.gguf`. A name
            that starts with `hf://` is always one on the hub.
        revision: of the hub's repository; defaults to its main branch.
        weights: whether to download a repository's weights, too; False downloads only its configuration and tokenizer.
    Raises FileNotFoundError if there is no such model, or if it is not in the cache while offline.
    """
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for names on the hub, but {path} is local; leave it out")
        return path
    found = hub_name(name)
    if found is None:
        raise FileNotFoundError(_not_here(path))
    try:
        return _download(found["repository"], found["file"], revision, WEIGHTS if weights else ())
    except (OSError, ValueError) as error:  # the hub raises OSError, and ValueError for invalid names
        where = "on the hub" if found["scheme"] else f"{path} here, and none on the hub"
        why = _why_not(error, found["repository"], found["file"], revision)
        raise FileNotFoundError(f"no model {where}: {why}") from error


def hub_name(name: str | Path) -> re.Match[str] | None:
    """The parts of a name on the hub, or None for a local path.

    `runs/x` is a path if there is a folder `runs`, and `x/y.gguf` is a file's.
    """
    found = HUB_NAME.fullmatch(Path(name).as_posix())
    if found is None or found["scheme"]:
        return found
    owner = found["repository"].split("/")[0]
    is_file = found["file"] is None and found["repository"].endswith(FILE_SUFFIXES)
    return None if owner.startswith(".") or is_file or Path(owner).exists() else found


def _not_here(path: Path) -> str:
    """What is wrong with a local path that does not exist, and the way out."""
    if path.suffix in FILE_SUFFIXES:
        return f"no file {path}; give a .gguf file, or a folder that holds config.json and model.safetensors"
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    wanted = f"did you mean {path.parent / near[0]}?" if near else "give one with config.json and model.safetensors"
    on_hub = f" (a model of the hub: hf://{path.as_posix()})" if HUB_NAME.fullmatch(path.as_posix()) else ""
    return f"no model folder {path}; {wanted}{on_hub}"


def _why_not(error: Exception, repository: str, file: str | None, revision: str | None) -> str:
    """Why the download failed, and the way out. An unusual error keeps the hub's whole message."""
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{repository}"
    match error:
        case errors.GatedRepoError():
            return f"{repository} asks for consent; accept its terms on {page} and log in with `hf auth login`"
        case errors.RepositoryNotFoundError():
            return f"it has no model {repository}, or a private one; check the name, or log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"{repository} has no revision {revision!r}; {page}/tree/main has a list"
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"{repository} is not in the cache, and HF_HUB_OFFLINE=1 turns downloads off; unset it"
        case errors.LocalEntryNotFoundError():
            cause = " ".join(str(error.__cause__ or error).split())
            return f"{repository} is not in the cache, and the hub cannot be reached ({cause}); check the connection"
        case errors.EntryNotFoundError():
            return f"{repository} has no file {file}; {page}/tree/main has a list"
    return " ".join(str(error).split())


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
