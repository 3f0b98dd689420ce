"""Many bad clients at once against the server as it comes: others are served meanwhile, and memory stays bounded."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import PATIENCE_S, ServerProcess, ask, until, user

pytestmark = pytest.mark.nightly

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LARGE = 100 << 20
GIBIBYTE = 1 << 30
FLOOD = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(1000))


@pytest.fixture(scope="module")
def process() -> Iterator[ServerProcess]:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    with ServerProcess("--head-timeout-s", "2", "--write-timeout-s", "5") as running:
        yield running


def held(process: ServerProcess) -> int:
    """Bytes that the server holds in memory."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))


def files(process: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{process.process.pid}/fd"))


def connect(process: ServerProcess) -> socket.socket:
    return socket.create_connection(process.address, PATIENCE_S)


def says_nothing(process: ServerProcess, stop: threading.Event) -> None:
    """Connections that are open and silent, or begin a head and never end it; opened anew when they are closed."""
    while not stop.is_set():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(100):
                connection = stack.enter_context(connect(process))
                if number % 2:
                    connection.sendall(HEAD.encode())
            stop.wait(1)


def floods_headers(process: ServerProcess, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError), connect(process) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n" + FLOOD)


def sends_a_large_body(process: ServerProcess, stop: threading.Event) -> None:
    """As large as it may be; by its length or in chunks, and only now and then whole."""
    piece = b"a" * (1 << 20)
    opening, closing = b'{"messages": [{"role": "user", "content": "', b'"}]}'
    filling = LARGE - len(opening) - len(closing)
    while not stop.is_set():
        with contextlib.suppress(OSError), connect(process) as connection:
            connection.sendall(f"{HEAD}Content-Length: {LARGE}\r\n\r\n".encode() + opening)
            for _ in range(filling >> 20):
                if stop.is_set():
                    return
                connection.sendall(piece)
            connection.sendall(b"a" * (filling & ((1 << 20) - 1)) + closing)
            connection.recv(1000)


def does_not_read(process: ServerProcess, stop: threading.Event) -> None:
    """Asks for much, and reads nothing of it."""
    body = json.dumps(
        {"messages": user("Tell me a story."), "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}
    ).encode()
    while not stop.is_set():
        with contextlib.suppress(OSError), socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(process.address)
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            stop.wait(10)


BAD: list[tuple[Callable[[ServerProcess, threading.Event], None], int]] = [
    (says_nothing, 3),
    (floods_headers, 2),
    (sends_a_large_body, 30),
    (does_not_read, 5),
]
"""What bad clients do, and how many of them do it at a time."""


def test_good_clients_are_served_among_bad_ones(process: ServerProcess) -> None:
    with process.http() as http:
        assert ask(http).status_code == 200
        before, open_before = held(process), files(process)
        stop, most, statuses = threading.Event(), [before], []

        def watch() -> None:
            while not stop.wait(0.05):
                most.append(held(process))

        others = [threading.Thread(target=each, args=(process, stop)) for each, count in BAD for _ in range(count)]
        others.append(threading.Thread(target=watch))
        for thread in others:
            thread.start()
        try:
            end = time.monotonic() + 20
            while time.monotonic() < end or len(statuses) < 20:
                answered = ask(http)
                statuses.append(answered.status_code)
                if answered.status_code == 200:
                    assert answered.json()["choices"][0]["message"]["content"] == "12 + 30 = 42"
                else:  # all that may be in memory is
                    assert answered.json()["error"]["code"] == "overloaded"
        finally:
            stop.set()
            for thread in others:
                thread.join()
        print(f"{len(statuses)} answers, {statuses.count(200)} good; {(max(most) - before) >> 20} MiB gained")
        assert statuses.count(200) >= 0.9 * len(statuses)
        assert max(most) - before < 2 * GIBIBYTE, "bodies of 1 GiB, and what is made of those that are read"
        until(lambda: files(process) <= open_before + 1)
        until(lambda: held(process) - before < GIBIBYTE // 2)
        assert ask(http).status_code == 200
    assert process.process.poll() is None
