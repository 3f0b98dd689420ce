"""Continuous batching with chunked prefill and prefix caching: requests in, scheduled chunks out.

No tensors, no text, no threads. A request is admitted only when every page it may ever need is reserved for it, so
that no running request is ever preempted. First come, first served: the head of the queue waits for pages and is not
overtaken, and every request that decodes gets one token in each step.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .page_pool import PagePool


@dataclass(frozen=True)
class Span:
    """Positions ``begin`` to ``end`` of a prompt are the placeholders of an image with this digest."""

    begin: int
    end: int
    digest: bytes


@dataclass(eq=False)
class Request:
    """A sequence: ``ids`` are the prompt and the tokens after it, of which there may be ``max_new_tokens``."""

    ids: list[int]
    max_new_tokens: int
    images: Sequence[Span] = ()
    prompt_length: int = field(init=False)
    computed: int = 0  # tokens whose keys are in the KV cache
    num_cached_tokens: int = 0  # of these, the ones that prefix caching found
    admitted_at: float | None = None  # of time.monotonic(), when it left the queue
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full pages, as far as they are known

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)


@dataclass(frozen=True)
class ScheduledChunk:
    """Compute positions ``begin`` to ``end`` of a request; ``pages`` hold everything up to ``end``."""

    request: Request
    begin: int
    end: int

    @property
    def complete(self) -> bool:
        """Whether the request's next token can be sampled after this."""
        return self.end == len(self.request.ids)

    @property
    def decodes(self) -> bool:
        """Whether this is a decode step: a single token, after which the next one can be sampled."""
        return self.complete and self.end - self.begin == 1


class NeverFits(Exception):
    """The request needs more pages than there are."""


class Scheduler:
    """Plans steps of at most ``max_num_batched_tokens`` tokens for at most ``max_num_seqs`` requests at once."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ):
        if not 0 < max_num_seqs <= max_num_batched_tokens:
            raise ValueError("every running request must have its token in a step")
        self.pool, self.page_size = pool, page_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.prefix_caching = prefix_caching
        # pages that were taken and hold an earlier user's values; whoever clears one removes it from here
        self.fresh: set[int] = set()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prompt_tokens_computed = self.prompt_tokens_cached = 0  # of all requests so far

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, prompt_length: int, max_new_tokens: int) -> None:
        """Raises :class:`NeverFits` for what could not run even alone."""
        if self._page_count(prompt_length + max_new_tokens) > self.pool.count:
            raise NeverFits

    def add(self, request: Request) -> None:
        """Queue a request; raises :class:`NeverFits`, and then nothing has changed. The caller bounds the queue."""
        self.check(request.prompt_length, request.max_new_tokens)
        self.waiting.append(request)

    def plan(self) -> list[ScheduledChunk]:
        """The chunks of one step, single tokens first; empty only when nothing waits or runs."""
        self._admit()
        decoding = [request for request in self.running if request.computed == len(request.ids) - 1]
        chunks = [ScheduledChunk(request, request.computed, request.computed + 1) for request in decoding]
        left = self.max_num_batched_tokens - len(chunks)
        longer = []
        for request in self.running:
            missing = len(request.ids) - request.computed
            if missing > 1 and left > 0:
                end = request.computed + min(missing, left)
                (longer if end - request.computed > 1 else chunks).append(
                    ScheduledChunk(request, request.computed, end)
                )
                left -= end - request.computed
        chunks += longer
        for chunk in chunks:
            self._extend(chunk.request, chunk.end)
        return chunks

    def plan_overlapped(self, chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
        """The decode step after ``chunks``, before their tokens are known; empty where a request gets its last one.

        It counts only for requests that go on with the token it assumes; see :mod:`kimi_vl.engine.overlap`.
        """
        if any(chunk.end + 1 >= chunk.request.prompt_length + chunk.request.max_new_tokens for chunk in chunks):
            return []
        following = [ScheduledChunk(chunk.request, chunk.end, chunk.end + 1) for chunk in chunks]
        for chunk in following:
            self._extend(chunk.request, chunk.end)
        return following

    def computed(self, chunk: ScheduledChunk) -> None:
        """The keys of a chunk are in the KV cache now; its full pages may be shared from here on."""
        request = chunk.request
        request.computed = chunk.end
        self.prompt_tokens_computed += max(0, min(chunk.end, request.prompt_length) - chunk.begin)
        if not self.prefix_caching:
            return
        for index in range(len(request.keys), request.computed // self.page_size):
            request.keys.append(self._key(request, index))
        for index in range(chunk.begin // self.page_size, request.computed // self.page_size):
            self.pool.register(request.pages[index], request.keys[index])

    def remove(self, request: Request, evict: bool = False) -> None:
        """A request is over, waiting or running: release its pages; with ``evict``, prefix caching forgets them."""
        if request in self.running:
            for page in reversed(request.pages):  # the end of a sequence is evicted first
                if evict:
                    self.pool.evict(page)
                self.pool.release(page)
            request.pages = []
            self.running.remove(request)  # last: who sees nothing running sees every page released
        elif request in self.waiting:
            self.waiting.remove(request)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if self.prefix_caching:
                self._match_prefix(request)
            if self.pool.available - self._owed(self.running) < self._owed([request]):
                for page in request.pages:
                    self.pool.release(page)
                request.pages, request.computed, request.num_cached_tokens = [], 0, 0
                return
            self.running.append(self.waiting.popleft())
            request.admitted_at = time.monotonic()
            self.prompt_tokens_cached += request.num_cached_tokens

    def _owed(self, requests: Sequence[Request]) -> int:
        """Pages reserved for these requests that they have not taken yet."""
        return sum(
            self._page_count(request.prompt_length + request.max_new_tokens) - len(request.pages)
            for request in requests
        )

    def _match_prefix(self, request: Request) -> None:
        """Take the pages that hold the same prefix already; the last token is always computed."""
        for index in range((len(request.ids) - 1) // self.page_size):
            if index == len(request.keys):
                request.keys.append(self._key(request, index))
            page = self.pool.lookup(request.keys[index])
            if page is None:
                break
            request.pages.append(page)
        request.computed = request.num_cached_tokens = len(request.pages) * self.page_size

    def _extend(self, request: Request, end: int) -> None:
        while len(request.pages) < self._page_count(end):
            request.pages.append(self.pool.take())
            self.fresh.add(request.pages[-1])

    def _key(self, request: Request, index: int) -> bytes:
        """Stands for all tokens up to the end of page ``index``; images count by what they show."""
        begin, end = index * self.page_size, (index + 1) * self.page_size
        digest = hashlib.sha256(request.keys[index - 1] if index else b"")
        digest.update(b"".join(token.to_bytes(4, "little") for token in request.ids[begin:end]))
        for image in request.images:
            if image.begin < end and begin < image.end:
                digest.update(image.digest + (begin - image.begin).to_bytes(8, "little", signed=True))
        return digest.digest()

    def _page_count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
