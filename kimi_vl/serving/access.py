"""What every HTTP request goes through: an id, the key, bounds of its body, errors in one form, a line of the log.

Bodies are read within limits of size and time, and counted while they are in memory. The log has no content.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, bad_request, from_exception, overloaded
from .protocol import json_value

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = ("/health", "/ready")
CLIENT_CLOSED = 499
"""In the log alone: the client went away before it had its answer."""

LEAST_BYTES_A_SECOND = 64 << 10
"""A body that comes more slowly than this ends once its first seconds are over."""

PARSED_BESIDE = 64 << 10
"""Bodies of so many bytes are read as JSON in another thread: the event loop serves everybody."""

LINGER_S, LINGER_BYTES = 5.0, 256 << 20
"""How long, and how much of, a refused body is still taken, so that its sender comes to read why."""


class Disconnected(Exception):
    """The client is gone."""


class Keys:
    """The keys that clients may send. They are compared by their digests, all of them, in constant time."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str) -> bool:
        """Whether a header ``Authorization`` (its bytes as Latin-1) has one of the keys, or there are none."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
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
        self._scope["state"].setdefault("log", {})["code"] = refusal.code
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


class Bodies:
    """Reads bodies for one application, which holds at most ``max_total`` bytes of them at a time."""

    def __init__(self, max_bytes: int, max_total: int, seconds: float, executor: Executor):
        self._max_bytes, self._max_total, self._seconds, self._executor = max_bytes, max_total, seconds, executor
        self.held = 0

    async def json(self, scope: Scope, receive: Receive) -> Body:
        """The value of a body in JSON, whose memory counts until it is released.

        Raises :class:`~kimi_vl.serving.errors.ApiError` and :class:`Disconnected`.
        """
        headers = dict(scope["headers"])
        _check_type(headers.get(b"content-type", b""), headers.get(b"content-encoding", b""))
        held = Body(self)
        try:
            self._check_size(held, _length(headers.get(b"content-length")))
            data = await self._read(held, receive)
            if len(data) > PARSED_BESIDE:
                held.value = await asyncio.get_running_loop().run_in_executor(self._executor, parse, data)
            else:
                held.value = parse(data)
        except BaseException:
            held.release()
            raise
        return held

    async def _read(self, held: Body, receive: Receive) -> bytes:
        data, began = bytearray(), asyncio.get_running_loop().time()
        while True:
            message = await self._next(receive, began + self._seconds + len(data) / LEAST_BYTES_A_SECOND)
            data += message.get("body", b"")
            self._check_size(held, len(data))
            if not message.get("more_body"):
                return bytes(data)

    def _check_size(self, held: Body, size: int) -> None:
        """Count a body that has, or will have, ``size`` bytes."""
        if size > self._max_bytes:
            raise ApiError(413, f"a body may have {self._max_bytes >> 20} MiB; send less.", code="request_too_large")
        if size > held.bytes:
            held.grow(size - held.bytes)

    def reserve(self, size: int) -> None:
        """Count ``size`` more bytes. Raises :class:`ApiError` (429) where there are too many."""
        if self.held + size > self._max_total:
            raise overloaded("too many large requests come in at a time; try again later.", 1)
        self.held += size

    async def _next(self, receive: Receive, until: float) -> Message:
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, "the body came too slowly; send it again.", code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        return message


class Body:
    """A body that is in memory: its value, and for how many bytes it counts."""

    def __init__(self, bodies: Bodies):
        self._bodies = bodies
        self.bytes = 0
        self.value: Any = None

    def grow(self, size: int) -> None:
        """Count ``size`` more bytes that came with it. Raises :class:`ApiError` (429)."""
        self._bodies.reserve(size)
        self.bytes += size

    def release(self) -> None:
        """Let go of the value. May be called again."""
        self._bodies.held -= self.bytes
        self.bytes, self.value = 0, None


async def linger(receive: Receive) -> None:
    """Take what a client still sends of a body that was refused, for a while."""
    left = LINGER_BYTES
    try:
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        pass


def parse(body: bytes) -> Any:
    """The value of a body in JSON, as in the standard: no NaN, nothing after the end, UTF-8. A BOM is passed over."""
    try:
        return json_value(body.decode("utf-8-sig"))
    except ValueError:
        raise bad_request(None, "the body is not valid JSON in UTF-8; correct it.", "invalid_json") from None


def _check_type(content_type: bytes, encoding: bytes) -> None:
    if encoding.strip().lower() not in (b"", b"identity"):
        raise ApiError(415, "send the body as it is, without a Content-Encoding.", code="unsupported_media_type")
    kind = content_type.partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(
            415, "send the body as JSON, with the header Content-Type: application/json.", code="unsupported_media_type"
        )


def _length(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0


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
