"""Downloads a tar from a URL and extracts it: entries are checked before the download, and the folder after it.

With pget under a watchdog, or with Python. Knows nothing of checkpoints. Never prints a query or a password.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx

from ..errors import CheckpointError
from . import http
from .progress import Progress, amount
from .tar_contents import LARGEST_END, Contents, end_fault

log = logging.getLogger(__name__)
TRIES = 3
PAUSE_SECONDS = 5.0
# pget holds one chunk for each connection in memory, and writes nothing before the first chunk is complete. So a chunk
# is what all connections together receive in FIRST_SECONDS: progress is visible on a slow network as well.
CONNECTIONS = 16
FIRST_SECONDS = 2.0
LEAST_CHUNK = 256_000
LARGEST_CHUNK = 16_000_000

_WATCH_SECONDS = 0.2
_MEASURED_BYTES = 8_000_000
_WINDOW = 2**16  # bytes of one range request while only headers are read
_LARGEST_HEADER = 2**20
# Variables that change pget's behaviour, which it must not inherit. PGET itself names the program.
_PGET_SETTINGS = (
    "PGET_EXTRACT",
    "PGET_FORCE",
    "PGET_OUTPUT",
    "PGET_PID_FILE",
    "PGET_CHUNK_SIZE",
    "PGET_LOG_LEVEL",
    "PGET_RESOLVE",
)


def disk_error(folder: Path, error: OSError) -> CheckpointError:
    """The error for a disk that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(folder, 0)
    return CheckpointError(f"{folder}: cannot be written ({error.strerror or type(error).__name__}); check the disk")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise :class:`CheckpointError` where ``needed`` bytes and 1 % more do not fit on the disk of ``folder``."""
    needed += needed // 100
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {what} needs {amount(needed)} and {amount(free)} are free; "
            f"free {amount(needed - free)} or use a larger disk"
        )


def fetch(url: str, private: Path) -> Path:
    """Extract the tar at ``url`` below ``private``, an empty folder that only the caller uses; returns the folder.

    Raises :class:`CheckpointError`. Files may then be left in ``private``, which the caller deletes.
    """
    program = _pget()
    reason = ""
    for attempt in range(1, TRIES + 1):
        if attempt > 1:
            log.warning("try %d of %d failed: %s", attempt - 1, TRIES, reason)
            time.sleep(PAUSE_SECONDS * (attempt - 1))
            remove(private)
            private.mkdir(mode=0o700)
        try:
            # The last try uses Python, so that no fault of pget keeps a service down.
            return _try(url, private, program if attempt < TRIES else None, patience=http.STALL_SECONDS * attempt)
        except http.Retry as error:
            reason = str(error)
        except OSError as error:
            raise disk_error(private.parent, error) from None
    raise CheckpointError(
        f"{http.shown(url)}: could not be fetched in {TRIES} tries ({reason}); check the server and the network, "
        "and start again"
    )


def _try(url: str, private: Path, program: str | None, patience: float) -> Path:
    remote = http.probe(url)
    contents = _read_contents(url, remote.size) if remote.ranges and remote.size is not None else None
    if remote.size is not None:
        check_space(private.parent, remote.size, http.shown(url))
    tree = private / "tree"
    size = "an archive of unknown size" if remote.size is None else amount(remote.size)
    if program and contents and remote.lengths:
        log.info("fetching %s from %s with pget", size, http.shown(url))
        progress = Progress("fetching", contents.size)
        _extract_with_pget(program, url, private, tree, contents.size, progress, patience)
    else:
        missing = "support ranges" if contents is None else "send the length of a part"
        why = "" if program is None else f": the server does not {missing}, which pget needs"
        log.info("fetching %s from %s with Python%s", size, http.shown(url), why)
        progress = Progress("fetching", remote.size)
        contents = _extract_with_python(url, remote, tree, progress)
    progress.finish("fetched")
    if difference := contents.difference(tree):  # pget succeeds after some incomplete extractions
        raise http.Retry(difference)
    return tree


def remove(folder: Path) -> None:
    """Delete ``folder``, also where an archive made read-only folders in it."""
    for path, names, _ in os.walk(folder):
        for name in names:
            inner = os.path.join(path, name)
            if not os.path.islink(inner):
                with suppress(OSError):
                    os.chmod(inner, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _disk_full(folder: Path, needed: int) -> CheckpointError:
    free = f"free {amount(needed)}" if needed else "free some space"
    return CheckpointError(f"{folder}: no space is left on this disk; {free} or use a larger one")


def _chunk(url: str, size: int) -> int:
    """Bytes of one of pget's chunks: each connection's part of what arrives in FIRST_SECONDS."""
    received, began, now = 0, 0.0, 0.0
    with suppress(http.Retry), http.get(url, f"0-{min(size // 100, _MEASURED_BYTES)}") as answer:
        for piece in answer.iter_raw():
            now = time.monotonic()
            received += len(piece) if began else 0  # the rate without the latency of the first bytes
            began = began or now
            if now - began > FIRST_SECONDS:
                break
    rate = received / max(now - began, 1e-3)
    return int(min(max(rate * FIRST_SECONDS / CONNECTIONS, LEAST_CHUNK), LARGEST_CHUNK))


class _RangedFile:
    """A seekable file over range requests: only what tarfile reads is transferred."""

    def __init__(self, url: str, size: int):
        self.url = url
        self.size = size
        self.position = 0
        self._window = b""
        self._start = 0

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def read(self, size: int) -> bytes:
        if size > _LARGEST_HEADER:  # no honest archive has one
            raise tarfile.ReadError("a header is too large")
        pieces = []
        end = min(self.position + size, self.size)
        while self.position < end:
            if not self._start <= self.position < self._start + len(self._window):
                self._load()
            piece = self._window[self.position - self._start : end - self._start]
            pieces.append(piece)
            self.position += len(piece)
        return b"".join(pieces)

    def _load(self) -> None:
        last = min(self.position + _WINDOW, self.size) - 1
        with http.get(self.url, f"{self.position}-{last}") as answer:
            if answer.status_code != 206 or http.total_size(answer, self.position) != self.size:
                raise http.Retry("the file on the server changed or is served in different ways")
            pieces = []
            with suppress(httpx.RemoteProtocolError):  # cut off: the bytes that arrived are used
                for piece in answer.iter_raw():
                    pieces.append(piece)
            window = b"".join(pieces)
        if not window:
            raise http.Retry("the connection was cut off")
        self._start, self._window = self.position, window


def _read_contents(url: str, size: int) -> Contents:
    """The archive's entries, read from its headers alone; raises for what must not be downloaded at all."""
    contents = Contents(http.shown(url))
    file: Any = _RangedFile(url, size)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                contents.add(member)
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _not_a_tar(url, error) from None
    file.seek(end)
    if fault := end_fault(file.read(min(size - end, LARGEST_END))):
        raise CheckpointError(f"{http.shown(url)}: {fault}; make or upload it anew")
    contents.finish()
    return contents


