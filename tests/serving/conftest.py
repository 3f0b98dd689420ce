"""The OpenAI-compatible server in a process of its own, on the demo model, once for each module of tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300
"""How long a test waits for what must happen at once on a quiet machine."""


class ServerProcess:
    """``kimi-vl serve`` with options, ready on entry."""

    def __init__(self, *flags: str, environment: Mapping[str, str] | None = None):
        settings = {"KIMI_VL_MODEL": "demo", "OMP_NUM_THREADS": "1", **(environment or {})}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kimi_vl.cli", "serve", "--port", "0", *flags],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        found = self.wait_for(r"ready: (http://\S+)/v1")
        self.url = found.group(1)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line of the log in which the pattern is found."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern} did not come: {self.lines[-20:]}")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def records(self, event: str = "request") -> list[dict[str, Any]]:
        """The lines of its log in JSON."""
        read = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [record for record in read if record.get("event") == event]

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
        self._reader.join()
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def until(condition: Any) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": user("What is 12 + 30?"), "temperature": 0, **body})


__all__: Sequence[str] = ("PATIENCE_S", "ROOT", "ServerProcess", "ask", "until", "user")
