"""A server that answers what a test says, as the page meets it: over HTTP, in pieces, late, wrongly, or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kimi_vl.serving.page import page_routes


@dataclass(frozen=True)
class Thinking:
    text: str


@dataclass(frozen=True)
class Answer:
    text: str


@dataclass(frozen=True)
class Pause:
    """The answer goes on when ``until`` is set."""

    until: threading.Event


@dataclass(frozen=True)
class Raw:
    """Bytes of the stream as they are."""

    data: bytes


@dataclass(frozen=True)
class Details:
    """What the last chunk of the answer has as ``kimi_vl``."""

    value: dict[str, Any]


@dataclass(frozen=True)
class Break:
    """The connection ends, without a last chunk."""


@dataclass(frozen=True)
class Refusal:
    """An answer with another status than 200, instead of a stream."""

    status: int
    code: str = ""
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None


Step = Thinking | Answer | Pause | Raw | Details | Break
Script = Sequence[Step] | Refusal
USAGE = {
    "prompt_tokens": 1200,
    "completion_tokens": 34,
    "total_tokens": 1234,
    "completion_tokens_details": {"reasoning_tokens": 20},
    "prompt_tokens_details": {"cached_tokens": 1024, "image_tokens": 135},
}


@dataclass
class Seen:
    """A request that came, and whether its client has gone before the end."""

    body: dict[str, Any]
    headers: dict[str, str]
    gone: threading.Event = field(default_factory=threading.Event)


class ScriptedServer:
    """``scripts`` are what the next requests get, one after the other; ``seen`` are the requests that came.

    ``estimates`` are what ``/tokenize`` answers, the last of them again and again; without any there is no such route.
    """

    def __init__(self) -> None:
        self.reset()
        routes = [
            *page_routes(),
            Route("/v1/models", self._models),
            Route("/version", lambda _: JSONResponse({"version": "1.2.3"})),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def reset(self) -> None:
        self.scripts: deque[Script] = deque()
        self.seen: list[Seen] = []
        self.estimates: deque[dict[str, Any] | Refusal] = deque()
        self.estimated: list[dict[str, Any]] = []
        self.models = ["kimi-vl-demo"]
        self.key: str | None = None
        self.finish_reason = "stop"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
            assert self._thread.is_alive()
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _refusal(Refusal(401, "invalid_api_key", "a key is needed."))

    async def _models(self, request: Request) -> Response:
        data = [{"id": name, "object": "model", "max_model_len": 8192} for name in self.models]
        return self._refused(request) or JSONResponse({"object": "list", "data": data})

    async def _tokenize(self, request: Request) -> Response:
        self.estimated.append(await request.json())
        if not self.estimates:
            return _refusal(Refusal(404, "not_found", "there is no such route; correct the path."))
        answer = self.estimates.popleft() if len(self.estimates) > 1 else self.estimates[0]
        return _refusal(answer) if isinstance(answer, Refusal) else JSONResponse(answer)

    async def _complete(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        seen = Seen(await request.json(), dict(request.headers))
        self.seen.append(seen)
        script = self.scripts.popleft() if self.scripts else [Thinking("I see."), Answer("Here it is.")]
        if isinstance(script, Refusal):
            return _refusal(script)
        return StreamingResponse(self._stream(script, seen), media_type="text/event-stream")

    async def _stream(self, script: Sequence[Step], seen: Seen) -> AsyncIterator[bytes]:
        details = None
        try:
            yield _chunk({"role": "assistant", "content": ""})
            for step in script:
                match step:
                    case Thinking(text):
                        yield _chunk({"reasoning_content": text})
                    case Answer(text):
                        yield _chunk({"content": text})
                    case Pause(until):
                        while not until.is_set():
                            await asyncio.sleep(0.01)
                    case Raw(data):
                        yield data
                    case Details(value):
                        details = value
                    case Break():
                        return
            yield _chunk({}, self.finish_reason, details)
            yield _data({"choices": [], "usage": USAGE})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            seen.gone.set()
            raise


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _chunk(delta: dict[str, Any], finish_reason: str | None = None, details: dict[str, Any] | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return _data({"choices": [{**choice, **({"kimi_vl": details} if details else {})}], "usage": None})


def _refusal(refusal: Refusal) -> Response:
    if refusal.body is not None:
        return Response(refusal.body, refusal.status, refusal.headers, "text/html")
    error = {"message": refusal.message, "type": "error", "param": None, "code": refusal.code}
    return JSONResponse({"error": error}, refusal.status, refusal.headers)
