"""Documents as tokens in one memory-mapped table: built once from files, cached, read in spans."""

from __future__ import annotations

from .build import build_token_table
from .store import TokenStore
from .tokens import DocumentNames, TokenTable

__all__ = ["DocumentNames", "TokenStore", "TokenTable", "build_token_table"]
