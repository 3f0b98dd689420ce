"""One thread that serves every request: plan, tensors, forward, sample, commit.

Knows ids, images as patches, and a guide for each request that says what to do with a drawn token; no text and no
files. Whatever goes wrong with one request reaches that request alone; :mod:`kimi_vl.engine.faults` says what ends the
engine.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..device import cuda as devices
from ..device.budget import spare_bytes
from ..errors import UserError
from ..model.config import TextConfig
from ..model.kimi_vl import KimiVL
from . import cuda_graphs as graphs
from . import sampling
from .cuda_graphs import Action, CudaGraphs, Launched, Row, StaticDecoder
from .decoder import FusedDecoder
from .faults import Broken, Failed, Faults, NotFinite, Overloaded
from .image_cache import EmbeddingCache
from .kv_cache import Chunk, PagedCache
from .page_pool import PagePool
from .requests import Guide, Patches, Ticket, Unguided, spans
from .sampling import draw
from .scheduler import NeverFits, Request, Scheduler, Span, Work

__all__ = ["Engine", "EngineOptions", "Guide", "Overloaded", "Patches", "Ticket"]

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on. ``cache_bytes`` 0 takes what the device can spare."""

    page_size: int = 32
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_waiting: int = 256
    cache_bytes: int = 0
    embedding_bytes: int = 256 << 20
    prefix_caching: bool = True

    def use(self, config: TextConfig, dtype: torch.dtype) -> kernels.Use:
        """What this asks of the decoder's operations."""
        return kernels.Use(config, dtype, self.page_size, self.max_num_seqs, self.max_num_batched_tokens)


