"""Limits on what clients may send."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one client may ask for, and how long it may take to ask."""

    max_body: int = 4_000_000
    """Bytes of a request's body."""
    max_prompt: int = 131_072
    """Tokens of a prompt."""
    max_new_tokens: int = 16_384
    """Tokens of an answer."""
    chat_tokens: int = 1024
    """Tokens of a chat's answer if the request does not say."""
    max_queued: int = 256
    """Answers that may wait for a row; more requests get 429."""
    header_seconds: float = 10.0
    """Seconds for a request's headers."""
    body_seconds: float = 30.0
    """Seconds for a request's body."""
    send_seconds: float = 60.0
    """Seconds that a client may leave its answer unread."""
    compile_seconds: float = 1.0
    """Seconds for a schema or a regular expression."""
