"""``POST /v1/chat/completions``: one request from its body to the end of its answers, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from starlette.types import Receive, Scope, Send

from ..engine.engine import RequestHandle
from ..event_loop import Bell, Inbox
from ..events import Done, Event
from ..pipeline import Pipeline
from ..prompt import Prompt
from ..text.messages import Turn
from . import responses
from .access import Body, Disconnected, log_error
from .errors import ApiError, from_exception
from .protocol import ChatRequest, read_chat
from .responses import Chunks, Head
from .service import Service

PING_S = 15.0
"""A stream that says nothing for so long sends a comment, which keeps proxies from closing it."""

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ChatCompletions:
    """``POST /v1/chat/completions``."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._service.available()
            body = await self._service.bodies.json(scope, receive)
        except ApiError as error:
            self._service.observer.rejects(error.status, error.code)
            raise
        await _unless_gone(_Answer(self._service, scope, send).run(body), receive)


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do ``work`` unless the client goes away meanwhile, which ends it at once. Raises :class:`Disconnected` then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone = not working.done()
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))
    if gone and working.cancelled():
        raise Disconnected
    working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """One chat completion, from its body to the end of its answer."""

    def __init__(self, service: Service, scope: Scope, send: Send):
        self._service, self._send = service, send
        self._id: str = scope["state"]["request_id"]
        self._log: dict[str, Any] = scope["state"].setdefault("log", {})
        self._began = time.monotonic()
        self._spoke = False
        self._spoke_at: dict[int, float] = {}  # when each choice had a piece last
        self._finished: dict[int, Done] = {}

    async def run(self, body: Body) -> None:
        observer, status = self._service.observer, 499
        generation = None
        try:
            generation, chunks = await self._begin(body)
            observer.begins()
            if chunks is None:
                status = await self._whole(generation)
            else:
                status = await self._stream(generation, chunks)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            refusal = from_exception(error, self._id, self._service.retry_after())
            status = refusal.status
            if status == 500:
                log_error(error, self._id)
            if generation is None:
                observer.rejects(status, refusal.code)
            raise refusal from None
        finally:
            body.release()
            if generation is not None:
                generation.close()
                for seconds in generation.queued():
                    observer.queued(seconds)
                observer.ends(status, time.monotonic() - self._began, list(self._finished.values()))
                self._log |= self._summary()

    async def _begin(self, body: Body) -> tuple[Generation, Chunks | None]:
        """Hand the request to the engine. Nothing of its messages stays here."""
        service = self._service
        request = read_chat(body.value, service.rules)
        model = service.model(request.model)
        body.value = None
        request = replace(request, turns=await service.with_pictures(request.turns, body))
        self._head = Head(
            f"chatcmpl-{uuid.uuid4().hex}",
            int(time.time()),
            model,
            service.fingerprint,
            request.reasoning,
            service.options.reasoning_field,
            request.grounding,
        )
        self._n = request.n
        generation = Generation(
            service.available(), request, service.bell(), service.executor_for, service.options.deadline_s, body.release
        )
        try:
            await generation.begin()
        except BaseException:
            generation.close()
            raise
        return generation, Chunks(self._head, request.include_usage) if request.stream else None

    async def _whole(self, generation: Generation) -> int:
        async for items in generation.events():
            self._note(items, chunks=False)
        body = json.dumps(responses.completion(self._head, self._choices())).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        return 200

    async def _stream(self, generation: Generation, chunks: Chunks) -> int:
        await self._send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        await self._write(chunks.start(self._n))
        pings = _Pings(generation.nudge)
        status = 200
        try:
            async for items in generation.events():
                self._note(items)
                written = chunks.events(items)
                if written:
                    await self._write(written)
                    pings.spoke()
                elif pings.due():
                    await self._write(responses.PING)
                    pings.spoke()
            await self._write(chunks.usage(self._choices()) + responses.DONE)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the status has left: the error is an event
            refusal = from_exception(error, self._id)
            if refusal.status == 500:
                log_error(error, self._id)
            status = refusal.status
            self._log["code"] = refusal.code
            await self._write(responses.error_event(refusal))
        finally:
            pings.stop()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return status

    async def _write(self, text: bytes) -> None:
        await self._send({"type": "http.response.body", "body": text, "more_body": True})

    def _note(self, items: Sequence[tuple[int, Event]], chunks: bool = True) -> None:
        """Keep the summaries, and tell the observer, of ``chunks`` only where the client gets them."""
        pieces: dict[int, int] = {}
        for index, event in items:
            if isinstance(event, Done):
                self._finished[index] = event
            else:
                pieces[index] = pieces.get(index, 0) + 1
        if not items:
            return
        now, observer = time.monotonic(), self._service.observer
        if not self._spoke:
            self._spoke = True
            observer.first_token(now - self._began)
        for index, count in pieces.items():
            if chunks and index in self._spoke_at:
                observer.chunk(now - self._spoke_at[index], count)
            self._spoke_at[index] = now

    def _choices(self) -> list[Done]:
        return [self._finished[index] for index in range(self._n)]

    def _summary(self) -> dict[str, Any]:
        """Figures of the request for the log."""
        done = list(self._finished.values())
        if not done:
            return {}
        used = responses.usage(done)
        return {
            "choices": len(done),
            "prompt_tokens": used["prompt_tokens"],
            "completion_tokens": used["completion_tokens"],
            "finish_reason": [responses.finish_reason(each) for each in done],
            "first_token_seconds": round(done[0].time_to_first_token, 4),
        }


