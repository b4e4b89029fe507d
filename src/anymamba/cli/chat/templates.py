"""Templates: how the messages of a conversation become the text that a model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer


class Template(NamedTuple):
    """The text around messages. It is put together from the end of the last reply, so that the state can be carried."""

    system: str
    """The text before the first message, with {system}."""
    first: str
    """What comes before the first message."""
    later: str
    """What comes before any other message, after `stop`."""
    message: str
    """A message and what the reply begins after, with {message}."""
    stop: str
    """What ends a reply; "" if only the number of tokens does."""

    def text(self, message: str, *, system: str = "", is_first: bool, stopped: bool) -> str:
        """What the model reads for a message.

        Args:
            message: the message.
            system: what to say before the first message.
            is_first: whether it is the first message.
            stopped: whether `stop` has been read at the end of the last reply.
        """
        if is_first:
            before = (self.system.replace("{system}", system) if system else "") + self.first
        else:
            before = ("" if stopped else self.stop) + self.later
        return before + self.message.replace("{message}", message)


TEMPLATES = {
    "plain": Template("{system}", "", "", "{message}", ""),
    "dialog": Template("{system}\n\n", "User:", "", " {message}\nAssistant:", "\nUser:"),
    "chatml": Template(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        first="<|im_start|>user\n",
        later="\n<|im_start|>user\n",
        message="{message}<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
    ),
}


def fitting_template(tokenizer: Tokenizer) -> str:
    """The name of the template for a tokenizer: chatml if it has the tokens for that, otherwise dialog."""
    return "chatml" if len(tokenizer.encode("<|im_start|>")) == 1 else "dialog"
