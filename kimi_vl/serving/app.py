"""The ASGI application: its routes, and those of them that are short."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..events import MediaUse
from ..pipeline import Pipeline
from ..text.messages import Turn
from . import responses
from .access import OPEN_PATHS, Access, Keys
from .completions import ChatCompletions
from .errors import ApiError, bad_request, unavailable
from .fetch import FetchOptions, ImageFetcher
from .metrics import CONTENT_TYPE, Metrics
from .options import OptionError, ServerOptions
from .page import page_routes
from .protocol import Fields, read_estimated, read_turns
from .service import Fetcher, Observer, Service

MAX_TOKENIZED = 2**20
"""Tokens that ``/tokenize`` counts at most."""


def build_app(
    pipeline: Pipeline | None,
    options: ServerOptions = ServerOptions(),
    observer: Observer | None = None,
    fetch_images: Fetcher | None = None,
    labels: Mapping[str, str] | None = None,
) -> Starlette:
    """The application around ``pipeline``, for any ASGI server.

    ``app.state.service`` is its :class:`~kimi_vl.serving.service.Service`. Where ``pipeline`` is None, every request is
    answered with 503 until the service's ``loaded`` is called. ``observer`` is told what happens in place of what
    ``/metrics`` shows, ``fetch_images`` fetches pictures by URL in place of what ``options`` ask for, and all figures
    of ``/metrics`` carry ``labels``.
    Raises :class:`~kimi_vl.serving.options.OptionError`.
    """
    metrics = Metrics(options.names()[0], lambda: service.stats(), labels)
    fetcher = _fetcher(options)
    if fetcher and not fetch_images:
        fetch_images = fetcher.fetch
    service = Service(pipeline, options, observer or metrics, fetch_images)
    api = Api(service, metrics)
    page = page_routes()
    routes = [
        *page,
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/version", api.version),
        Route("/metrics", api.metrics),
    ]
    open_paths = (*OPEN_PATHS, *(["/metrics"] if options.open_metrics else []), *(route.path for route in page))
    middleware = [Middleware(Access, keys=Keys(options.api_keys), open_paths=open_paths)]
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
        if fetcher:
            fetcher.close()

    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error}, lifespan=lifespan
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _fetcher(options: ServerOptions) -> ImageFetcher | None:
    if not options.allow_image_urls:
        if options.image_url_host or options.allow_http_image_urls:
            raise OptionError("--image-url-host and --allow-http-image-urls need --allow-image-urls")
        return None
    try:
        return ImageFetcher(FetchOptions.of(options.image_url_host, options.allow_http_image_urls))
    except ValueError as error:
        raise OptionError(f"--image-url-host: {error}") from None


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself."""
    status = getattr(error, "status_code", 500)
    if status == 405:
        headers = getattr(error, "headers", None) or {}
        methods = " or ".join(sorted(headers.get("Allow", "").split(", ")))
        raise ApiError(
            405, f"this route takes {methods}; change the method.", code="method_not_allowed", headers=headers
        )
    raise ApiError(404, "there is no such route; correct the path.", code="not_found")


class Api:
    """The other routes."""

    def __init__(self, service: Service, metrics: Metrics):
        self._service, self._metrics = service, metrics

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

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
        """``prompt`` or ``messages`` to token ids, in vLLM's form; ``media`` is what images and files take of them."""
        body = await self._service.bodies.json(request.scope, request.receive)
        try:
            fields = Fields.of(body.value)
            self._service.model(fields.text("model"))
            turns = None
            if fields.get("messages") is not None:
                turns = await self._service.with_pictures(read_turns(fields), body)
            tokens, media = await self._in_thread(turns or (), self._tokens, fields, turns)
        finally:
            body.release()
        strings = bool(fields.boolean("return_token_strs"))
        pieces = [self._service.available().tokenizer.decode([token]) for token in tokens] if strings else None
        found = {"count": len(tokens), "max_model_len": self._service.max_model_len, "tokens": tokens}
        return JSONResponse({**found, "token_strs": pieces, "media": [dataclasses.asdict(use) for use in media]})

    def _tokens(self, fields: Fields, turns: tuple[Turn, ...] | None) -> tuple[list[int], tuple[MediaUse, ...]]:
        pipeline, prompt = self._service.available(), fields.text("prompt")
        if (prompt is None) == (turns is None):
            raise bad_request("prompt", "give either prompt or messages.")
        if prompt is None:
            found = pipeline.estimate(turns or (), **read_estimated(fields))
            return list(found.ids), found.media
        tokens = pipeline.tokenizer.encode(prompt, limit=MAX_TOKENIZED)
        if len(tokens) > MAX_TOKENIZED:
            raise bad_request(
                "prompt", f"prompt may have {MAX_TOKENIZED} tokens; shorten it.", "context_length_exceeded"
            )
        return tokens, ()

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
            return JSONResponse({"prompt": await self._in_thread((), tokenizer.decode, tokens)})
        finally:
            body.release()

    async def _in_thread(self, turns: Sequence[Turn], function: Any, *arguments: Any) -> Any:
        executor = self._service.executor_for(turns)
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
