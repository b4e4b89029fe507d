"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

LONGEST_VALUE = 80
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that a client gets as a status and a JSON object.

    Args:
        status: the HTTP status.
        message: what is wrong and the way out.
        param: the field that is wrong, as `messages[0].role`.
        code: a short name of the error for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers that belong to it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def wrong_value(name: str, wanted: str, value: Any) -> ApiError:
    """A field has a value that cannot be used: a 400 that names the field."""
    return ApiError(400, f"{name} must be {wanted}, got {shown(value)}", param=name, code="invalid_value")


def shown(value: Any) -> str:
    """A value in a message, cut if it is long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"
