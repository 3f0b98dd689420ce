"""What every HTTP request goes through: an id, the key, errors in one form, and one line of log without content."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .bodies import Disconnected, linger
from .errors import ApiError, from_exception

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = ("/health", "/ready")
CLIENT_CLOSED = 499
"""In the log alone: the client went away before it had its answer."""


class Keys:
    """The keys that clients may send. They are compared by their digests, all of them, in constant time."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str) -> bool:
        """Whether a header ``Authorization`` has one of the keys; any will do where there are none."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return not self._digests or (scheme.lower() == "bearer" and any(matches))


class Access:
    """Wraps the application; ``open_paths`` (and what is below them that ends in a slash) need no key."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Sequence[str] = OPEN_PATHS):
        self._app, self._keys, self._open_paths = app, keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            if scope["path"] not in self._open_paths and not self._keys.allow(
                exchange.headers.get("authorization", "")
            ):
                raise ApiError(
                    401,
                    "send a key that this server knows, as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            await self._app(scope, exchange.receive, exchange.send)
        except Disconnected:
            exchange.status = CLIENT_CLOSED
        except Exception as error:
            if exchange.status and not isinstance(error, ApiError):
                log_error(error, exchange.id)  # the answer has begun: cutting it off is all that is left
                raise ConnectionAbortedError from None
            await exchange.refuse(error)
        finally:
            exchange.log()


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._scope, self._receive, self._send = scope, receive, send
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = self.id
        self.status = 0
        self._body_is_read = False
        self._began = time.monotonic()

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_is_read |= message["type"] == "http.disconnect" or not message.get("more_body")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    async def refuse(self, error: Exception) -> None:
        """Answer with an error. The connection ends with it where the client may still be sending its body."""
        refusal = from_exception(error, self.id)
        if refusal.status == 500:
            log_error(error, self.id)
        body = refusal.body()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
        if not self._body_is_read:
            headers["Connection"] = "close"
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        if not self._body_is_read:
            await linger(self._receive)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def log(self) -> None:
        route = self._scope.get("route")
        record = {
            "event": "request",
            "id": self.id,
            "method": self._scope["method"],
            "path": getattr(route, "path", None),  # of the route: what a client makes up is not logged
            "status": self.status,
            "seconds": round(time.monotonic() - self._began, 4),
            **self._scope["state"].get("log", {}),
        }
        log.info(record)


def log_error(error: BaseException, request_id: str) -> None:
    log.error({"event": "error", "id": request_id, "errors": places(error)})


def places(error: BaseException | None) -> list[dict[str, Any]]:
    """Where an error and its causes came from, without their messages: these may quote what a client sent."""
    found, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames = traceback.extract_tb(error.__traceback__)
        found.append({"type": type(error).__name__, "at": [f"{f.filename}:{f.lineno} in {f.name}" for f in frames]})
        error = error.__cause__ or error.__context__
    return found


class JsonLines(logging.Formatter):
    """A line of JSON for each record: the fields of a dict, or a text as ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = record.msg if isinstance(record.msg, dict) else {"event": "log", "message": record.getMessage()}
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), **fields}
        if record.exc_info:
            line["errors"] = places(record.exc_info[1])
        return json.dumps(line)
