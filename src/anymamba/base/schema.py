"""Convert frozen dataclasses to nested JSON or TOML tables and back. Unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

ConfigT = TypeVar("ConfigT")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to nested dictionaries that JSON can hold (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return value

    return plain(config)


def config_from_dict(cls: type[ConfigT], values: dict[str, Any], where: str = "") -> ConfigT:
    """Build a (nested) dataclass from a dictionary.

    Args:
        cls: the dataclass.
        values: its fields; a missing field takes its default.
        where: the path of the enclosing keys, for error messages.
    Raises ValueError for an unknown key (the message names the nearest one), TypeError for a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{where or cls.__name__} must be a table of keys and values, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ValueError(unknown_key(key, names, where or cls.__name__))
    converted = {key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()}
    return cls(**converted)


def unknown_key(key: str, known: list[str], where: str) -> str:
    """The error message for an unknown key; it suggests the nearest known key."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(known))}"
    return f"unknown key {key!r} in {where}{hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against a type hint and turn lists into tuples and tables into dataclasses."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else config_from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} must be a list, got {value!r}")
        return _convert_tuple(args, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    raise TypeError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _convert_tuple(args: tuple[Any, ...], value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ValueError(f"{where} must have {len(args)} entries, got {len(value)}: {value!r}")
    return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    errors: list[Exception] = []
    for arg in args:
        if arg is not type(None):
            try:
                return _convert(arg, value, where)
            except (TypeError, ValueError) as error:
                errors.append(error)
    raise errors[0]
