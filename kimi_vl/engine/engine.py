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
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..device import cuda
from ..errors import UserError
from ..model.config import TextConfig
from ..model.kimi_vl import KimiVL
from . import cuda_graphs
from .cuda_graphs import Action, CudaGraphs, StaticDecoder
from .decoder import FusedDecoder, forms, widths
from .faults import Broken, Failed, Faults, Overloaded
from .image_cache import EmbeddingCache
from .kv_cache import Chunk, PagedCache, spare_bytes
from .overlap import OverlappedDecoding
from .page_pool import PagePool
from .requests import (
    ActiveRequests,
    EngineStats,
    NullOutputProcessor,
    OutputProcessor,
    Patches,
    RequestHandle,
    spans,
)
from .sampling import NextToken, Sampled, sample_step
from .scheduler import NeverFits, Request, ScheduledChunk, Scheduler, Span

__all__ = ["Engine", "EngineOptions", "EngineStats", "OutputProcessor", "Overloaded", "Patches", "RequestHandle"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on. ``cache_bytes`` 0 takes what the device can spare, and ``max_num_batched_tokens`` 0
    what suits it: see :meth:`batched_tokens`."""

    page_size: int = 32
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 0
    max_waiting: int = 256
    cache_bytes: int = 0
    embedding_bytes: int = 256 << 20
    prefix_caching: bool = True

    def batched_tokens(self, kind: str) -> int:
        """Tokens of a step on a device of a ``kind`` ("cuda" or "cpu").

        While experts are read for few tokens each, a GPU computes longer steps in hardly more time; on a CPU they only
        keep sequences waiting that decode. Every running sequence has its token in a step.
        """
        return self.max_num_batched_tokens or max(self.max_num_seqs, 2048 if kind == "cuda" else 1024)

    def use(self, model: KimiVL, device: torch.device | None = None) -> kernels.Use:
        """What this asks on ``device`` of the operations of ``model``'s decoder, which need not have memory yet."""
        sizes = widths(model.config.text_config, self.page_size)
        own = forms(model.language_model)
        return kernels.Use(
            sizes, model.dtype, self.max_num_seqs, self.batched_tokens((device or model.device).type), *own
        )

    def page_count(self, device: torch.device, config: TextConfig, dtype: torch.dtype, weights: int = 0) -> int:
        """How many pages the KV cache gets of the memory that there is.

        ``weights`` are bytes of a GPU's free memory that the model's weights take before.
        """
        spare = self.cache_bytes or spare_bytes(
            device,
            config,
            dtype,
            sequences=self.max_num_seqs,
            max_num_batched_tokens=self.batched_tokens(device.type),
            images=self.embedding_bytes,
            weights=weights,
        )
        return self.pages_in(spare, config, dtype)

    def pages_in(self, nbytes: int, config: TextConfig, dtype: torch.dtype) -> int:
        """How many pages ``nbytes`` hold, and no more than all sequences can ever fill."""
        most = self.max_num_seqs * -(-config.max_position_embeddings // self.page_size)
        return min(most, nbytes // PagedCache.page_bytes(config, self.page_size, dtype))


class Engine:
    """Serves requests through one model by continuous batching. Callers may be in any thread.

    ``cache`` and ``scheduler`` belong to the engine's thread while requests run; ``ops`` is the table of operations
    that the decoder computes with, and ``static_decoder`` runs the decode steps where these can be captured.
    """

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

        ``ops`` None takes those that KIMI_VL_KERNELS names. Where they are static, decode steps run over static
        tensors: as CUDA graphs on a GPU, and for ``ops`` given here on any device, as ``capture`` makes of them.
        """
        self.model = model
        self.options = options = options or EngineOptions()
        self._device, text = model.device, model.config.text_config
        on_gpu, wanted = self._device.type == "cuda", cuda_graphs.wanted()
        # before memory is counted: kernels are compiled and tried
        with cuda.current(self._device):
            self.ops = ops or kernels.select_ops(self._device, use=options.use(model))
        pages = options.page_count(self._device, text, model.dtype)
        if pages < 1:
            raise MemoryError("there is no memory left for a cache; free some or take a smaller model")
        self.cache = PagedCache(text, pages, options.page_size, dtype=model.dtype, device=self._device)
        self.scheduler = Scheduler(
            PagePool(pages),
            options.page_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.batched_tokens(self._device.type),
            prefix_caching=options.prefix_caching,
        )
        self._requests = ActiveRequests(self.scheduler, text.vocab_size, text_tokens)
        self._embeddings = EmbeddingCache(model, options.embedding_bytes)
        self._faults = Faults(self._device)
        self.static_decoder: StaticDecoder | None = None
        self._overlapped: OverlappedDecoding | None = None
        with cuda.current(self._device):
            self._decoder = FusedDecoder(model.language_model, self.ops)
            if self.ops.static and wanted and (on_gpu or ops):
                capture = capture or (CudaGraphs(self._device) if on_gpu else None)
                self.static_decoder = StaticDecoder(model, self._decoder, self.cache, options.max_num_seqs, capture)
                self.static_decoder.prepare()
                self._overlapped = OverlappedDecoding(
                    self.static_decoder,
                    self.scheduler,
                    self._requests,
                    self._faults,
                    begin_step=self._begin_overlapped,
                    interrupted=self._interrupted,
                )
        self._new: deque[RequestHandle] = deque()
        # No Condition: an exception raised in a caller's thread from outside (a cancelled prediction's) can strike
        # inside its Python code, and leave it locked for ever or lose the next wake-up. A lock and a SimpleQueue are
        # single steps in C.
        self._lock = threading.RLock()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()  # whose thread it is, once there is one
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
            handle.cancelled = True  # the caller was stopped before it had the handle
            raise
        return handle

    def _queue(self, handle: RequestHandle) -> None:
        if self._forked():  # before the lock, which another thread may have held at the fork
            raise RuntimeError("a model does not outlive a fork; load it in the process that is to use it")
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
                raise Overloaded("too many requests are waiting; try again later.", "queue")
            if self._thread is None:
                self._process = os.getpid()
                self._thread = threading.Thread(target=self._serve, name="kimi_vl engine", daemon=True)
                atexit.register(self._abandon)
            if self._thread.ident is None:  # it may not have started when it was made: the system may refuse
                self._thread.start()
            self._new.append(handle)
        self._wake.put(None)

    def cancel(self, handle: RequestHandle) -> None:
        """Stop a request within one step; harmless when it is over. The output processor hears no more of it."""
        handle.cancelled = True
        self._wake.put(None)

    def close(self, wait: bool = True) -> None:
        """Finish what runs or waits, take nothing more, and end the thread."""
        if self._forked():
            return
        with self._lock:
            self._closing = True
        self._wake.put(None)
        if wait and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """The program ends: a thread that is inside torch by then would take it down with an error."""
        if self._forked():
            return
        with self._lock:
            for handle in [*self._requests.handles.values(), *self._new]:
                handle.cancelled = True
        self.close()

    def idle(self) -> bool:
        """Whether no request waits or runs, and nothing of an earlier one is held."""
        with self._lock:
            return not (self._new or self._requests.handles or self.scheduler.busy)

    def healthy(self) -> bool:
        """False once no request can be served any more; each is refused then."""
        return self._broken is None and not self._closing and not self._forked()

    def stats(self) -> EngineStats:
        """Figures of this moment. For any thread, at any time: nothing is locked, and nothing is computed."""
        return self._requests.stats(len(self._new), self.steps, self.healthy())

    def _forked(self) -> bool:
        """Whether this is a child of the process that serves: forking copies no thread but the one that forks."""
        return self._thread is not None and self._process != os.getpid()

    # The thread

    def _serve(self) -> None:
        try:
            with cuda.current(self._device):
                while self._collect():
                    self._drop_late_and_cancelled()
                    chunks = self.scheduler.plan()
                    if not chunks:
                        continue
                    if self._overlapped is None or not all(chunk.decodes for chunk in chunks):
                        self._step(chunks, self._forward)
                    elif self._overlapped.samples(chunks):
                        failed = self._overlapped.run(chunks)
                        if failed:
                            self._step(failed, self._forward)
                    else:
                        self._step(chunks, self._static_forward)
        except BaseException as error:  # whatever it is, nobody may wait for this thread any longer
            self._break(error)

    def _collect(self) -> bool:
        """Take in new requests, waiting for one when there is nothing to do; False at the end."""
        while not (self._new or self.scheduler.busy or self._closing):
            self._wake.get()
        with contextlib.suppress(queue.Empty):  # what has come until now is seen below
            while True:
                self._wake.get_nowait()
        with self._lock:
            while self._new:
                handle = self._new.popleft()
                self._requests.handles[handle.request] = handle
                self.scheduler.add(handle.request)
            return self.scheduler.busy or not self._closing

    def _drop_late_and_cancelled(self) -> None:
        now, requests = time.monotonic(), self._requests
        for request, handle in list(requests.handles.items()):
            if handle.cancelled:
                requests.release(request)
            elif now > handle.deadline:
                late = Overloaded("the request was not done in time; try again later, or ask for less.", "deadline")
                requests.fail(request, late)

    @torch.inference_mode()
    def _step(self, chunks: Sequence[ScheduledChunk], forward: Callable[[Sequence[ScheduledChunk]], Tensor]) -> None:
        """Compute all chunks together; where that fails, each alone, so that only those at fault fail."""
        self.steps += 1
        logits = self._faults.attempt(forward, chunks)
        if not isinstance(logits, Failed):
            for chunk in chunks:
                self.scheduler.computed(chunk)
            ready = [chunk for chunk in chunks if chunk.complete]
            if ready:
                self._advance([self._requests.handles[chunk.request] for chunk in ready], logits)
        elif len(chunks) == 1:
            self._fail_alone(chunks[0].request, logits.reason)
        else:
            log.warning("a step of %d requests failed (%s); each is tried alone", len(chunks), logits.kind)
            for chunk in chunks:
                self._step([chunk], self._forward)

    def _interrupted(self) -> bool:
        """Whether requests came, or one of those that run is to end."""
        now, handles = time.monotonic(), self._requests.handles.values()
        return bool(self._new) or any(handle.cancelled or now > handle.deadline for handle in handles)

    def _begin_overlapped(self, chunks: Sequence[ScheduledChunk]) -> None:
        self.steps += 1
        self._clear(chunks)

    def _clear(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Clear the pages that chunks are the first to write to.

        A value that is not finite, left by an earlier user of a page, would spoil even masked products.
        """
        fresh, size = self.scheduler.fresh, self.options.page_size
        if fresh:
            pages = [page for chunk in chunks for page in chunk.request.pages[chunk.begin // size :] if page in fresh]
            self.cache.clear(pages)
            fresh.difference_update(pages)

    def _static_forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """The same for chunks of one token each, by the static decoder."""
        assert self._overlapped is not None
        self._clear(chunks)
        return self._overlapped.logits(chunks)

    def _forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Float32 logits (complete chunks, vocab_size)."""
        model = self.model
        self._clear(chunks)
        step = self.cache.step([Chunk(chunk.request.pages, chunk.begin, chunk.end) for chunk in chunks])
        ids = [token for chunk in chunks for token in chunk.request.ids[chunk.begin : chunk.end]]
        features = [
            feature
            for chunk in chunks
            for feature in self._embeddings.features(chunk, self._requests.handles[chunk.request].patches)
        ]
        ids = cuda.tensor([ids], torch.int64, self._device)
        embeddings = model.embed(ids, torch.cat(features) if features else None)
        states = self._decoder.states(embeddings[0], step)  # (T, H)
        ends = itertools.accumulate(chunk.end - chunk.begin for chunk in chunks)
        last = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.complete]
        return self._decoder.logits(states[cuda.tensor(last, torch.int64, self._device)])

    def _advance(self, handles: Sequence[RequestHandle], logits: Tensor) -> None:
        """Sample each request's next token, or take the forced one, and give it to the output processor."""
        requests = self._requests
        asked = [requests.ask(handle, lambda handle=handle: requests.next_token(handle)) for handle in handles]
        for handle, found in zip(handles, self._sample(logits, asked), strict=True):
            if handle.request not in requests.handles:  # its output processor failed
                continue
            if isinstance(found, Exception):
                self._fail_alone(handle.request, found)
            elif found is not None:
                self._faults.success()
                requests.accept(handle, found)

    def _sample(self, logits: Tensor, asked: Sequence[NextToken | None]) -> Sequence[Sampled | Exception | None]:
        """The next token of each of B requests, or why it has none; ``logits`` (B, V).

        Where sampling the batch fails, each request is sampled alone.
        """
        found = self._faults.attempt(sample_step, logits, asked, self.model.dtype == torch.bfloat16)
        if not isinstance(found, Failed):
            return found
        if len(asked) == 1:
            return [found.reason]
        log.warning("sampling for %d requests failed (%s); each is tried alone", len(asked), found.kind)
        return [self._sample(logits[index : index + 1], [each])[0] for index, each in enumerate(asked)]

    # Ends

    def _fail_alone(self, request: Request, failure: Exception) -> None:
        """A request has failed in a step of its own."""
        self._requests.fail(request, failure)
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
        self._requests.handles[request] = handle = RequestHandle(request, [picture], NullOutputProcessor())
        try:
            for begin in (0, 2):
                logits = self._forward([ScheduledChunk(request, begin, len(request.ids))])
                (found,) = sample_step(logits, [self._requests.next_token(handle)])
                if not isinstance(found, Sampled):
                    raise found or AssertionError("nothing was asked")
                request.ids.append(found.token)
        finally:
            del self._requests.handles[request]
            self._embeddings.drop(picture.digest)
            for page in request.pages:
                pool.release(page)

    def _break(self, error: BaseException) -> None:
        """The thread cannot go on: every caller is told."""
        log.error("the engine has stopped: %s", type(error).__name__)
        with self._lock:
            self._broken = error
            handles = [*self._requests.handles.values(), *self._new]
            self._requests.handles, self._new = {}, deque()
        for handle in handles:
            handle.fail(error)
