"""The file of answers: what an earlier run has done is found in it, and each answer is appended as one line.

Whatever kills the program, at most the last line is torn: the next run cuts it off and goes on from there. A line
carries the digest of its request in its id, so that the file alone says what is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from .lines import digest

SYNC_SECONDS = 2.0
_BEGINNING = b'{"id": "batch_req_'


class Earlier:
    """What earlier runs have answered: lines by their digests, of which no two of a batch have the same.

    ``answered`` and ``failed`` count those that this run has come across.
    """

    def __init__(self) -> None:
        self._lines: set[int] = set()
        self._failures: set[int] = set()
        self._ids: set[int] = set()
        self.answered = self.failed = 0

    def add(self, result: dict[str, Any]) -> None:
        """A line of the file of answers. Raises ValueError, LookupError or TypeError where it is none."""
        line = int(result["id"].removeprefix("batch_req_"), 16)
        self._lines.add(line)
        if failed(result):
            self._failures.add(line)
        elif result["custom_id"] is not None:
            self._ids.add(digest(result["custom_id"].encode("utf-8", "surrogatepass")))

    def take(self, line: int) -> bool:
        """Whether the line with this digest is answered; counts it then."""
        if line not in self._lines:
            return False
        self.answered += 1
        self.failed += line in self._failures
        return True

    def has_id(self, key: int) -> bool:
        """Whether a line whose custom_id has this digest was answered without a failure."""
        return key in self._ids


def failed(result: dict[str, Any]) -> bool:
    """Whether the answer to a line is an error."""
    return result["response"] is None or result["response"]["status_code"] != 200


class Results:
    """A file that answers are appended to, for one program at a time. ``-`` is standard output.

    Raises :class:`UserError` where there is something else in it, where another run writes to it, and where it cannot
    be written.
    """

    def __init__(self, path: str):
        self._name = "standard output" if path == "-" else path
        self.earlier = Earlier()
        self._synced_at = time.monotonic()
        self._end: int | None = None  # of the lines that are whole, in a file that can be cut
        if path == "-":
            sys.stdout.flush()
            self._file = os.dup(sys.stdout.fileno())
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._error(f"cannot be written ({error.strerror})") from None
        try:
            if stat.S_ISREG(os.fstat(self._file).st_mode):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._end = self._read(path)
        except BaseException as error:
            os.close(self._file)
            if isinstance(error, BlockingIOError):
                raise self._error("another run writes to it; wait for that, or name another file") from None
            raise

    def same_as(self, other: os.stat_result) -> bool:
        """Whether this is the file of which ``other`` speaks."""
        return self._end is not None and os.path.samestat(os.fstat(self._file), other)

    def _read(self, path: str) -> int:
        """Take in what is there, and cut off a torn last line; the size of what is left."""
        end = 0
        with Path(path).open("rb") as file:
            beginning = file.read(len(_BEGINNING)).rstrip(b"\0")
            if not _BEGINNING.startswith(beginning):
                raise self._foreign(1)
            file.seek(0)
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    break
                try:
                    self.earlier.add(json.loads(data))
                except (ValueError, LookupError, TypeError, AttributeError):
                    raise self._foreign(number) from None
                end += len(data)
        with self._failures():
            os.ftruncate(self._file, end)
        return end

    def append(self, result: dict[str, Any]) -> None:
        """Write one answer; it is on the disk :data:`SYNC_SECONDS` later."""
        data = memoryview(json.dumps(result).encode() + b"\n")
        with self._failures():
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
        if self._end is not None:
            self._end += len(data)
            if time.monotonic() - self._synced_at > SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """Have everything that was written on the disk."""
        if self._end is not None:
            with self._failures():
                os.fsync(self._file)
        self._synced_at = time.monotonic()

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._file)

    @contextlib.contextmanager
    def _failures(self):
        """What the system says, as one line; half a line that fitted is taken back."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._end is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
            raise self._error(f"{error.strerror}; make room and run the same command again: it goes on there") from None

    def _foreign(self, number: int) -> UserError:
        return self._error(f"line {number} is no answer of a batch; name another file")

    def _error(self, what: str) -> UserError:
        return UserError("E_PARAMETER", f"{self._name}: {what}.")
