"""A reader that does what a file tells it to, in the place of a library that a file has taken over."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

HEAD = b"\0\0\0\x18ftypisom"
FILM = {"width": 64, "height": 64, "seconds": 3.0, "frames": 3, "pages": 3}


def file(order: str) -> bytes:
    return HEAD + order.encode()


def read(opened: BinaryIO) -> Reader:
    order = opened.read()[len(HEAD) :].decode()
    if order == "hang":
        time.sleep(1000)
    if order == "spin":
        while True:
            pass
    if order == "exit":
        os._exit(3)
    if order in ("SIGSEGV", "SIGABRT", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, order))
    if order == "eat":
        kept = []
        while True:
            kept.append(bytearray(2**20))
    if order == "raise":
        raise RuntimeError("a library's own words about /etc/hostname")
    if order == "print":
        print("a library's own words")
        os.write(1, b'{"error": "encrypted"}\n')
    if order == "noise":
        os.write(_pipe(), b"\xff\xfe no JSON\n")
    if order == "list":
        os.write(_pipe(), b"[1, 2]\n")
    if order == "endless line":
        while True:
            os.write(_pipe(), b"x" * 65536)
    if order == "other fields":
        os.write(_pipe(), b'{"width": "wide"}\n')
    if order == "an error of no kind":
        os.write(_pipe(), b'{"error": {"x": 1}}\n')
    return Reader(order)


def _pipe() -> int:
    """The descriptor to the service: the one beside the standard ones that is a pipe."""
    return next(n for n in range(3, 64) if os.path.exists(f"/proc/self/fd/{n}") and _is_pipe(n))


def _is_pipe(number: int) -> bool:
    return os.readlink(f"/proc/self/fd/{number}").startswith("pipe:")


class Reader:
    def __init__(self, order: str):
        self.order = order
        self.facts: dict[str, Any] = {**FILM}
        tries = {
            "open": lambda: os.open("/etc/hostname", os.O_RDONLY),
            "connect": lambda: socket.create_connection(("127.0.0.1", 1), 1),
            "write": lambda: os.open("/tmp/written", os.O_WRONLY | os.O_CREAT),
            "pipe": os.pipe,
        }
        if order in tries:
            try:
                tries[order]()
            except OSError as error:
                self.facts["frames"] = error.errno

    def hello(self) -> dict[str, Any]:
        return self.facts

    def answer(self, question: dict[str, Any]) -> dict[str, Any] | None:
        if "sizes" in question:
            return {"sizes": [[64, 64]] * 3}
        if self.order == "hang later":
            time.sleep(1000)
        return None

    def pictures(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        if self.order == "half a picture":
            yield {"at": 0, "turns": 0}, b"\0" * 100
            os._exit(0)
        if self.order == "no picture":
            return
        for number in range(3):
            if self.order == "dies later" and number == 1:
                os.kill(os.getpid(), signal.SIGSEGV)
            yield {"at": number, "turns": "upside" if self.order == "odd turns" else 0}, bytes(64 * 64 * 3)


assert sys.stdin is not None
