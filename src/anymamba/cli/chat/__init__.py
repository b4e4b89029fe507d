"""`anymamba chat`: a conversation with a model in the terminal, with the state carried from turn to turn."""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from anymamba.base.errors import one_line
from anymamba.cli.app import FAILURES, MISUSED
from anymamba.cli.chat.terminal import CtrlC, handled_ctrl_c, read_messages
from anymamba.console.flags import read_flags
from anymamba.console.output import printable, say
from anymamba.console.runtime import Runtime, load_model, open_model
from anymamba.console.sampling import SamplingFlags, checked_sampling
from anymamba.console.speculation import SpeculationFlags, check_speculation, open_speculation

if TYPE_CHECKING:
    from anymamba.cli.chat.conversation import Conversation
    from anymamba.data.tokenizer import Tokenizer
    from anymamba.generation.sampling import SamplingConfig
    from anymamba.generation.speculation import Speculation
    from anymamba.models.language_model import LanguageModel

COMMANDS = {
    "edit": ("TEXT", "replace your last message"),
    "retry": ("", "another reply to your last message"),
    "undo": ("[N]", "take back the last N turns, 1 if left out"),
    "branch": ("[NAME]", "make a branch here and go to it; without a name, list the branches"),
    "switch": ("NAME", "go to a branch"),
    "history": ("", "print the turns of the branch"),
    "save": ("[FOLDER]", "write all branches; the folder is that of the last /save or /load if left out"),
    "load": ("FOLDER", "go on with a saved conversation"),
    "help": ("", "print this list"),
    "quit": ("", "leave; so does Ctrl-D"),
}
"""The commands, what they take, and what they do."""


