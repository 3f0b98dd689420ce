"""`ConcurrentPredictor` behind Cog's server: many requests at once, each streamed, cancelled and answered as alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cog_local.client import Client, Event, RequestRefused
from cog_local.server import Server
from tests.e2e.conftest import DEMO, data_url, picture
from tests.e2e.scripted import Loopback, make_thinker, spoken
from tests.e2e.test_protocol import call

SLOTS = 32
MANY = int(os.environ.get("KIMI_VL_FUZZ", "0")) or 60
LONG = {
    "prompt": "Think about it.",
    "temperature": 0,
    "max_length_tokens": 100_000,
    "thinking_budget": 0,
    "output_format": "answer",
}


@pytest.fixture(scope="module")
def concurrent() -> Iterator[Server]:
    with Server(environment={**os.environ, **DEMO}, concurrent=True) as running:
        yield running


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that says what is known before, and never ends by itself."""
    folder = make_thinker(tmp_path_factory.mktemp("thinker"))
    with Server(environment={**os.environ, **DEMO, "KIMI_VL_MODEL": str(folder)}, concurrent=True) as running:
        yield running


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    with Loopback().running() as running:
        yield running


def request(number: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {"seed": number, "temperature": 1.0, "max_length_tokens": 60, "output_format": "json"}
    if number % 3 == 0:
        return inputs | {"prompt": "What do you see?", "image": data_url(picture(("red", "blue")[number % 2]))}
    if number % 7 == 0:
        return inputs | {"prompt": " "}
    return inputs | {"prompt": f"What is {number} + 3?"}


def outcome(server: Server, number: int) -> tuple[str, str]:
    """How a request ended, and the last line of its output or its error; streamed or whole by turns.

    How much of the prompt was cached depends on who asked before, and is left out.
    """
    if number % 2:
        answer = server.client.predict(request(number))
    else:
        *events, last = server.client.stream(request(number))
        chunks = [event.data for event in events if event.name == "output"]
        assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))
        assert [chunk["chunk"] for chunk in chunks] == (last.data.get("output") or [])
        answer = last.data
    if answer["status"] != "succeeded":
        return answer["status"], answer["error"]
    done = json.loads("".join(answer["output"]).splitlines()[-1])
    del done["usage"]["cached_tokens"]
    return answer["status"], json.dumps(done)


def test_requests_beside_each_other_are_as_alone(concurrent: Server) -> None:
    alone = [outcome(concurrent, number) for number in range(24)]
    with ThreadPoolExecutor(24) as callers:
        together = list(callers.map(lambda number: outcome(concurrent, number), range(24)))
    assert together == alone
    assert {status for status, _ in alone} == {"succeeded", "failed"}
    for number, (status, text) in enumerate(alone):
        if number % 7 == 0 and number % 3:
            assert status == "failed" and "E_PROMPT_EMPTY" in text
        else:
            assert json.loads(text)["seed"] == number


def test_metrics_go_to_their_own_request(concurrent: Server) -> None:
    with ThreadPoolExecutor(12) as callers:
        answers = list(
            callers.map(
                lambda n: concurrent.client.predict(request(n)),
                [n for n in range(1, 20) if n % 7],
            )
        )
    assert [answer["metrics"]["seed"] for answer in answers] == [n for n in range(1, 20) if n % 7]


@pytest.mark.parametrize("count", [36, pytest.param(100, marks=pytest.mark.nightly)])
def test_many_seeds_give_the_texts_that_they_give_alone(concurrent: Server, count: int) -> None:
    """Half of them with a picture; beside requests of other lengths, whose prefill comes between their steps.

    Rounding changes about one sampled token in 4,300 beside others, and what follows it.
    """

    def text(number: int) -> str:
        inputs = {"prompt": "Tell me more.", "seed": number, "temperature": 1.5, "max_length_tokens": 24}
        if number % 2:
            inputs |= {"prompt": "What do you see?", "image": data_url(picture("green"))}
        return "".join(concurrent.client.predict(inputs)["output"])

    def other(number: int) -> None:
        concurrent.client.predict({"prompt": "word " * number, "seed": number, "max_length_tokens": 16})

    alone = [text(number) for number in range(count)]
    with ThreadPoolExecutor(24) as callers:
        beside = [callers.submit(other, 8 * number) for number in range(1, 40)]
        together = list(callers.map(text, range(count)))
        for each in beside:
            each.result()
    assert sum(one != other for one, other in zip(together, alone, strict=True)) <= count // 18
    assert len(set(alone)) > 0.4 * count, "other seeds give other texts"


