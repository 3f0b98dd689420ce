"""One thread that serves every request by continuous batching: plan, prepare tensors, forward, sample, commit.

Knows token ids, images as patches, and for each request an output processor that decides what to do with a sampled
token; no text and no files. An error that belongs to one request ends that request alone; see
:mod:`kimi_vl.engine.faults` for what ends the engine.
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
from .cuda_graphs import Action, CudaGraphs, DecodeInput, Launched, StaticDecoder
from .decoder import FusedDecoder
from .faults import Broken, Failed, Faults, NotFinite, Overloaded
from .image_cache import EmbeddingCache
from .kv_cache import Chunk, PagedCache
from .page_pool import PagePool
from .requests import NullOutputProcessor, OutputProcessor, Patches, RequestHandle, spans
from .sampling import sample_batch
from .scheduler import NeverFits, Request, ScheduledChunk, Scheduler, Span

__all__ = ["Engine", "EngineOptions", "OutputProcessor", "Overloaded", "Patches", "RequestHandle"]

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
            chosen = ops or kernels.select_ops(self._device, use=options.use(text, model.dtype))
        page_bytes = PagedCache.page_bytes(text, options.page_size, model.dtype)
        # no more pages than all sequences could ever fill
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
        self._handles: dict[Request, RequestHandle] = {}
        self._new: deque[RequestHandle] = deque()
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
        processor: OutputProcessor,
        seconds: float = float("inf"),
    ) -> RequestHandle:
        """Queue a prompt with its images (in the order of their placeholders) for up to ``max_new_tokens`` new tokens.

        Raises :class:`UserError` (E_OVERLOADED, E_PROMPT_TOO_LONG) at once; later errors reach
        :meth:`OutputProcessor.fail`.
        """
        if not ids or not 0 <= min(ids) <= max(ids) < self.model.config.text_config.vocab_size:
            raise ValueError("a prompt has at least one token, and none outside of the vocabulary")
        pad = self.model.config.media_placeholder_token_id
        request = Request(list(ids), max_new_tokens, spans(ids, patches, pad))
        handle = RequestHandle(request, patches, processor, time.monotonic() + seconds)
        try:
            self._queue(handle)
        except BaseException:
            handle.cancelled = True  # whoever was to hold it has been cancelled meanwhile
            raise
        return handle

    def _queue(self, handle: RequestHandle) -> None:
        with self._lock:
            if self._broken or self._closing:
                raise RuntimeError("the engine has stopped")
            try:
                self.scheduler.check(handle.request.prompt_length, handle.request.max_new_tokens)
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
            self._new.append(handle)
        self._bell.put(None)

    def cancel(self, handle: RequestHandle) -> None:
        """Stop a request within one step; harmless when it is over. The output processor hears no more of it."""
        handle.cancelled = True
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
            for handle in [*self._handles.values(), *self._new]:
                handle.cancelled = True
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
                    chunks = self.scheduler.plan()
                    if self._static is not None and chunks and all(chunk.decodes for chunk in chunks):
                        self._decode(self._static, chunks)
                    elif chunks:
                        self._step(chunks)
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
                handle = self._new.popleft()
                self._handles[handle.request] = handle
                self.scheduler.add(handle.request)
            return self.scheduler.busy or not self._closing

    def _drop_the_late_and_cancelled(self) -> None:
        now = time.monotonic()
        for request, handle in list(self._handles.items()):
            if handle.cancelled:
                self._release(request)
            elif now > handle.deadline:
                self._fail(request, Overloaded("the request was not done in time; try again later, or ask for less."))

    @torch.inference_mode()
    def _step(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Compute all chunks together; where that fails, each alone, so that only those at fault fail."""
        if not chunks:
            return
        self.steps += 1
        logits = self._faults.attempt(self._forward, chunks)
        if not isinstance(logits, Failed):
            for chunk in chunks:
                self.scheduler.computed(chunk)
            ready = [chunk for chunk in chunks if chunk.complete]
            if ready:
                self._advance([self._handles[chunk.request] for chunk in ready], logits)
        elif len(chunks) == 1:
            self._fail_alone(chunks[0].request, logits.reason)
        else:
            log.warning("a step of %d requests failed (%s); each is tried alone", len(chunks), logits.kind)
            for chunk in chunks:
                self._step([chunk])

    def _decode(self, static: StaticDecoder, chunks: Sequence[ScheduledChunk]) -> None:
        """Decode until something else is to be done, each step begun before the tokens of the last one are read::

            host    launch 1  launch 2  read 1, commit  launch 3  read 2, commit  ...
            device            step 1 .........  step 2 .................  step 3 ....

        It takes for granted that each of them follows as it was drawn, and that the next one is drawn by the same
        rules. Where that turns out to be wrong for a request, its part of the step does not count, and what has to be
        computed instead overwrites it. Nothing between two launches may wait for the device.
        """
        in_flight = self._faults.attempt(self._launch, static, chunks, 0)
        counts = [True] * len(chunks)
        while in_flight is not None:
            if isinstance(in_flight, Failed):
                log.warning("a decoding step failed (%s); it is tried another way", in_flight.kind)
                return self._step(chunks)
            following, after = [], None
            if all(counts) and not self._interrupted():
                following = self.scheduler.plan_overlapped(chunks)
            if following:
                after = self._faults.attempt(self._launch, static, following, 1)
                if isinstance(after, Failed):
                    log.warning("a decoding step could not begin early (%s)", after.kind)
                    after = None
            sampled = self._faults.attempt(in_flight.launched.read)
            if isinstance(sampled, Failed):
                log.warning("a decoding step could not be read (%s); it is tried another way", sampled.kind)
                return self._step([chunk for chunk, counted in zip(chunks, counts, strict=True) if counted])
            counts = [
                counts[row] and self._commit(chunk, token, finite, after and after.limits[row])
                for row, (chunk, token, finite) in enumerate(zip(chunks, *sampled, strict=True))
            ]
            chunks, in_flight = following, after

    def _launch(self, static: StaticDecoder, chunks: Sequence[ScheduledChunk], early: int) -> InFlightStep:
        """Begin a step; ``early`` is how many tokens of each request are still to be read."""
        self.steps += 1
        self._clear(chunks)
        handles = [self._handles[chunk.request] for chunk in chunks]
        limits = [self._limit(handle) for handle in handles]
        rows = [
            DecodeInput(
                None if early else chunk.request.ids[-1],
                chunk.begin,
                chunk.request.pages,
                handle.sampling,
                handle.number(handle.num_output_tokens + early),
                limit,
            )
            for chunk, handle, limit in zip(chunks, handles, limits, strict=True)
        ]
        return InFlightStep(static.launch(rows), limits)

    def _commit(self, chunk: ScheduledChunk, sampled: int, finite: bool, limit: int | None) -> bool:
        """Take in what a step computed and drew for a request. Whether the next step, which was begun with the drawn
        token and is to draw below ``limit``, counts for it."""
        request = chunk.request
        handle = self._handles[request]
        self.scheduler.computed(chunk)
        if not finite:
            self._fail(request, NotFinite())
            return False
        asked = self._asked(handle, lambda: self._next(handle))
        if asked is None:
            return False
        self._faults.success()
        self._take(handle, sampled if asked.forced is None else asked.forced)
        if request not in self._handles or request.ids[-1] != sampled:
            return False
        return self._asked(handle, lambda: self._limit(handle)) == limit

    def _interrupted(self) -> bool:
        """Whether requests came, or one of those that run is to end."""
        now = time.monotonic()
        return bool(self._new) or any(handle.cancelled or now > handle.deadline for handle in self._handles.values())

    def _clear(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Clear the pages that chunks are the first to write to: a value that is not finite, left by an earlier user of
        a page, would spoil even masked products."""
        fresh, size = self.scheduler.fresh, self.options.page_size
        if fresh:
            pages = [page for chunk in chunks for page in chunk.request.pages[chunk.begin // size :] if page in fresh]
            self._cache.clear(pages)
            fresh.difference_update(pages)

    def _forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Float32 logits (complete chunks, vocab_size)."""
        model = self.model
        self._clear(chunks)
        step = self._cache.step([Chunk(chunk.request.pages, chunk.begin, chunk.end) for chunk in chunks])
        ids = [token for chunk in chunks for token in chunk.request.ids[chunk.begin : chunk.end]]
        features = [feature for chunk in chunks for feature in self._features(chunk)]
        ids = devices.tensor([ids], torch.int64, self._device)
        embeddings = model.embed(ids, torch.cat(features) if features else None)
        states = self._decoder.states(embeddings[0], step)  # (T, H)
        ends = itertools.accumulate(chunk.end - chunk.begin for chunk in chunks)
        last = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.complete]
        return self._decoder.logits(states[devices.tensor(last, torch.int64, self._device)])

    def _features(self, chunk: ScheduledChunk) -> list[Tensor]:
        """The image vectors (t, H) of the placeholders among a chunk's tokens."""
        parts = []
        for span, patches in zip(chunk.request.images, self._handles[chunk.request].patches, strict=True):
            begin, end = max(span.begin, chunk.begin), min(span.end, chunk.end)
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

    def _advance(self, handles: Sequence[RequestHandle], logits: Tensor) -> None:
        """Get each request's next token and let its output processor take it."""
        asked = [self._asked(handle, lambda handle=handle: self._next(handle)) for handle in handles]
        for handle, token in zip(handles, self._sample(handles, logits, asked), strict=True):
            if handle.request not in self._handles:  # its output processor failed
                continue
            if isinstance(token, Exception):
                self._fail_alone(handle.request, token)
            else:
                self._faults.success()
                self._take(handle, token)

    def _sample(
        self, handles: Sequence[RequestHandle], logits: Tensor, asked: Sequence[_Next | None]
    ) -> Sequence[int | Exception]:
        """The next token of each of B requests, or why it has none; ``logits`` (B, V).

        Where sampling the batch fails, each request is sampled alone.
        """
        tokens = self._faults.attempt(self._sample_batch, handles, logits, asked)
        if not isinstance(tokens, Failed):
            return tokens
        if len(handles) == 1:
            return [tokens.reason]
        log.warning("sampling for %d requests failed (%s); each is tried alone", len(handles), tokens.kind)
        return [
            self._sample([handle], logits[index : index + 1], [each])[0]
            for index, (handle, each) in enumerate(zip(handles, asked, strict=True))
        ]

    def _sample_batch(
        self, handles: Sequence[RequestHandle], logits: Tensor, asked: Sequence[_Next | None]
    ) -> list[int | Exception]:
        finite = sampling.finite(logits).tolist()
        found: list[int | Exception] = [NotFinite() for _ in handles]
        sampling_for = []
        for index, each in enumerate(asked):
            if each is not None and finite[index]:
                if each.forced is None:
                    sampling_for.append((index, handles[index], each.limit))
                else:
                    found[index] = each.forced
        sampled = sample_batch(
            logits[[index for index, _, _ in sampling_for]] if len(sampling_for) < len(handles) else logits,
            [handle.sampling for _, handle, _ in sampling_for],
            [handle.num_output_tokens for _, handle, _ in sampling_for],
            [limit for _, _, limit in sampling_for],
            rounded=self.model.dtype == torch.bfloat16,
        )
        for (index, _, _), token in zip(sampling_for, sampled, strict=True):
            found[index] = token
        return found

    # What output processors say

    def _asked(self, handle: RequestHandle, question: Callable[[], T]) -> T | None:
        """The answer of a request's output processor; one that raises ends its own request, and is None."""
        try:
            return question()
        except BaseException as error:
            self._fail(handle.request, error)
            return None

    def _next(self, handle: RequestHandle) -> _Next:
        return _Next(handle.processor.forced(), self._limit(handle))

    def _limit(self, handle: RequestHandle) -> int:
        """The id that a request samples next is below it."""
        return self._text_tokens if handle.processor.text_only else self.model.config.text_config.vocab_size

    def _take(self, handle: RequestHandle, token: int) -> None:
        request, vocabulary = handle.request, self.model.config.text_config.vocab_size
        following = None if handle.cancelled else self._asked(handle, lambda: handle.processor.take(token))
        if request not in self._handles:  # its output processor failed
            return
        if following is None:
            self._release(request)
        elif not 0 <= following < vocabulary or len(request.ids) >= request.prompt_length + request.max_new_tokens:
            # a GPU that meets an id without an embedding is lost, and with it everybody else
            self._fail(
                request, ValueError("an output processor put a token outside of the vocabulary, or after the last one")
            )
        else:
            handle.num_output_tokens += 1
            request.ids.append(following)

    # Ends

    def _release(self, request: Request, evict: bool = False) -> RequestHandle:
        self.scheduler.remove(request, evict)
        return self._handles.pop(request)

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
        self._handles[request] = handle = RequestHandle(request, [picture], NullOutputProcessor())
        try:
            for begin in (0, 2):
                logits = self._forward([ScheduledChunk(request, begin, len(request.ids))])
                (token,) = self._sample_batch([handle], logits, [self._next(handle)])
                if isinstance(token, Exception):
                    raise token
                request.ids.append(token)
        finally:
            del self._handles[request]
            self._embeddings.drop(picture.digest)
            for page in request.pages:
                pool.release(page)

    def _break(self, error: BaseException) -> None:
        """The thread cannot go on: every caller is told."""
        log.error("the engine has stopped: %s", type(error).__name__)
        with self._lock:
            self._broken = error
            handles = [*self._handles.values(), *self._new]
            self._handles, self._new = {}, deque()
        for handle in handles:
            handle.fail(error)


@dataclass(frozen=True)
class InFlightStep:
    """A decoding step under way, and below which ids it draws for each request."""

    launched: Launched
    limits: Sequence[int]


@dataclass(frozen=True)
class _Next:
    """What an output processor says of the next token: it, or None for a sampled one, whose id is below ``limit``."""

    forced: int | None
    limit: int
