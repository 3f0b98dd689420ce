"""Many streams at a time through Cog 0.23.1, by what its server does and no document promises.

Cog streams what a plain generator yields, and gives a plain ``predict`` one request at a time. An ``async def predict``
gets as many as there are slots, and may return a plain generator: Cog then drives it in a thread of that request, which
streams. What Cog does for its coroutines is missing there, and comes from here:

* logs and metrics find their request by context variables, which Cog sets for the coroutine alone;
* cancelling calls ``cancel()`` on the future of the coroutine, which is done by then, so that nobody hears it.

Nothing here imports Cog. Where a part of this no longer holds, answers are sent whole.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, cast

_END = object()


class Cancellation:
    """Whether one request is cancelled; its callbacks get the exception that has to end the request."""

    def __init__(self, error: type[BaseException]):
        self._error = error
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[BaseException], None]] = []
        self._requested = False

    def request(self) -> None:
        """Cancel the request, from any thread; a second time does nothing."""
        with self._lock:
            self._requested = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self._error())

    def then(self, callback: Callable[[BaseException], None]) -> None:
        """Call ``callback`` when the request is cancelled, or at once if it was."""
        with self._lock:
            if not self._requested:
                self._callbacks.append(callback)
                return
        callback(self._error())

    def check(self) -> None:
        """Raise the exception if the request is cancelled."""
        if self._requested:
            raise self._error()


_current: contextvars.ContextVar[Cancellation] = contextvars.ContextVar("kimi_vl_cancellation")


def on_cancel(callback: Callable[[BaseException], None]) -> None:
    """Call ``callback`` with an exception when the request of this context is cancelled.

    Does nothing where requests are not run by :class:`Streams`: Cog raises in the thread of a plain ``predict``.
    """
    cancellation = _current.get(None)
    if cancellation is not None:
        cancellation.then(callback)


class _HeardFuture(Future[Any]):
    """The future of a coroutine, as Cog keeps it for cancelling and waits for it."""

    def heard(self, cancellation: Cancellation, cancelled: type[BaseException]) -> None:
        self._cancellation, self._cancelled = cancellation, cancelled

    def cancel(self) -> bool:
        self._cancellation.request()
        return super().cancel()

    def result(self, timeout: float | None = None) -> Any:
        # Until Cog knows that it has a future, it cancels by raising in the thread that waits here, and then calls the
        # request failed; of this exception it says "canceled", as it should.
        try:
            return super().result(timeout)
        except self._cancelled:
            self.cancel()
            raise CancelledError from None


class Streams:
    """Runs the generators of an async ``predict``. To be made before Cog submits ``setup``, in ``__init__``.

    ``cancelled`` is the exception class that tells Cog that a generator ended because it was cancelled.
    """

    def __init__(self, cancelled: type[BaseException]):
        self._cancelled = cancelled
        self._threads = ThreadPoolExecutor(1024)  # made as they are needed, and Cog's slots are fewer
        self._submit = asyncio.run_coroutine_threadsafe
        # Cog looks this name up in the module whenever it submits a coroutine, and keeps the future for cancelling.
        asyncio.run_coroutine_threadsafe = self._submit_heard
        self.streaming = False
        """Whether :meth:`try_out` has found that everything is as it should be."""

    def close(self) -> None:
        """Take the hook out again."""
        asyncio.run_coroutine_threadsafe = self._submit
        self._threads.shutdown(wait=False)

    def _submit_heard(self, coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Future[Any]:
        cancellation = Cancellation(self._cancelled)
        try:
            token = _current.set(cancellation)  # the task's context is a copy of the one that it is submitted from
            try:
                future = self._submit(coroutine, loop)
            finally:
                _current.reset(token)
        except self._cancelled:
            future = Future()
            future.cancel()
            return future
        # Not attributes of the one future that call its own methods: that would be a cycle, which outlives its request.
        future.__class__ = _HeardFuture
        cast(_HeardFuture, future).heard(cancellation, self._cancelled)
        return future

    async def try_out(self) -> None:
        """Find out whether Cog submits coroutines through the hook. Call it in an async ``setup``, which is one."""
        if _current.get(None) is None:
            return
        heard: list[BaseException] = []

        async def cancelled_later() -> None:
            on_cancel(heard.append)

        future = asyncio.run_coroutine_threadsafe(cancelled_later(), asyncio.get_running_loop())
        await asyncio.wrap_future(future)
        future.cancel()
        self.streaming = len(heard) == 1

    async def run(self, pieces: Generator[str, None, None]) -> Generator[str, None, None] | list[str]:
        """What an async ``predict`` returns to have Cog send ``pieces``: as they come, or else all of them at the end.

        Each step of ``pieces`` runs in a copy of the context of the coroutine that awaits this.
        """
        context = contextvars.copy_context()
        cancellation = _current.get(None)
        if self.streaming and cancellation is not None:
            return self._steps(pieces, context, cancellation)
        cancellation = Cancellation(self._cancelled)
        context.run(_current.set, cancellation)
        steps = self._steps(pieces, context, cancellation)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, list, steps)
        except asyncio.CancelledError:
            cancellation.request()
            raise

    def _steps(
        self, pieces: Generator[str, None, None], context: contextvars.Context, cancellation: Cancellation
    ) -> Generator[str, None, None]:
        try:
            while True:
                cancellation.check()
                piece = context.run(next, pieces, _END)
                if piece is _END:
                    return
                yield piece  # pyright: ignore[reportReturnType]
        finally:
            context.run(pieces.close)
