"""Positional arguments in the order of version 1 of `mamba_ssm`, where version 2 has another order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def accepting_version_1(
    names: tuple[str, ...], is_version_1: Callable[[tuple[Any, ...], dict[str, Any]], bool]
) -> Callable[[Function], Function]:
    """A decorator that makes a function also accept the positional arguments of version 1.

    Args:
        names: the arguments of version 1 in order, with `self` for a method.
        is_version_1: whether the arguments of a call are in the order of version 1.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not is_version_1(arguments, options):
                return function(*arguments, **options)
            if len(arguments) > len(names):
                raise TypeError(
                    f"{function.__qualname__} takes at most {len(names)} positional arguments in the order of "
                    f"version 1 ({', '.join(names)}), got {len(arguments)}; pass the others by name"
                )
            return function(**dict(zip(names, arguments, strict=False)), **options)

        return cast(Function, call)

    return decorate
