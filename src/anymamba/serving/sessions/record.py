"""One session as bytes: a safetensors file with the state, its tokens, and the name and the model in its metadata.

Beside the state after all tokens it may hold the one at the end of the last prompt, as `prompt.NAME` for each tensor
NAME of a state. The next text may go on from there only: the end of an answer may be half a character.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from anymamba.base.errors import CheckpointError
from anymamba.generation.requests import KeptState
from anymamba.generation.state_store import pack_state, state_of, tensors_of, unpack_state
from anymamba.models.language_model import LanguageModel
from anymamba.serving.sessions.identity import ModelIdentity
from anymamba.serving.sessions.store import OtherModelError, SessionInfo, StoreError

KIND = "anymamba-session"
VERSION = 2
"""The format version: the one that is written, and the newest one that can be read. Version 1 has no second state."""
TOKENS = "tokens"
PROMPT = "prompt."
"""What the names of the tensors of the state at the end of the prompt begin with."""
NOTES = ("name", "model", "weights", "n_tokens", "n_prompt_tokens", "created")
HEADER = 8
"""Bytes of the header's length at the beginning of a safetensors file."""
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format


def encode(name: str, kept: KeptState, model: LanguageModel, identity: ModelIdentity, created: float) -> bytes:
    """Raises ValueError if the states are not those of the model."""
    notes = {
        "name": name,
        "model": identity.name,
        "weights": identity.digest,
        "n_tokens": str(len(kept.tokens)),
        "created": repr(created),
    }
    extra = {TOKENS: torch.tensor(kept.tokens, dtype=torch.int32)}
    if kept.earlier is not None:
        before = tensors_of(kept.earlier.generation_state(), model)
        extra |= {PROMPT + part: tensor for part, tensor in before.items()}
        notes["n_prompt_tokens"] = str(len(kept.earlier.tokens))
    return save(*pack_state(kept.generation_state(), model, kind=KIND, version=VERSION, extra=extra, notes=notes))


def decode(data: bytes, name: str, model: LanguageModel, identity: ModelIdentity) -> KeptState:
    """The state in `data`, on the model's device.

    Raises OtherModelError if another model made it, StoreError if it is damaged.
    """
    where = f"the session {name!r}"
    metadata = metadata_of(data, where)
    maker = ModelIdentity(metadata.get("model", ""), metadata.get("weights", ""))
    if maker.digest != identity.digest:
        raise OtherModelError(
            f"{where} was made by the model {maker}, and this server runs {identity}; delete the session or choose "
            "another name"
        )
    try:
        tensors = load(data)
        before = {part.removeprefix(PROMPT): t for part, t in tensors.items() if part.startswith(PROMPT)}
        extra = [TOKENS, *(PROMPT + part for part in before)]
        state = unpack_state(tensors, metadata, model, where, version=VERSION, extra=extra, notes=NOTES)
        tokens, earlier = tuple(tensors[TOKENS].tolist()), None
        if before:
            at_prompt = state_of(before, model, where)
            earlier = KeptState(tokens[: int(metadata["n_prompt_tokens"])], at_prompt.model, at_prompt.logits)
        return KeptState(tokens, state.model, state.logits, earlier=earlier)
    except (SafetensorError, CheckpointError, KeyError, ValueError) as error:
        raise StoreError(f"{where} cannot be read ({error}); delete it") from error


def info_of(header: bytes, n_bytes: int, used: float) -> SessionInfo:
    """What a list says of a session, from the beginning of its bytes. Raises StoreError if it is damaged."""
    metadata = metadata_of(header, "a session")
    try:
        return SessionInfo(
            name=metadata["name"],
            model=metadata["model"],
            n_tokens=int(metadata["n_tokens"]),
            n_bytes=n_bytes,
            created=float(metadata["created"]),
            used=used,
        )
    except (KeyError, ValueError) as error:
        raise StoreError(f"a session is damaged: {error}; delete it") from error


def header_length(start: bytes) -> int:
    """How many bytes the header takes, with its length, from the first `HEADER` bytes."""
    return HEADER + min(int.from_bytes(start[:HEADER], "little"), LONGEST_HEADER)


def metadata_of(data: bytes, where: str) -> dict[str, str]:
    """The metadata in a header. Raises StoreError if it is not that of a session."""
    try:
        header: Any = json.loads(data[HEADER : header_length(data)])
        metadata = header["__metadata__"]
        if metadata["kind"] == KIND:
            return metadata
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{where} is damaged: its header cannot be read ({error}); delete it") from error
    raise StoreError(f"{where} is not a session but {metadata['kind']!r}; delete it")
