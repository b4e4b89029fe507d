"""Conversations in folders: `conversation.json` with all branches, and the state after each turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anymamba.base import manifest
from anymamba.base.errors import FORMAT_VERSION, CheckpointError, require_format_version
from anymamba.base.files import atomic_folder, own_file, require_utf8, write_json
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.cli.chat.conversation import Conversation, Turn, turns_to
from anymamba.cli.chat.templates import TEMPLATES
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.state_store import load_state, save_state
from anymamba.models.checkpoints.formats.files import read_json
from anymamba.models.language_model import LanguageModel

FILE = "conversation.json"
VERSION = 1
"""The format version: the one that is written, and the newest one that can be read."""


@dataclass(frozen=True)
class SavedTurn:
    """A turn; the file `turn-N.safetensors` has its state."""

    earlier: int | None
    """The number of the turn before it."""
    message: str
    reply: str
    stopped: bool


@dataclass(frozen=True)
class SavedBranch:
    """A branch and the number of its last turn."""

    name: str
    last: int | None


@dataclass(frozen=True)
class SavedConversation:
    """The contents of `conversation.json`."""

    template: str
    system: str
    tokenizer: str
    """The tokenizer's fingerprint."""
    branch: str
    branches: tuple[SavedBranch, ...]
    turns: tuple[SavedTurn, ...]
    """Each one after the turn before it."""
    n_replies: int

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {self.template!r}")
        if self.branch not in [branch.name for branch in self.branches]:
            raise ValueError(f"branch must be one of the branches, got {self.branch!r}")
        limits = [*((turn.earlier, n) for n, turn in enumerate(self.turns))]
        for number, limit in [*limits, *((branch.last, len(self.turns)) for branch in self.branches)]:
            if number is not None and not 0 <= number < limit:
                raise ValueError(f"a turn must be one of the {limit} before it, got {number}")


def save_conversation(folder: Path, conversation: Conversation) -> None:
    """Write a conversation atomically; an older one in the folder is replaced.

    Raises FileExistsError if the folder holds anything else.
    """
    require_utf8(folder)
    if folder.exists() and not (folder / FILE).is_file():
        raise FileExistsError(f"{folder} exists and is not a conversation; choose another folder")
    turns = list(dict.fromkeys(turn for last in conversation.branches.values() for turn in turns_to(last)))
    number: dict[Turn | None, int | None] = {turn: n for n, turn in enumerate(turns)} | {None: None}
    saved = SavedConversation(
        template=conversation.template,
        system=conversation.system,
        tokenizer=conversation.tokenizer.fingerprint,
        branch=conversation.branch,
        branches=tuple(SavedBranch(name, number[last]) for name, last in conversation.branches.items()),
        turns=tuple(SavedTurn(number[turn.earlier], turn.message, turn.reply, turn.stopped) for turn in turns),
        n_replies=conversation.n_replies,
    )
    with own_file(folder), atomic_folder(folder, replace=True) as temporary:
        temporary.mkdir()
        for n, turn in enumerate(turns):
            save_state(temporary / _state_file(n), turn.state, conversation.model)
        write_json(temporary / FILE, {FORMAT_VERSION: VERSION, **config_to_dict(saved)})
        manifest.write(temporary)


def load_conversation(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> Conversation:
    """Read a conversation with this model.

    Raises FileNotFoundError if there is none, CheckpointError if it is damaged, of a newer format version, or of
        another model or tokenizer.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no conversation in {folder}; give a folder that /save has written")
    manifest.check(folder, f"if it was changed on purpose, delete {folder / manifest.NAME}")
    values = read_json(path)
    require_format_version(values, VERSION, path)
    values.pop(FORMAT_VERSION, None)
    try:
        saved = config_from_dict(SavedConversation, values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if saved.tokenizer != tokenizer.fingerprint:
        raise CheckpointError(f"{folder} is a conversation with another tokenizer; give the one that it was held with")
    conversation = Conversation(model, tokenizer, saved.template, saved.system)
    turns: list[Turn] = []
    for n, turn in enumerate(saved.turns):
        earlier = None if turn.earlier is None else turns[turn.earlier]
        state = load_state(folder / _state_file(n), model)
        turns.append(Turn(earlier, turn.message, turn.reply, state, turn.stopped))
    conversation.branches = {
        branch.name: None if branch.last is None else turns[branch.last] for branch in saved.branches
    }
    conversation.branch, conversation.n_replies = saved.branch, saved.n_replies
    return conversation


def _state_file(n: int) -> str:
    return f"turn-{n}.safetensors"
