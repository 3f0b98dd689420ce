"""Generators of an async `predict`, run by an imitation of what Cog does with its coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import itertools
import random
import threading
import weakref
from collections.abc import Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from kimi_vl.cog_streaming import Cancellation, Streams, on_cancel
from kimi_vl.media.images import ImageOptions
from kimi_vl.pipeline import Pipeline
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"

PREDICTION: contextvars.ContextVar[str] = contextvars.ContextVar("prediction", default="nobody's")
"""As the variables by which Cog finds the logs and metrics of a prediction."""


class Canceled(BaseException):
    """As Cog's exception."""


class Cog:
    """A loop in a thread of its own, to which coroutines are submitted from the thread of their prediction."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any], name: str = "") -> Future[Any]:
        async def with_name() -> Any:
            PREDICTION.set(name)
            return await coroutine

        return asyncio.run_coroutine_threadsafe(with_name(), self.loop)

    def output(self, future: Future[Any]) -> list[Any]:
        """What Cog sends: a generator is driven in this thread."""
        returned = future.result()
        assert isinstance(returned, list) or inspect.isgenerator(returned)
        return list(returned)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def cog() -> Iterator[Cog]:
    running = Cog()
    yield running
    running.end()


@pytest.fixture
def streams(cog: Cog) -> Iterator[Streams]:
    made = Streams(Canceled)
    cog.submit(made.try_out()).result()
    assert made.streaming
    yield made
    made.close()


@pytest.fixture
def joined(cog: Cog) -> Iterator[Streams]:
    """Where the hook is not called."""
    made = Streams(Canceled)
    asyncio.run_coroutine_threadsafe = made._submit
    cog.submit(made.try_out()).result()
    assert not made.streaming
    yield made
    made.close()


def test_the_hook_is_taken_out_again() -> None:
    before = asyncio.run_coroutine_threadsafe
    made = Streams(Canceled)
    assert asyncio.run_coroutine_threadsafe != before
    made.close()
    assert asyncio.run_coroutine_threadsafe is before


def test_a_generator_streams_in_the_context_of_its_coroutine(cog: Cog, streams: Streams) -> None:
    step: SimpleQueue[None] = SimpleQueue()
    closed = []

    def pieces() -> Generator[str, None, None]:
        try:
            for number in range(3):
                step.get(timeout=300)
                yield f"{PREDICTION.get()} {number}"
        finally:
            closed.append(PREDICTION.get())

    generator = cog.submit(streams.run(pieces()), "mine").result()
    for number in range(3):
        step.put(None)
        assert next(generator) == f"mine {number}", "each is there before the next one may be made"
    assert list(generator) == [] and closed == ["mine"]
    assert PREDICTION.get() == "nobody's"


def test_a_reader_that_leaves_closes_the_generator_in_its_context(cog: Cog, streams: Streams) -> None:
    closed = []

    def pieces() -> Generator[str, None, None]:
        try:
            yield "one"
            yield "two"
        finally:
            closed.append(PREDICTION.get())

    generator = cog.submit(streams.run(pieces()), "mine").result()
    assert next(generator) == "one"
    generator.close()
    assert closed == ["mine"]


def test_many_run_at_once_and_keep_their_contexts(cog: Cog, streams: Streams) -> None:
    together = threading.Barrier(16)

    def pieces(name: str) -> Generator[str, None, None]:
        for _ in range(20):
            together.wait(timeout=300)
            yield f"{name}={PREDICTION.get()}"

    def run(number: int) -> list[Any]:
        return cog.output(cog.submit(streams.run(pieces(str(number))), str(number)))

    with ThreadPoolExecutor(16) as threads:
        outputs = list(threads.map(run, range(16)))
    assert outputs == [[f"{number}={number}"] * 20 for number in range(16)]


def test_an_error_leaves_as_it_is(cog: Cog, streams: Streams) -> None:
    def pieces() -> Generator[str, None, None]:
        yield "one"
        raise KeyError("two")

    generator = cog.submit(streams.run(pieces())).result()
    assert next(generator) == "one"
    with pytest.raises(KeyError, match="two"):
        next(generator)


def waiting(events: SimpleQueue[Any]) -> Generator[str, None, None]:
    """Waits for events, and hears that it is cancelled while it does."""
    on_cancel(events.put)
    while True:
        event = events.get(timeout=300)
        if isinstance(event, BaseException):
            raise event
        yield event


def test_cancelling_interrupts_a_generator_that_waits(cog: Cog, streams: Streams) -> None:
    events: SimpleQueue[Any] = SimpleQueue()
    future = cog.submit(streams.run(waiting(events)))
    generator = future.result()
    events.put("one")
    assert next(generator) == "one"
    asking = threading.Timer(0.05, future.cancel)
    asking.start()
    with pytest.raises(Canceled):
        next(generator)
    asking.join()


def test_cancelling_between_two_steps_and_before_the_first(cog: Cog, streams: Streams) -> None:
    for taken in (0, 1):
        closed = []

        def pieces(closed: list[bool] = closed) -> Generator[str, None, None]:
            try:
                while True:
                    yield "more"
            finally:
                closed.append(True)

        future = cog.submit(streams.run(pieces()))
        generator = future.result()
        assert [next(generator) for _ in range(taken)] == ["more"] * taken
        future.cancel()
        future.cancel()
        with pytest.raises(Canceled):
            next(generator)
        assert closed == [True] * taken, "what has not begun has nothing to close"


def test_cancelling_one_leaves_the_others(cog: Cog, streams: Streams) -> None:
    first, second = SimpleQueue[Any](), SimpleQueue[Any]()
    futures = [cog.submit(streams.run(waiting(events))) for events in (first, second)]
    generators = [future.result() for future in futures]
    for events, generator in zip((first, second), generators, strict=True):
        events.put("one")
        assert next(generator) == "one"
    futures[0].cancel()
    with pytest.raises(Canceled):
        next(generators[0])
    second.put("two")
    assert next(generators[1]) == "two"


def test_cancelling_a_coroutine_that_still_runs(cog: Cog, streams: Streams) -> None:
    entered = threading.Event()

    async def slow() -> None:
        entered.set()
        await asyncio.sleep(30)

    future = cog.submit(slow())
    assert entered.wait(300)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()


@pytest.mark.parametrize("where", ["submit", "result"])
def test_what_cog_raises_before_it_has_the_future_is_a_cancelled_future(
    cog: Cog, streams: Streams, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Cog reads "canceled" off the name of the error, and calls its own exception a failure."""

    def raising(*given: Any) -> Any:
        raise Canceled

    events: SimpleQueue[Any] = SimpleQueue()
    if where == "submit":
        monkeypatch.setattr(streams, "_submit", raising)
    else:
        monkeypatch.setattr(Future, "result", raising)
    work = streams.run(waiting(events))
    future = asyncio.run_coroutine_threadsafe(work, cog.loop)
    with pytest.raises(CancelledError):
        future.result()
    work.close()