# While all of them run


class Stream:
    """A request that goes on until it is ended."""

    def __init__(self, client: Client, **inputs: Any) -> None:
        self.client = client
        self.name = uuid.uuid4().hex
        self.events = client.stream({**LONG, **inputs}, self.name)
        self.text = ""

    def read(self, outputs: int) -> None:
        for event in self.events:
            if event.name == "output":
                self.text += event.data["chunk"]
                outputs -= 1
            if not outputs:
                return

    def end(self) -> Event:
        """The last event, which comes without anything being asked of it."""
        *_, last = self.events
        return last

    def cancel(self) -> None:
        assert self.client.cancel(self.name)


@contextlib.contextmanager
def running(server: Server, count: int, **inputs: Any) -> Iterator[list[Stream]]:
    """So many streams that have all begun to answer."""
    with contextlib.ExitStack() as stack:
        streams = [Stream(server.client, seed=number, **inputs) for number in range(count)]
        for stream in streams:
            stack.enter_context(contextlib.closing(stream.events))
        for stream in streams:
            stream.read(2)
        yield streams


def until_free(server: Server) -> None:
    """Until as many requests run at a time as there are slots: none is left busy."""
    deadline = time.monotonic() + 300
    impatient = Client(server.url, patience=0)
    while True:
        streams = [Stream(impatient) for _ in range(SLOTS)]
        try:
            for stream in streams:
                stream.read(1)
            return
        except RequestRefused:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        finally:
            for stream in streams:
                until_cancelled(server.client, stream.name)
                stream.events.close()


def until_cancelled(client: Client, name: str) -> None:
    """Asks again until the prediction is no more: Cog may lose what cancels it in its first moments."""
    deadline = time.monotonic() + 300
    while client.cancel(name):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_of_them_stream_at_once(thinking: Server) -> None:
    with running(thinking, SLOTS) as streams:
        assert thinking.client.health()["status"] == "BUSY"
        impatient = Client(thinking.url, patience=0)
        with pytest.raises(RequestRefused) as refusal:
            impatient.predict({"prompt": "Hello."})
        assert refusal.value.status == 409
        for stream in reversed(streams):
            stream.read(2)
        for stream in streams:
            assert len(stream.text) > 0 and spoken(100_000).startswith(stream.text)
    until_free(thinking)


def test_cancelling_some_leaves_the_others_as_they_are(thinking: Server) -> None:
    with running(thinking, 12) as streams:
        ended, others = streams[::2], streams[1::2]
        for stream in ended:
            stream.cancel()
        for stream in ended:
            assert stream.end().data["status"] == "canceled"
            assert not thinking.client.cancel(stream.name)
        for stream in others:
            stream.read(3)
            assert spoken(100_000).startswith(stream.text)
        for stream in others:
            stream.cancel()
            assert stream.end().data["status"] == "canceled"
    until_free(thinking)


def test_cancelling_reaches_those_who_say_nothing(thinking: Server) -> None:
    """They think, of which nothing is shown: between two pieces, a cancellation would be seen too late."""
    silent = [Stream(thinking.client, thinking_budget=6_000, max_length_tokens=8_000) for _ in range(4)]
    for stream in silent:
        assert next(stream.events).name == "start"
    with running(thinking, 2) as streams:
        for stream in streams:
            stream.read(3)
        for stream in silent:
            until_cancelled(thinking.client, stream.name)
        for stream in silent:
            *before, last = stream.events
            assert last.data["status"] == "canceled" and not last.data.get("output")
            assert not [event for event in before if event.name == "output"]
    until_free(thinking)


def test_callers_who_hang_up_free_their_slots(thinking: Server) -> None:
    with running(thinking, 8) as streams:
        for stream in streams[:4]:
            stream.events.close()
        for stream in streams[4:]:
            stream.read(2)
    until_free(thinking)


