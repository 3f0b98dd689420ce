"""Events cross to an event loop in order and none is lost, and many streams wake it once in a while."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from kimi_vl.event_loop import MAX_PACE_S, Bell, Inbox
from kimi_vl.events import Answer


class Clock:
    """Of an event loop, what a bell uses; time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: list[Callable[[], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.closed = False

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.soon.append(function)

    def call_at(self, when: float, function: Callable[[], None]) -> Any:
        self.timers.append((when, function))
        clock = self

        class Handle:
            def cancel(self) -> None:
                clock.timers = [timer for timer in clock.timers if timer[1] != function]

        return Handle()

    def run(self) -> None:
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        soon, self.soon = self.soon, []
        for function in [*soon, *(function for _, function in due)]:
            function()


class Woken(Inbox):
    """Counts how often it is woken."""

    def __init__(self, bell: Bell):
        super().__init__(bell)
        self.times = 0

    def wake(self) -> None:
        self.times += 1
        self._announced = False
        self._items.clear()


def bell_of(streams: int, pace: float = 0.001) -> tuple[Clock, Bell]:
    clock = Clock()
    bell = Bell(cast(asyncio.AbstractEventLoop, clock), pace)
    bell.streams = streams
    return clock, bell


def step(inboxes: list[Woken]) -> None:
    """The engine gives every request a token."""
    for inbox in inboxes:
        inbox.put((0, Answer("a")), urgent=False)


def test_a_step_of_the_engine_rings_once():
    clock, bell = bell_of(64)
    inboxes = [Woken(bell) for _ in range(64)]
    step(inboxes)
    assert len(clock.soon) == 1
    clock.run()
    assert [inbox.times for inbox in inboxes] == [1] * 64


def test_one_stream_gets_every_token_at_once():
    clock, bell = bell_of(1)
    inbox = Woken(bell)
    for number in range(5):
        step([inbox])
        clock.run()
        assert inbox.times == number + 1


def test_many_streams_are_woken_at_a_pace():
    clock, bell = bell_of(21, pace=0.001)
    inboxes = [Woken(bell) for _ in range(21)]
    for millisecond in range(100):
        clock.now = millisecond / 1000
        step(inboxes)
        clock.run()
    assert [inbox.times for inbox in inboxes] == [5] * 21, "every 20 ms"
    clock, bell = bell_of(10_000, pace=0.001)
    inbox = Woken(bell)
    for millisecond in range(1000):
        clock.now = millisecond / 1000
        step([inbox])
        clock.run()
    assert inbox.times == pytest.approx(1 / MAX_PACE_S, abs=1.5)


def test_what_is_urgent_does_not_wait():
    clock, bell = bell_of(64)
    waiting, hurried = Woken(bell), Woken(bell)
    step([waiting])
    clock.run()
    step([waiting])
    clock.run()
    assert waiting.times == 1 and len(clock.timers) == 1
    hurried.put((0, Answer("b")), urgent=True)
    clock.run()
    assert (waiting.times, hurried.times, clock.timers) == (2, 1, [])


def test_a_loop_that_is_closed_is_no_fault():
    clock, bell = bell_of(1)
    clock.closed = True
    step([Woken(bell)])


@pytest.mark.parametrize("urgent", [0.0, 0.05])
@pytest.mark.parametrize("pace", [0.0, 0.0005])
def test_everything_arrives_in_order(pace: float, urgent: float):
    """From a thread that does not wait, to many tasks that read at their own speed."""
    count, inboxes = 400, []

    def engine() -> None:
        order = random.Random(5)
        for number in range(count):
            for inbox in inboxes:
                inbox.put((number, Answer("a")), urgent=order.random() < urgent)

    async def read(inbox: Inbox) -> list[int]:
        numbers: list[int] = []
        while len(numbers) < count:
            numbers += [number for number, _ in await inbox.take()]
            if len(numbers) % 7 == 0:
                await asyncio.sleep(0)
        return numbers

    async def main() -> list[list[int]]:
        bell = Bell(asyncio.get_running_loop(), pace)
        bell.streams = 8
        inboxes.extend(Inbox(bell) for _ in range(8))
        reading = [asyncio.ensure_future(read(inbox)) for inbox in inboxes]
        await asyncio.sleep(0)
        thread = threading.Thread(target=engine)
        thread.start()
        found = await asyncio.wait_for(asyncio.gather(*reading), 120)
        thread.join()
        return found

    assert asyncio.run(main()) == [list(range(count))] * 8
