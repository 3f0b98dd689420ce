"""What all requests to one pipeline share: whether it takes them, what it is called, limits, and who is told."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeGuard

import torch

from .. import __version__
from ..engine.engine import EngineStats
from ..errors import UserError
from ..event_loop import Bell
from ..events import Done
from ..media.images import MAX_IMAGES
from ..pipeline import Pipeline
from ..text.messages import ImagePart, Part, Turn
from .access import Bodies, Body
from .errors import ApiError, unavailable
from .options import ServerOptions
from .protocol import Rules

TEXT_THREADS = 4
"""For bodies, tokens and templates, where there is nothing to decode."""

Fetcher = Callable[[Sequence[str]], Awaitable[list[bytes]]]
"""Gets the pictures of a request at their http(s) URLs, in order. Raises :class:`~kimi_vl.errors.UserError`."""


class Observer:
    """Is told what happens to chat completions, on the event loop; this one does nothing. Times are in seconds."""

    def begins(self) -> None:
        """The engine has taken a request."""

    def queued(self, seconds: float) -> None:
        """How long a choice waited in the engine's queue; told at the end of its request."""

    def first_token(self, seconds: float) -> None:
        """The first text of a request (or its end, where it has none), since its arrival."""

    def chunk(self, seconds: float, pieces: int) -> None:
        """A later chunk of a stream with so many pieces of a choice in it, since that choice's last one."""

    def ends(self, status: int, seconds: float, choices: Sequence[Done]) -> None:
        """A request that had begun is over. ``choices`` are those that were finished; 499 is a client that left."""

    def rejects(self, status: int, code: str | None) -> None:
        """A request was refused before the engine took it."""


class Service:
    """One pipeline (None while it is loaded), and what its requests share."""

    def __init__(
        self,
        pipeline: Pipeline | None,
        options: ServerOptions,
        observer: Observer,
        fetch_images: Fetcher | None = None,
    ):
        self.options, self.observer, self.fetch_images = options, observer, fetch_images
        self.pipeline: Pipeline | None = None
        self.draining = False
        self.created = int(time.time())
        self.fingerprint = ""
        self.executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="kimi_vl request")
        self._image_decoders = ThreadPoolExecutor(options.max_decoding, thread_name_prefix="kimi_vl images")
        self._file_readers = ThreadPoolExecutor(options.max_decoding, thread_name_prefix="kimi_vl files")
        self.bodies = Bodies(
            options.max_body_mib << 20, options.max_bodies_mib << 20, options.body_timeout_s, self.executor
        )
        self.rules = Rules(options.lenient, options.ignore_tools)
        self._bell: Bell | None = None
        if pipeline is not None:
            self.loaded(pipeline)

    def loaded(self, pipeline: Pipeline) -> None:
        self.fingerprint = fingerprint(pipeline)
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

    def stats(self) -> EngineStats | None:
        """Figures of the engine, once there is one."""
        return self.pipeline.engine.stats() if self.pipeline is not None else None

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

    async def with_pictures(self, turns: tuple[Turn, ...], body: Body) -> tuple[Turn, ...]:
        """``turns`` with the pictures at http(s) URLs in them, where this server fetches those.

        They count as parts of the ``body`` that named them. Raises what the fetcher does.
        """
        urls = [part.source for turn in turns for part in turn.images if _is_url(part)]
        if self.fetch_images is None or not urls:
            return turns
        if len(urls) > MAX_IMAGES:
            raise UserError("E_TOO_MANY_IMAGES", f"a request may have {MAX_IMAGES} images; send fewer.")
        found = await self.fetch_images(urls)
        body.grow(sum(map(len, found)))
        pictures = iter(found)
        return tuple(
            Turn(turn.role, tuple(ImagePart(next(pictures)) if _is_url(part) else part for part in turn.parts))
            for turn in turns
        )

    def executor_for(self, turns: Sequence[Turn]) -> Executor:
        """Where a request with these messages is read: it waits for no other that takes longer by its kind."""
        files = [part for turn in turns for part in turn.files]
        if not files:
            return self.executor
        return self._image_decoders if all(isinstance(part, ImagePart) for part in files) else self._file_readers

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
        for executor in (self.executor, self._image_decoders, self._file_readers):
            executor.shutdown(wait=False, cancel_futures=True)


def _is_url(part: Part) -> TypeGuard[ImagePart]:
    return (
        isinstance(part, ImagePart)
        and isinstance(part.source, str)
        and part.source[:8].lower().startswith(("http://", "https://"))
    )


def fingerprint(pipeline: Pipeline) -> str:
    """The ``system_fingerprint`` of answers: it tells checkpoints apart by one value of every parameter."""
    with torch.inference_mode():
        values = torch.stack([parameter.reshape(-1)[-1].float() for parameter in pipeline.model.parameters()])
    return f"fp_{__version__}_{hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()[:12]}"
