"""What every request passes: whose it is, where it was sent to, how long it is."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .protocol import Error

OPEN = ("/", "/health")
"""Paths that need no key."""
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def error_response(error: Error) -> Response:
    return json_response(error.body, error.status, error.headers)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    # In ASCII: a message may quote text that is no valid Unicode.
    return Response(json.dumps(content), status, headers, "application/json")


class Gate:
    """Middleware; `request.state.key` is the hash of the API key, empty where none is needed."""

    def __init__(
        self, app: ASGIApp, keys: Iterable[str], hosts: Iterable[str] | None, max_body: int
    ) -> None:
        """`hosts` are the names by which the server may be called; None: any."""
        self.app = app
        self._keys = [_hash(key) for key in keys]
        self._hosts = None if hosts is None else frozenset(hosts)
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            key = self._key(HTTPConnection(scope))
            body = await self._body(HTTPConnection(scope), receive)
        except Error as error:
            return await error_response(error)(scope, receive, send)
        if body is None:  # the client went away
            return
        scope.setdefault("state", {})["key"] = key
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _key(self, request: HTTPConnection) -> bytes:
        host = re.sub(r":\d+$", "", request.headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            # A page of another site may have had its name resolved to this machine.
            raise Error(403, "the server is not known by this host name", "forbidden")
        if not self._keys or request.scope["path"] in OPEN:
            return b""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = _hash(given.strip())
        # All are compared, each in constant time.
        known = [hmac.compare_digest(found, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            headers = {"WWW-Authenticate": "Bearer"}
            raise Error(401, "the API key is wrong or missing", "invalid_api_key", headers=headers)
        return found

    async def _body(self, request: HTTPConnection, receive: Receive) -> bytes | None:
        """All of it; None if the client goes away."""
        too_long = Error(413, f"the body has more than {self._max_body} bytes", "body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise too_long
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                raise too_long
        return bytes(body)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
