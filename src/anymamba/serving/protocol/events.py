"""Answers as bytes: whole as JSON, and in pieces as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

PIECE = 200
"""Entries of a list that are encoded at once."""
DONE = b"data: [DONE]\n\n"
"""The end of a stream."""
_MARK = "\0text\0"
encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def event(piece: dict[str, Any] | bytes) -> bytes:
    """A piece of a stream as an event; bytes are one already."""
    if isinstance(piece, bytes):
        return piece
    return f"data: {encode_json(piece)}\n\n".encode("utf-8", "replace")


class TextEvent:
    """An event that is encoded once and sent with one text after another.

    Args:
        piece: makes the piece of a stream with a text.
    """

    def __init__(self, piece: Callable[[str], dict[str, Any]]) -> None:
        self._before, self._after = event(piece(_MARK)).split(encode_json(_MARK).encode())

    def __call__(self, text: str) -> bytes:
        """The event with a text."""
        return self._before + encode_json(text).encode("utf-8", "replace") + self._after


def encode_in_pieces(value: Any) -> str:
    """JSON of a value, a few entries of its lists at a time: other threads wait while one piece is encoded."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode_json(key)}:{encode_in_pieces(inner)}" for key, inner in value.items()) + "}"
    if not isinstance(value, list) or len(value) <= PIECE:
        return encode_json(value) if not _has_objects(value) else f"[{','.join(map(encode_in_pieces, value))}]"
    starts = range(0, len(value), PIECE)
    return "[" + ",".join(encode_json(value[start : start + PIECE])[1:-1] for start in starts) + "]"


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