def _not_a_tar(url: str, error: Exception) -> CheckpointError:
    reason = http.redact(str(error)) or type(error).__name__
    return CheckpointError(
        f"{http.shown(url)}: is not a complete, uncompressed tar archive ({reason}); make or upload it anew"
    )


# With pget


def _pget() -> str | None:
    """The pget to use: what PGET names, else the one on PATH."""
    named = os.environ.get("PGET")
    program = shutil.which(named or "pget")
    if program is None:
        log.info("%s: fetching with Python, on one connection", f"PGET={named} is no program" if named else "no pget")
    return program


def _extract_with_pget(
    program: str, url: str, private: Path, tree: Path, size: int, progress: Progress, patience: float
) -> None:
    chunk = _chunk(url, size)
    try:
        process = subprocess.Popen(
            [
                *(program, "-x", "--pid-file", str(private / "pget.pid"), "--log-level", "warn"),
                *("-m", str(chunk), "-c", str(CONNECTIONS), _escaped(url), str(tree)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name not in _PGET_SETTINGS},
            preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise http.Retry(f"pget cannot be started: {error.strerror}") from None
    lines: deque[str] = deque(maxlen=50)
    reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
    reader.start()
    try:
        _watch(process, tree, progress, patience)
    finally:
        with suppress(OSError):
            process.kill()
        process.wait()
        reader.join(timeout=5)
        if (
            process.stderr is not None and not reader.is_alive()
        ):  # if pget is a script, its child may still have it open
            process.stderr.close()
    if process.returncode:
        said = _last_words(lines)
        if "no space left on device" in said:
            raise _disk_full(private.parent, size)
        raise http.Retry(f"pget ended with status {process.returncode}{': ' if said else ''}{said}")


def _escaped(url: str) -> str:
    """``url`` with all characters escaped that pget's parser refuses, mostly in logins."""
    return re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", str(httpx.URL(url).copy_with(fragment=None)))


def _watch(process: subprocess.Popen[bytes], tree: Path, progress: Progress, patience: float) -> None:
    """Wait for pget; raises :class:`http.Retry` when it has written nothing for ``patience`` seconds."""
    size, grown = 0, time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_WATCH_SECONDS)
            break
        current = _size(tree)
        progress.reach(current)
        if current > size:
            size, grown = current, time.monotonic()
        elif time.monotonic() - grown > patience:
            raise http.Retry(f"pget wrote nothing for {patience:g} s")
    progress.reach(_size(tree))


def _size(tree: Path) -> int:
    total = 0
    for folder, _, names in os.walk(tree):
        for name in names:
            with suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _read_lines(process: subprocess.Popen[bytes], lines: deque[str]) -> None:
    assert process.stderr is not None
    with suppress(OSError, ValueError):  # closed under us
        while line := process.stderr.readline(4096):
            lines.append(line.decode(errors="replace").strip())


def _last_words(lines: deque[str]) -> str:
    """Why pget failed: its last error, a crash of its runtime, or its last line."""
    for start in ("Error: ", "panic: ", "fatal error: ", ""):
        for line in reversed(lines):
            if line and line.startswith(start):
                return http.redact(line.removeprefix("Error: "))[:300]
    return ""


def _die_with(parent: int) -> Any:
    """What the child runs before it becomes pget, so that it never outlives this process, even if that is killed.

    Linux sends the signal when the thread that started the child ends; that thread waits for it.
    """
    prctl = ctypes.CDLL(None).prctl
    death_signal = 1

    def prepare() -> None:
        prctl(death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


# With Python


class _Body:
    """The bytes of a URL in order; a download that is cut off is resumed where the server supports ranges."""

    def __init__(self, url: str, remote: http.Remote, progress: Progress):
        self.url = url
        self.remote = remote
        self.progress = progress
        self.received = 0
        self._pieces: Iterator[bytes] | None = None
        self._resumed_at = -1
        self._last: deque[bytes] = deque(maxlen=16)

    def read(self, size: int) -> bytes:
        """The next bytes, of any length; none at the end. Raises :class:`http.Retry`."""
        while True:
            left = None if self.remote.size is None else self.remote.size - self.received
            if left == 0:
                return b""
            reason = "the connection was cut off"
            try:
                self._pieces = self._pieces or self._connect()
                piece = next(self._pieces, b"")[:left]
            except http.Retry as error:
                reason = str(error)
            else:
                if piece:
                    self.received += len(piece)
                    self._last.append(piece)
                    self.progress.reach(self.received)
                if piece or left is None:
                    return piece
            self.close()
            if not self.remote.ranges or self._resumed_at == self.received:
                raise http.Retry(reason)
            self._resumed_at = self.received
            log.info("%s after %s: going on from there", reason, amount(self.received))

    def _connect(self) -> Iterator[bytes]:
        with http.get(self.url, f"{self.received}-" if self.received else "") as answer:
            if self.received and (
                answer.status_code != 206 or http.total_size(answer, self.received) != self.remote.size
            ):
                raise http.Retry("the file on the server changed")
            yield from answer.iter_raw()

    def rest(self, start: int) -> bytes:
        """The bytes from the recent position ``start`` on, of which only LARGEST_END or little more are read."""
        came = b"".join(self._last)
        if self.received - start > len(came):
            raise http.Retry("the answer came in crumbs")
        rest = came[len(came) - (self.received - start) :]
        while len(rest) < LARGEST_END and (piece := self.read(2**16)):
            rest += piece
        return rest

    def close(self) -> None:
        self._pieces = None  # which closes the connection


def _extract_with_python(url: str, remote: http.Remote, tree: Path, progress: Progress) -> Contents:
    contents = Contents(http.shown(url))
    body: Any = _Body(url, remote, progress)
    tree.mkdir()
    try:
        with closing(body), tarfile.open(fileobj=body, mode="r|", bufsize=LARGEST_END) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not in Python 3.11 before 3.11.4
            for member in archive:
                contents.add(member)
                archive.extract(member, tree, set_attrs=False)
            fault = end_fault(body.rest(archive.offset))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        if remote.size is None:
            raise http.Retry(f"it is not a complete, uncompressed tar archive: {http.redact(str(error))}") from None
        raise _not_a_tar(url, error) from None
    if fault and remote.size is None:  # then the archive or the connection may have been cut off
        raise http.Retry(fault)
    if fault:
        raise CheckpointError(f"{http.shown(url)}: {fault}; make or upload it anew")
    contents.finish()
    return contents
