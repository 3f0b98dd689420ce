"""The OpenAI-compatible server on the demo model, in a process of its own or in a thread, once a module of tests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

import kimi_vl
from kimi_vl.engine.engine import Engine, EngineOptions
from kimi_vl.events import Done
from kimi_vl.serving import server
from kimi_vl.serving.app import build_app
from kimi_vl.serving.options import ServerOptions
from kimi_vl.serving.service import Observer, Service
from tests.e2e.scripted import make_thinker

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

    def stop(self, number: int = signal.SIGINT) -> int:
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


class ServerThread:
    """The same application on the same uvicorn, beside the test, which sees the engine."""

    def __init__(self, model: str | Path = "demo", **options: Any):
        torch.set_num_threads(1)
        self.options = ServerOptions(model=str(model), port=0, drain_s=1.0, **options)
        engine = EngineOptions(max_num_seqs=self.options.max_num_seqs, max_waiting=self.options.max_waiting)
        self.pipeline = kimi_vl.load(str(model), options=engine)
        self.observer = Recorder()
        self.app = build_app(self.pipeline, self.options, self.observer)
        listener = server.listen(self.options)
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self.url = f"http://{self.address[0]}:{self.address[1]}"
        config = server.configuration(self.app, self.options)
        self.connection_class: Any = config.http
        self._server = server.Server(config, self.service)
        self._thread = threading.Thread(target=self._run, args=(config.get_loop_factory(), listener))
        self._thread.start()
        until(lambda: self._server.started)

    def _run(self, loop_factory: Any, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(self._server.serve(sockets=[listener]))

    @property
    def service(self) -> Service:
        return self.app.state.service

    @property
    def engine(self) -> Engine:
        return self.pipeline.engine

    def idle(self) -> bool:
        """Whether nothing is left of any request: neither in the engine nor a body in memory."""
        return self.engine.idle() and self.service.bodies.held == 0

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    @property
    def connections(self) -> set[Any]:
        return self._server.server_state.connections

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE_S)

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.pipeline.close()


class Recorder(Observer):
    """Keeps what an observer is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begins(self) -> None:
        self.calls.append(("begins",))

    def first_token(self, seconds: float) -> None:
        self.calls.append(("first_token", seconds))

    def chunk(self, seconds: float, events: int) -> None:
        self.calls.append(("chunk", seconds, events))

    def ends(self, status: int, seconds: float, choices: Sequence[Done]) -> None:
        self.calls.append(("ends", status, seconds, choices))

    def rejects(self, status: int, code: str | None) -> None:
        self.calls.append(("rejects", status, code))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def until(condition: Any) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerThread]:
    with ServerThread() as running:
        yield running


@pytest.fixture(scope="module")
def http(demo: ServerThread) -> Iterator[httpx.Client]:
    with demo.http() as client:
        yield client


@pytest.fixture(scope="module")
def client(demo: ServerThread) -> Iterator[OpenAI]:
    with demo.client() as client:
        yield client


def python_with(extra: str, what: str) -> str:
    """The Python of the environment that `kimi_vl_EXTRA` of scripts/environment.sh makes, which has ``what``; the
    test is skipped where that cannot be installed."""
    made = subprocess.run(
        ["bash", "-c", f"source scripts/environment.sh && kimi_vl_{extra}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"{what} cannot be installed from the registry of packages, or not now")
    return made.stdout.strip()


@pytest.fixture(scope="session")
def ray_python() -> str:
    """The Python of an environment with Ray: RAY_PYTHON, or that of `kimi_vl_cluster` in scripts/environment.sh."""
    if found := os.environ.get("RAY_PYTHON"):
        return found
    return python_with("cluster", "Ray")


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that thinks for ever, and answers for ever once its thinking is closed."""
    return make_thinker(tmp_path_factory.mktemp("endless"))


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": user("What is 12 + 30?"), "temperature": 0, **body})


def thinking_of(said: Any) -> str:
    """What a message or a delta has of the thinking."""
    return (said.model_extra or {}).get("reasoning_content") or ""