def test_without_the_hook_everything_is_sent_at_the_end_in_its_context(cog: Cog, joined: Streams) -> None:
    def pieces() -> Generator[str, None, None]:
        for number in range(3):
            yield f"{PREDICTION.get()} {number}"

    returned = cog.submit(joined.run(pieces()), "mine").result()
    assert returned == ["mine 0", "mine 1", "mine 2"]


def test_without_the_hook_many_run_at_once(cog: Cog, joined: Streams) -> None:
    together = threading.Barrier(40)

    def pieces() -> Generator[str, None, None]:
        together.wait(timeout=300)
        yield "met"

    futures = [cog.submit(joined.run(pieces())) for _ in range(40)]
    assert [future.result(timeout=300) for future in futures] == [["met"]] * 40


def test_without_the_hook_cancelling_is_heard_too(cog: Cog, joined: Streams) -> None:
    events: SimpleQueue[Any] = SimpleQueue()
    over = threading.Event()

    def pieces() -> Generator[str, None, None]:
        try:
            yield from waiting(events)
        finally:
            over.set()

    future = cog.submit(joined.run(pieces()))
    events.put("one")
    while not events.empty():
        pass
    assert future.cancel()
    assert over.wait(300)
    with pytest.raises(CancelledError):
        future.result()


def test_a_request_that_did_not_pass_the_hook_is_joined(cog: Cog, streams: Streams) -> None:
    def pieces() -> Generator[str, None, None]:
        yield "one"

    future = streams._submit(streams.run(pieces()), cog.loop)
    assert future.result() == ["one"]