class Generation:
    """The ``n`` answers of a request. The others are submitted when the first one's prompt is in the KV cache.

    ``submitted`` is called once the messages are needed no longer.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        request: ChatRequest,
        bell: Bell,
        executor_for: Callable[[Sequence[Turn]], Executor],
        deadline: float,
        submitted: Callable[[], None],
    ):
        self._pipeline, self._executor_for, self._deadline = pipeline, executor_for, deadline
        self._request = request
        self._prompt: Prompt | None = None
        self._n, self._stream, self._submitted = request.n, request.stream, submitted
        self._bell, self._inbox = bell, Inbox(bell)
        self._handles: list[RequestHandle] = []
        self._others: asyncio.Task[None] | None = None
        self._closed = False
        bell.streams += 1

    async def begin(self) -> None:
        """Submit the first answer. Raises what :meth:`kimi_vl.pipeline.Pipeline.submit` raises."""
        try:
            await self._submit(0)
        finally:
            self._request = replace(self._request, turns=())
            self._submitted()
        if self._n == 1:
            self._prompt = None

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
            if items and self._prompt is not None and self._others is None:
                self._others = asyncio.ensure_future(self._submit_others())
            yield items

    def queued(self) -> list[float]:
        """For each answer that the engine has begun, the seconds that it waited for that."""
        admitted = ((handle.request.admitted_at, handle.submitted_at) for handle in self._handles)
        return [at - since for at, since in admitted if at is not None]

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
        self._prompt = None
        for handle in self._handles:
            self._pipeline.engine.cancel(handle)

    async def _submit_others(self) -> None:
        try:
            for choice in range(1, self._n):
                await self._submit(choice)
            self._prompt = None
        except Exception as error:
            self._inbox.put((0, error), urgent=True)

    async def _submit(self, choice: int) -> None:
        """Images are decoded in another thread, and a request that was cancelled meanwhile does not stay."""
        loop = asyncio.get_running_loop()
        executor = self._executor_for(self._request.turns)
        submitting = loop.run_in_executor(executor, self._send, self._request, self._prompt, choice)
        try:
            self._handles.append(await asyncio.shield(submitting))
        except asyncio.CancelledError:
            submitting.add_done_callback(self._cancel_late)
            raise

    def _send(self, request: ChatRequest, prompt: Prompt | None, choice: int) -> RequestHandle:
        if prompt is None:
            prompt = self._prompt = self._pipeline.prepare(request.turns, **request.reading)
        first, put = True, self._inbox.put

        def deliver(event: Event | Exception) -> None:
            nonlocal first
            urgent = first or isinstance(event, Done | Exception)
            if self._stream or urgent:
                put((choice, event), urgent)
            first = False

        return self._pipeline.submit(prompt, (), deliver, deadline=self._deadline, **request.params_of(choice))

    def _cancel_late(self, submitted: asyncio.Future[RequestHandle]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._pipeline.engine.cancel(submitted.result())


class _Pings:
    """Nudges a stream when it has said nothing for :data:`PING_S`; one timer, however much it says."""

    def __init__(self, nudge: Any):
        self._loop, self._nudge = asyncio.get_running_loop(), nudge
        self._spoke_at = self._loop.time()
        self._timer = self._loop.call_later(PING_S, self._check)

    def spoke(self) -> None:
        self._spoke_at = self._loop.time()

    def due(self) -> bool:
        return self._loop.time() - self._spoke_at >= PING_S

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        due = self.due()
        self._timer = self._loop.call_at((self._loop.time() if due else self._spoke_at) + PING_S, self._check)
        if due:
            self._nudge()
