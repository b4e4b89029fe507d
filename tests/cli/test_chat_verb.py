"""`anymamba chat`: the state is carried from turn to turn, and turns can be edited, taken back, branched and saved."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest
import torch

from anymamba import LanguageModel, SamplingConfig, generate, load_tokenizer
from anymamba.base import manifest
from anymamba.base.errors import CheckpointError
from anymamba.cli.chat import COMMANDS, conversation, store, templates
from anymamba.cli.chat.conversation import Conversation
from anymamba.cli.chat.templates import TEMPLATES, fitting_template
from anymamba.models.config import ModelConfig

GREEDY = {"max_new_tokens": 6, "sampling": SamplingConfig(temperature=0)}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A model far from its initialisation, so that its likeliest bytes depend on the past."""
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=257)).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(8)
    return model


@pytest.fixture
def folder(model, tmp_path):
    """The model as a folder."""
    model.save_pretrained(tmp_path / "model", load_tokenizer())
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch) -> list[list[int]]:
    """The ids that the model reads and generates, by turn."""
    turns: list[list[int]] = []
    real = conversation.stream_text

    def recording(model, tokenizer, text, **options):
        stream = real(model, tokenizer, text, **options)
        turns.extend(([*tokenizer.encode(text)], stream.ids))
        return stream

    monkeypatch.setattr(conversation, "stream_text", recording)
    return turns


