"""One thread that serves every request: plan, tensors, forward, sample, commit.

Knows ids, images as patches, and a guide for each request that says what to do with a drawn token; no text and no
files. Whatever goes wrong with one request reaches that request alone.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import graphs, kernels, memory, sampling
from .cache import Chunk, PagedCache
from .config import TextConfig
from .errors import UserError
from .fused import FusedDecoder
from .graphs import CudaGraphs, Launched, Row, StaticDecoder
from .model import KimiVL
from .pages import PagePool
from .sampling import Sampling, draw, uniforms
from .scheduler import NeverFits, Request, Scheduler, Span, Work
from .vision import Grid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on. ``cache_bytes`` 0 takes what the device can spare."""

    page_size: int = 32
    max_rows: int = 64
    step_tokens: int = 1024
    max_waiting: int = 256
    cache_bytes: int = 0
    embedding_bytes: int = 256 << 20
    reuse: bool = True

    def use(self, config: TextConfig, dtype: torch.dtype) -> kernels.Use:
        """What this asks of the decoder's operations."""
        return kernels.Use(config, dtype, self.page_size, self.max_rows, self.step_tokens)


class Patches:
    """An image as the vision tower takes it: ``pixel_values`` (P, 3, 14, 14), float32, in a ``grid``.

    The digest is the SHA-256 of exactly these values, so that only equal pictures are taken for each other.
    """

    def __init__(self, pixel_values: np.ndarray, grid: Grid):
        self.pixel_values, self.grid = pixel_values, grid
        self.digest = hashlib.sha256(repr(grid).encode() + np.ascontiguousarray(pixel_values).tobytes()).digest()

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] // 4


class Guide(Protocol):
    """What the engine asks about a request. All calls come from the engine's thread, and must not wait."""

    sampling: Sampling

    @property
    def text_only(self) -> bool:
        """Whether tokens without text are ruled out in the next draw."""
        ...

    def forced(self) -> int | None:
        """The next token where it is not drawn."""
        ...

    def take(self, token: int) -> int | None:
        """What follows the sequence after this token was drawn: it, another one, or None when all is said."""
        ...

    def fail(self, error: Exception) -> None:
        """The request is over, without an end."""
        ...


class Ticket:
    """A request in the engine; :meth:`Engine.cancel` takes it back."""

    def __init__(self, request: Request, patches: Sequence[Patches], guide: Guide, deadline: float):
        self.request, self.patches, self.guide, self.deadline = request, patches, guide, deadline
        self.drawn = 0
        self.cancelled = False
        self._numbers: tuple[int, list[float]] = (0, [])  # where they begin, and uniform numbers from there on

    def number(self, position: int) -> float:
        """What the draw at ``position`` is decided by."""
        begin, numbers = self._numbers
        if not begin <= position < begin + len(numbers):
            begin, numbers = self._numbers = position, uniforms(self.guide.sampling.seed, position, 64)
        return numbers[position - begin]


class Overloaded(UserError):
    """More work than the queue may hold, or than was done in time."""

    def __init__(self, message: str):
        super().__init__("E_OVERLOADED", message)


