"""A conversation with a model: a tree of turns, each with the state after it, so that no message is read twice."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from anymamba.cli.chat.templates import TEMPLATES
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.generate import stream_text
from anymamba.generation.prompts import GenerationState
from anymamba.generation.sampling import SamplingConfig
from anymamba.generation.speculation import Speculation
from anymamba.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Turn:
    """A message and its reply."""

    earlier: Turn | None
    """The turn before it; None for the first one."""
    message: str
    reply: str
    state: GenerationState = field(repr=False)
    """The state of the model after the reply, one row. With recurrent layers its size is constant."""
    stopped: bool
    """Whether the reply ended with the template's stop string, which is then part of the state."""


class Conversation:
    """Turns in one or more branches. Branches share the turns before the point where they part.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        template: a name in `TEMPLATES`.
        system: the text before the first message; "" for none.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, template: str, system: str = "") -> None:
        self.model, self.tokenizer, self.template, self.system = model, tokenizer, template, system
        self.branches: dict[str, Turn | None] = {"main": None}
        """The last turn of each branch; None if it has no turn."""
        self.branch = "main"
        """The branch that goes on."""
        self.n_replies = 0
        """Replies generated so far, also those that were taken back; each draws other random numbers."""

    @property
    def last(self) -> Turn | None:
        """The last turn of the current branch."""
        return self.branches[self.branch]

    def turns(self) -> list[Turn]:
        """The turns of the current branch, the first one first."""
        return turns_to(self.last)

    def reply(
        self,
        message: str,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        stop: Sequence[str] = (),
        seed: int = 0,
        speculation: Speculation | None = None,
    ) -> Generator[str, None, None]:
        """Add a turn; iterating gives pieces of the reply. Closing the iterator ends the reply there.

        The turn is added at the end. After an error the conversation is as before.

        Raises ValueError for a message that the tokenizer cannot read.
        """
        earlier, template = self.last, TEMPLATES[self.template]
        text = template.text(
            message, system=self.system, is_first=earlier is None, stopped=earlier is not None and earlier.stopped
        )
        if speculation is not None:
            speculation = replace(speculation, earlier=self._earlier_ids())
        stream = stream_text(
            self.model,
            self.tokenizer,
            text,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=[*([template.stop] if template.stop else []), *stop],
            seed=[(seed, self.n_replies)],
            state=None if earlier is None else earlier.state,
            speculation=speculation,
        )
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        except GeneratorExit:
            pass
        stopped = template.stop != "" and template.stop in self.tokenizer.decode(stream.ids)
        self.branches[self.branch] = Turn(earlier, message, "".join(said), stream.state, stopped)
        self.n_replies += 1

    def _earlier_ids(self) -> list[int]:
        """The turns of the branch as ids. A reply may have been generated as others."""
        return [int(i) for turn in self.turns() for i in self.tokenizer.encode(turn.message + turn.reply)]

    def undo(self, n_turns: int = 1) -> None:
        """Take back the last turns of the current branch. Raises ValueError if it has fewer."""
        turns = self.turns()
        if not 1 <= n_turns <= len(turns):
            raise ValueError(f"cannot take back {n_turns} of {count(len(turns))}")
        self.branches[self.branch] = turns[-n_turns].earlier

    def make_branch(self, name: str) -> None:
        """Make a branch that begins as the current one, and go to it. Raises ValueError if the name is taken."""
        if name in self.branches:
            raise ValueError(f"there is a branch {name!r}; choose another name, or go to it with /switch {name}")
        self.branches[name] = self.last
        self.branch = name

    def switch(self, name: str) -> None:
        """Go to a branch. Raises ValueError if there is none of that name."""
        if name not in self.branches:
            raise ValueError(f"there is no branch {name!r}; there are {', '.join(self.branches)}")
        self.branch = name


def count(n_turns: int) -> str:
    """A number of turns in words."""
    return f"{n_turns} turn{'' if n_turns == 1 else 's'}"


def turns_to(turn: Turn | None) -> list[Turn]:
    """A turn and all turns before it, the first one first."""
    turns = []
    while turn is not None:
        turns.append(turn)
        turn = turn.earlier
    return turns[::-1]