class Engine:
    """Requests side by side through one model. Callers may be in any thread."""

    def __init__(
        self,
        model: KimiVL,
        text_tokens: int,
        options: EngineOptions | None = None,
        *,
        ops: kernels.Ops | None = None,
        capture: Callable[[Action], Action] | None = None,
    ):
        """Token ids below ``text_tokens`` have a text.

        ``ops`` None takes those that KIMI_VL_KERNELS names. Where they are static, decoding steps run over buffers that
        stay: on a GPU as graphs, and for ``ops`` given here on any device, as ``capture`` makes of them.
        """
        self.model = model
        self._text_tokens = text_tokens
        self.options = options = options or EngineOptions()
        self._device, text = model.device, model.config.text_config
        on_gpu, wanted = self._device.type == "cuda", graphs.wanted()
        # before memory is counted: kernels are compiled and tried
        with devices.current(self._device):
            chosen = ops or kernels.choose(self._device, use=options.use(text, model.dtype))
        page_bytes = PagedCache.page_bytes(text, options.page_size, model.dtype)
        # no more pages than all rows could ever fill
        most = options.max_num_seqs * -(-text.max_position_embeddings // options.page_size)
        spare = options.cache_bytes or spare_bytes(
            self._device,
            text,
            model.dtype,
            sequences=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            images=options.embedding_bytes,
        )
        pages = min(most, spare // page_bytes)
        if pages < 1:
            raise MemoryError("there is no memory left for a cache; free some or take a smaller model")
        self._cache = PagedCache(text, pages, options.page_size, dtype=model.dtype, device=self._device)
        self.scheduler = Scheduler(
            PagePool(pages),
            options.page_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_waiting=options.max_waiting,
            prefix_caching=options.prefix_caching,
        )
        self._embeddings = EmbeddingCache(options.embedding_bytes)
        self._faults = Faults(self._device)
        with devices.current(self._device):
            self._decoder, self._static = FusedDecoder(model.language_model, chosen), None
            if chosen.static and wanted and (on_gpu or ops):
                capture = capture or (CudaGraphs(self._device) if on_gpu else None)
                self._static = StaticDecoder(model, self._decoder, self._cache, options.max_num_seqs, capture)
                self._static.prepare()
        self._tickets: dict[Request, Ticket] = {}
        self._new: deque[Ticket] = deque()
        # No Condition here: an exception that is raised in a caller's thread from outside (a cancelled prediction's)
        # can strike inside its Python code, and leave it locked for ever or the next call unheard. A lock and a queue
        # are single steps in C.
        self._lock = threading.RLock()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._broken: BaseException | None = None
        self.steps = 0

    def submit(
        self,
        ids: Sequence[int],
        patches: Sequence[Patches],
        max_new_tokens: int,
        guide: Guide,
        seconds: float = float("inf"),
    ) -> Ticket:
        """Queue a prompt with its images (in the order of their placeholders) for up to ``max_new_tokens`` new tokens.

        Raises :class:`UserError` (E_OVERLOADED, E_PROMPT_TOO_LONG) at once; what happens later reaches the guide.
        """
        if not ids or not 0 <= min(ids) <= max(ids) < self.model.config.text_config.vocab_size:
            raise ValueError("a prompt has at least one token, and none outside of the vocabulary")
        pad = self.model.config.media_placeholder_token_id
        request = Request(list(ids), max_new_tokens, spans(ids, patches, pad))
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
                self.scheduler.check(ticket.request.prompt_length, ticket.request.max_new_tokens)
            except NeverFits:
                raise UserError(
                    "E_PROMPT_TOO_LONG", "prompt and answer need more memory than there is; shorten either."
                ) from None
            if len(self._new) + len(self.scheduler.waiting) >= self.options.max_waiting:
                raise Overloaded("too many requests are waiting; try again later.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="kimi_vl engine", daemon=True)
                atexit.register(self._abandon)
            if self._thread.ident is None:  # it may not have started when it was made: the system may refuse
                self._thread.start()
            self._new.append(ticket)
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
        """False once no request can be served any more; each is refused then."""
        return self._broken is None

    # The thread

    def _serve(self) -> None:
        try:
            with devices.current(self._device):
                while self._collect():
                    self._drop_the_late_and_cancelled()
                    works = self.scheduler.plan()
                    if self._static is not None and works and all(work.decodes for work in works):
                        self._decode(self._static, works)
                    elif works:
                        self._step(works)
        except BaseException as error:  # whatever it is, nobody may wait for this thread any longer
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
        if not works:
            return
        self.steps += 1
        logits = self._faults.attempt(self._forward, works)
        if not isinstance(logits, Failed):
            for work in works:
                self.scheduler.computed(work)
            ready = [work for work in works if work.complete]
            if ready:
                self._advance([self._tickets[work.request] for work in ready], logits)
        elif len(works) == 1:
            self._fail_alone(works[0].request, logits.reason)
        else:
            log.warning("a step of %d requests failed (%s); each is tried alone", len(works), logits.kind)
            for work in works:
                self._step([work])

    def _decode(self, static: StaticDecoder, works: Sequence[Work]) -> None:
        """Decode until something else is to be done, each step begun before the tokens of the last one are read::

            host    launch 1  launch 2  read 1, commit  launch 3  read 2, commit  ...
            device            step 1 .........  step 2 .................  step 3 ....

        It takes for granted that each of them follows as it was drawn, and that the next one is drawn by the same
        rules. Where that turns out to be wrong for a request, its part of the step does not count, and what has to be
        computed instead overwrites it. Nothing between two launches may wait for the device.
        """
        flight = self._faults.attempt(self._launch, static, works, 0)
        counts = [True] * len(works)
        while flight is not None:
            if isinstance(flight, Failed):
                log.warning("a decoding step failed (%s); it is tried another way", flight.kind)
                return self._step(works)
            following, after = [], None
            if all(counts) and not self._interrupted():
                following = self.scheduler.ahead(works)
            if following:
                after = self._faults.attempt(self._launch, static, following, 1)
                if isinstance(after, Failed):
                    log.warning("a decoding step could not begin early (%s)", after.kind)
                    after = None
            drawn = self._faults.attempt(flight.launched.read)
            if isinstance(drawn, Failed):
                log.warning("a decoding step could not be read (%s); it is tried another way", drawn.kind)
                return self._step([work for work, counted in zip(works, counts, strict=True) if counted])
            counts = [
                counts[row] and self._commit(work, token, finite, after and after.limits[row])
                for row, (work, token, finite) in enumerate(zip(works, *drawn, strict=True))
            ]
            works, flight = following, after

    def _launch(self, static: StaticDecoder, works: Sequence[Work], early: int) -> _Flight:
        """Begin a step; ``early`` is how many tokens of each request are still to be read."""
        self.steps += 1
        self._clear(works)
        tickets = [self._tickets[work.request] for work in works]
        limits = [self._limit(ticket) for ticket in tickets]
        rows = [
            Row(
                None if early else work.request.ids[-1],
                work.begin,
                work.request.pages,
                ticket.sampling,
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
            self._fail(request, NotFinite())
            return False
        asked = self._asked(ticket, lambda: self._next(ticket))
        if asked is None:
            return False
        self._faults.success()
        self._take(ticket, drawn if asked.forced is None else asked.forced)
        if request not in self._tickets or request.ids[-1] != drawn:
            return False
        return self._asked(ticket, lambda: self._limit(ticket)) == limit

    def _interrupted(self) -> bool:
        """Whether requests came, or one of those that run is to end."""
        now = time.monotonic()
        return bool(self._new) or any(ticket.cancelled or now > ticket.deadline for ticket in self._tickets.values())

    def _clear(self, works: Sequence[Work]) -> None:
        """Clear the pages that works are the first to write to: a value that is not finite, left by an earlier user of
        a page, would spoil even masked products."""
        fresh, size = self.scheduler.fresh, self.options.page_size
        if fresh:
            pages = [page for work in works for page in work.request.pages[work.begin // size :] if page in fresh]
            self._cache.clear(pages)
            fresh.difference_update(pages)

    def _forward(self, works: Sequence[Work]) -> Tensor:
        """Float32 logits (complete works, vocab_size)."""
        model = self.model
        self._clear(works)
        step = self._cache.step([Chunk(work.request.pages, work.begin, work.end) for work in works])
        ids = [token for work in works for token in work.request.ids[work.begin : work.end]]
        features = [feature for work in works for feature in self._features(work)]
        ids = devices.tensor([ids], torch.int64, self._device)
        embeddings = model.embed(ids, torch.cat(features) if features else None)
        states = self._decoder.states(embeddings[0], step)  # (T, H)
        ends = itertools.accumulate(work.end - work.begin for work in works)
        last = [end - 1 for end, work in zip(ends, works, strict=True) if work.complete]
        return self._decoder.logits(states[devices.tensor(last, torch.int64, self._device)])

    def _features(self, work: Work) -> list[Tensor]:
        """The image vectors (t, H) of the placeholders among a work's tokens."""
        parts = []
        for span, patches in zip(work.request.images, self._tickets[work.request].patches, strict=True):
            begin, end = max(span.begin, work.begin), min(span.end, work.end)
            if begin < end:
                parts.append(self._embed(patches)[begin - span.begin : end - span.begin])
        return parts

    def _embed(self, patches: Patches) -> Tensor:
        found = self._embeddings.lookup(patches.digest)
        if found is None:
            pixels = torch.from_numpy(patches.pixel_values).to(self.model.device)
            found = self.model.encode_images(pixels, [patches.grid])
            self._embeddings.keep(patches.digest, found)
        return found

    def _advance(self, tickets: Sequence[Ticket], logits: Tensor) -> None:
        """Get each request's next token and let its guide take it."""
        asked = [self._asked(ticket, lambda ticket=ticket: self._next(ticket)) for ticket in tickets]
        for ticket, token in zip(tickets, self._draw(tickets, logits, asked), strict=True):
            if ticket.request not in self._tickets:  # its guide failed
                continue
            if isinstance(token, Exception):
                self._fail_alone(ticket.request, token)
            else:
                self._faults.success()
                self._take(ticket, token)

    def _draw(
        self, tickets: Sequence[Ticket], logits: Tensor, asked: Sequence[_Next | None]
    ) -> Sequence[int | Exception]:
        """The next token of each of B requests, or why it has none; ``logits`` (B, V). Where drawing for all together
        fails, it is done for each alone."""
        tokens = self._faults.attempt(self._draw_together, tickets, logits, asked)
        if not isinstance(tokens, Failed):
            return tokens
        if len(tickets) == 1:
            return [tokens.reason]
        log.warning("drawing for %d requests failed (%s); each is tried alone", len(tickets), tokens.kind)
        return [
            self._draw([ticket], logits[row : row + 1], [each])[0]
            for row, (ticket, each) in enumerate(zip(tickets, asked, strict=True))
        ]

    def _draw_together(
        self, tickets: Sequence[Ticket], logits: Tensor, asked: Sequence[_Next | None]
    ) -> list[int | Exception]:
        finite = sampling.finite(logits).tolist()
        found: list[int | Exception] = [NotFinite() for _ in tickets]
        drawing = []
        for row, each in enumerate(asked):
            if each is not None and finite[row]:
                if each.forced is None:
                    drawing.append((row, tickets[row], each.limit))
                else:
                    found[row] = each.forced
        drawn = draw(
            logits[[row for row, _, _ in drawing]] if len(drawing) < len(tickets) else logits,
            [ticket.sampling for _, ticket, _ in drawing],
            [ticket.drawn for _, ticket, _ in drawing],
            [limit for _, _, limit in drawing],
            rounded=self.model.dtype == torch.bfloat16,
        )
        for (row, _, _), token in zip(drawing, drawn, strict=True):
            found[row] = token
        return found

    # What guides say

    def _asked(self, ticket: Ticket, question: Callable[[], T]) -> T | None:
        """The answer of a request's guide; one that raises ends its own request, and is None."""
        try:
            return question()
        except BaseException as error:
            self._fail(ticket.request, error)
            return None

    def _next(self, ticket: Ticket) -> _Next:
        return _Next(ticket.guide.forced(), self._limit(ticket))

    def _limit(self, ticket: Ticket) -> int:
        """The ids of a request's next draw are below it."""
        return self._text_tokens if ticket.guide.text_only else self.model.config.text_config.vocab_size

    def _take(self, ticket: Ticket, token: int) -> None:
        request, vocabulary = ticket.request, self.model.config.text_config.vocab_size
        following = None if ticket.cancelled else self._asked(ticket, lambda: ticket.guide.take(token))
        if request not in self._tickets:  # its guide failed
            return
        if following is None:
            self._release(request)
        elif not 0 <= following < vocabulary or len(request.ids) >= request.prompt_length + request.max_new_tokens:
            # a GPU that meets an id without an embedding is lost, and with it everybody else
            self._fail(request, ValueError("a guide put a token outside of the vocabulary, or after the last one"))
        else:
            ticket.drawn += 1
            request.ids.append(following)

    # Ends

    def _release(self, request: Request, evict: bool = False) -> Ticket:
        self.scheduler.remove(request, evict)
        return self._tickets.pop(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        self._release(request, evict=True).fail(error)

    def _fail_alone(self, request: Request, failure: Exception) -> None:
        """A request has failed in a step of its own."""
        self._fail(request, failure)
        if self._faults.alone(failure):
            log.warning("requests fail one after another (%s); the engine checks itself", type(failure).__name__)
            checked = self._faults.attempt(self.check)
            if isinstance(checked, Failed) and not isinstance(checked.reason, Overloaded):
                raise Broken(f"a prompt that is known to be right cannot be answered ({checked.kind})")

    @torch.inference_mode()
    def check(self) -> None:
        """Answer a prompt with a picture by two tokens, the way that every request takes, and raise what that raises.
        For the engine's thread, or while nothing runs."""
        config, pool, count = self.model.config, self.scheduler.pool, -(-3 // self.options.page_size)
        if pool.available < count:
            return  # there will be another time
        (height, width), side = config.vision_config.merge_kernel_size, config.vision_config.patch_size
        picture = Patches(np.zeros((height * width, 3, side, side), np.float32), (height, width))
        request = Request(
            [config.media_placeholder_token_id, 0],
            2,
            [Span(0, 1, picture.digest)],
            pages=[pool.take() for _ in range(count)],
        )
        self.scheduler.fresh.update(request.pages)
        self._tickets[request] = ticket = Ticket(request, [picture], Unguided())
        try:
            for begin in (0, 2):
                logits = self._forward([Work(request, begin, len(request.ids))])
                (token,) = self._draw_together([ticket], logits, [self._next(ticket)])
                if isinstance(token, Exception):
                    raise token
                request.ids.append(token)
        finally:
            del self._tickets[request]
            self._embeddings.drop(picture.digest)
            for page in request.pages:
                pool.release(page)

    def _break(self, error: BaseException) -> None:
        """The thread cannot go on: every caller is told."""
        log.error("the engine has stopped: %s", type(error).__name__)
        with self._lock:
            self._broken = error
            tickets = [*self._tickets.values(), *self._new]
            self._tickets, self._new = {}, deque()
        for ticket in tickets:
            ticket.fail(error)


@dataclass(frozen=True)
class _Flight:
    """A decoding step under way, and below which ids it draws for each request."""

    launched: Launched
    limits: Sequence[int]


@dataclass(frozen=True)
class _Next:
    """What a guide says of the next token: it, or None for a drawn one, whose id is below ``limit``."""

    forced: int | None
    limit: int