class Terminal(io.TextIOWrapper):
    """A stdin that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(run, folder, monkeypatch):
    """Sends lines to `anymamba chat` and returns its exit code, stdout and stderr."""

    def call(*lines: str, flags: tuple = (), stdin: type = io.TextIOWrapper) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", stdin(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
        return run("chat", "--model", folder, "--max-new-tokens", 6, *flags)

    return call


def make(model, template="dialog", system="") -> Conversation:
    return Conversation(model, load_tokenizer(), template, system)


def say(talk: Conversation, *messages: str, **options) -> list[str]:
    return ["".join(talk.reply(message, **(GREEDY | options))) for message in messages]


# ------------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_the_state_is_that_of_the_whole_text(model, read, template):
    talk = make(model, template, "About text.")
    replies = say(talk, "one", "two", "three")
    whole = [token for turn in read[:-1] for token in turn]
    expected = generate(model, [whole], load_tokenizer(), **GREEDY)
    assert expected.ids[0] == read[-1] and expected.texts == replies[-1:]
    assert sum(map(len, read[2::2])) < len(whole), "nothing is read twice"


def test_what_is_taken_back_leaves_no_trace(model):
    first, second = make(model), make(model)
    say(first, "one", "two", "three")
    first.undo(2)
    say(second, "one")
    assert say(first, "four", "five") == say(second, "four", "five")
    with pytest.raises(ValueError, match="cannot take back 4 of 3 turns"):
        first.undo(4)


def test_branches_part_where_they_are_made(model):
    talk, straight = make(model), make(model)
    say(talk, "one")
    talk.make_branch("other")
    other = say(talk, "two")
    talk.switch("main")
    assert [turn.message for turn in talk.turns()] == ["one"]
    main = say(talk, "three")
    assert say(straight, "one", "three")[1:] == main
    straight.undo()
    assert say(straight, "two") == other
    with pytest.raises(ValueError, match="there is a branch 'other'"):
        talk.make_branch("other")
    with pytest.raises(ValueError, match="no branch 'none'; there are main, other"):
        talk.switch("none")


def test_a_reply_that_is_stopped_goes_on_from_there(model, read):
    talk = make(model)
    pieces = talk.reply("one", max_new_tokens=100, sampling=SamplingConfig(temperature=0))
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.last is not None and talk.last.reply == said
    say(talk, "two")
    whole = [token for turn in read[:-1] for token in turn]
    assert generate(model, [whole], load_tokenizer(), **GREEDY).ids[0] == read[-1]


def test_an_error_leaves_the_conversation_as_it_was(model):
    talk = make(model)
    say(talk, "one")
    before = talk.last
    with pytest.raises(ValueError, match="max_new_tokens"):
        say(talk, "two", max_new_tokens=-1)
    assert talk.last is before


def test_the_stop_string_is_read_once(model, read, monkeypatch):
    stop = next(c for c in say(make(model), "one", max_new_tokens=30)[0] if c.isascii())  # the model will say it
    read.clear()
    monkeypatch.setitem(templates.TEMPLATES, "dialog", TEMPLATES["dialog"]._replace(stop=stop))
    talk = make(model)
    say(talk, "one", max_new_tokens=30)
    assert talk.last is not None and talk.last.stopped and stop not in talk.last.reply
    say(talk, "two", max_new_tokens=0)
    assert chr(read[1][-1]) == stop and bytes(read[2]) == b" two\nAssistant:"
    assert not talk.last.stopped
    say(talk, "three", max_new_tokens=0)
    assert bytes(read[4]).decode() == f"{stop} three\nAssistant:", "the last reply did not end with it"


def test_templates():
    parts = {"is_first": True, "stopped": False}
    assert TEMPLATES["plain"].text("a", **parts) == "a"
    assert TEMPLATES["dialog"].text("a {system}", system="s", **parts) == "s\n\nUser: a {system}\nAssistant:"
    later = {"is_first": False, "stopped": False, "system": "s"}
    assert TEMPLATES["dialog"].text("b", **later) == "\nUser: b\nAssistant:"
    first = TEMPLATES["chatml"].text("a", system="s", **parts)
    assert first == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert TEMPLATES["chatml"].text("b", is_first=False, stopped=True).startswith("\n<|im_start|>user\nb<|im_end|>")


def test_chatml_needs_its_tokens(tmp_path):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    assert fitting_template(load_tokenizer(tmp_path)) == "chatml"
    assert fitting_template(load_tokenizer()) == "dialog"


# ------------------------------------------------------------------------------------------------- saving


def test_a_saved_conversation_goes_on_as_if_it_had_not_been_left(model, tmp_path):
    drawn = {"sampling": SamplingConfig(), "seed": 3}
    talk = make(model, system="About text.")
    say(talk, "one", "two\udcff", **drawn)
    talk.make_branch("other")
    say(talk, "three", **drawn)
    talk.make_branch("empty")
    talk.undo(3)
    talk.switch("other")
    store.save_conversation(tmp_path / "talk", talk)
    again = store.load_conversation(tmp_path / "talk", model, load_tokenizer())
    assert list(again.branches) == ["main", "other", "empty"] and again.branches["empty"] is None
    for turn, loaded in zip(talk.turns(), again.turns(), strict=True):
        assert (turn.message, turn.reply, turn.stopped) == (loaded.message, loaded.reply, loaded.stopped)
    for branch, n_turns in (("other", 3), ("main", 2), ("empty", 0)):
        talk.switch(branch)
        again.switch(branch)
        assert len(again.turns()) == n_turns
        assert say(talk, "four", **drawn) == say(again, "four", **drawn)
    shared = again.branches["main"], again.branches["other"]
    assert shared[0].earlier is shared[1].earlier.earlier, "branches share their turns"


def test_a_folder_with_something_else_is_not_replaced(model, tmp_path):
    talk = make(model)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is not a conversation"):
        store.save_conversation(tmp_path / "mine", talk)
    for _ in range(2):
        say(talk, "one")
        store.save_conversation(tmp_path / "new" / "talk", talk)
        assert len(list((tmp_path / "new" / "talk").glob("*.safetensors"))) == len(talk.turns())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["talk"]


def test_damaged_and_foreign_conversations(model, tmp_path):
    talk, path = make(model), tmp_path / "talk" / store.FILE
    say(talk, "one", "two")
    store.save_conversation(path.parent, talk)
    whole = json.loads(path.read_text())
    path.write_text(path.read_text().replace("one", "ono"))
    with pytest.raises(CheckpointError, match="is damaged or was replaced"):
        store.load_conversation(path.parent, model, load_tokenizer())
    (path.parent / manifest.NAME).unlink()

    def load(changes: dict, tokenizer=None, of=model):
        path.write_text(json.dumps(whole | changes))
        store.load_conversation(path.parent, of, tokenizer or load_tokenizer())

    for changes, message in (
        ({"format_version": 7}, "has format version 7, and this anymamba reads versions up to 1"),
        ({"turns": []}, "cannot be read: a turn must be one of the 0 before it, got 1"),
        ({"turns": [whole["turns"][1] | {"earlier": 0}]}, "a turn must be one of the 0 before it, got 0"),
        ({"branch": "none"}, "branch must be one of the branches, got 'none'"),
        ({"template": "none"}, "template must be one of plain, dialog, chatml, got 'none'"),
        ({"more": 1}, "unknown key 'more'"),
        ({"tokenizer": "x"}, "is a conversation with another tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(changes)
    with pytest.raises(CheckpointError, match="is a state of another model"):
        load({}, of=LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=257)))
    with pytest.raises(FileNotFoundError, match="no conversation in"):
        store.load_conversation(tmp_path, model, load_tokenizer())


# ------------------------------------------------------------------------------------------------- the verb


def test_messages_from_a_pipe(chat, model, capsys):
    code, out, err = chat("one", "", "two\\", "lines", "//three", flags=("--temperature", 0))
    assert (code, err) == (0, "")
    assert out.encode("utf-8", "replace") == "".join(
        text + "\n" for text in say(make(model), "one", "two\nlines", "/three")
    ).encode("utf-8", "replace")


def test_plain_text_is_continued(chat, model):
    code, out, _ = chat("one", "", flags=("--temperature", 0, "--template", "plain"))
    assert code == 0 and out == "".join(text + "\n" for text in say(make(model, "plain"), "one", ""))


def test_commands(chat, tmp_path, model):
    first = (
        "one",
        "two",
        f"/save {tmp_path / 'talk'}",
        "/undo",
        "/branch other",
        "three",
        "/edit four",
        "/retry",
        "/save",
    )
    code, _, err = chat(*first)
    assert (code, err) == (0, f"saved in {tmp_path / 'talk'}\n" * 2)
    code, out, err = chat(
        "/history", "/switch main", "/history", "/branch", "/quit", "five", flags=("--load", tmp_path / "talk")
    )
    assert (code, err) == (0, "2 turns in the branch other\n")
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("> ")] == ["> one", "> four", "> one"]
    assert lines[-2:] == ["* main: 1 turn", "  other: 2 turns"]
    saved = store.load_conversation(tmp_path / "talk", model, load_tokenizer())
    assert saved.n_replies == 5


def test_a_retry_draws_another_reply(chat):
    _, out, _ = chat("one", "/retry", "/retry")
    assert len(set(out.split("\n")[:3])) == 3


def test_help_lists_every_command(chat):
    code, out, _ = chat("/help")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [f"/{name}" for name in COMMANDS]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/undu", "unknown command /undu; did you mean /undo?"),
        ("/xyzzy", "unknown command /xyzzy; /help lists the commands"),
        ("/undo", "cannot take back 1 of 0 turns"),
        ("/undo x", "/undo takes a number of turns, got 'x'"),
        ("/retry", "there is no message to reply to"),
        ("/retry x", "/retry takes nothing, got x"),
        ("/edit", "/edit takes TEXT, got nothing"),
        ("/switch none", "there is no branch 'none'; there are main"),
        ("/branch main", "there is a branch 'main'"),
        ("/save", "/save takes a folder"),
        ("/load none", "no conversation in none"),
    ],
)
def test_mistakes_in_commands_end_a_pipe(chat, line, message):
    code, out, err = chat(line, "not read")
    assert (code, out) == (2, "") and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_terminal_goes_on_after_a_mistake(chat, monkeypatch):
    lines = iter(["/xyzzy", "one", KeyboardInterrupt, "/undo", KeyboardInterrupt, KeyboardInterrupt])

    def answer(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", answer)
    code, out, err = chat(stdin=Terminal)
    assert code == 130, "two Ctrl-C in a row"
    assert err.count("error: ") == 1 and err.splitlines()[0].startswith("the template is dialog")
    assert out.count("\n") >= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", -1), "temperature"),
        (("--load", "x", "--template", "plain"), "--load goes on with the conversation's own template"),
        (("--load", "none"), "no conversation in none"),
    ],
)
def test_wrong_flags(chat, flags, message):
    code, out, err = chat("one", flags=flags)
    assert (code, out) == (2, "") and message in err


def test_ctrl_c_ends_a_reply_and_not_the_conversation(folder, interruptible):
    command = [sys.executable, "-m", "anymamba", "chat", "--model", str(folder), "--threads", "1"]
    with interruptible():
        process = subprocess.Popen(
            [*command, "--max-new-tokens", "1000000000", "--temperature", "0"],  # a draw may soon end the reply
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(b"one\n")
        process.stdin.flush()
        process.stdout.read(3)  # a reply has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/branch\n", timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"\n* main: 1 turn\n")
