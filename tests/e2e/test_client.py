"""The client of Cog's HTTP API against a server that sends exactly what each test says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from cog_local.client import Client, Event, RequestRefused, ServerGone

EVENT = b'event: output\ndata: {"chunk":"a"}\n\n'


class ScriptedServer:
    """Answers the n-th connection with ``answers[n]``, in the pieces given; None waits until the client is gone."""

    def __init__(self) -> None:
        self.answers: list[list[bytes | None]] = []
        self.requests: list[bytes] = []
        self.left = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(300)
            with connection:
                self.requests.append(_request(connection))
                for piece in self.answers[len(self.requests) - 1]:
                    if piece is None:
                        assert connection.recv(1) == b""
                        self.left.set()
                    else:
                        connection.sendall(piece)


def _request(connection: socket.socket) -> bytes:
    """A whole request: head and body."""
    came = b""
    while b"\r\n\r\n" not in came:
        came += connection.recv(2**16)
    head, _, body = came.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(2**16)
    return head + b"\r\n\r\n" + body


def answer(status: str, body: bytes) -> list[bytes | None]:
    return [f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BUSY = [*answer("409 Conflict", b'{"detail": "Already running a prediction"}'), None]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


def test_a_busy_server_is_asked_again_on_new_connections(server):
    server.answers = [BUSY, BUSY, answer("200 OK", b'{"status": "succeeded"}')]
    assert Client(server.url).predict({"prompt": "Why?"}, "a") == {"status": "succeeded"}
    assert len(server.requests) == 3
    for request in server.requests:
        head, _, body = request.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /predictions HTTP/1.1\r\n")
        assert json.loads(body) == {"input": {"prompt": "Why?"}, "id": "a"}


def test_patience_ends(server):
    server.answers = [BUSY]
    with pytest.raises(RequestRefused, match="Already running") as caught:
        Client(server.url, patience=-1).predict({})
    assert caught.value.status == 409


def test_other_refusals_are_final_and_name_the_inputs(server):
    server.answers = [answer("422 No", b'{"detail": [{"loc": ["body", "input", "top_k"], "msg": "not whole"}]}')]
    with pytest.raises(RequestRefused, match=r"^top_k: not whole$") as caught:
        next(Client(server.url).stream({}))
    assert caught.value.status == 422 and len(server.requests) == 1


def test_a_refusal_that_is_no_json(server):
    server.answers = [answer("500 No", b"worker crashed\xff\n")]
    with pytest.raises(RequestRefused, match=r"^worker crashed\ufffd$"):
        Client(server.url).predict({})


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_in_pieces_of_any_size(server, size):
    said = "a\u2028b\u0085c\rd é"  # what str.splitlines would take for line ends
    output = 'event: output\ndata: {"chunk":"a\u2028b\u0085c\\rd é"}\n\n'
    text = f"{output}: quiet\n\nevent: completed\r\ndata: {{}}\r\n\r\n".encode()
    pieces = [chunk(text[at : at + size]) for at in range(0, len(text), size)]
    server.answers = [[STREAM, *pieces, chunk(b"")]]
    assert list(Client(server.url).stream({})) == [Event("output", {"chunk": said}), Event("completed", {})]


@pytest.mark.parametrize("rest", [b"", b"40\r\nda", chunk(b"data: {")])
def test_a_server_that_stops_in_the_middle(server, rest):
    server.answers = [[STREAM + chunk(EVENT) + rest]]
    events = Client(server.url).stream({})
    assert next(events) == Event("output", {"chunk": "a"})
    with pytest.raises(ServerGone, match="in the middle"):
        next(events)


def test_an_answer_that_is_cut_off(server):
    server.answers = [[b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"status":']]
    with pytest.raises(ServerGone, match="in the middle"):
        Client(server.url).predict({})


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 2", b"SSH-2.0-x\r\n"])
def test_no_answer_at_all(server, said):
    server.answers = [[said]]
    with pytest.raises(ServerGone, match="does not answer"):
        Client(server.url).health()


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ServerGone, match="does not answer"):
        Client(url).health()


def test_closing_the_iterator_hangs_up(server):
    server.answers = [[STREAM, chunk(EVENT), None]]
    events = Client(server.url).stream({})
    assert next(events).data == {"chunk": "a"}
    assert not server.left.is_set()
    events.close()
    assert server.left.wait(60)


def test_an_event_comes_while_the_stream_is_open(server):
    server.answers = [[STREAM, chunk(EVENT), chunk(EVENT), None]]
    events = Client(server.url).stream({})
    assert [next(events), next(events)] == [Event("output", {"chunk": "a"})] * 2
    events.close()


def test_cancelling_says_whether_anything_ran(server):
    server.answers = [answer("200 OK", b"{}"), answer("404 No", b"{}")]
    client = Client(server.url)
    assert client.cancel("a b/c?") and not client.cancel("a")
    assert server.requests[0].startswith(b"POST /predictions/a%20b/c%3F/cancel HTTP/1.1\r\n")


def test_proxies_are_for_other_servers(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answers = [answer("200 OK", b'{"status": "READY"}')]
    assert Client(server.url).health() == {"status": "READY"}
    assert b"accept-encoding: identity" in server.requests[0].lower()
