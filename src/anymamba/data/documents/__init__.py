"""Reads a user's files as documents: each text file, and each row of .jsonl, .csv and .parquet; also compressed."""

from __future__ import annotations

from .files import COMPRESSION_SUFFIXES, ROW_SUFFIXES, TEXT_SUFFIXES, file_format, find_files
from .genomes import GENOME_SUFFIXES, format_by_content
from .readers import DEFAULT_TEXT_FIELD, Document, OnBadRow, document_name, iter_documents, refuse
from .streams import open_decompressed, require_whole_bgzip

__all__ = [
    "COMPRESSION_SUFFIXES",
    "DEFAULT_TEXT_FIELD",
    "GENOME_SUFFIXES",
    "ROW_SUFFIXES",
    "TEXT_SUFFIXES",
    "Document",
    "OnBadRow",
    "document_name",
    "file_format",
    "find_files",
    "format_by_content",
    "iter_documents",
    "open_decompressed",
    "refuse",
    "require_whole_bgzip",
]
