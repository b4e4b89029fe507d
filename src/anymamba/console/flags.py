"""Reads flags into frozen dataclasses, in the same way for every verb."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from anymamba.console.mistakes import in_one_line
from anymamba.console.synonyms import with_synonym

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, StructTypeInfo

OptionsT = TypeVar("OptionsT")
HELP = {"-h", "--help"}


def read_flags(
    options: type[OptionsT],
    verb: str,
    arguments: Sequence[str],
    default: OptionsT | None = None,
    registry: ConstructorRegistry | None = None,
) -> OptionsT:
    """Fill a dataclass from flags.

    Args:
        options: the dataclass; its docstring is the verb's help, its fields' docstrings are the flags' help.
        verb: for the usage line.
        arguments: the command line after the verb.
        default: values of the flags that are not given; defaults to the fields' own defaults.
        registry: rules for flags whose name is not that of their field.
    Raises ValueError, in one line, for flags that are unknown (naming the nearest), missing or of a wrong value.
    """
    import tyro

    command, told = f"anymamba {verb}", io.StringIO()
    columns = {} if HELP & set(arguments) else {"COLUMNS": "10000"}  # a mistake is not to be broken into lines
    try:
        with redirect_stderr(told), variables(columns):
            read: OptionsT = tyro.cli(
                options,
                prog=command,
                args=arguments,
                default=default if default is not None else tyro.MISSING_NONPROP,
                registry=registry,
            )
    except SystemExit as end:
        if end.code:
            raise ValueError(with_synonym(verb, arguments) or in_one_line(told.getvalue(), command)) from None
        raise
    sys.stderr.write(told.getvalue())  # a warning of tyro's, if there is one
    return read


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment while the body runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def renamed_flags(names: Mapping[type, Mapping[str, str]], repeatable: Collection[str]) -> ConstructorRegistry:
    """Rules that give fields of nested dataclasses a short flag instead of their dotted path.

    Args:
        names: for each dataclass the flags of some of its fields.
        repeatable: those among the fields, tuples of strings, that take several values at a time and may be repeated.
    """
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec

    registry = ConstructorRegistry()
    being_asked: list[type] = []  # types whose own spec the rule is looking up; it must not call itself

    def renamed(spec: StructFieldSpec, flag: str) -> StructFieldSpec:
        kind: Any = spec.type
        if spec.name in repeatable:
            kind = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
            spec = dataclasses.replace(spec, default=(spec.default,) if spec.default else ())
        kind = Annotated[kind, tyro.conf.arg(name=flag, prefix_name=False)]
        return dataclasses.replace(spec, type=kind)

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type not in names or info.type in being_asked:
            return None
        being_asked.append(info.type)
        spec = ConstructorRegistry.get_struct_spec(info)
        being_asked.pop()
        assert isinstance(spec, StructConstructorSpec), f"{info.type} is a dataclass"
        flags, build = names[info.type], spec.instantiate

        def instantiate(**values: Any) -> Any:
            for name in flags.keys() & repeatable:
                values[name] = tuple(value for group in values[name] for value in group)
            return build(**values)

        fields = tuple(renamed(field, flags[field.name]) if field.name in flags else field for field in spec.fields)
        return dataclasses.replace(spec, instantiate=instantiate, fields=fields)

    return registry
