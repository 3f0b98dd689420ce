"""The ASGI application: routes, and what every request of one pipeline shares."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..events import Done, Event
from ..pipeline import Pipeline
from . import responses
from .access import Access, Keys, log_error
from .bodies import Bodies, Body, Disconnected
from .errors import ApiError, bad_request, from_exception, unavailable
from .generation import Bell, Generation
from .options import ServerOptions
from .protocol import Fields, Rules, read_chat, read_turns
from .responses import Chunks, Head

PING_S = 15.0
"""A stream that says nothing for so long sends a comment, which keeps proxies from closing it."""

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
MAX_TOKENIZED = 2**20
"""Tokens that ``/tokenize`` counts at most."""


class Observer:
    """Is told what happens to chat completions, on the event loop; this one does nothing. Times are in seconds."""

    def begins(self) -> None:
        """The engine has taken a request."""

    def first_token(self, seconds: float) -> None:
        """The first text of a request, since its arrival."""

    def chunk(self, seconds: float, events: int) -> None:
        """A later chunk of a stream with so many events in it, since the one before."""

    def ends(self, status: int, seconds: float, choices: Sequence[Done]) -> None:
        """A request that had begun is over. ``choices`` are those that were finished; 499 is a client that left."""

    def rejects(self, status: int, code: str | None) -> None:
        """A request was refused before the engine took it."""


class Service:
    """One pipeline (None while it is loaded), and what its requests share."""

    def __init__(self, pipeline: Pipeline | None, options: ServerOptions, observer: Observer):
        self.pipeline, self.options, self.observer = None, options, observer
        self.draining = False
        self.created = int(time.time())
        self.fingerprint = ""
        self.executor = ThreadPoolExecutor(options.max_decoding, thread_name_prefix="kimi_vl request")
        self.bodies = Bodies(
            options.max_body_mib << 20, options.max_bodies_mib << 20, options.body_timeout_s, self.executor
        )
        self.rules = Rules(options.lenient, options.ignore_tools)
        self._bell: Bell | None = None
        if pipeline is not None:
            self.loaded(pipeline)

    def loaded(self, pipeline: Pipeline) -> None:
        self.fingerprint = f"fp_{__version__}_{_digest(pipeline)}"
        self.pipeline = pipeline

    def available(self) -> Pipeline:
        """The pipeline, where it takes requests. Raises :class:`ApiError` (503) while it does not."""
        if self.draining:
            raise unavailable("the server is shutting down; send the request to another one.")
        if self.pipeline is None:
            raise unavailable("the model is being loaded; try again later.")
        if not self.pipeline.healthy():
            raise unavailable("the model can no longer answer; the server must be started again.", 30)
        return self.pipeline

    def bell(self) -> Bell:
        if self._bell is None:
            self._bell = Bell(asyncio.get_running_loop())
        return self._bell

    def model(self, asked: str | None) -> str:
        """The served name for ``asked``. Raises :class:`ApiError` (404)."""
        name = self.options.served(asked)
        if name is None:
            names = ", ".join(self.options.names())
            raise ApiError(404, f"there is no such model here; ask for {names}.", code="model_not_found", param="model")
        return name

    def retry_after(self) -> int:
        """Seconds after which a place in a queue that is full now may be free: from 1 to 30."""
        if self.pipeline is None:
            return 5
        stats = self.pipeline.engine.stats()
        return max(1, min(30, math.ceil(stats.waiting / self.options.max_num_seqs * stats.mean_request_s)))

    @property
    def max_model_len(self) -> int:
        return self.available().model.config.text_config.max_position_embeddings

    def close(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)


def _digest(pipeline: Pipeline) -> str:
    """Tells checkpoints apart: a digest of one value of every parameter."""
    import hashlib

    with torch.inference_mode():
        values = torch.stack([parameter.reshape(-1)[-1].float() for parameter in pipeline.model.parameters()])
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()[:12]


def build_app(
    pipeline: Pipeline | None, options: ServerOptions = ServerOptions(), observer: Observer | None = None
) -> Starlette:
    """The application around ``pipeline``, for any ASGI server.

    ``app.state.service`` is its :class:`Service`: where ``pipeline`` is None, its ``loaded`` is called later, and every
    request is answered with 503 until then.
    """
    service = Service(pipeline, options, observer or Observer())
    api = Api(service)
    routes = [
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/version", api.version),
    ]
    middleware = [Middleware(Access, keys=Keys(options.api_keys))]
    if options.cors_origin:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],
        )
        middleware.insert(0, cors)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        yield
        service.close()

    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error}, lifespan=lifespan
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself."""
    status = getattr(error, "status_code", 500)
    if status == 405:
        raise ApiError(405, "this route has no such method.", code="method_not_allowed", headers=error.headers or {})  # pyright: ignore[reportAttributeAccessIssue]
    raise ApiError(404, "there is no such route here.", code="not_found")


