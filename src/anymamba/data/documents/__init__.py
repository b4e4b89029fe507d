"""A user's files as documents: text files whole, rows of .jsonl, .csv and .parquet one by one, also compressed."""

from __future__ import annotations

from .files import COMPRESSION_SUFFIXES, ROW_SUFFIXES, TEXT_SUFFIXES, find_files
from .readers import DEFAULT_TEXT_FIELD, Document, document_name, iter_documents

__all__ = [
    "COMPRESSION_SUFFIXES",
    "DEFAULT_TEXT_FIELD",
    "ROW_SUFFIXES",
    "TEXT_SUFFIXES",
    "Document",
    "document_name",
    "find_files",
    "iter_documents",
]
