"""nginx and vllm-router, as docs/deployment sets them up, in front of two servers with a model that never ends.

nginx is the one on PATH; vllm-router is in an environment of its own (`kimi_vl_router` in scripts/environment.sh).
"""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from .conftest import PATIENCE_S, ROOT, ServerThread, ask, python_with, until, user

FOLDER = ROOT / "docs" / "deployment"
BALANCERS = ("nginx", "router")
SESSIONS = [f"session-{number}" for number in range(8)]

pytestmark = pytest.mark.nightly


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def nginx(folder: Path, port: int, servers: list[str]) -> list[str]:
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("needs nginx on PATH")
    text = (FOLDER / "nginx" / "nginx.conf").read_text()
    for number, server in enumerate(servers, 1):
        text = text.replace(f"server-{number}:8000", server)
    text = text.replace("listen 8000;", f"listen 127.0.0.1:{port};").replace("/tmp/nginx.pid", str(folder / "pid"))
    places = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # a packaged nginx has them in /var
    text = text.replace("http {", "http {" + "".join(f"{name}_temp_path {folder / name};" for name in places), 1)
    (folder / "nginx.conf").write_text(text)
    return [program, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]


def router(folder: Path, port: int, servers: list[str]) -> list[str]:
    python = python_with("router", "vllm-router")
    words = yaml.safe_load((FOLDER / "router" / "compose.yaml").read_text())["services"]["balancer"]["command"]
    for number, server in enumerate(servers, 1):
        words = [word.replace(f"server-{number}:8000", server) for word in words]
    words = ["--host=127.0.0.1" if word.startswith("--host=") else word for word in words]
    words = [f"--port={port}" if word.startswith("--port=") else word for word in words]
    program = Path(python).with_name("vllm-router")
    return [str(program), f"--prometheus-port={free_port()}", f"--log-dir={folder}", *words]


@contextmanager
def balanced(name: str, folder: Path, servers: list[str]) -> Iterator[str]:
    """The address of a balancer in front of ``servers``, which are host:port."""
    port = free_port()
    folder.chmod(0o777)  # a worker of nginx that was started by root is somebody else
    command = {"nginx": nginx, "router": router}[name](folder, port, servers)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: process.poll() is not None or _healthy(url))
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            yield url
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def servers(endless_model: Path) -> Iterator[list[ServerThread]]:
    with (
        ServerThread(endless_model, max_num_seqs=1, max_waiting=1) as first,
        ServerThread(endless_model, max_num_seqs=1, max_waiting=1) as second,
    ):
        yield [first, second]


@pytest.fixture(scope="module", params=BALANCERS)
def client(
    request: pytest.FixtureRequest, servers: list[ServerThread], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    addresses = ["{}:{}".format(*server.address) for server in servers]
    folder = tmp_path_factory.mktemp(request.param)
    with balanced(request.param, folder, addresses) as url, httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        yield client


def answering(client: httpx.Client, servers: list[ServerThread], session: str) -> int:
    """The server that answers a request of ``session``."""
    before = [len(server.observer.named("ends")) for server in servers]
    with session_of(client, session):
        assert ask(client, max_tokens=3).status_code == 200
    until(lambda: [len(server.observer.named("ends")) for server in servers] != before)
    [number] = [n for n, server in enumerate(servers) if len(server.observer.named("ends")) != before[n]]
    return number


@contextmanager
def session_of(client: httpx.Client, session: str) -> Iterator[None]:
    client.headers["x-session-id"] = session
    try:
        yield
    finally:
        del client.headers["x-session-id"]


def test_a_session_stays_on_a_server_and_sessions_are_spread(client: httpx.Client, servers: list[ServerThread]) -> None:
    places = {session: {answering(client, servers, session) for _ in range(3)} for session in SESSIONS}
    assert all(len(found) == 1 for found in places.values()), places
    assert set().union(*places.values()) == {0, 1}


def test_the_refusal_of_a_full_server_passes_and_what_a_client_leaves_is_freed(
    client: httpx.Client, servers: list[ServerThread]
) -> None:
    place = servers[answering(client, servers, SESSIONS[0])]
    until(lambda: all(server.idle() for server in servers))
    body = {"messages": user("Hello."), "stream": True, "max_tokens": 100_000}
    waited: list[httpx.Response] = []
    with session_of(client, SESSIONS[0]):
        second = threading.Thread(target=lambda: waited.append(ask(client, max_tokens=3)))
        with client.stream("POST", "/v1/chat/completions", json=body) as first:
            assert first.headers["content-type"].startswith("text/event-stream")
            lines = first.iter_lines()
            assert all(next(line for line in lines if line).startswith("data: {") for _ in range(3))
            second.start()
            until(lambda: place.engine.stats().waiting == 1)
            before = len(place.observer.named("rejects"))
            refused = ask(client, max_tokens=3)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) >= 1
            assert len(place.observer.named("rejects")) == before + 1, "the balancer tried again"
        second.join()  # what waits is answered once the engine has heard that the first client left
        assert waited[0].status_code == 200
        until(place.idle)


class OnePiece(http.server.BaseHTTPRequestHandler):
    """Sends one small piece of a stream, and no more until it has been read.

    The stream has neither a length nor chunks: of these, a proxy with buffers waits for more.
    """

    read = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: 1\n\n")
        self.wfile.flush()
        self.read.wait(60)
        self.wfile.write(b"data: 2\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("name", BALANCERS)
def test_not_even_a_small_piece_of_a_stream_is_held_back(name: str, tmp_path: Path) -> None:
    OnePiece.read.clear()
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OnePiece)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    with balanced(name, tmp_path, [f"127.0.0.1:{upstream.server_port}"] * 2) as url:
        body = {"messages": user("Hello."), "stream": True, "model": "any"}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=20) as stream:
            pieces = stream.iter_lines()
            assert next(line for line in pieces if line) == "data: 1"
            OnePiece.read.set()
            assert next(line for line in pieces if line) == "data: 2"
    upstream.shutdown()
    upstream.server_close()
