"""A request as its caller hands it to the engine: images as patches, and an output processor.

The engine asks the output processor about every token.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from ..model.config import num_image_tokens
from ..model.vision import Grid
from .faults import as_exception
from .sampling import Constraint, LogitBias, Logprobs, NextToken, Sampled, Sampling, uniforms
from .scheduler import Request, Scheduler, Span

T = TypeVar("T")
log = logging.getLogger(__name__)
MEAN_OF = 32  # about so many of the last requests decide the mean duration


class Patches:
    """An image as the vision tower takes it: ``pixel_values`` (P, 3, 14, 14), float32, in a ``grid``.

    The digest is the SHA-256 of exactly these values, so that only equal pictures are taken for each other.
    """

    def __init__(self, pixel_values: np.ndarray, grid: Grid):
        self.pixel_values, self.grid = pixel_values, grid
        self.digest = hashlib.sha256(repr(grid).encode() + np.ascontiguousarray(pixel_values).tobytes()).digest()

    @property
    def tokens(self) -> int:
        return num_image_tokens(self.grid)


class OutputProcessor(Protocol):
    """What the engine asks about a request. All calls come from the engine's thread, and must not block.

    An exception from any call ends its own request and no other.
    """

    @property
    def sampling(self) -> Sampling:
        """How tokens are sampled. Read once, when the request is submitted."""
        ...

    @property
    def text_only(self) -> bool:
        """Whether tokens without text are ruled out for the next token."""
        ...

    @property
    def logit_bias(self) -> LogitBias | None:
        """What is added to the logits of the next token."""
        ...

    @property
    def constraint(self) -> Constraint | None:
        """What rules out some of the next tokens."""
        ...

    def started(self, num_cached_tokens: int) -> None:
        """The prompt is computed, but for ``num_cached_tokens`` of it that prefix caching found; tokens follow."""
        ...

    def forced(self) -> int | None:
        """The next token where it is not sampled. Asked once for each token."""
        ...

    def sampled(self, logprobs: Logprobs) -> None:
        """Log-probabilities of the token that :meth:`take` gets next, where ``sampling`` asks for them and the token
        was sampled."""
        ...

    def take(self, token: int) -> int | None:
        """Consume a sampled token; returns what follows the sequence: it, another token, or None at the end."""
        ...

    def fail(self, error: Exception) -> None:
        """The request has failed; nothing more comes."""
        ...


class NullOutputProcessor:
    """The output processor of a request that no caller sent: accepts every token, reports nothing."""

    sampling = Sampling(1, 0.9, 20, 0)
    text_only = False
    logit_bias: LogitBias | None = None
    constraint: Constraint | None = None

    def started(self, num_cached_tokens: int) -> None:
        pass

    def sampled(self, logprobs: Logprobs) -> None:
        pass

    def forced(self) -> int | None:
        return None

    def take(self, token: int) -> int | None:
        return token

    def fail(self, error: Exception) -> None:
        pass


class CountingOutputProcessor(NullOutputProcessor):
    """The output processor of a request that this program sends: ends it after ``max_new_tokens`` tokens.

    ``over`` is set at its end, and ``error`` is what it failed of, if it did.
    """

    def __init__(self, max_new_tokens: int, sampling: Sampling):
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.error: Exception | None = None
        self.over = threading.Event()
        self._count = 0

    def take(self, token: int) -> int | None:
        self._count += 1
        if self._count < self.max_new_tokens:
            return token
        self.over.set()
        return None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.over.set()


class RequestHandle:
    """A request in the engine; :meth:`kimi_vl.engine.engine.Engine.cancel` takes it back."""

    def __init__(
        self, request: Request, patches: Sequence[Patches], processor: OutputProcessor, deadline: float = float("inf")
    ):
        self.request, self.patches, self.processor, self.deadline = request, patches, processor, deadline
        self.sampling = processor.sampling
        self.num_output_tokens = 0
        self.submitted_at = time.monotonic()
        self.cancelled = False
        self._numbers: tuple[int, list[float]] = (0, [])  # where they begin, and uniform numbers from there on

    def number(self, position: int) -> float:
        """The uniform random number that decides the token at ``position``; 0 where none does."""
        if self.sampling.greedy:
            return 0.0
        begin, numbers = self._numbers
        if not begin <= position < begin + len(numbers):
            begin, numbers = self._numbers = position, uniforms(self.sampling.seed, position, 64)
        return numbers[position - begin]

    def fail(self, error: BaseException) -> None:
        """Report the error; an output processor that raises here affects no other request."""
        try:
            self.processor.fail(as_exception(error))
        except BaseException as another:
            log.warning("a request's end could not be told (%s)", type(another).__name__)


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one moment; those that count are since its start."""

    running: int  # requests
    waiting: int  # requests
    cache_usage_ratio: float  # of the KV cache's pages, those that running requests hold, from 0 to 1
    steps: int
    prompt_tokens_computed: int
    prompt_tokens_cached: int  # found by prefix caching, and not computed
    output_tokens: int
    mean_request_s: float  # from queue to last token, of the last requests that were answered; 0 before the first
    healthy: bool


