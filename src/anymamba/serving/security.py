"""Who may ask: API keys, and the check that no web page of another site reaches the server through a browser."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import urlsplit

from anymamba.serving.protocol.errors import ApiError

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load and do: files of this server and calls to it, no inline scripts or styles, no frames."""
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
"""Headers of all answers."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Guard:
    """Decides whether a request may be served.

    Args:
        keys: the API keys; without any, whoever reaches the server may ask.
        host: the address that the server listens on.
        allowed_hosts: more names of the server, for the header Host.
        allowed_origins: other sites whose pages may ask, such as `https://example.org`. They get CORS headers.
    Raises ValueError if there is no key and other machines can reach the address, or a key is empty.
    """

    def __init__(
        self,
        keys: Sequence[str] = (),
        host: str = "127.0.0.1",
        allowed_hosts: Collection[str] = (),
        allowed_origins: Collection[str] = (),
    ) -> None:
        if not all(keys):
            raise ValueError("an API key must not be empty")
        if not keys and not is_loopback(host):
            raise ValueError(
                f"other machines can reach {host}, so an API key is needed: give --api-key-file, or --host 127.0.0.1"
            )
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._hosts = frozenset(name.lower() for name in (*LOCAL_NAMES, host, *allowed_hosts))
        self._any_host = not is_loopback(host) and not allowed_hosts  # the key keeps others out there

    def require_own_site(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError if the request is for another host or comes from a page of another site."""
        host = headers.get("host", "")
        if not self._any_host and _hostname(host) not in self._hosts:
            raise ApiError(
                403, f"the server does not serve the host {host[:80]!r}; start it with --allowed-host", code="host"
            )
        origin = headers.get("origin")
        if origin is None:
            if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
                raise ApiError(403, "a page of another site may not ask this server", code="origin")
        elif urlsplit_host(origin) != host.lower() and not self.is_allowed_origin(origin):
            raise ApiError(
                403,
                f"pages of {origin[:80]!r} may not ask this server; start it with --allowed-origin",
                code="origin",
            )

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether pages of an origin get CORS headers."""
        return origin.lower().rstrip("/") in self._origins

    def owner(self, headers: Mapping[str, str]) -> str:
        """Who asks: a digest of the API key, "" if the server has no keys. Raises ApiError for a wrong key."""
        if not self._digests:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, for a constant time
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return digest.hex()[:32]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def urlsplit_host(origin: str) -> str:
    """Host and port of an origin; "" for one that has none, such as `null`."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    """A Host header without its port."""
    try:
        return (urlsplit("//" + host).hostname or "").lower()
    except ValueError:
        return ""
