"""Runs the application on uvicorn: listening, loading the model beside it, what a connection may cost, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httptools
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..engine.engine import EngineOptions
from ..pipeline import Pipeline, load
from .app import Service, build_app
from .errors import ApiError, unavailable
from .options import OptionError, ServerOptions

MAX_HEAD_BYTES = 64 << 10
SEND_BUFFER_BYTES = 128 << 10
MAX_PIPELINED = 16
"""Requests that a client may send on a connection before it has its answers."""

_PROBES = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
"""After two minutes without an answer from the other side's system a connection is over."""


class Connection(HttpToolsProtocol):
    """A connection with bounds: the head of a request in size and time, and how long a client may not read.

    uvicorn bounds none of these with httptools, and says what it refuses in plain text. It also loses the body of a
    request that offers to upgrade, as Java's HttpClient does in each of them, and sends chunks to HTTP/1.0.
    """

    options = ServerOptions()
    parser: Any

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._offers_upgrade = False
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        _set_up(transport.get_extra_info("socket"))
        if len(self.connections) > self.options.max_connections:
            self._refuse(unavailable("too many connections; try again later.", 1))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._reading is None:  # the first bytes of another request on this connection
                self._await_head()
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(ApiError(400, "this is not a valid HTTP request; correct it.", code="invalid_http"))
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def _feed(self, data: bytes) -> None:
        """Parse ``data``. An offer to upgrade is declined by reading the same request without it.

        The parser takes what follows such a head for another protocol, a body too.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._offers_upgrade:  # CONNECT, which is refused: what follows is not HTTP
                    return
                self._offers_upgrade = False
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)  # the other one may be at the end of its connection
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offers_upgrade = True
            return
        self._in_head = False
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse_head()
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        self._in_head, self._head_bytes = True, 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head:  # a body that nobody reads could drip for ever
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _until_close(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.options.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _await_head(self) -> None:
        self._reading = self.loop.call_later(self.options.head_timeout_s, self.transport.close)

    def _refuse_head(self) -> None:
        self._refuse(ApiError(431, "the headers of a request may have 64 KiB; send less.", code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answer before there is a request, and close. In the middle of another answer nothing can be said."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = error.body()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"{name}: {value}\r\n" for name, value in {**headers, **error.headers}.items()]
        self.transport.write(b"".join([STATUS_LINE[error.status], *(line.encode() for line in lines), b"\r\n", body]))
        self.transport.close()


def _until_close(app: ASGIApp, cycle: RequestResponseCycle) -> Any:
    """``app`` for HTTP/1.0, which has no chunks: an answer without a length ends with the connection."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = False

        async def write(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                cycle.chunked_encoding = None if has_length else False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, write)

    return run


def _set_up(connection: Any) -> None:
    """Bound what the system keeps for a client, and let it notice one that is gone without having said so."""
    with contextlib.suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM and SIGINT first says 503 in ``/health`` for a while, and then ends what runs."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._stop_at = float("inf")

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A handler of signals: what it may do is to set values, which the main loop looks at ten times a second."""
        if self._service.draining or self._service.pipeline is None:  # the second signal means now
            self.should_exit = self.force_exit = True
        self._service.draining = True
        delay = 0.0 if sig == signal.SIGINT else self._service.options.drain_delay_s  # somebody waits at a terminal
        self._stop_at = min(self._stop_at, time.monotonic() + delay)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self._stop_at


def listen(options: ServerOptions) -> socket.socket:
    """The socket to serve on. Raises :class:`OptionError`."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise OptionError(f"cannot listen on {options.host} port {options.port} ({error.strerror})") from None
    return listener


def configuration(app: Starlette, options: ServerOptions) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=type("Connection", (Connection,), {"options": options}),
        loop="auto",  # uvloop where it is installed
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=options.keep_alive_s,
        timeout_graceful_shutdown=max(1, round(options.drain_s)),
    )


def serve(options: ServerOptions, ready: Callable[[str], None]) -> int:
    """Serve until a signal; the exit status. ``ready`` is told the address once the model is loaded.

    Raises :class:`OptionError` for an address that cannot be used, and whatever loading the model raises.
    """
    listener = listen(options)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    app = build_app(None, options)
    service: Service = app.state.service
    config = configuration(app, options)
    server = Server(config, service)
    failed: list[BaseException] = []

    def load_beside() -> None:
        try:
            service.loaded(load_pipeline(options))
            ready(address)
        except BaseException as error:
            failed.append(error)
            server.should_exit = True

    # as a daemon: a signal must not wait for gigabytes
    threading.Thread(target=load_beside, name="kimi_vl loading", daemon=True).start()
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))
    if failed:
        raise failed[0]
    if service.pipeline is not None:
        service.pipeline.engine.close(wait=False)
    return 0


def load_pipeline(options: ServerOptions) -> Pipeline:
    engine = EngineOptions(max_num_seqs=options.max_num_seqs, max_waiting=options.max_waiting)
    return load(options.model, options=engine)