class ActiveRequests:
    """The requests that wait or run, and what their output processors decide. For the engine's thread."""

    def __init__(self, scheduler: Scheduler, vocab_size: int, text_tokens: int):
        self._scheduler, self._vocab_size, self._text_tokens = scheduler, vocab_size, text_tokens
        self.handles: dict[Request, RequestHandle] = {}
        self.output_tokens = 0
        self.mean_request_s = 0.0
        self._answered = 0

    def stats(self, new: int, steps: int, healthy: bool) -> EngineStats:
        """Figures of this moment, with ``new`` requests that the scheduler does not know yet. For any thread."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=new + len(scheduler.waiting),
            cache_usage_ratio=1 - scheduler.pool.available / scheduler.pool.count,
            steps=steps,
            prompt_tokens_computed=scheduler.prompt_tokens_computed,
            prompt_tokens_cached=scheduler.prompt_tokens_cached,
            output_tokens=self.output_tokens,
            mean_request_s=self.mean_request_s,
            healthy=healthy,
        )

    def ask(self, handle: RequestHandle, question: Callable[[], T]) -> T | None:
        """The answer of a request's output processor; one that raises ends its own request, and is None."""
        try:
            return question()
        except BaseException as error:
            self.fail(handle.request, error)
            return None

    def next_token(self, handle: RequestHandle) -> NextToken:
        processor = handle.processor
        return NextToken(
            processor.forced(),
            handle.sampling,
            handle.number(handle.num_output_tokens),
            self._limit(handle),
            processor.logit_bias,
            processor.constraint,
        )

    def _limit(self, handle: RequestHandle) -> int:
        """The id that a request samples next is below it."""
        return self._text_tokens if handle.processor.text_only else self._vocab_size

    def device_limit(self, handle: RequestHandle) -> int | None:
        """The same where that is all the difference there is from sampling by itself, as the static decoder does it;
        None where the host has to look at the logits."""
        processor = handle.processor
        on_host = handle.sampling.logprobs is not None or processor.logit_bias or processor.constraint
        return None if on_host else self._limit(handle)

    def accept(self, handle: RequestHandle, sampled: Sampled) -> None:
        """Give a token to the output processor, and append what follows to the sequence, or end the request."""
        request = handle.request
        following = None if handle.cancelled else self.ask(handle, lambda: self._take(handle, sampled))
        if request not in self.handles:  # its output processor failed
            return
        if following is None:
            self.release(request)
            if not handle.cancelled:
                self._answered += 1
                seconds = time.monotonic() - handle.submitted_at
                self.mean_request_s += (seconds - self.mean_request_s) / min(self._answered, MEAN_OF)
        elif (
            not 0 <= following < self._vocab_size or len(request.ids) >= request.prompt_length + request.max_new_tokens
        ):
            # a GPU that meets an id without an embedding is lost, and with it every other request
            self.fail(
                request, ValueError("an output processor put a token outside of the vocabulary, or after the last one")
            )
        else:
            handle.num_output_tokens += 1
            request.ids.append(following)

    def _take(self, handle: RequestHandle, sampled: Sampled) -> int | None:
        if not handle.num_output_tokens:
            handle.processor.started(handle.request.num_cached_tokens)
        self.output_tokens += 1
        if sampled.logprobs is not None:
            handle.processor.sampled(sampled.logprobs)
        return handle.processor.take(sampled.token)

    def release(self, request: Request, evict: bool = False) -> RequestHandle:
        """End a request, whatever it was doing; with ``evict``, its pages are not found again."""
        self._scheduler.remove(request, evict)
        return self.handles.pop(request)

    def fail(self, request: Request, error: BaseException) -> None:
        self.release(request, evict=True).fail(error)


def spans(ids: Sequence[int], patches: Sequence[Patches], pad: int) -> list[Span]:
    """Where each image's placeholders ``pad`` are. Raises ValueError where they do not go with the images."""
    found, at = [], 0
    for image in patches:
        while at < len(ids) and ids[at] != pad:
            at += 1
        found.append(Span(at, at + image.tokens, image.digest))
        at += image.tokens
    if sum(token == pad for token in ids) != sum(image.tokens for image in patches):
        raise ValueError("the placeholders and the images differ in number")
    return found