def test_a_cancelled_request_does_not_wait_for_its_webhook_s_receiver(thinking: Server) -> None:
    """Nor does anybody else: the receiver takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        hook = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        names = [uuid.uuid4().hex for _ in range(6)]
        for name in names:
            body = {"id": name, "input": LONG, "webhook": hook}
            assert call(thinking.client, "POST", "/predictions", body, Prefer="respond-async")[0] == 202
        with running(thinking, 6) as streams:
            for stream in streams:
                stream.read(2)
        for name in names:
            assert thinking.client.cancel(name)
        until_free(thinking)


def test_a_client_that_does_not_read_harms_nobody(thinking: Server) -> None:
    """Cog keeps what was not read for a while, and drops the oldest of it."""
    payload = json.dumps({"input": LONG}).encode()
    head = (
        "POST /predictions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", thinking.port))
            connection.sendall(head.encode() + payload)
        with running(thinking, 8) as streams:
            for stream in streams:
                stream.read(4)
                assert spoken(100_000).startswith(stream.text)
    until_free(thinking)


class Dripping(BaseHTTPRequestHandler):
    """Gives out a picture byte by byte, and never comes to its end."""

    stopped: threading.Event
    asked: threading.Semaphore

    def do_GET(self) -> None:
        self.asked.release()
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", "100000")
        self.end_headers()
        with contextlib.suppress(OSError):
            while not self.stopped.wait(0.05):
                self.wfile.write(b"\x89")
                self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_pictures_that_drip_keep_their_own_slots_alone(concurrent: Server) -> None:
    handler = type("Here", (Dripping,), {"stopped": threading.Event(), "asked": threading.Semaphore(0)})
    source = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serving = threading.Thread(target=source.serve_forever, daemon=True)
    serving.start()
    try:
        body = {"input": {**request(1), "image": f"http://127.0.0.1:{source.server_port}/x.png"}}
        for _ in range(6):
            assert call(concurrent.client, "POST", "/predictions", body, Prefer="respond-async")[0] == 202
        for _ in range(6):
            assert handler.asked.acquire(timeout=300)
        with ThreadPoolExecutor(12) as callers:
            numbers = [number for number in range(24) if number % 7]
            statuses = {status for status, _ in callers.map(lambda n: outcome(concurrent, n), numbers)}
        assert statuses == {"succeeded"}
    finally:
        handler.stopped.set()
        source.shutdown()
        source.server_close()
        serving.join()


# Webhooks


def hooks_of(loopback: Loopback, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """All the hooks of these predictions: those up to the end of each, and what is still on its way then."""
    hooks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    while not all(map(complete, hooks.values())):
        hook = loopback.hooks.get(timeout=300)
        hooks[hook["id"]].append(hook)
    time.sleep(0.3)
    while not loopback.hooks.empty():
        hook = loopback.hooks.get()
        hooks[hook["id"]].append(hook)
    return hooks


def complete(hooks: list[dict[str, Any]]) -> bool:
    """The end is there, and so is the start and every piece before the last one that came."""
    final = next((hook for hook in hooks if hook["status"] != "processing"), None)
    if final is None:
        return False
    if final["status"] == "succeeded":
        return len(hooks) >= len(final["output"]) + 2
    return {len(hook.get("output") or []) for hook in hooks if hook is not final} == set(range(len(hooks) - 1))


def check_hooks(hooks: list[dict[str, Any]], status: str) -> None:
    """One hook at the start, one for each piece, and one at the end.

    Cog sends each by a task of its own, so that on a busy machine two that are close may change places.
    """
    (final,) = [hook for hook in hooks if hook["status"] != "processing"]
    early = status == "canceled" and "CancelationException" in final.get("error", "")
    assert final["status"] == ("failed" if early else status)
    outputs = sorted((hook.get("output") or [] for hook in hooks if hook is not final), key=len)
    assert [len(output) for output in outputs] == list(range(len(outputs)))
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(outputs))
    if status == "succeeded":
        assert outputs[-1] == final["output"]


def test_hooks_of_many_are_those_of_their_pieces(concurrent: Server, loopback: Loopback) -> None:
    names = {uuid.uuid4().hex: number for number in range(16)}
    for name, number in names.items():
        inputs = {"prompt": f"What is {number} + 3?", "seed": number, "temperature": 1.0, "max_length_tokens": 300}
        body = {"id": name, "input": inputs, "webhook": loopback.url}
        assert call(concurrent.client, "POST", "/predictions", body, Prefer="respond-async")[0] == 202
    for name, hooks in hooks_of(loopback, names).items():
        check_hooks(hooks, "succeeded")
        (final,) = [hook for hook in hooks if hook["status"] == "succeeded"]
        assert final["metrics"]["seed"] == names[name]
        assert len(final["output"]) < final["metrics"]["output_token_count"], "pieces of several tokens"


def test_hooks_come_while_the_text_is_made(thinking: Server, loopback: Loopback) -> None:
    names = [uuid.uuid4().hex for _ in range(4)]
    for name in names:
        body = {"id": name, "input": LONG, "webhook": loopback.url}
        assert call(thinking.client, "POST", "/predictions", body, Prefer="respond-async")[0] == 202
    waiting = set(names)
    while waiting:  # nothing here ends by itself
        hook = loopback.hooks.get(timeout=300)
        assert hook["status"] == "processing"
        if len(hook.get("output") or []) > 2:
            waiting.discard(hook["id"])
    for name in names:
        until_cancelled(thinking.client, name)


# Anything, in any order


def test_requests_that_are_cancelled_left_and_hooked_at_random(thinking: Server, loopback: Loopback) -> None:
    """Sixty of them; KIMI_VL_FUZZ=1000 makes so many, of other kinds in every run."""
    dice = random.Random(os.urandom(8) if "KIMI_VL_FUZZ" in os.environ else 0)
    kinds = [dice.choice(("whole", "cancelled", "left", "hooked", "hooked and cancelled")) for _ in range(MANY)]
    expected: dict[str, str] = {}
    seen: Counter[str] = Counter()

    def one(number: int) -> None:
        kind, local = kinds[number], random.Random(number)
        client, name = thinking.client, uuid.uuid4().hex
        length = 20 if kind in ("whole", "hooked") else 100_000
        inputs = {**LONG, "max_length_tokens": length, "seed": number, "thinking_budget": local.randrange(20)}
        seen[kind] += 1
        if kind.startswith("hooked"):
            expected[name] = "canceled" if "cancelled" in kind else "succeeded"
            body = {"id": name, "input": inputs, "webhook": loopback.url}
            assert call(client, "POST", "/predictions", body, 60, Prefer="respond-async")[0] == 202
            if "cancelled" in kind:
                time.sleep(local.choice((0, 0.01, 0.3)))
                until_cancelled(client, name)
            return
        with contextlib.closing(client.stream(inputs, name)) as events:
            outputs = local.randrange(3)
            for event in events:
                outputs -= event.name == "output"
                if kind != "whole" and outputs < 0:
                    break
            if kind == "cancelled":
                until_cancelled(client, name)
                *_, event = events
            if kind == "cancelled":
                # of what it cancels while it still reads the inputs, Cog says so with its exception
                assert event.data["status"] == "canceled" or "CancelationException" in event.data["error"]
            elif kind == "whole":
                assert event.data["status"] == "succeeded"
                assert spoken(100).startswith("".join(event.data["output"])[:200])

    with ThreadPoolExecutor(24) as callers:
        list(callers.map(one, range(MANY)))
    hooks = hooks_of(loopback, expected)
    for name, status in expected.items():
        check_hooks(hooks[name], status)
    until_free(thinking)
    print(f"{MANY} requests: {dict(seen)}, {sum(map(len, hooks.values()))} hooks")


# What is written


def test_requests_leave_no_trace_in_the_log(concurrent: Server) -> None:
    secret = "quokka-" + uuid.uuid4().hex
    asked = [
        {"prompt": f"Say {secret}.", "max_length_tokens": 20},
        {"prompt": secret, "image": "/tmp/" + secret},
        {"messages": [{"role": secret}]},
        {"prompt": "Hello.", "image": data_url(secret.encode())},
    ]
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(concurrent.client.predict, asked * 4))
    assert {answer["status"] for answer in answers} == {"succeeded", "failed"}
    assert not [line for line in concurrent.lines if secret in line]
    assert not any(answer["logs"] for answer in answers)


# A predictor of a few lines, for what is Cog's part alone

TALKER = """
import asyncio, sys, time
from collections.abc import Iterable, Iterator

