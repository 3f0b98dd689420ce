"""A client of many streams at a time that costs little: a program of its own, with one thread and bare sockets.

Reads from its input a line of JSON: ``address``, the ``bodies`` that are sent together once all connections are there,
and the ``dialect`` that the server speaks. Answers with a line of JSON: ``streams``, for each how it went, and
``processor_seconds``, what the reading cost. It reads no HTTP beyond the status, and no JSON: it looks for the few
words that it needs.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PATIENCE_S = 600.0
KEPT = 2000
"""Bytes of a stream that are kept, for words that come in two pieces."""


@dataclass(frozen=True)
class Dialect:
    """How a server is asked for a stream, and the words of it that are looked for."""

    path: str
    text: re.Pattern[bytes]
    """The first text."""
    tokens: re.Pattern[bytes]
    """How many tokens there were."""
    end: bytes
    """What a whole stream ends with."""
    again: bytes | None = None
    """What a refusal begins with after which the same is asked again."""


DIALECTS = {
    "openai": Dialect(
        "/v1/chat/completions",
        re.compile(rb'"(?:content|reasoning_content)": "[^"]'),
        re.compile(rb'"completion_tokens": (\d+)[,}]'),
        b"data: [DONE]",
    ),
    "cog": Dialect(
        "/predictions",
        re.compile(rb'"chunk":"[^"]'),
        re.compile(rb'"output_token_count":(\d+)[,}]'),  # of the last event
        b"\r\n0\r\n\r\n",  # of chunked transfer
        again=b"HTTP/1.1 409",  # Cog refuses some of those that come together though it has a slot for each
    ),
}


@dataclass
class Stream:
    """Seconds to the first byte, to the first text and to the end, and the tokens; ``error`` where it went wrong."""

    first_byte: float = 0.0
    first_text: float = 0.0
    end: float = 0.0
    tokens: int = 0
    error: str = ""


class Client:
    """The program on the other side of a pipe."""

    def __init__(self, dialect: str = "openai"):
        self._dialect = dialect

    def __enter__(self) -> Client:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, address: tuple[str, int], bodies: Sequence[dict[str, Any]]) -> tuple[list[Stream], float]:
        """The streams of all ``bodies``, which begin together, and the client's processor seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"address": address, "bodies": bodies, "dialect": self._dialect}) + "\n")
        self._process.stdin.flush()
        answered = json.loads(self._process.stdout.readline())
        return [Stream(**each) for each in answered["streams"]], answered["processor_seconds"]


def ask(address: tuple[str, int], bodies: Sequence[dict[str, Any]], dialect: Dialect) -> list[Stream]:
    """Send all ``bodies`` at once, and read what comes until the end of each."""
    streams = [Stream() for _ in bodies]
    requests = [request(body, dialect) for body in bodies]
    connections = [socket.create_connection(address, PATIENCE_S) for _ in bodies]
    began, kept = [0.0] * len(bodies), [b""] * len(bodies)
    with selectors.DefaultSelector() as selector:

        def send(number: int, connection: socket.socket) -> None:
            connection.sendall(requests[number])
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, number)

        for number, connection in enumerate(connections):
            began[number] = time.monotonic()
            send(number, connection)
        deadline = time.monotonic() + PATIENCE_S
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                connection, number = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                try:
                    received = connection.recv(65536)
                except BlockingIOError:
                    continue
                except OSError as error:
                    received, streams[number].error = b"", type(error).__name__
                again = bool(dialect.again and not kept[number] and received.startswith(dialect.again))
                kept[number] = (kept[number] + received)[-max(KEPT, len(received)) :]
                if again or note(streams[number], time.monotonic() - began[number], received, kept[number], dialect):
                    selector.unregister(connection)
                    connection.close()
                if again:
                    kept[number] = b""
                    send(number, socket.create_connection(address, PATIENCE_S))
        for key in list(selector.get_map().values()):
            streams[key.data].error = "not done in time"
            key.fileobj.close()  # pyright: ignore[reportAttributeAccessIssue]
    return streams


def request(body: dict[str, Any], dialect: Dialect) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {dialect.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def note(stream: Stream, now: float, received: bytes, kept: bytes, dialect: Dialect) -> bool:
    """What a stream's next bytes say; whether they are the last ones."""
    if not stream.first_byte:
        stream.first_byte = now
        if not received.startswith(b"HTTP/1.1 200"):
            stream.error = stream.error or received[:12].decode("latin-1") or "closed"
            return True
    if not stream.first_text and dialect.text.search(kept):
        stream.first_text = now
    if not stream.tokens and (found := dialect.tokens.search(kept)):
        stream.tokens = int(found.group(1))
    if dialect.end in kept or not received:
        stream.end = now
        stream.first_text = stream.first_text or now  # an answer may have no text
        if dialect.end not in kept or not stream.tokens:
            stream.error = stream.error or "cut off"
        return True
    return False


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        before = time.process_time()
        streams = ask(tuple(asked["address"]), asked["bodies"], DIALECTS[asked["dialect"]])
        seconds = time.process_time() - before
        print(json.dumps({"streams": [asdict(each) for each in streams], "processor_seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
