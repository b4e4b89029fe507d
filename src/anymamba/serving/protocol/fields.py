"""The fields of a request: kinds of values, each of which checks a value and describes itself as a JSON schema."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from anymamba.serving.protocol.errors import ApiError, wrong_value


class Kind(Protocol):
    """A kind of value."""

    def read(self, value: Any, name: str) -> Any:
        """The value checked. Raises ApiError that names the field."""
        ...

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        ...


@dataclass(frozen=True)
class Integer:
    """A whole number; 3.0 is one, too, as in JSON Schema."""

    lowest: int
    highest: int

    def read(self, value: Any, name: str) -> int:
        """The number as an int."""
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not self.lowest <= value <= self.highest:
            raise wrong_value(name, f"an integer from {self.lowest} to {self.highest}", value)
        return int(value)

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return {"type": "integer", "minimum": self.lowest, "maximum": self.highest}


@dataclass(frozen=True)
class Number:
    """A finite number."""

    lowest: float
    highest: float
    open_below: bool = False
    """Whether the lowest value is excluded."""

    def read(self, value: Any, name: str) -> float:
        """The number as a float."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self._holds(value):
            above = "above" if self.open_below else "from"
            raise wrong_value(name, f"a number {above} {self.lowest:g} to {self.highest:g}", value)
        return float(value)

    def _holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and self.lowest <= value <= self.highest
            and not (self.open_below and value == self.lowest)
        )

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        lower = "exclusiveMinimum" if self.open_below else "minimum"
        return {"type": "number", lower: self.lowest, "maximum": self.highest}


@dataclass(frozen=True)
class Boolean:
    """True or false."""

    def read(self, value: Any, name: str) -> bool:
        """The value."""
        if not isinstance(value, bool):
            raise wrong_value(name, "true or false", value)
        return value

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    """A string."""

    shortest: int = 0
    longest: int | None = None

    def read(self, value: Any, name: str) -> str:
        """The string."""
        if not isinstance(value, str):
            raise wrong_value(name, "a string", value)
        if len(value) < self.shortest or (self.longest is not None and len(value) > self.longest):
            most = "" if self.longest is None else f" and at most {self.longest}"
            raise wrong_value(name, f"a string of at least {self.shortest}{most} characters", value)
        return value

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        longest = {} if self.longest is None else {"maxLength": self.longest}
        return {"type": "string", "minLength": self.shortest, **longest}


@dataclass(frozen=True)
class OneOf:
    """One of a few strings."""

    choices: tuple[str, ...]

    def read(self, value: Any, name: str) -> str:
        """The string."""
        if not isinstance(value, str) or value not in self.choices:
            raise wrong_value(name, " or ".join(map(repr, self.choices)), value)
        return value

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return {"type": "string", "enum": list(self.choices)}


@dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    kind: Kind
    longest: int
    shortest: int = 0

    def read(self, value: Any, name: str) -> list[Any]:
        """The values."""
        if not isinstance(value, list):
            raise wrong_value(name, "a list", value)
        if not self.shortest <= len(value) <= self.longest:
            raise ApiError(
                400,
                f"{name} must have {self.shortest} to {self.longest} entries, got {len(value)}",
                param=name,
                code="invalid_value",
            )
        return [self.kind.read(entry, f"{name}[{place}]") for place, entry in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return {
            "type": "array",
            "items": self.kind.schema(),
            "minItems": self.shortest,
            "maxItems": self.longest,
        }


@dataclass(frozen=True)
class Object:
    """A JSON object with any content."""

    def read(self, value: Any, name: str) -> dict[str, Any]:
        """The object."""
        if not isinstance(value, dict):
            raise wrong_value(name, "an object", value)
        return value

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return {"type": "object"}


@dataclass(frozen=True)
class Any_:
    """Any JSON value; the code that uses it checks it."""

    description: dict[str, Any]

    def read(self, value: Any, name: str) -> Any:
        """The value."""
        return value

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return self.description


@dataclass(frozen=True)
class Refused:
    """A known field that is not served: only values that ask for nothing are taken."""

    reason: str
    harmless: Sequence[Any] = ()

    def read(self, value: Any, name: str) -> None:
        """Nothing. Raises ApiError if the value asks for something."""
        if not any(type(value) is type(known) and value == known for known in self.harmless):
            raise ApiError(
                400, f"{name} is not served: {self.reason}; leave it out", param=name, code="unsupported_parameter"
            )

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return {"enum": list(self.harmless)} if self.harmless else {"type": "null"}


@dataclass(frozen=True)
class Field:
    """A field of a request."""

    kind: Kind
    default: Any = None
    text: str = ""
    """What it does, for the API's description."""
    required: bool = False


def read_fields(table: Mapping[str, Field], body: Any, inside: str = "") -> dict[str, Any]:
    """The values of all fields of a table; null counts as not given, and unknown fields are ignored.

    Args:
        table: the fields by name.
        body: the JSON object.
        inside: the name of the object that holds the fields, with a dot; "" for the whole body.
    Raises ApiError that names the first wrong field.
    """
    if not isinstance(body, dict):
        error = wrong_value(inside.rstrip(".") or "the body", "a JSON object", body)
        raise ApiError(400, error.message, param=inside.rstrip(".") or None, code=error.code)
    values = {}
    for name, field in table.items():
        value = body.get(name)
        if value is None:
            if field.required:
                raise ApiError(400, f"{inside}{name} is missing", param=inside + name, code="missing_required_field")
            values[name] = field.default
        else:
            values[name] = field.kind.read(value, inside + name)
    return values


def table_schema(table: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON schema of an object with the fields of a table."""
    properties = {}
    for name, field in table.items():
        schema = field.kind.schema()
        if not field.required and not isinstance(field.kind, Any_):
            schema = schema if isinstance(field.kind, Refused) and not field.kind.harmless else _or_null(schema)
        properties[name] = {**schema, "description": field.text} if field.text else schema
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name, field in table.items() if field.required],
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}
