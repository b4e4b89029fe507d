"""The page: plain HTML, CSS and ES modules that talk to the server's own endpoints. It loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "files"
"""The files to serve at the server's root; `index.html` is the page."""
