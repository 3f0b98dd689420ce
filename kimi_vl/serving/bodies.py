"""Bodies of requests: read within limits of size and time, counted while they are in memory, and read as JSON."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Executor
from typing import Any

from starlette.types import Message, Receive, Scope

from .errors import ApiError, bad_request, overloaded

LEAST_BYTES_A_SECOND = 64 << 10
"""A body that comes more slowly than this ends once its first seconds are over."""

PARSED_BESIDE = 64 << 10
"""Bodies of so many bytes are read as JSON in another thread: the event loop serves everybody."""

LINGER_S, LINGER_BYTES = 5.0, 256 << 20
"""How long, and how much of, a refused body is still taken, so that its sender comes to read why."""


class Disconnected(Exception):
    """The client is gone."""


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
        _check_type(headers.get(b"content-type", b""))
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
    """The value of a body in JSON, as the standard has it: no NaN, nothing after the end, UTF-8."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise bad_request(None, "the body is not valid JSON in UTF-8; correct it.", "invalid_json") from None


def _no_number(name: str) -> None:
    raise ValueError(name)


def _check_type(value: bytes) -> None:
    kind = value.partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(
            415, "send the body as JSON, with the header Content-Type: application/json.", code="unsupported_media_type"
        )


def _length(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0
