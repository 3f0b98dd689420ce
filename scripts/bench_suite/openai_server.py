"""Starts and stops `kimi-vl serve`, or a cluster of it, and looks at its process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRAIN_SECONDS = 60.0


class OpenAIServer:
    """A running server, as a context manager: ready on entry, gone on exit. ``flags`` are those of `kimi-vl serve`.

    ``command`` is another one of `kimi-vl`, and ``python`` another interpreter than this one.
    """

    def __init__(
        self,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        command: str = "serve",
        python: str = sys.executable,
    ):
        self.lines: deque[str] = deque(maxlen=2000)
        """The last lines of its log."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {**(os.environ if environment is None else environment), "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [python, "-P", "-m", "kimi_vl.cli", command, "--port", "0", *flags],
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._address = ("", 0)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := re.match(r"ready: http://(\S+):(\d+)/v1", line):
                self._address = found.group(1), int(found.group(2))
                self._ready.set()
        self._ready.set()

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    @property
    def url(self) -> str:
        return f"http://{self._address[0]}:{self._address[1]}"

    def __enter__(self) -> OpenAIServer:
        self._ready.wait()
        if not self._address[1]:
            self.__exit__()
            raise SystemExit("error: the server did not start\n" + "\n".join(self.lines))
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()

    def megabytes(self) -> float:
        """What it holds in memory; NaN where /proc does not tell."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024 / 1e6
        return float("nan")

    def threads(self) -> int:
        return self._entries("task")

    def files(self) -> int:
        """Its open files and sockets."""
        return self._entries("fd")

    def _entries(self, folder: str) -> int:
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{self.process.pid}/{folder}"))
        return 0
