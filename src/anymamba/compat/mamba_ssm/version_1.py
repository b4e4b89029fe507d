"""Positional arguments in the order that version 1 of `mamba_ssm` had, where version 2 has another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def accepting_version_1(
    names: tuple[str, ...], is_version_1: Callable[[tuple[Any, ...], dict[str, Any]], bool]
) -> Callable[[Function], Function]:
    """Have a function take the positional arguments of version 1, too.

    Args:
        names: version 1's, in order; `self` among them for a method.
        is_version_1: tells from the arguments of a call.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not is_version_1(arguments, options):
                return function(*arguments, **options)
            if len(arguments) > len(names):
                raise TypeError(
                    f"{function.__qualname__} takes at most {len(names)} positional arguments in the order of "
                    f"version 1 ({', '.join(names)}), got {len(arguments)}; name the others"
                )
            return function(**dict(zip(names, arguments, strict=False)), **options)

        return cast(Function, call)

    return decorate
