"""Chat templates: how the messages of a conversation become the text that a model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from anymamba.models.checkpoints import Checkpoint
from anymamba.models.checkpoints.formats.gguf import GGUFFile
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.protocol.tools import describe

try:
    import jinja2
    import jinja2.ext
    import jinja2.meta
    import jinja2.nodes
    import jinja2.sandbox
except ImportError as error:
    raise ImportError(f'jinja2 is needed here ({error}); pip install "anymamba[serve]"') from error

LONGEST_TEXT = 1 << 24
"""Most characters of a rendered conversation."""

BUILT_IN = {
    "plain": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
        "{% for call in message.tool_calls or [] %}"
        "{{ '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
        "{{ '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
STOPS = {"plain": (), "chatml": ("<|im_end|>",)}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which published templates use to mark answers for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The body as it is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """A Jinja template, rendered in an immutable sandbox: it cannot reach files, attributes of Python or its inputs.

    Args:
        source: the template.
        stop: strings that end an answer beside those of a request.
        variables: values for all conversations, such as `bos_token`.
        origin: where it comes from, for messages.
    Raises ValueError for a template that cannot be parsed.
    """

    def __init__(
        self, source: str, *, stop: Sequence[str] = (), variables: Mapping[str, Any] | None = None, origin: str
    ) -> None:
        self.source, self.stop, self._variables = source, tuple(stop), dict(variables or {})
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        try:
            self._template = environment.from_string(source)
            self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {origin} cannot be parsed: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: with roles and contents.
            tools: told to the model; by the template if it has a place for them, else in a message of the system.
            add_generation_prompt: end with the header of an answer.
            values: more variables.
        Raises ApiError if the template refuses the messages.
        """
        if tools and not self.knows_tools:
            messages = [{"role": "system", "content": describe(tools)}, *messages]
        given = {
            **self._variables,
            **(values or {}),
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, length = [], 0
        try:
            for piece in self._template.generate(given):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST_TEXT:
                    raise ApiError(
                        400, "the chat template made too long a text; shorten the messages", param="messages"
                    )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ApiError(400, f"the chat template refuses these messages: {reason}", param="messages") from None
        except RecursionError:
            raise ApiError(400, "the chat template refuses these messages: too deep", param="messages") from None
        return "".join(pieces)


def unfinished(text: str, content: str) -> str:
    """The text of a conversation up to the end of the content of its last message.

    A template may have taken white space off the content. Raises ApiError if it has changed more.
    """
    for shown in (content, content.lstrip(), content.strip()):
        place = text.rfind(shown)
        if place >= 0:
            return text[: place + len(shown)]
    raise ApiError(
        400,
        "the chat template changes the last message, so that it cannot be continued; use /v1/completions",
        param="continue_final_message",
    )


def load_template(name: str | None, checkpoint: Checkpoint | None) -> ChatTemplate | None:
    """The template that a name gives, else the model's own; None if there is none.

    Args:
        name: plain, chatml, or a file with a template or a tokenizer_config.json; None: the model's own.
        checkpoint: the model, whose folder or file may hold one.
    Raises FileNotFoundError or ValueError if the template cannot be read.
    """
    config = {} if checkpoint is None else _tokenizer_config(_folder(checkpoint) / "tokenizer_config.json")
    variables = {key: text for key, value in config.items() if key.endswith("_token") and (text := _token(value))}
    if name in BUILT_IN:
        return ChatTemplate(BUILT_IN[name], stop=STOPS[name], variables=variables, origin=name)
    if name is not None:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no chat template at {path}; give a file, or plain or chatml")
        if path.suffix == ".json":
            source = _chosen(_tokenizer_config(path).get("chat_template"))
        else:
            source = path.read_text(encoding="utf-8")
        if source is None:
            raise ValueError(f"{path} holds no chat_template; give another file, or plain or chatml")
        return ChatTemplate(source, stop=_ends(variables), variables=variables, origin=name)
    source = None if checkpoint is None else _own_source(checkpoint, config)
    if source is None:
        return None
    return ChatTemplate(source, stop=_ends(variables), variables=variables, origin="the model")


def _own_source(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    if isinstance(checkpoint.file, GGUFFile):
        inside = checkpoint.file.field("tokenizer.chat_template")
        if isinstance(inside, str):
            return inside
    file = _folder(checkpoint) / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return _chosen(config.get("chat_template"))


def _folder(checkpoint: Checkpoint) -> Path:
    place = checkpoint.home or checkpoint.path
    return place if place.is_dir() else place.parent


def _tokenizer_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _chosen(templates: Any) -> str | None:
    """The template of a `tokenizer_config.json`: one, or the default of several with names."""
    if isinstance(templates, list):
        named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
        return named.get("default")
    return templates if isinstance(templates, str) else None


def _token(value: Any) -> str | None:
    """The text of a special token, which may be an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _ends(variables: Mapping[str, str]) -> tuple[str, ...]:
    return (variables["eos_token"],) if "eos_token" in variables else ()


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