@dataclass(frozen=True)
class ChatOptions:
    """Hold a conversation with a model. Only what is new is read: the state is carried from turn to turn.

    Type a message, or a command: /help lists the commands. A line that ends with a backslash goes on in the next line.
    Ctrl-C ends a reply. Messages may also come from a pipe; the first error then ends the command.
    """

    model: Path
    """Folder of a model (a run folder is one), a .gguf file, or a name on the Hugging Face hub."""
    template: Literal["auto", "plain", "dialog", "chatml"] = "auto"
    """plain: messages as they are; dialog: after "User:"; chatml: after <|im_start|>; auto: what fits the tokenizer."""
    system: str = ""
    """Text before the first message, such as what the conversation is about."""
    load: Path | None = None
    """Folder of a conversation that /save has written, to go on with."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = field(default_factory=SamplingFlags)
    guesses: tyro.conf.OmitArgPrefixes[SpeculationFlags] = field(default_factory=SpeculationFlags)
    tokenizer: Path | None = None
    """A tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to the model's own."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = field(default_factory=Runtime)


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba chat`."""
    options = read_flags(ChatOptions, "chat", arguments)
    if options.load is not None and (options.template != "auto" or options.system):
        raise ValueError("--load goes on with the conversation's own template; leave out --template and --system")
    sampling = checked_sampling(options.sampling)
    check_speculation(options.guesses)
    checkpoint, tokenizer = open_model(options.model, options.tokenizer, options.runtime)
    model = load_model(checkpoint, options.runtime)
    speculation = open_speculation(options.guesses, options.runtime, model, tokenizer)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is not an error
    with handled_ctrl_c() as ctrl_c:
        Chat(model, tokenizer, options, sampling, speculation, ctrl_c).run()


class Chat:
    """Reads messages and commands, and prints replies."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        options: ChatOptions,
        sampling: SamplingConfig,
        speculation: Speculation | None,
        ctrl_c: CtrlC,
    ) -> None:
        from anymamba.cli.chat.conversation import Conversation
        from anymamba.cli.chat.templates import fitting_template

        self.options, self.sampling, self.speculation, self.ctrl_c = options, sampling, speculation, ctrl_c
        template = fitting_template(tokenizer) if options.template == "auto" else options.template
        self.conversation: Conversation = Conversation(model, tokenizer, template, options.system)
        self.folder: Path | None = None
        if options.load is not None:
            self.load(str(options.load))

    def run(self) -> None:
        """Go on until stdin ends or /quit."""
        interactive = sys.stdin.isatty()
        if interactive:
            say(f"the template is {self.conversation.template}; /help lists the commands")
        for line in read_messages():
            if line.strip() == "/quit":
                return
            try:
                self.obey(line)
            except (*MISUSED, *FAILURES) as error:
                if not interactive or isinstance(error, BrokenPipeError):
                    raise
                say(f"error: {one_line(error)}")

    def obey(self, line: str) -> None:
        """Reply to a message, or carry out a command. A message that begins with a slash is written with two."""
        if line.startswith("//") or not line.startswith("/"):
            if line or self.conversation.template == "plain":
                self.say(line.removeprefix("/"))
            return
        word, _, rest = line[1:].partition(" ")
        if word not in COMMANDS:
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
            raise ValueError(f"unknown command /{word}; {hint}")
        takes = COMMANDS[word][0]
        if bool(rest.strip()) > bool(takes) or (takes and not takes.startswith("[") and not rest.strip()):
            raise ValueError(f"/{word} takes {takes or 'nothing'}, got {rest.strip() or 'nothing'}")
        getattr(self, word)(*([rest.strip()] if takes else []))

    def say(self, message: str) -> None:
        """Print the reply to a message while it is generated."""
        flags = self.options.sampling
        pieces = self.conversation.reply(
            message,
            max_new_tokens=flags.max_new_tokens,
            sampling=self.sampling,
            stop=flags.stop,
            seed=flags.seed,
            speculation=self.speculation,
        )
        with self.ctrl_c.ends_reply(), closing(pieces):
            for piece in pieces:
                print(piece, end="", flush=True)
                if self.ctrl_c.pressed:
                    break
        print(flush=True)

    def edit(self, message: str) -> None:
        """`/edit`."""
        conversation = self.conversation
        last = conversation.last
        conversation.undo()
        try:
            self.say(message)
        except BaseException:
            conversation.branches[conversation.branch] = last
            raise

    def retry(self) -> None:
        """`/retry`."""
        last = self.conversation.last
        if last is None:
            raise ValueError("there is no message to reply to")
        self.edit(last.message)

    def undo(self, number: str) -> None:
        """`/undo`."""
        if number and not number.isdecimal():
            raise ValueError(f"/undo takes a number of turns, got {number!r}")
        self.conversation.undo(int(number or 1))

    def branch(self, name: str) -> None:
        """`/branch`."""
        if name:
            self.conversation.make_branch(name)
            return
        from anymamba.cli.chat.conversation import count, turns_to

        for name, last in self.conversation.branches.items():
            mark = "*" if name == self.conversation.branch else " "
            print(printable(f"{mark} {name}: {count(len(turns_to(last)))}", sys.stdout))

    def switch(self, name: str) -> None:
        """`/switch`."""
        self.conversation.switch(name)

    def history(self) -> None:
        """`/history`."""
        for turn in self.conversation.turns():
            print(printable(f"> {turn.message}\n{turn.reply}", sys.stdout))

    def save(self, folder: str) -> None:
        """`/save`."""
        from anymamba.cli.chat.store import save_conversation

        if not folder and self.folder is None:
            raise ValueError("/save takes a folder, such as /save talks/first")
        self.folder = Path(folder).expanduser() if folder else self.folder
        assert self.folder is not None
        save_conversation(self.folder, self.conversation)
        say(f"saved in {self.folder}")

    def load(self, folder: str) -> None:
        """`/load`."""
        from anymamba.cli.chat.conversation import count
        from anymamba.cli.chat.store import load_conversation

        path, old = Path(folder).expanduser(), self.conversation
        self.conversation = load_conversation(path, old.model, old.tokenizer)
        self.folder = path
        say(f"{count(len(self.conversation.turns()))} in the branch {self.conversation.branch}")

    def help(self) -> None:
        """`/help`."""
        for name, (takes, does) in COMMANDS.items():
            print(f"{f'/{name} {takes}':<17} {does}")
