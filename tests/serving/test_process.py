"""``kimi-vl serve`` as a process: its start, its log, and its end by signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from kimi_vl.cli import main

from .conftest import PATIENCE_S, ROOT, ServerProcess, ask, until, user


@pytest.fixture(scope="module")
def process() -> Iterator[ServerProcess]:
    with ServerProcess("--served-model-name", "mine", environment={"KIMI_VL_API_KEYS": "one,two"}) as running:
        yield running


def test_options_arrive_and_the_log_has_no_content(process: ServerProcess) -> None:
    with process.client(api_key="two") as client:
        assert [model.id for model in client.models.list()] == ["mine"]
        secret = user("What is 12 + 30? My password is hunter2.")
        answer = client.chat.completions.create(
            model="mine", messages=secret, temperature=0, extra_headers={"X-Request-Id": "mine-7"}
        )
        assert answer._request_id == "mine-7"
    with process.http() as http:
        assert http.get("/v1/models/hunter2").status_code == 401
        assert ask(http, temperature=9).status_code == 401
    until(lambda: any(record["id"] == "mine-7" for record in process.records()))
    record = next(record for record in process.records() if record["id"] == "mine-7")
    assert record["path"] == "/v1/chat/completions" and record["status"] == 200 and record["method"] == "POST"
    assert record["completion_tokens"] > 0 and record["finish_reason"] == ["stop"] and record["seconds"] > 0
    assert not any("hunter2" in line or "two" in line for line in process.lines)
    for line in process.lines:
        assert line.startswith(("ready: ", "{")), line
        if line.startswith("{"):
            assert {"time", "level", "event"} <= json.loads(line).keys()


def test_it_is_reached_from_this_machine_alone(process: ServerProcess) -> None:
    assert process.address[0] == "127.0.0.1"


def serve(*flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """The exit status of the command, in this process."""
    monkeypatch.setenv("KIMI_VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(main, "_interrupt", signal.SIG_DFL)
    before = signal.getsignal(signal.SIGTERM)
    try:
        return main.main(["serve", "--port", "0", *flags])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_port_that_is_taken_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ("--model", "demo", "--port", str(port))
        assert serve(*flags, monkeypatch=monkeypatch, tmp_path=tmp_path) == 1
    said = f"error: cannot listen on 127.0.0.1 port {port} (Address already in use)\n"
    assert capsys.readouterr().err == said


def test_a_model_that_cannot_be_loaded_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve("--model", str(tmp_path), monkeypatch=monkeypatch, tmp_path=tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.nightly
def test_without_its_packages_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['starlette'] = None\n")
    ended = subprocess.run(
        [sys.executable, "-m", "kimi_vl.cli", "serve", "--model", "demo"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == 'error: the server is not installed; pip install "kimi-vl[server]" adds it\n'


def endless(endless_model: Path, *flags: str) -> ServerProcess:
    return ServerProcess("--model", str(endless_model), *flags)


def stream(client: OpenAI, received: list[Any], **params: Any) -> threading.Thread:
    """A stream that is read in a thread; its chunks, or what ended it, are in ``received``."""

    def read() -> None:
        try:
            for chunk in client.chat.completions.create(
                model="api-kimi-vl", messages=user("Hello."), stream=True, **params
            ):
                received.append(chunk)
        except Exception as error:
            received.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: len(received) > 2)
    return thread


def test_sigterm_says_so_finishes_streams_and_ends(endless_model: Path) -> None:
    with endless(endless_model, "--drain-delay-s", "1.5") as process, process.client() as client:
        received: list[Any] = []
        thread = stream(client, received, max_tokens=600)
        process.process.send_signal(signal.SIGTERM)
        with process.http() as http:
            until(lambda: http.get("/health").status_code == 503)
            for path in ("/ready", "/health"):
                answer = http.get(path)
                assert answer.json()["error"]["code"] == "service_unavailable" and answer.headers["retry-after"]
            refused = ask(http)
            assert refused.status_code == 503 and refused.headers["x-should-retry"] == "true"
        assert process.process.wait(PATIENCE_S) == 0
        thread.join()
        assert received[-1].choices[0].finish_reason == "length"
    with pytest.raises(OSError):
        socket.create_connection(process.address, 5)


@pytest.mark.nightly
def test_a_second_signal_ends_it_now(endless_model: Path) -> None:
    with endless(endless_model) as process, process.client() as client:
        received: list[Any] = []
        thread = stream(client, received, max_tokens=100_000)
        process.process.send_signal(signal.SIGINT)
        with process.http() as http:
            until(lambda: _refused(http))
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(PATIENCE_S) == 0
        thread.join()
        assert isinstance(received[-1], Exception)


def _refused(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 503
    except httpx.HTTPError:
        return True


@pytest.mark.nightly
def test_streams_that_go_on_too_long_are_cut(endless_model: Path) -> None:
    with endless(endless_model, "--drain-delay-s", "0", "--drain-s", "1") as process, process.client() as client:
        received: list[Any] = []
        thread = stream(client, received, max_tokens=100_000)
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(PATIENCE_S) == 0
        thread.join()
        assert isinstance(received[-1], Exception)


@pytest.mark.nightly
def test_a_signal_while_the_model_is_loaded(tmp_path: Path) -> None:
    """The folder is a pipe's: loading waits for what never comes."""
    os.mkfifo(tmp_path / "config.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "kimi_vl.cli", "serve", "--model", str(tmp_path), "--port", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = []
    until(lambda: found.extend(_listening(process.pid)) or found or process.poll() is not None)
    with httpx.Client(base_url=f"http://127.0.0.1:{found[0]}", timeout=PATIENCE_S) as http:
        for path in ("/health", "/ready", "/v1/models"):
            assert http.get(path).status_code == 503
        refused = ask(http)
        assert refused.status_code == 503 and "loaded" in refused.json()["error"]["message"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


def _listening(pid: int) -> list[int]:
    """The TCP ports on which a process listens."""
    inodes = set()
    for number in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(number))
        except OSError:
            continue
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [int(cells[1].split(":")[1], 16) for cells in lines if cells[3] == "0A" and f"socket:[{cells[9]}]" in inodes]
