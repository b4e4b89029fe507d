"""A request of /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anymamba.serving.protocol.errors import ApiError, wrong_value
from anymamba.serving.protocol.fields import Field, ListOf, Object, OneOf, Text, read_fields
from anymamba.serving.protocol.formats import Form, read_form
from anymamba.serving.protocol.options import Options, read_options
from anymamba.serving.protocol.tables import CHAT
from anymamba.serving.protocol.tools import Tools, read_tools

ROLES = ("system", "developer", "user", "assistant", "tool")

_MESSAGE = {
    "role": Field(OneOf(ROLES), required=True),
    "name": Field(Text()),
    "tool_calls": Field(ListOf(Object(), 128)),
    "tool_call_id": Field(Text()),
    "refusal": Field(Text()),
}
_CALL = {"id": Field(Text()), "function": Field(Object(), required=True)}
_CALLED = {"name": Field(Text(1), required=True), "arguments": Field(Text(), required=True)}


@dataclass(frozen=True)
class ChatCall:
    """A conversation to go on with."""

    options: Options
    messages: tuple[dict[str, Any], ...]
    """As the chat template gets them: contents are text, and a developer's message is one of the system."""
    tools: Tools | None
    max_tokens: int | None
    n_top: int | None
    """Report log-probabilities and so many of the likeliest tokens; None: do not."""
    form: Form | None
    add_generation_prompt: bool
    continue_final_message: bool
    """Whether the answer goes on with the last message in place of a new one."""
    template_values: Mapping[str, Any]


def read_chat(body: Any) -> ChatCall:
    """Check a body. Raises ApiError that names the wrong field."""
    values = read_fields(CHAT, body)
    options, tools, form = read_options(values), read_tools(values), read_form(values)
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
    forced = None if tools is None else tools.form()
    if forced is not None and form is not None:
        raise ApiError(400, f"{form.param} does not go with a required tool; leave one out", param=form.param)
    messages = read_messages(values["messages"])
    if values["continue_final_message"]:
        _require_unfinished(messages[-1], values["add_generation_prompt"])
    newer, older = values["max_completion_tokens"], values["max_tokens"]
    return ChatCall(
        options=options,
        messages=messages,
        tools=tools,
        max_tokens=older if newer is None else newer,
        n_top=(values["top_logprobs"] or 0) if values["logprobs"] else None,
        form=form if forced is None else forced,
        add_generation_prompt=values["add_generation_prompt"],
        continue_final_message=values["continue_final_message"],
        template_values=values["chat_template_kwargs"] or {},
    )


def _require_unfinished(last: Mapping[str, Any], add_generation_prompt: bool) -> None:
    """Raise ApiError unless the last message is the beginning of an answer."""
    name = "continue_final_message"
    if add_generation_prompt:
        raise ApiError(400, f"{name} needs add_generation_prompt false: no new answer begins", param=name)
    if last["role"] != "assistant" or "tool_calls" in last or not last["content"].strip():
        raise ApiError(400, f"{name} needs a last message of the assistant with a text", param=name)


def read_messages(messages: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The messages as a chat template takes them."""
    return tuple(_message(message, f"messages[{place}]") for place, message in enumerate(messages))


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    fields = read_fields(_MESSAGE, message, where + ".")
    calls = [_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(fields["tool_calls"] or [])]
    content = message.get("content")
    if content is None and not (fields["role"] == "assistant" and (calls or fields["refusal"] is not None)):
        raise ApiError(400, f"{where}.content is missing", param=f"{where}.content", code="missing_required_field")
    read = {
        "role": "system" if fields["role"] == "developer" else fields["role"],
        "content": (fields["refusal"] or "") if content is None else content_text(content, f"{where}.content"),
    }
    if calls:
        read["tool_calls"] = calls
    return read | {name: fields[name] for name in ("name", "tool_call_id") if fields[name] is not None}


def content_text(content: Any, where: str) -> str:
    """The text of a message, which may be given as a string or in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_value(where, "a string or a list of parts", content)
    return "".join(_part_text(part, f"{where}[{place}]") for place, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    kind = read_fields({"type": Field(Text(), required=True)}, part, where + ".")["type"]
    if kind not in ("text", "refusal"):
        raise ApiError(
            400,
            f"{where}.type must be text, got {kind[:40]!r}; the model reads nothing else",
            param=f"{where}.type",
            code="unsupported_value",
        )
    text: str = read_fields({kind: Field(Text(), required=True)}, part, where + ".")[kind]
    return text


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call of an earlier answer; its arguments are an object for the template if they are JSON."""
    fields = read_fields(_CALL, call, where + ".")
    function = read_fields(_CALLED, fields["function"], where + ".function.")
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        function["arguments"] = arguments
    return {"id": fields["id"], "type": "function", "function": function}