def test_a_hook_that_is_called_but_hears_nothing_is_found_out(cog: Cog, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Streams(Canceled)
    try:
        monkeypatch.setattr(Cancellation, "request", lambda self: None)
        cog.submit(made.try_out()).result()
        assert not made.streaming

        def pieces() -> Generator[str, None, None]:
            yield "one"

        assert cog.submit(made.run(pieces())).result() == ["one"]
    finally:
        made.close()


def test_nothing_of_a_request_outlives_it(cog: Cog, streams: Streams) -> None:
    """A cycle would wait for Python's collector, which a server of large requests gives little to count."""
    gc.disable()
    try:
        events: SimpleQueue[Any] = SimpleQueue()
        events.put("one")
        held = weakref.ref(events)
        future = cog.submit(streams.run(waiting(events)))
        generator = future.result()
        assert next(generator) == "one"
        generator.close()
        del events, generator, future
        cog.submit(asyncio.sleep(0)).result()  # the loop lets go of what it did last
        assert held() is None
    finally:
        gc.enable()


# With the engine


def test_no_page_and_no_ticket_is_left_by_requests_that_end_in_any_way(cog: Cog, streams: Streams) -> None:
    pipeline = Pipeline(
        loader.load(CHECKPOINT, dtype=torch.float32),
        Tokenizer.from_directory(CHECKPOINT),
        ImageOptions.from_directory(CHECKPOINT),
    )
    pool = pipeline.engine.scheduler.pool

    def pieces(number: int) -> Generator[str, None, None]:
        messages = [{"role": "user", "content": f"Count from {number}."}]
        length = 5 if number % 4 == 3 else 100
        with contextlib.closing(pipeline.stream(messages, seed=number, max_length_tokens=length)) as events:
            on_cancel(events.interrupt)
            for event in events:
                yield type(event).__name__

    def one(number: int) -> str:
        dice = random.Random(number)
        future = cog.submit(streams.run(pieces(number)))
        generator = future.result()
        if number % 4 == 0:
            future.cancel()
        elif number % 4 == 1:
            threading.Timer(dice.random() / 20, future.cancel).start()
        elif number % 4 == 2:
            for _ in itertools.islice(generator, dice.randrange(4)):
                pass
            generator.close()
            return "left"
        try:
            return list(generator)[-1]
        except Canceled:
            return "canceled"

    with ThreadPoolExecutor(16) as threads:
        ends = list(threads.map(one, range(64)))
    assert set(ends[::4]) == {"canceled"} and set(ends[3::4]) == {"Done"}
    assert set(ends[1::4]) <= {"canceled", "Done"} and set(ends[2::4]) == {"left"}
    pipeline.close()
    assert pool.available == pool.count, "every page is free again"
    assert pipeline.engine.idle()


def test_callbacks_are_called_once_whether_they_come_before_or_after() -> None:
    calls: list[BaseException] = []
    cancellation = Cancellation(Canceled)
    cancellation.check()
    cancellation.then(calls.append)
    assert calls == []
    cancellation.request()
    cancellation.request()
    cancellation.then(calls.append)
    assert [type(call) for call in calls] == [Canceled, Canceled]
    with pytest.raises(Canceled):
        cancellation.check()


def test_outside_of_a_request_nobody_cancels() -> None:
    calls: list[BaseException] = []
    on_cancel(calls.append)
    assert calls == []
