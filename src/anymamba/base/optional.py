"""Import a module of an optional package, or say in words why that does not work."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any


def imported(name: str, package: str, requirements: str) -> Any:
    """A module, or in words why it cannot be imported and what to do.

    Args:
        name: of a module inside a package, with dots.
        package: what pip calls the package.
        requirements: what `pip install` takes to install it.
    """
    top = name.partition(".")[0]
    other = _file_instead_of(top)
    if other is not None:  # importing it would run it, and it may be the script that runs already
        return f"{other} is found in place of the package {package}, because it is also called {top!r}; rename it"
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module may raise anything while it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            return f"the package {package} is not installed; pip install {requirements}"
        return (
            f"the package {package} cannot be imported ({first_line(error)}); install what it lacks, or reinstall it: "
            f"pip install --force-reinstall {requirements}"
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _file_instead_of(package: str) -> str | None:
    """The file that is found by the name of a package and is none, such as a script beside the one that runs."""
    found = sys.modules.get(package)
    if found is not None:
        return None if hasattr(found, "__path__") else getattr(found, "__file__", None)
    spec = find_spec(package)
    return spec.origin if spec and spec.has_location and spec.submodule_search_locations is None else None