class Engine:
    """Requests side by side through one model. Callers may be in any thread."""

    def __init__(self, model: KimiVL, text_tokens: int, options: EngineOptions | None = None):
        """Token ids below ``text_tokens`` have a text."""
        self.model = model
        self._text_tokens = text_tokens
        self.options = options = options or EngineOptions()
        text = model.config.text_config
        # before memory is counted: kernels are compiled and tried
        ops, capture = kernels.choose(model.device, use=options.use(text, model.dtype)), graphs.wanted()
        page_bytes = PagedCache.page_bytes(text, options.page_size, model.dtype)
        # no more pages than all rows could ever fill
        most = options.max_rows * -(-text.max_position_embeddings // options.page_size)
        pages = min(most, (options.cache_bytes or spare_bytes(model.device)) // page_bytes)
        if pages < 1:
            raise MemoryError("there is no memory left for a cache; free some or take a smaller model")
        self._cache = PagedCache(text, pages, options.page_size, dtype=model.dtype, device=model.device)
        self.scheduler = Scheduler(
            PagePool(pages),
            options.page_size,
            max_rows=options.max_rows,
            step_tokens=options.step_tokens,
            max_waiting=options.max_waiting,
            reuse=options.reuse,
        )
        self._decoder, self._static = FusedDecoder(model.language_model, ops), None
        if ops.static and capture and model.device.type == "cuda":
            recorder = CudaGraphs(model.device)
            self._static = StaticDecoder(model, self._decoder, self._cache, options.max_rows, recorder)
            self._static.prepare()
        self._embeddings = _Embeddings(options.embedding_bytes)
        self._tickets: dict[Request, Ticket] = {}
        self._new: deque[Ticket] = deque()
        # No Condition here: an exception that is raised in a caller's thread from outside (a cancelled prediction's)
        # can strike inside its Python code, and leave it locked for ever or the next call unheard. A lock and a queue
        # are single steps in C.
        self._lock = threading.RLock()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._broken: Exception | None = None
        self.steps = 0

    def submit(
        self, ids: Sequence[int], patches: Sequence[Patches], room: int, guide: Guide, seconds: float = float("inf")
    ) -> Ticket:
        """Queue a prompt with its images (in the order of their placeholders) for up to ``room`` new tokens.

        Raises :class:`UserError` (E_OVERLOADED, E_PROMPT_TOO_LONG) at once; what happens later reaches the guide.
        """
        request = Request(list(ids), room, self._spans(ids, patches))
        ticket = Ticket(request, patches, guide, time.monotonic() + seconds)
        try:
            self._queue(ticket)
        except BaseException:
            ticket.cancelled = True  # whoever was to hold it has been cancelled meanwhile
            raise
        return ticket

    def _queue(self, ticket: Ticket) -> None:
        with self._lock:
            if self._broken or self._closing:
                raise RuntimeError("the engine has stopped")
            try:
                self.scheduler.check(ticket.request.prompt_length, ticket.request.room)
            except NeverFits:
                raise UserError(
                    "E_PROMPT_TOO_LONG", "prompt and answer need more memory than there is; shorten either."
                ) from None
            if len(self._new) + len(self.scheduler.waiting) >= self.options.max_waiting:
                raise Overloaded("too many requests are waiting; try again later.")
            self._new.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="kimi_vl engine", daemon=True)
                self._thread.start()
                atexit.register(self._abandon)
        self._bell.put(None)

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request within one step; harmless when it is over. The guide hears no more of it."""
        ticket.cancelled = True
        self._bell.put(None)

    def close(self, wait: bool = True) -> None:
        """Finish what runs or waits, take nothing more, and end the thread."""
        with self._lock:
            self._closing = True
        self._bell.put(None)
        if wait and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """The program ends: a thread that is inside torch by then would take it down with an error."""
        with self._lock:
            for ticket in [*self._tickets.values(), *self._new]:
                ticket.cancelled = True
        self.close()

    def healthy(self) -> bool:
        """False once the thread has died of an error."""
        return self._broken is None

    # The thread

    def _serve(self) -> None:
        try:
            while self._collect():
                self._drop_the_late_and_cancelled()
                works = self.scheduler.plan()
                # a value that is not finite, left by an earlier user of a page, would spoil even masked products
                self._cache.clear(self.scheduler.fresh)
                if self._static is not None and works and all(work.decodes for work in works):
                    self._decode(self._static, works)
                elif works:
                    self._step(works)
        except Exception as error:
            self._break(error)

    def _collect(self) -> bool:
        """Take in new requests, waiting for one when there is nothing to do; False at the end."""
        while not (self._new or self.scheduler.busy or self._closing):
            self._bell.get()
        with contextlib.suppress(queue.Empty):  # what rang until now is seen below
            while True:
                self._bell.get_nowait()
        with self._lock:
            while self._new:
                ticket = self._new.popleft()
                self._tickets[ticket.request] = ticket
                self.scheduler.add(ticket.request)
            return self.scheduler.busy or not self._closing

    def _drop_the_late_and_cancelled(self) -> None:
        now = time.monotonic()
        for request, ticket in list(self._tickets.items()):
            if ticket.cancelled:
                self._release(request)
            elif now > ticket.deadline:
                self._fail(request, Overloaded("the request was not done in time; try again later, or ask for less."))

    @torch.inference_mode()
    def _step(self, works: Sequence[Work]) -> None:
        """Compute all works together; where that fails, each alone, so that only those at fault fail."""
        self.steps += 1
        try:
            logits = self._forward(works)
        except Exception as error:
            if len(works) == 1:
                self._fail(works[0].request, _blamed(error))
                return
            log.warning("a step of %d requests failed (%s); each is tried alone", len(works), type(error).__name__)
            for work in works:
                self._step([work])
            return
        for work in works:
            self.scheduler.computed(work)
        ready = [work for work in works if work.complete]
        if ready:
            self._advance([self._tickets[work.request] for work in ready], logits)

    def _decode(self, static: StaticDecoder, works: Sequence[Work]) -> None:
        """Decode until something else is to be done, each step begun before the tokens of the last one are read.

        It takes for granted that each of them follows as it was drawn, and that the next one is drawn by the same
        rules. Where that turns out to be wrong for a request, its part of the step does not count, and what has to be
        computed instead overwrites it.
        """
        try:
            launched = self._launch(static, works, 0)
        except Exception as error:
            log.warning("a decoding step failed (%s); it is tried another way", type(error).__name__)
            self._step(works)
            return
        counts = [True] * len(works)
        while launched is not None:
            following, after = [], None
            if all(counts) and not self._interrupted():
                following = self.scheduler.ahead(works)
            if following:
                self._cache.clear(self.scheduler.fresh)
                try:
                    after = self._launch(static, following, 1)
                except Exception as error:
                    log.warning("a decoding step could not begin early (%s)", type(error).__name__)
            drawn = launched.launched.read()
            counts = [
                counts[row] and self._commit(work, token, finite, after and after.limits[row])
                for row, (work, token, finite) in enumerate(zip(works, *drawn, strict=True))
            ]
            works, launched = following, after

    def _launch(self, static: StaticDecoder, works: Sequence[Work], early: int) -> _Flight:
        """Begin a step; ``early`` is how many tokens of each request are still to be read."""
        self.steps += 1
        tickets = [self._tickets[work.request] for work in works]
        limits = [self._limit(ticket) for ticket in tickets]
        rows = [
            Row(
                None if early else work.request.ids[-1],
                work.begin,
                work.request.pages,
                ticket.guide.sampling,
                ticket.number(ticket.drawn + early),
                limit,
            )
            for work, ticket, limit in zip(works, tickets, limits, strict=True)
        ]
        return _Flight(static.launch(rows), limits)

    def _commit(self, work: Work, drawn: int, finite: bool, limit: int | None) -> bool:
        """Take in what a step computed and drew for a request. Whether the next step, which was begun with the drawn
        token and is to draw below ``limit``, counts for it."""
        request = work.request
        ticket = self._tickets[request]
        self.scheduler.computed(work)
        if not finite:
            self._fail(request, _not_finite())
            return False
        forced = ticket.guide.forced()
        self._take(ticket, drawn if forced is None else forced)
        return request in self._tickets and request.ids[-1] == drawn and self._limit(ticket) == limit

    def _interrupted(self) -> bool:
        """Whether requests came, or one of those that run is to end."""
        now = time.monotonic()
        return bool(self._new) or any(ticket.cancelled or now > ticket.deadline for ticket in self._tickets.values())

    def _limit(self, ticket: Ticket) -> int:
        """The ids of a request's next draw are below it."""
        return self._text_tokens if ticket.guide.text_only else self.model.config.text_config.vocab_size

    def _forward(self, works: Sequence[Work]) -> Tensor:
        """Float32 logits (complete works, vocab_size)."""
        model = self.model
        step = self._cache.step([Chunk(work.request.pages, work.begin, work.end) for work in works])
        ids = torch.tensor([[token for work in works for token in work.request.ids[work.begin : work.end]]])
        features = [feature for work in works for feature in self._features(work)]
        embeddings = model.embed(ids.to(model.device), torch.cat(features) if features else None)
        states = self._decoder.states(embeddings[0], step)  # (T, H)
        ends = torch.tensor([work.end - work.begin for work in works]).cumsum(0) - 1
        complete = torch.tensor([work.complete for work in works])
        return self._decoder.logits(states[ends[complete].to(model.device)])

    def _features(self, work: Work) -> list[Tensor]:
        """The image vectors (t, H) of the placeholders among a work's tokens."""
        parts = []
        for span, patches in zip(work.request.images, self._tickets[work.request].patches, strict=True):
            begin, end = max(span.begin, work.begin), min(span.end, work.end)
            if begin < end:
                parts.append(self._embed(patches)[begin - span.begin : end - span.begin])
        return parts

    def _embed(self, patches: Patches) -> Tensor:
        found = self._embeddings.find(patches.digest)
        if found is None:
            pixels = torch.from_numpy(patches.pixel_values).to(self.model.device)
            found = self.model.encode_images(pixels, [patches.grid])
            self._embeddings.keep(patches.digest, found)
        return found

    def _advance(self, tickets: Sequence[Ticket], logits: Tensor) -> None:
        """Draw each request's next token and let its guide take it."""
        finite = sampling.finite(logits).tolist()
        forced = [ticket.guide.forced() for ticket in tickets]
        rows = [row for row, token in enumerate(forced) if token is None and finite[row]]
        drawn = draw(
            logits[rows] if len(rows) < len(tickets) else logits,
            [tickets[row].guide.sampling for row in rows],
            [tickets[row].drawn for row in rows],
            [self._limit(tickets[row]) for row in rows],
        )
        tokens = dict(zip(rows, drawn, strict=True))
        for row, ticket in enumerate(tickets):
            if not finite[row]:
                self._fail(ticket.request, _not_finite())
                continue
            token = forced[row]
            self._take(ticket, tokens[row] if token is None else token)

    def _take(self, ticket: Ticket, token: int) -> None:
        try:
            following = None if ticket.cancelled else ticket.guide.take(token)
        except Exception as error:
            self._fail(ticket.request, error)
            return
        if following is None:
            self._release(ticket.request)
        else:
            ticket.drawn += 1
            ticket.request.ids.append(following)

    def _release(self, request: Request, forget: bool = False) -> Ticket:
        self.scheduler.remove(request, forget)
        return self._tickets.pop(request)

    def _fail(self, request: Request, error: Exception) -> None:
        self._release(request, forget=True).guide.fail(error)

    def _break(self, error: Exception) -> None:
        """The thread cannot go on: every caller is told."""
        log.error("the engine has stopped: %s", type(error).__name__)
        with self._lock:
            self._broken = error
            tickets = [*self._tickets.values(), *self._new]
            self._tickets, self._new = {}, deque()
        for ticket in tickets:
            ticket.guide.fail(error)

    def _spans(self, ids: Sequence[int], patches: Sequence[Patches]) -> list[Span]:
        """Where each image's placeholders are."""
        pad, spans, at = self.model.config.media_placeholder_token_id, [], 0
        for image in patches:
            while at < len(ids) and ids[at] != pad:
                at += 1
            spans.append(Span(at, at + image.tokens, image.digest))
            at += image.tokens
        if sum(token == pad for token in ids) != sum(image.tokens for image in patches):
            raise ValueError("the placeholders and the images differ in number")
        return spans


class _Embeddings:
    """Image vectors by digest, the longest unused given up first."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def find(self, digest: bytes) -> Tensor | None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def keep(self, digest: bytes, vectors: Tensor) -> None:
        self._kept[digest] = vectors
        self._bytes += vectors.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            _, given_up = self._kept.popitem(last=False)
            self._bytes -= given_up.nbytes


@dataclass(frozen=True)
class _Flight:
    """A decoding step under way, and below which ids it draws for each request."""

    launched: Launched
    limits: Sequence[int]


def _not_finite() -> Exception:
    return RuntimeError("the model produced a value that is not finite")


def _blamed(error: Exception) -> Exception:
    """What the one request at fault is told."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Overloaded("there was not enough memory for this request; try again later, or ask for less.")
    return error


def spare_bytes(device: torch.device) -> int:
    """Memory for the cache: on a GPU nine tenths of what is free after a reserve of 4 GiB for activations, on a CPU
    a tenth of the machine's, 4 GiB at most."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(max(free - (4 << 30), free // 4) * 0.9)
    return min(4 << 30, memory.total() // 10)