from cog import BasePredictor, CancelationException, ConcatenateIterator, Input, concurrent, streaming

from kimi_vl.cog_streaming import Streams


class Predictor(BasePredictor):
    def __init__(self) -> None:
        self.streams = Streams(CancelationException)
        UNHOOK

    async def setup(self) -> None:
        await self.streams.try_out()

    @streaming
    @concurrent(max=32)
    async def predict(
        self,
        name: str = Input(default=""),
        pieces: int = Input(default=10),
        pause: float = Input(default=0.01),
    ) -> ConcatenateIterator[str]:
        return await self.streams.run(self.talk(name, pieces, pause))

    def talk(self, name: str, pieces: int, pause: float) -> Iterator[str]:
        try:
            for number in range(pieces):
                print(f"{name} says {number}", flush=True)
                self.record_metric("last", f"{name} {number}")
                yield f"{name} {number};"
                time.sleep(pause)
        finally:
            print(f"{name} ends", flush=True)
"""


@contextlib.contextmanager
def talking(folder: Path, unhook: bool) -> Iterator[Server]:
    root = Path(__file__).resolve().parents[2]
    undo = "asyncio.run_coroutine_threadsafe = self.streams._submit" if unhook else "pass"
    (folder / "predict.py").write_text(TALKER.replace("UNHOOK", undo))
    with Server(folder, environment={**os.environ, "PYTHONPATH": str(root)}) as server:
        yield server


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with talking(tmp_path_factory.mktemp("talker"), unhook=False) as server:
        yield server


def listen(server: Server, name: str, **inputs: Any) -> list[Event]:
    return list(server.client.stream({"name": name, **inputs}))


def check_talk(name: str, events: list[Event], pieces: int, logs: bool = True) -> None:
    final = events[-1].data
    assert final["status"] == "succeeded"
    assert final["output"] == [f"{name} {number};" for number in range(pieces)]
    assert final["metrics"]["last"] == f"{name} {pieces - 1}"
    assert [event.data["chunk"] for event in events if event.name == "output"] == final["output"]
    said = [f"{name} says {number}\n" for number in range(pieces)] + [f"{name} ends\n"]
    assert "".join(event.data["data"] for event in events if event.name == "log") == "".join(said)
    assert final["logs"] == "".join(said)


def test_logs_and_metrics_of_many_are_their_own(talker: Server) -> None:
    with ThreadPoolExecutor(30) as callers:
        heard = list(callers.map(lambda number: listen(talker, f"n{number}", pieces=20), range(30)))
    for number, events in enumerate(heard):
        check_talk(f"n{number}", events, 20)
        kinds = [event.name for event in events if event.name in ("log", "output")]
        assert kinds[:4] == ["log", "output", "log", "output"], "each piece is there before the next is made"


def test_a_cancelled_generator_is_closed_and_its_log_kept(talker: Server) -> None:
    name = uuid.uuid4().hex
    with contextlib.closing(talker.client.stream({"name": "it", "pieces": 100_000}, name)) as events:
        next(event for event in events if event.name == "output")
        assert talker.client.cancel(name)
        *_, last = events
    assert last.data["status"] == "canceled"
    assert not talker.client.cancel(name)


def test_a_cog_that_does_not_call_the_hook_sends_everything_at_the_end(tmp_path: Path) -> None:
    with talking(tmp_path, unhook=True) as server:
        with ThreadPoolExecutor(12) as callers:
            heard = list(callers.map(lambda number: listen(server, f"n{number}"), range(12)))
        for number, events in enumerate(heard):
            check_talk(f"n{number}", events, 10)
            kinds = [event.name for event in events if event.name in ("log", "output")]
            assert kinds == ["log"] * 11 + ["output"] * 10
        name = uuid.uuid4().hex
        with contextlib.closing(server.client.stream({"name": "it", "pieces": 100_000}, name)) as events:
            next(event for event in events if event.name == "log")
            assert server.client.cancel(name)
            *_, last = events
        assert last.data["status"] == "canceled"
