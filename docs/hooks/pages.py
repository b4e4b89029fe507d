"""Hooks of MkDocs that include files of the repository in pages, and stop a build that must not be published.

A page with `include: FILE` in its front matter ends with that file of the repository, without its title if the page has
other text. Links in the file are written for the repository, and are changed to the same target on the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from names import without_page

LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
ASSET = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^"'\s>]+""")


def on_pre_build(config: Any) -> None:
    """Stop the build if a public name has no page."""
    docs = Path(config.docs_dir)
    missing = without_page(docs.parent / "src", docs)
    if missing:
        raise PluginError(
            f"{len(missing)} public names have no page: {', '.join(missing)}; add `::: NAME`, or `::: MODULE` for a "
            "whole module, to a page in docs/reference, or start the name with an underscore"
        )


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Add the file that the page includes."""
    if "include" not in page.meta:
        return markdown
    text = (Path(config.docs_dir).parent / page.meta["include"]).read_text(encoding="utf-8")
    if markdown.strip():
        text = re.sub(r"\A# .*\n", "", text)
    return f"{markdown}\n\n{LINK.sub(lambda match: f']({site_path(match[1])}', text)}"


def site_path(target: str) -> str:
    """The place of a repository path on the site: pages without `docs/`, included files at their page."""
    return target.removeprefix("docs/") if target.startswith("docs/") else Path(target).name.lower()


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Stop the build if a page loads something from another host."""
    found = ASSET.search(output)
    if found:
        raise PluginError(f"{page.file.src_path} loads {found[0]}; put the file into docs/ and link it there")
    return output
