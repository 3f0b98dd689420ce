"""Runs a batch: as many requests at a time as the engine takes, each answer written as soon as it is there."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..events import Done
from ..pipeline import Pipeline
from ..prompt import Prompt
from ..serving import responses
from ..serving.errors import ApiError, from_exception
from ..serving.options import ServerOptions
from ..serving.protocol import ChatRequest, read_chat
from ..serving.service import fingerprint
from .files import Files
from .lines import Line, LineError, digest
from .progress import Progress
from .results import Results, failed

DECODERS = 4
"""Threads that decode pictures."""
BESIDE = 16
"""Sequences beyond those that are computed: their pictures are decoded meanwhile."""
WINDOW = 4
"""Where answers keep the order of the lines: so many times as many lines may wait for the first of them."""
_JOINED_S = 3600.0  # pieces of an answer are of no use here


class Batch:
    """One run over ``lines``, whose answers go to ``results``. ``options`` name the model."""

    def __init__(
        self,
        pipeline: Pipeline,
        options: ServerOptions,
        lines: Iterator[Line],
        files: Files,
        results: Results,
        progress: Progress,
        ordered: bool = False,
    ):
        self._pipeline, self._options, self._files = pipeline, options, files
        self._lines, self._results, self._progress, self._ordered = lines, results, progress, ordered
        self._fingerprint = fingerprint(pipeline)
        engine = pipeline.engine.options
        at_once = engine.max_num_seqs + min(BESIDE, engine.max_waiting)
        self._sequences = asyncio.Semaphore(at_once)
        self._window = asyncio.Semaphore(at_once * WINDOW if ordered else at_once)
        self._ids: set[int] = set()

    def run(self) -> None:
        """Answer every line that has no answer yet.

        Raises :class:`UserError` for what ends the whole run, and KeyboardInterrupt on SIGINT and SIGTERM; what was
        answered until then is in the results.
        """
        with asyncio.Runner() as runner:
            try:
                runner.run(self._run())
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None

    async def _run(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGTERM, task.cancel)
        loop.set_default_executor(ThreadPoolExecutor(DECODERS, thread_name_prefix="kimi_vl batch"))
        reader, before = _Reader(self._next), None
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._window.acquire()
                    line = await reader.next()
                    if line is None:
                        break
                    written = asyncio.Event()
                    group.create_task(self._work(line, before, written))
                    before = written if self._ordered else None
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _next(self) -> Line | None:
        """The next line without an answer. Runs in a thread."""
        for line in self._lines:
            key = None if line.custom_id is None else digest(line.custom_id.encode("utf-8", "surrogatepass"))
            if key in self._ids:
                sentence = "custom_id is that of an earlier line; give each line its own."
                again = digest(b"%d %d" % (line.number, line.digest))  # an answer to the earlier line is none to this
                line = replace(line, digest=again, body=None, error=LineError("duplicate_custom_id", sentence))
            elif key is not None:
                self._ids.add(key)
            if self._results.earlier.take(line.digest):
                continue
            if line.error is None and key is not None and self._results.earlier.has_id(key):
                raise UserError(
                    "E_PARAMETER",
                    f"line {line.number} has changed since it was answered; name another file for the answers.",
                )
            return line
        return None

    async def _work(self, line: Line, before: asyncio.Event | None, written: asyncio.Event) -> None:
        """Answer a line, and write that, after the line ``before`` where order is asked for."""
        result = await self._answer(line)
        if before is not None:
            await before.wait()
        self._results.append(result)
        written.set()
        self._window.release()
        self._progress.answered(failed(result))

    async def _answer(self, line: Line) -> dict[str, Any]:
        """The line of the answer."""
        name = f"{line.digest:016x}"
        result: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": line.custom_id}
        if line.error is not None:
            error = {"code": line.error.code, "message": f"line {line.number}: {line.error}", "line": line.number}
            return {**result, "response": None, "error": error}
        request_id = f"req_{name}"
        try:
            status, body = 200, await self._completion(line, name)
        except Exception as error:
            if not self._pipeline.healthy():
                raise UserError("E_INTERNAL", "the model can no longer answer; run the same command again.") from error
            refusal = from_exception(error, request_id)
            status, body = refusal.status, refusal.object()
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {**result, "response": response, "error": None}

    async def _completion(self, line: Line, name: str) -> dict[str, Any]:
        request = await asyncio.to_thread(self._request, line)
        model = self._options.served(request.model)
        if model is None:
            names = ", ".join(self._options.names())
            raise ApiError(404, f"there is no such model here; ask for {names}.", code="model_not_found", param="model")
        head = responses.Head(
            f"chatcmpl-{name}",
            int(time.time()),
            model,
            self._fingerprint,
            request.reasoning,
            self._options.reasoning_field,
            request.grounding,
        )
        return responses.completion(head, await self._choices(request))

    def _request(self, line: Line) -> ChatRequest:
        """The request of a line. Without a seed it has one of its own, so that another run gives the same answer."""
        body = line.body if line.body.get("seed") is not None else {**line.body, "seed": line.digest % 2**31}
        request = read_chat(body)
        return replace(request, turns=self._files.put_in(request.turns))

    async def _choices(self, request: ChatRequest) -> list[Done]:
        """All answers; the others begin when the first one's prompt is in the KV cache."""
        computed = asyncio.Event()
        async with self._sequences:  # no more files in memory than sequences
            prompt = await asyncio.to_thread(self._pipeline.prepare, request.turns, **request.reading)

        def begin(choice: int) -> asyncio.Task[Done]:
            return asyncio.ensure_future(self._choice(prompt, request.params_of(choice), computed))

        tasks = [begin(0)]
        try:
            await computed.wait()
            tasks += [begin(choice) for choice in range(1, request.n)]
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _choice(self, prompt: Prompt, params: dict[str, Any], computed: asyncio.Event) -> Done:
        try:
            async with self._sequences:
                events = self._pipeline.astream(prompt, interval=_JOINED_S, **params)
                async with contextlib.aclosing(events):
                    async for event in events:
                        computed.set()
                        if isinstance(event, Done):
                            return event
        finally:
            computed.set()
        raise AssertionError("a request ends with Done")


class _Reader:
    """Calls a function in a thread that nobody waits for at the end: standard input may stay silent for ever."""

    def __init__(self, function: Any):
        self._function, self._loop = function, asyncio.get_running_loop()
        self._asked: queue.SimpleQueue[asyncio.Future[Line | None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="kimi_vl batch reader", daemon=True).start()

    async def next(self) -> Line | None:
        future: asyncio.Future[Line | None] = self._loop.create_future()
        self._asked.put(future)
        return await future

    def _serve(self) -> None:
        while True:
            future = self._asked.get()
            try:
                line, error = self._function(), None
            except Exception as failure:
                line, error = None, failure
            try:
                self._loop.call_soon_threadsafe(self._tell, future, line, error)
            except RuntimeError:  # the loop is closed
                return
            if line is None:
                return

    @staticmethod
    def _tell(future: asyncio.Future[Line | None], line: Line | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(line)
