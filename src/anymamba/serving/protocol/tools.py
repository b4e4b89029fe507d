"""Tools: the functions that a chat may call, the form of a required call, and calls found in free text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anymamba.serving.protocol.errors import ApiError, wrong_value
from anymamba.serving.protocol.fields import Field, Object, OneOf, Text, read_fields
from anymamba.serving.protocol.formats import Form

CALL_BEGINS, CALL_ENDS = "<tool_call>", "</tool_call>"
"""What surrounds a call in free text, as models of the Hermes format write it."""

_TOOL = {"type": Field(OneOf(("function",)), required=True), "function": Field(Object(), required=True)}
_FUNCTION = {"name": Field(Text(1, 64), required=True), "description": Field(Text()), "parameters": Field(Object())}
_NAMED = {"type": Field(OneOf(("function",)), required=True), "function": Field(Object(), required=True)}

Choice = Literal["auto", "none", "required", "named"]


@dataclass(frozen=True)
class Tools:
    """The functions of a request and how they are to be used."""

    functions: tuple[dict[str, Any], ...]
    """Those that a call may name; one, if the choice is `named`."""
    choice: Choice
    described: tuple[dict[str, Any], ...]
    """The tools as the chat template gets them; none if the choice is `none`."""

    def form(self) -> Form | None:
        """What the answer must look like: a call that names its function if one is required, else the arguments."""
        if self.choice == "named":
            return Form("call", _parameters(self.functions[0]), "tools")
        if self.choice == "required":
            return Form("call", call_schema(self.functions), "tools")
        return None


def read_tools(values: Mapping[str, Any]) -> Tools | None:
    """The tools of a chat; None if it has none. Raises ApiError that names the wrong field."""
    tools = values["tools"] or []
    functions = []
    for place, tool in enumerate(tools):
        inner = read_fields(_TOOL, tool, f"tools[{place}].")["function"]
        functions.append(read_fields(_FUNCTION, inner, f"tools[{place}].function."))
    _require_different([function["name"] for function in functions])
    choice, name = read_choice(values["tool_choice"], "auto" if tools else "none")
    if choice in ("required", "named") and not tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools; give tools", param="tool_choice")
    if not tools:
        return None
    if choice == "named":
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
    return Tools(tuple(functions), choice, () if choice == "none" else tuple(tools))


def read_choice(value: Any, default: Choice) -> tuple[Choice, str]:
    """The choice and the name of the function, "" if it names none."""
    if value is None:
        return default, ""
    if value in ("auto", "none", "required"):
        return value, ""
    if not isinstance(value, dict):
        raise wrong_value("tool_choice", "auto, none, required or an object that names a function", value)
    inner = read_fields(_NAMED, value, "tool_choice.")["function"]
    name = read_fields({"name": Field(Text(1, 64), required=True)}, inner, "tool_choice.function.")["name"]
    return "named", name


def call_schema(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a call of one of the functions: `{"name": ..., "arguments": {...}}`."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/tool{place}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, function in enumerate(functions)
    ]
    definitions = {
        f"tool{place}": _moved(_parameters(function), f"#/$defs/tool{place}")
        for place, function in enumerate(functions)
    }
    return {"anyOf": calls, "$defs": definitions}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return function["parameters"] or {"type": "object", "properties": {}, "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references still hold when it is moved from the root to a place inside another one."""
    if isinstance(schema, list):
        return [_moved(entry, place) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def parse_call(text: str) -> tuple[str, str] | None:
    """The name and the arguments (as JSON) of a call, or None if the text is not one."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def find_calls(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first call in free text, and the calls. Text that is not a call stays text."""
    content, *rest = text.split(CALL_BEGINS)
    found = [parse_call(piece.split(CALL_ENDS)[0]) for piece in rest]
    calls = [call for call in found if call is not None]
    if len(calls) < len(found) or not calls:
        return text, []
    return content.rstrip(), calls


def describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """A text that tells a model its tools, for chat templates that have no place for them."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You may call functions. To call one, answer {CALL_BEGINS}"
        '{"name": <its name>, "arguments": <an object>}'
        f"{CALL_ENDS}. The functions, as JSON:\n{lines}"
    )


def _require_different(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ApiError(400, f"two tools have the name {name!r}; names must differ", param=f"tools[{place}]")