class ChatCompletions:
    """``POST /v1/chat/completions``."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._service.available()
            body = await self._service.bodies.json(scope, receive)
        except ApiError as error:
            self._service.observer.rejects(error.status, error.code)
            raise
        await _unless_gone(_Answer(self._service, scope, send).run(body), receive)


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do ``work`` unless the client goes away meanwhile, which ends it at once. Raises :class:`Disconnected` then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone = not working.done()
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))
    if gone and working.cancelled():
        raise Disconnected
    working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """One chat completion, from its body to the end of its answer."""

    def __init__(self, service: Service, scope: Scope, send: Send):
        self._service, self._send = service, send
        self._id: str = scope["state"]["request_id"]
        self._log: dict[str, Any] = scope["state"].setdefault("log", {})
        self._began = time.monotonic()
        self._spoke_at: float | None = None
        self._finished: dict[int, Done] = {}

    async def run(self, body: Body) -> None:
        observer, status = self._service.observer, 499
        generation = None
        try:
            generation, chunks = await self._begin(body)
            observer.begins()
            if chunks is None:
                status = await self._whole(generation)
            else:
                status = await self._stream(generation, chunks)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            refusal = from_exception(error, self._id, self._service.retry_after())
            status = refusal.status
            if status == 500:
                log_error(error, self._id)
            if generation is None:
                observer.rejects(status, refusal.code)
            raise refusal from None
        finally:
            body.release()
            if generation is not None:
                generation.close()
                observer.ends(status, time.monotonic() - self._began, list(self._finished.values()))
                self._log |= self._summary()

    async def _begin(self, body: Body) -> tuple[Generation, Chunks | None]:
        """Hand the request to the engine. Nothing of its messages stays here."""
        service = self._service
        request = read_chat(body.value, service.rules)
        self._head = Head(
            f"chatcmpl-{uuid.uuid4().hex}",
            int(time.time()),
            service.model(request.model),
            service.fingerprint,
            request.reasoning,
            service.options.reasoning_field,
        )
        self._n = request.n
        generation = Generation(
            service.available(), request, service.bell(), service.executor, service.options.deadline_s, body.release
        )
        body.value = None
        try:
            await generation.begin()
        except BaseException:
            generation.close()
            raise
        return generation, Chunks(self._head, request.include_usage) if request.stream else None

    async def _whole(self, generation: Generation) -> int:
        async for items in generation.events():
            self._note(items)
        body = json.dumps(responses.completion(self._head, self._choices())).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        return 200

    async def _stream(self, generation: Generation, chunks: Chunks) -> int:
        await self._send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        await self._write(chunks.start(self._n))
        pings = _Pings(generation.nudge)
        status = 200
        try:
            async for items in generation.events():
                self._note(items)
                written = chunks.events(items)
                if written:
                    await self._write(written)
                    pings.spoke()
                elif pings.due():
                    await self._write(responses.PING)
                    pings.spoke()
            await self._write(chunks.usage(self._choices()) + responses.DONE)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the status has left: the error is an event
            refusal = from_exception(error, self._id)
            if refusal.status == 500:
                log_error(error, self._id)
            status = refusal.status
            await self._write(responses.error_event(refusal))
        finally:
            pings.stop()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return status

    async def _write(self, text: bytes) -> None:
        await self._send({"type": "http.response.body", "body": text, "more_body": True})

    def _note(self, items: Sequence[tuple[int, Event]]) -> None:
        """Keep the summaries, and tell the observer."""
        for index, event in items:
            if isinstance(event, Done):
                self._finished[index] = event
        if items:
            now, observer = time.monotonic(), self._service.observer
            if self._spoke_at is None:
                observer.first_token(now - self._began)
            else:
                observer.chunk(now - self._spoke_at, len(items))
            self._spoke_at = now

    def _choices(self) -> list[Done]:
        return [self._finished[index] for index in range(self._n)]

    def _summary(self) -> dict[str, Any]:
        """Figures of the request for the log."""
        done = list(self._finished.values())
        if not done:
            return {}
        used = responses.usage(done)
        return {
            "choices": len(done),
            "prompt_tokens": used["prompt_tokens"],
            "completion_tokens": used["completion_tokens"],
            "finish_reason": [responses.finish_reason(each) for each in done],
            "first_token_seconds": round(done[0].time_to_first_token, 4),
        }


class _Pings:
    """Nudges a stream when it has said nothing for :data:`PING_S`; one timer, however much it says."""

    def __init__(self, nudge: Any):
        self._loop, self._nudge = asyncio.get_running_loop(), nudge
        self._spoke_at = self._loop.time()
        self._timer = self._loop.call_later(PING_S, self._check)

    def spoke(self) -> None:
        self._spoke_at = self._loop.time()

    def due(self) -> bool:
        return self._loop.time() - self._spoke_at >= PING_S

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        due = self.due()
        self._timer = self._loop.call_at((self._loop.time() if due else self._spoke_at) + PING_S, self._check)
        if due:
            self._nudge()


class Api:
    """The other routes."""

    def __init__(self, service: Service):
        self._service = service

    async def models(self, request: Request) -> Response:
        service = self._service
        return JSONResponse(responses.models(service.options.names(), service.created, service.max_model_len))

    async def model(self, request: Request) -> Response:
        service = self._service
        name = service.model(request.path_params["model"])
        return JSONResponse(responses.model(name, service.created, service.max_model_len))

    async def health(self, request: Request) -> Response:
        """Whether requests are served: 200, or 503 while the model is loaded, when it is lost, and at the end."""
        self._service.available()
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether a request sent now would be taken: as ``/health``, and there is room in the queue."""
        stats = self._service.available().engine.stats()
        if stats.waiting >= self._service.options.max_waiting:
            raise unavailable("the queue is full; send requests to another server.", self._service.retry_after())
        return JSONResponse({"status": "ready", "running": stats.running, "waiting": stats.waiting})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def tokenize(self, request: Request) -> Response:
        """``prompt`` or ``messages`` to token ids, in vLLM's form."""
        body = await self._service.bodies.json(request.scope, request.receive)
        try:
            fields = Fields.of(body.value)
            self._service.model(fields.text("model"))
            tokens = await self._in_thread(self._tokens, fields)
        finally:
            body.release()
        strings = bool(fields.boolean("return_token_strs"))
        pieces = [self._service.available().tokenizer.decode([token]) for token in tokens] if strings else None
        found = {"count": len(tokens), "max_model_len": self._service.max_model_len, "tokens": tokens}
        return JSONResponse({**found, "token_strs": pieces})

    def _tokens(self, fields: Fields) -> list[int]:
        pipeline, prompt = self._service.available(), fields.text("prompt")
        if (prompt is None) == (fields.get("messages") is None):
            raise bad_request("prompt", "give either prompt or messages.")
        if prompt is None:
            return pipeline.tokenize(read_turns(fields))
        tokens = pipeline.tokenizer.encode(prompt, limit=MAX_TOKENIZED)
        if len(tokens) > MAX_TOKENIZED:
            raise bad_request(
                "prompt", f"prompt may have {MAX_TOKENIZED} tokens; shorten it.", "context_length_exceeded"
            )
        return tokens

    async def detokenize(self, request: Request) -> Response:
        """Token ids to ``prompt``, their text."""
        body = await self._service.bodies.json(request.scope, request.receive)
        try:
            fields = Fields.of(body.value)
            self._service.model(fields.text("model"))
            tokenizer = self._service.available().tokenizer
            tokens = fields.get("tokens")
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise bad_request("tokens", "tokens must be a list of token ids.")
            if not all(0 <= token < tokenizer.size for token in tokens):
                raise bad_request("tokens", f"tokens must be from 0 to {tokenizer.size - 1}.")
            return JSONResponse({"prompt": await self._in_thread(tokenizer.decode, tokens)})
        finally:
            body.release()

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._service.executor, function, *arguments)
