"""A throw-away process for files that only a large library can read: both ends of the pipe to it.

The process gets the bytes of one file and nothing else. Before it reads them it limits its own memory, processor time,
written files and descriptors: it can open no file and no connection. It answers questions, one line of JSON each way,
and sends pixels. Whatever becomes of it, its request gets one of the reasons of :class:`SandboxError`, and nothing that
a library says leaves it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

from ..errors import UserError

log = logging.getLogger(__name__)

Reason = Literal["format", "no pictures", "unreadable", "encrypted", "too large", "too long", "missing"]
REASONS: tuple[Reason, ...] = get_args(Reason)

MEMORY_BYTES = 500_000_000
"""Of a process, libraries and stacks included (RLIMIT_AS)."""
CPU_S = 40
"""Processor time of a process."""
WALL_S = 60.0
"""From start to end, waiting included."""
MAX_PROCESSES = 2
"""Requests that read such files at a time; more wait."""
WAIT_S = 60.0
_MAX_LINE = 4 * 2**20
_BACKENDS = {
    "video": (f"{__package__}.video_decoder", "av"),
    "document": (f"{__package__}.page_renderer", "pypdfium2"),
}
_START = f"import sys; sys.path[:0] = sys.argv[5:]; from {__name__} import serve; serve(*sys.argv[1:5])"
_PR_SET_PDEATHSIG = 1
_turns = threading.BoundedSemaphore(MAX_PROCESSES)


class SandboxError(Exception):
    """Why a file was not read. ``detail`` is a number that the sentence to the caller may name."""

    def __init__(self, reason: Reason, detail: int | None = None):
        super().__init__(reason)
        self.reason: Reason = reason
        self.detail = detail


# In the service


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """The right of a request to start such processes. Raises :class:`UserError` (E_OVERLOADED) after a while."""
    if not _turns.acquire(timeout=WAIT_S):
        raise UserError("E_OVERLOADED", "too many videos and documents are being read; try again in a minute.")
    try:
        yield
    finally:
        _turns.release()


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """A reply that is not of its form is as good as none: a process that a file has taken over may say anything."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SandboxError("unreadable") from None


