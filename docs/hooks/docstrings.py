"""Shows our docstrings as they are meant, and each name once."""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAGRAPH = re.compile(r"^(?: {4}(?=Others as))?(Returns|Raises|Source:|Others)(?=\s)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes what was read of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Give what is returned, raised and cited a paragraph each."""
        if obj.docstring:
            obj.docstring.value = PARAGRAPH.sub(r"\n**\1**", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Show what a package imports from its modules there only."""
        modules = [pkg]
        for module in modules:
            module.exports = None
            modules += [m for m in module.modules.values() if not m.is_alias]
