"""The form that an answer is held to: `response_format`, and vLLM's names for the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from anymamba.serving.protocol.errors import ApiError, wrong_value
from anymamba.serving.protocol.fields import Any_, Field, ListOf, Object, Text, read_fields

_STRUCTURED = {
    "json": Field(Any_({})),
    "regex": Field(Text(1)),
    "choice": Field(ListOf(Text(1), 1000, 1)),
}
_NAMED_SCHEMA = {"name": Field(Text()), "schema": Field(Object(), required=True)}
_FORMATS = ("text", "json_object", "json_schema", "regex")


@dataclass(frozen=True)
class Form:
    """What an answer must look like."""

    kind: Literal["json", "call", "regex", "choice"]
    """A call is JSON without white space."""
    value: Any
    """The schema, the pattern or the choices."""
    param: str
    """The field of the request that says so."""


def read_form(values: Mapping[str, Any]) -> Form | None:
    """The form that the fields ask for. Raises ApiError if there are two, or a field is wrong."""
    found = [*_response_format(values["response_format"]), *_structured(values["structured_outputs"])]
    for name in ("json", "regex", "choice"):
        if values[f"guided_{name}"] is not None:
            found.append(Form(name, values[f"guided_{name}"], f"guided_{name}"))
    if len(found) > 1:
        names = " and ".join(form.param for form in found)
        raise ApiError(400, f"{names} both give a form of the answer; leave one out", param=found[1].param)
    return _checked(found[0]) if found else None


def _response_format(value: dict[str, Any] | None) -> list[Form]:
    kind = "text" if value is None else value.get("type")
    if kind not in _FORMATS:
        raise wrong_value("response_format.type", ", ".join(_FORMATS[:-1]) + " or " + _FORMATS[-1], kind)
    if value is None or kind == "text":
        return []
    if kind == "json_object":
        return [Form("json", {"type": "object"}, "response_format")]
    if kind == "regex":
        pattern = read_fields({"regex": Field(Text(1), required=True)}, value, "response_format.")["regex"]
        return [Form("regex", pattern, "response_format.regex")]
    inner = read_fields({"json_schema": Field(Object(), required=True)}, value, "response_format.")["json_schema"]
    schema = read_fields(_NAMED_SCHEMA, inner, "response_format.json_schema.")["schema"]
    return [Form("json", schema, "response_format.json_schema.schema")]


def _structured(value: dict[str, Any] | None) -> list[Form]:
    fields = read_fields(_STRUCTURED, value or {}, "structured_outputs.")
    unknown = sorted(set(value or {}) - set(_STRUCTURED))
    if unknown:
        name = f"structured_outputs.{unknown[0]}"[:100]
        raise ApiError(400, f"{name} is not served; json, regex and choice are", param=name)
    return [
        Form(name, fields[name], f"structured_outputs.{name}")  # type: ignore[arg-type]
        for name in _STRUCTURED
        if fields[name] is not None
    ]


def _checked(form: Form) -> Form:
    """The form. Raises ApiError for a schema that is not an object, true or false."""
    if form.kind != "json" or isinstance(form.value, dict | bool):
        return form
    raise wrong_value(form.param, "a JSON schema: an object, true or false", form.value)
