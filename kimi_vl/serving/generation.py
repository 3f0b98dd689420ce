"""The choices of one API request in the engine: submitted, their events handed to an event loop, cancelled.

The engine's thread puts events into a deque and rings a bell. The bell wakes the event loop at most once in a while
that grows with the number of streams: each wake-up takes Python's interpreter from the engine's thread, which needs it
for the next step of everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any

from ..engine.engine import RequestHandle
from ..events import Done, Event
from ..pipeline import Pipeline
from .protocol import ChatRequest

PACE_PER_STREAM_S = 0.0006
MAX_PACE_S = 0.07
"""A wake-up serves every stream that has something. Many streams wait a little longer for each, so that writing to them
takes a bounded share of a core; one stream gets every token at once."""

Item = tuple[int, Event | Exception]


class Bell:
    """Wakes an event loop for any number of inboxes. :meth:`ring` is for any thread, the rest for the loop's own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pace_per_stream: float = PACE_PER_STREAM_S):
        self._loop, self._pace_per_stream = loop, pace_per_stream
        self._waiting: deque[Inbox] = deque()
        self._rung = self._urgent = False
        self._timer: asyncio.TimerHandle | None = None
        self._woke_at = float("-inf")
        self.streams = 0

    def ring(self, inbox: Inbox, urgent: bool) -> None:
        """``inbox`` has something; ``urgent`` does not wait for the pace."""
        self._waiting.append(inbox)
        if urgent and not self._urgent:
            self._urgent = self._rung = True
            self._call(self._wake)
        elif not self._rung:
            self._rung = True
            self._call(self._schedule)

    def _call(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function)

    def _schedule(self) -> None:
        due = self._woke_at + min(MAX_PACE_S, self._pace_per_stream * (self.streams - 1))
        if due <= self._loop.time():
            self._wake()
        elif self._timer is None:
            self._timer = self._loop.call_at(due, self._wake)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woke_at = self._loop.time()
        self._rung = self._urgent = False  # first: what comes from here on rings again
        while self._waiting:
            self._waiting.popleft().wake()


class Inbox:
    """Events on their way from the engine's thread to one task of the loop."""

    def __init__(self, bell: Bell):
        self._bell = bell
        self._items: deque[Item] = deque()
        self._announced = False  # whether the bell knows; one that is woken takes everything
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item, urgent: bool) -> None:
        """For the engine's thread."""
        self._items.append(item)
        if urgent or not self._announced:
            self._announced = True
            self._bell.ring(self, urgent)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Item]:
        """All items that are there; waits for :meth:`wake` where there is none, and may still find none then."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                if not self._items:
                    await self._waiter
            finally:
                self._waiter = None
        self._announced = False  # first: what comes from here on rings again
        taken = []
        while self._items:
            taken.append(self._items.popleft())
        return taken


class Generation:
    """The ``n`` answers of a request. The others are submitted when the first one's prompt is in the KV cache.

    ``submitted`` is called once the messages are needed no longer.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        request: ChatRequest,
        bell: Bell,
        executor: Executor,
        deadline: float,
        submitted: Callable[[], None],
    ):
        self._pipeline, self._executor, self._deadline = pipeline, executor, deadline
        self._request: ChatRequest | None = request
        self._n, self._stream, self._submitted = request.n, request.stream, submitted
        self._bell, self._inbox = bell, Inbox(bell)
        self._handles: list[RequestHandle] = []
        self._others: asyncio.Task[None] | None = None
        self._closed = False
        bell.streams += 1

    async def begin(self) -> None:
        """Submit the first answer. Raises what :meth:`kimi_vl.pipeline.Pipeline.submit` raises."""
        assert self._request is not None
        await self._submit(self._request, 0)
        if self._n == 1:
            self._forget_request()

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """What has come since, for each choice in order; an empty list after :meth:`nudge`. Ends after the last Done.

        Raises what ends any of the choices.
        """
        left = self._n
        while left:
            items: list[tuple[int, Event]] = []
            for index, event in await self._inbox.take():
                if isinstance(event, Exception):
                    raise event
                items.append((index, event))
                left -= isinstance(event, Done)
            if items and self._request is not None and self._others is None:
                self._others = asyncio.ensure_future(self._submit_others(self._request))
            yield items

    async def done(self) -> list[Done]:
        """The summaries of all answers, in order."""
        found: dict[int, Done] = {}
        async for items in self.events():
            found |= {index: event for index, event in items if isinstance(event, Done)}
        return [found[index] for index in range(self._n)]

    def nudge(self) -> None:
        """Let :meth:`events` give an empty list if nothing else has come."""
        self._inbox.wake()

    def close(self) -> None:
        """Cancel whatever is not over; all memory is free within a step. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._bell.streams -= 1
        if self._others is not None:
            self._others.cancel()
        self._forget_request()
        for handle in self._handles:
            self._pipeline.engine.cancel(handle)

    async def _submit_others(self, request: ChatRequest) -> None:
        try:
            for choice in range(1, self._n):
                await self._submit(request, choice)
            self._forget_request()
        except Exception as error:
            self._inbox.put((0, error), urgent=True)

    def _forget_request(self) -> None:
        self._request = None
        self._submitted()

    async def _submit(self, request: ChatRequest, choice: int) -> None:
        """Images are decoded in another thread, and a request that was cancelled meanwhile does not stay."""
        loop = asyncio.get_running_loop()
        submitting = loop.run_in_executor(self._executor, self._send, request, choice)
        try:
            self._handles.append(await asyncio.shield(submitting))
        except asyncio.CancelledError:
            submitting.add_done_callback(self._cancel_late)
            raise

    def _send(self, request: ChatRequest, choice: int) -> RequestHandle:
        first, put = True, self._inbox.put

        def deliver(event: Event | Exception) -> None:
            nonlocal first
            urgent = first or isinstance(event, Done | Exception)
            if self._stream or urgent:
                put((choice, event), urgent)
            first = False

        params: dict[str, Any] = request.params_of(choice)
        return self._pipeline.submit(request.turns, (), deliver, deadline=self._deadline, **params)

    def _cancel_late(self, submitted: asyncio.Future[RequestHandle]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._pipeline.engine.cancel(submitted.result())
