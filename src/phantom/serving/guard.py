"""Who may send requests, and how long they may be: checked before anything else looks at them."""

from __future__ import annotations

import hmac
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/healthz", "/readyz", "/metrics", "/openapi.json")  # nothing of anybody's is in them
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class TooLong(Exception):
    """The body is longer than the `max_bytes` that are accepted of its kind, `what`."""

    def __init__(self, max_bytes: int, what: str = "body") -> None:
        super().__init__(max_bytes, what)
        self.max_bytes, self.what = max_bytes, what


class Guard:
    """Asks for the token where there is one; without one, only for what this machine's own pages and programs send.

    Pages of other sites cannot read the answers, but could send forms to a service on this machine, or reach it under a
    name of their own.
    """

    def __init__(self, app: ASGIApp, token: str | None, max_bytes: int) -> None:
        self.app, self.token, self.max_bytes = app, token, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refused := self._refusal(scope["path"], headers):
            await refused(scope, receive, send)
            return
        left = self.max_bytes

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise TooLong(self.max_bytes)
            return message

        await self.app(scope, counted, send)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if self.token is None:
            host = headers.get("host", "")
            if _hostname(host) not in LOOPBACK:
                return error(403, "host", f"Host: found {host[:80]!r}; accepted without a token: {', '.join(LOOPBACK)}")
            origin = headers.get("origin")
            if origin and origin.partition("://")[2] != host:
                return error(403, "origin", "Origin: another site's page; accepted without a token: this one's")
        elif path not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                challenge = {"WWW-Authenticate": "Bearer"}
                return error(401, "invalid_api_key", "Authorization: accepted: Bearer and the token", headers=challenge)
        try:
            length = int(headers.get("content-length", 0))
        except ValueError:
            return error(400, "bad_request", "Content-Length: accepted: a number")
        return too_long(TooLong(self.max_bytes)) if length > self.max_bytes else None


def _hostname(host: str) -> str | None:
    """The name in a Host header, without the port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def error(
    status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    said, name = (text and text.encode(errors="replace").decode() for text in (message, param))  # no lone surrogates
    body: dict[str, Any] = {"message": said, "type": kind, "param": name, "code": code}
    return JSONResponse({"error": body}, status, headers)


def too_long(found: TooLong) -> JSONResponse:
    """The answer to a body that is too long."""
    message = f"{found.what}: accepted: at most {found.max_bytes / 2**20:g} MiB"
    return error(413, "too_long", message, "input_reference")
