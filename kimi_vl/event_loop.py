"""Hands events from the engine's thread to an event loop, for many requests at a time.

The engine's thread puts events into a deque and rings a bell. The bell wakes the event loop at most once in a while
that grows with the number of streams: each wake-up takes Python's interpreter from the engine's thread, which needs it
for the next step of everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from .events import Event

PACE_PER_STREAM_S = 0.001
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
