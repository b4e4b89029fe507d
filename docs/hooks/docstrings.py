"""Formats our docstrings for the site, and shows each name only once."""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAGRAPH = re.compile(r"^(?: {4}(?=Others as))?(Returns|Raises|Source:|Others)(?=\s)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """An extension of griffe that changes the objects that were read from the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Make separate paragraphs of what is returned, raised and cited."""
        if obj.docstring:
            obj.docstring.value = PARAGRAPH.sub(r"\n**\1**", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Show names that a package imports from its modules only in these modules."""
        modules = [pkg]
        for module in modules:
            module.exports = None
            modules += [m for m in module.modules.values() if not m.is_alias]