class Sandbox:
    """One process over the bytes of one file; a context manager, after which nothing of it is left."""

    def __init__(self, backend: str, data: bytes):
        module, self._library = _BACKENDS[backend]
        found = importlib.util.find_spec(self._library)
        if found is None or not found.submodule_search_locations:
            raise SandboxError("missing")
        roots = [str(Path(__file__).parents[2]), str(Path(found.submodule_search_locations[0]).parent)]
        self._ends = time.monotonic() + WALL_S
        self._buffer = bytearray()
        with _memory_file(data) as file:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, module, *map(str, (file, MEMORY_BYTES, CPU_S)), *roots],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(file,),
                env={"MALLOC_ARENA_MAX": "1"},  # more arenas than one reserve addresses, which are limited
                cwd="/",
                bufsize=0,
            )

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def peak_bytes(self) -> int:
        """The most memory that the process has held so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024

    def hello(self) -> dict[str, Any]:
        """What the process says of the file before it is asked anything. Raises :class:`SandboxError`."""
        return self._reply()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question. Raises :class:`SandboxError`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its end is read below
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return self._reply()

    def picture(self, width: int, height: int) -> tuple[dict[str, Any], bytes] | None:
        """The next picture, 3 * width * height bytes of RGB, and what is said of it; None after the last.

        Raises :class:`SandboxError`.
        """
        reply = self._reply()
        return None if reply.get("last") else (reply, self._read(3 * width * height))

    def _reply(self) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_LINE:
                raise SandboxError("unreadable")
            self._fill()
        line = self._buffer[:end]
        del self._buffer[: end + 1]
        try:
            reply = json.loads(line)
            reason, detail = reply.get("error"), reply.get("detail")
        except (ValueError, AttributeError):
            raise SandboxError("unreadable") from None
        if reason is not None:
            known = reason if reason in REASONS else "unreadable"
            if known == "missing":
                log.error("the package %s is installed, but its import fails; install it again.", self._library)
            raise SandboxError(known, detail if isinstance(detail, int) else None)
        return reply

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def _fill(self) -> None:
        assert self._process.stdout is not None
        number = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(number, select.POLLIN)
        if not poll.poll(max(0.0, self._ends - time.monotonic()) * 1000):
            raise SandboxError("too long")
        part = os.read(number, 2**20)
        if not part:
            raise SandboxError(self._end())
        self._buffer += part

    def _end(self) -> Reason:
        """Why the process ended before it had answered."""
        try:
            status = self._process.wait(max(0.0, self._ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "too long"
        if status == -signal.SIGXCPU:
            return "too long"
        # the system's own killer, and libraries that abort where they get no memory
        return "too large" if status in (-signal.SIGKILL, -signal.SIGABRT) else "unreadable"


class SandboxedFile:
    """A file that stays open in a process of its own; a context manager, after which the process has ended."""

    _sandbox: Sandbox

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._sandbox.__exit__()

    def peak_bytes(self) -> int:
        """The most memory that its process has held so far."""
        return self._sandbox.peak_bytes()

    @staticmethod
    def _refusal(error: SandboxError) -> UserError:
        """What an error means to a caller."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Errors of the process become the caller's."""
        try:
            yield
        except SandboxError as error:
            raise self._refusal(error) from None

    @contextlib.contextmanager
    def _opening(self, backend: str, data: bytes) -> Iterator[None]:
        """Start the process; whatever fails after that ends it."""
        with self._refusing():
            self._sandbox = Sandbox(backend, data)
            try:
                with understood():
                    yield
            except BaseException:
                self.close()
                raise


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """A descriptor of a file with ``data`` that has no name anywhere."""
    file = os.memfd_create("media")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


# In the process


class Reader(Protocol):
    """What a library makes of one file."""

    def hello(self) -> dict[str, Any]:
        """What is known of the file at once."""
        ...

    def answer(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a question of :meth:`Sandbox.ask`; None where pictures follow."""
        ...

    def pictures(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The pictures that the last question asked for, in bytes of RGB, and what there is to say of each."""
        ...


def serve(backend: str, file: str, memory_bytes: str, cpu_s: str) -> None:
    """The whole life of the process: limits, library, file, and answers until nobody asks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)  # what a library prints is nobody's answer
    with contextlib.suppress(OSError):  # the service is not what the system should end where memory is short
        Path("/proc/self/oom_score_adj").write_text("1000")
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, int(memory_bytes)),
        (resource.RLIMIT_CPU, int(cpu_s)),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        module = _imported(backend)
        data = os.fdopen(int(file), "rb")
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # from now on nothing can be opened, no connection either
        reader: Reader = module.read(data)
        _send(out, reader.hello())
        for line in iter(sys.stdin.buffer.readline, b""):
            answer = reader.answer(json.loads(line))
            _send(out, answer or {})
            if answer is None:
                for said, picture in reader.pictures():
                    _send(out, said, picture)
                _send(out, {"last": True})
    except SandboxError as error:
        _send(out, {"error": error.reason, "detail": error.detail})
    except MemoryError:
        _send(out, {"error": "too large"})
    except BrokenPipeError:
        pass
    except Exception:
        _send(out, {"error": "unreadable"})
    os._exit(0)  # libraries with threads may wait for ever at a normal end


def _imported(backend: str) -> Any:
    """The module of that name. A library that cannot be imported is as good as none, whatever is the matter with it."""
    try:
        return importlib.import_module(backend)
    except Exception:
        raise SandboxError("missing") from None


def _send(out: int, reply: dict[str, Any], data: bytes = b"") -> None:
    for part in (json.dumps(reply).encode() + b"\n", data):
        view = memoryview(part)
        while view:
            view = view[os.write(out, view) :]
