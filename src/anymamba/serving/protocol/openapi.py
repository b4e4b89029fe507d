"""The API's description in OpenAPI 3.1, made from the tables of fields."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from anymamba.base import __version__
from anymamba.serving.protocol.fields import Field, table_schema
from anymamba.serving.protocol.tables import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string", "enum": ["text_completion", "chat.completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "system_fingerprint": {"type": "string"},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "finish_reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "finish_reason": {"type": "string", "enum": ["stop", "length", "tool_calls"]},
                },
            },
        },
        "usage": _USAGE,
    },
}
_MODEL = {"type": "object", "required": ["id", "object"], "properties": {"id": {"type": "string"}}}
_LIST = {"type": "object", "required": ["object", "data"], "properties": {"data": {"type": "array"}}}
_TOKENS = {
    "type": "object",
    "required": ["count", "tokens"],
    "properties": {"count": {"type": "integer"}, "tokens": {"type": "array", "items": {"type": "integer"}}},
}
_TEXT = {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}}
_ANY = {"type": "object"}

_FAULTS = {
    "400": "A field is wrong; `param` names it.",
    "401": "The API key is missing or wrong.",
    "403": "The request comes from another site, or a quota is used up.",
    "404": "There is no such model, session or endpoint.",
    "405": "The endpoint takes another method.",
    "408": "The body came too slowly.",
    "409": "The session is one of another model.",
    "413": "The body is too large.",
    "415": "The body is not declared as application/json.",
    "429": "Too many answers are on their way; Retry-After says when to try again.",
    "503": "The model is being loaded, or the server is stopping.",
    "507": "The session could not be stored.",
}


@cache
def description() -> dict[str, Any]:
    """The OpenAPI document."""
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "anymamba", "version": __version__, "description": "OpenAI's protocol over Mamba models."},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/completions": {"post": _operation("Go on with texts.", _ANSWER, COMPLETION, more=stream)},
            "/v1/chat/completions": {"post": _operation("Go on with a conversation.", _ANSWER, CHAT, more=stream)},
            "/v1/models": {"get": _operation("The models.", _LIST)},
            "/v1/models/{name}": {"get": _operation("One model.", _MODEL), "parameters": [name]},
            "/v1/sessions": {"get": _operation("Your sessions.", _LIST)},
            "/v1/sessions/{name}": {
                "get": _operation("The text of a session.", _ANY),
                "delete": _operation("Delete a session.", _ANY),
                "parameters": [name],
            },
            "/tokenize": {"post": _operation("The ids of a text or a conversation.", _TOKENS, TOKENIZE)},
            "/detokenize": {"post": _operation("The text of ids.", _TEXT, DETOKENIZE)},
            "/tokenizer_info": {"get": _operation("Special tokens and the chat template.", _ANY)},
            "/health": {"get": _operation("200 if the server can answer, 503 while it loads.", _ANY, health=True)},
            "/metrics": {"get": _operation("Figures for Prometheus.", {"type": "string"}, media="text/plain")},
        },
    }


def _operation(
    summary: str,
    answer: dict[str, Any],
    body: Mapping[str, Field] | None = None,
    *,
    more: Mapping[str, Any] | None = None,
    media: str = "application/json",
    health: bool = False,
) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    faults = {status: {"description": text, "content": error} for status, text in _FAULTS.items()}
    if health:
        faults["503"] = {"description": "The model is being loaded.", "content": {media: {"schema": answer}}}
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": {media: {"schema": answer}, **(more or {})}},
            **faults,
        },
    }
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": table_schema(body)}}}
    return found
