"""Joins neighbouring events before they are handed to another thread: waking it for every token costs more than tokens.

Each thread that wakes wants Python's interpreter, which the engine's thread needs for the next step of everybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .events import Answer, Event, Reasoning
from .output_processor import Deliver


class Coalescer:
    """Takes the place of ``deliver``, and calls it with pieces of about ``interval`` seconds of one kind.

    The first piece leaves at once, and so does what is held when the kind changes or the request ends, by
    :class:`Done` or an error. There is no timer: what is held leaves with a later event.
    """

    def __init__(self, deliver: Deliver, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._deliver, self._interval, self._clock = deliver, interval, clock
        self._kind: type[Reasoning] | type[Answer] = Answer
        self._held: list[Reasoning | Answer] = []
        self._sent_at = float("-inf")

    def __call__(self, event: Event | Exception) -> None:
        if not isinstance(event, Reasoning | Answer):
            self._release()
            self._deliver(event)
            return
        if type(event) is not self._kind:
            self._release()
            self._kind = type(event)
        self._held.append(event)
        if self._clock() - self._sent_at >= self._interval:
            self._release()

    def _release(self) -> None:
        text = "".join(event.text for event in self._held)
        logprobs = tuple(each for event in self._held if isinstance(event, Answer) for each in event.logprobs)
        self._held.clear()
        if text or logprobs:
            self._sent_at = self._clock()
            self._deliver(Reasoning(text) if self._kind is Reasoning else Answer(text, logprobs))
