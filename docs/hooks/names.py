"""Finds public names of the package that have no page on the site.

The public names are those in `anymamba.__all__`, and the classes and functions without an underscore that the modules
of LEVELS define. A page shows a name with `::: its.full.name`, or with `::: a.module` or `::: a.package`, which shows
everything in it. Nothing is imported from the package, so the site can be built without torch.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = "anymamba"
LEVELS = ("ops", "layers", "models", "data", "generation", "training", "evaluation")
BLOCK = re.compile(rf"^::: ({PACKAGE}(?:\.\w+)*)$", re.MULTILINE)
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def without_page(source: Path, docs: Path) -> list[str]:
    """The full names that no page shows, sorted.

    Args:
        source: the folder that holds the package.
        docs: the folder of the pages.
    """
    shown = {name for page in sorted(docs.rglob("*.md")) for name in BLOCK.findall(page.read_text(encoding="utf-8"))}
    homes = {home(name, source) for name in shown}
    modules = {name for name in homes if module_file(name, source)}
    wanted = {home(name, source) for name in listed(source)} | defined(source)
    return sorted(name for name in wanted - homes if not any(name.startswith(f"{module}.") for module in modules))


def listed(source: Path) -> set[str]:
    """The names in `anymamba.__all__`, except those with two underscores."""
    tree = ast.parse((source / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return {f"{PACKAGE}.{name}" for name in ast.literal_eval(values[0]) if not name.startswith("__")}


def defined(source: Path) -> set[str]:
    """The public classes and functions that the modules of LEVELS define."""
    files = [path for level in LEVELS for path in (source / PACKAGE / level).rglob("*.py")]
    return {f"{module_name(path, source)}.{node.name}" for path in files for node in public_definitions(path)}


def public_definitions(path: Path) -> list[Definition]:
    """The classes and functions of a file whose names do not start with an underscore; none if the file's name does."""
    if path.stem.startswith("_") and path.stem != "__init__":
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, Definition) and not node.name.startswith("_")]


def module_name(path: Path, source: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(name: str, source: Path) -> Path | None:
    """The file of a module or package, or None if the name is neither."""
    path = source.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def home(name: str, source: Path) -> str:
    """The full name of a class or function in the module that defines it, also if a package imports it."""
    module, _, last = name.rpartition(".")
    file = module_file(module, source) if module else None
    if file is None or module_file(name, source):
        return name
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == last for alias in node.names):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == last)
            return home(f"{node.module}.{original}", source)
    return name
