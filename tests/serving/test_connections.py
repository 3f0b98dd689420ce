"""What a connection may cost: bodies, heads, silence, and clients that speak something else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from kimi_vl.serving import access

from .conftest import PATIENCE_S, ServerThread, ask, until, user

JSON = "Content-Type: application/json\r\n"
CHAT = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
HELLO = json.dumps({"messages": user("Hello."), "max_tokens": 1, "temperature": 0}).encode()


@pytest.fixture(scope="module")
def strict() -> Iterator[ServerThread]:
    """A server of small bounds in all but time: a slow machine must not be taken for a client that says nothing."""
    seconds: dict[str, Any] = {"body_timeout_s": PATIENCE_S, "head_timeout_s": PATIENCE_S, "keep_alive_s": PATIENCE_S}
    with ServerThread(max_body_mib=1, max_bodies_mib=1, max_connections=20, **seconds) as running:
        yield running


@pytest.fixture
def hurry(strict: ServerThread, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From its call on, the server has little patience with a head or a body that begins."""

    def hurry(seconds: float = 0.2) -> None:
        options = dataclasses.replace(strict.options, head_timeout_s=seconds)
        monkeypatch.setattr(strict.connection_class, "options", options)
        monkeypatch.setattr(strict.service.bodies, "_seconds", seconds)

    return hurry


@pytest.fixture
def connection(strict: ServerThread) -> Iterator[socket.socket]:
    with strict.connect() as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    connection.settimeout(PATIENCE_S)
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not piece:
            return received
        received += piece


def refusal(received: bytes) -> tuple[int, str]:
    """Status and code of the only answer in ``received``."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head and b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def alive(server: ServerThread) -> bool:
    with server.http() as http:
        return http.post("/v1/chat/completions", content=HELLO, headers={"Content-Type": "application/json"}).is_success


# Bodies


def test_a_body_that_says_it_is_too_large(connection: socket.socket) -> None:
    connection.sendall(f"{CHAT}{JSON}Content-Length: {2**40}\r\nExpect: 100-continue\r\n\r\n".encode())
    connection.shutdown(socket.SHUT_WR)
    received = read_all(connection)
    assert refusal(received) == (413, "request_too_large") and b"100 Continue" not in received


def test_a_body_that_turns_out_to_be_too_large(connection: socket.socket) -> None:
    connection.sendall(f"{CHAT}{JSON}Transfer-Encoding: chunked\r\n\r\n".encode())
    sent = 0
    try:
        while sent < 64 << 20:
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            sent += 65536
            if sent == 4 << 20:
                connection.sendall(b"0\r\n\r\n")
                break
    except OSError:
        pass
    assert refusal(read_all(connection)) == (413, "request_too_large")


def test_a_hundred_mebibytes_pass_and_a_byte_more_does_not() -> None:
    with ServerThread() as usual, usual.http() as http:
        for more, status in ((0, 200), (1, 413)):
            padding = (100 << 20) - len(HELLO) + more
            body = HELLO[:-1] + b" " * padding + HELLO[-1:]
            answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == "request_too_large"
        until(usual.idle)


def test_all_bodies_together_are_bounded(strict: ServerThread, connection: socket.socket) -> None:
    begun = b" " * (890 << 10)  # each 64 KiB of it give it one more second
    connection.sendall(f"{CHAT}{JSON}Content-Length: {900 << 10}\r\n\r\n".encode() + begun)
    until(lambda: strict.service.bodies.held == 900 << 10)
    with strict.http() as http:
        large = b" " * (200 << 10) + HELLO
        for body in (large, iter([large[:100_000], large[100_000:]])):  # with its length, and in chunks
            second = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert second.status_code == 429 and second.json()["error"]["code"] == "overloaded"
            assert second.headers["retry-after"] == "1"
        assert ask(http, max_tokens=1).status_code == 200, "there is room for a small one"
    connection.close()
    until(strict.idle)


@pytest.mark.parametrize("head", ["Content-Length: 1000\r\n", "Transfer-Encoding: chunked\r\n"])
def test_a_body_that_drips_ends(
    strict: ServerThread, connection: socket.socket, hurry: Callable[..., None], head: str
) -> None:
    hurry()
    connection.sendall(f"{CHAT}{JSON}{head}\r\n".encode())
    connection.sendall(b'{"' if "Length" in head else b'2\r\n{"\r\n')
    connection.settimeout(PATIENCE_S)
    received = connection.recv(65536)
    connection.shutdown(socket.SHUT_WR)
    assert refusal(received + read_all(connection)) == (408, "request_timeout")
    until(strict.idle)


def test_a_sender_of_a_refused_body_cannot_stay(
    strict: ServerThread, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "LINGER_S", 0.2)
    connection.sendall(f"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: {2**30}\r\n\r\n{{".encode())
    assert refusal(read_all(connection)) == (404, "not_found")


def test_a_body_that_no_route_reads_does_not_keep_a_connection(connection: socket.socket) -> None:
    connection.sendall(f"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: {2**30}\r\n\r\n{{".encode())
    assert read_all(connection).startswith(b"HTTP/1.1 200")


# Heads, and silence


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat", f"{CHAT}X: ".encode()], ids=["nothing", "a line", "a header"])
def test_who_does_not_ask_is_hung_up_on(strict: ServerThread, hurry: Callable[..., None], said: bytes) -> None:
    hurry()
    with strict.connect() as connection:
        with contextlib.suppress(OSError):  # it has happened already
            connection.sendall(said)
        assert read_all(connection) == b""


def test_a_connection_is_kept_for_the_next_request_for_a_while(
    connection: socket.socket, hurry: Callable[..., None]
) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.settimeout(PATIENCE_S)
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    hurry()
    connection.sendall(b"GET /heal")  # the rest never comes
    assert read_all(connection) == b""


@pytest.mark.parametrize(
    "head",
    [
        b"X: " + b"a" * 200_000,
        b"".join(b"X-%d: %s\r\n" % (number, b"a" * 100) for number in range(2000)),
        b"a" * 200_000,
    ],
    ids=["one long", "many", "no colon"],
)
def test_heads_are_bounded(strict: ServerThread, connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\n" + head + b"\r\n\r\n")
    assert refusal(read_all(connection)) == (431, "headers_too_large")


def test_an_address_is_bounded(connection: socket.socket) -> None:
    connection.sendall(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert refusal(read_all(connection)) == (431, "headers_too_large")


def test_connections_are_bounded(strict: ServerThread) -> None:
    until(lambda: len(strict.connections) == 0)
    held = [strict.connect() for _ in range(20)]
    until(lambda: len(strict.connections) == 20)
    with strict.connect() as one_more:
        assert refusal(read_all(one_more)) == (503, "service_unavailable")
    for each in held:
        each.close()
    until(lambda: len(strict.connections) == 0)
    assert alive(strict)


# What is not HTTP, or hardly


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 1000,
    ],
    ids=lambda said: repr(said[:20]),
)
def test_what_is_not_http_is_answered_and_ends(strict: ServerThread, said: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        received = read_all(connection)
    assert received == b"" or (received.startswith(b"HTTP/1.1 4") and b'"error"' in received)
    assert alive(strict)


UPGRADE = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
"""What Java's HttpClient offers in each of its requests."""


def with_length(body: bytes) -> bytes:
    return f"{CHAT}{JSON}{UPGRADE}Content-Length: {len(body)}\r\n\r\n".encode() + body


def in_chunks(body: bytes) -> bytes:
    return (
        f"{CHAT}{JSON}{UPGRADE}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    )


@pytest.mark.parametrize("frame", [with_length, in_chunks])
@pytest.mark.parametrize("step", [1, 7, 100, 10_000])
def test_an_offer_to_upgrade_is_declined_and_the_request_answered(
    connection: socket.socket, frame: Callable[[bytes], bytes], step: int
) -> None:
    said = frame(HELLO)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(said), step):
        connection.sendall(said[start : start + step])
    connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n")
    first, second = read_all(connection).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and b'"object": "chat.completion"' in first
    assert second.startswith(b"200") and b'"version"' in second


def test_a_large_head_that_offers_to_upgrade_is_bounded(connection: socket.socket) -> None:
    connection.sendall(f"GET /health HTTP/1.1\r\n{UPGRADE}X: {'a' * 200_000}\r\n\r\n".encode())
    assert refusal(read_all(connection)) == (431, "headers_too_large")


def test_a_tunnel_is_refused(strict: ServerThread, connection: socket.socket) -> None:
    connection.sendall(b"CONNECT /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
    assert refusal(read_all(connection)) == (405, "method_not_allowed")
    assert alive(strict)


@pytest.mark.parametrize("streamed", [False, True])
def test_http_1_0_has_no_chunks(connection: socket.socket, streamed: bool) -> None:
    body = json.dumps({**json.loads(HELLO), "stream": streamed}).encode()
    head = f"{CHAT}{JSON}Content-Length: {len(body)}\r\n\r\n".replace("HTTP/1.1", "HTTP/1.0")
    connection.sendall(head.encode() + body)
    head, _, said = read_all(connection).partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"transfer-encoding" not in head
    if streamed:
        events = said.split(b"\n\n")
        assert all(event.startswith(b"data: ") for event in events[:-1]) and events[-2:] == [b"data: [DONE]", b""]
    else:
        assert json.loads(said)["object"] == "chat.completion" and f"content-length: {len(said)}".encode() in head


def test_requests_in_a_row_are_answered_in_order(strict: ServerThread, connection: socket.socket) -> None:
    one = f"{CHAT}{JSON}Content-Length: {len(HELLO)}\r\n\r\n".encode() + HELLO
    connection.sendall(one + b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    received = read_all(connection)
    assert received.index(b"chat.completion") < received.index(b'"version"') and received.count(b"HTTP/1.1 200") == 2


def test_requests_in_a_row_are_bounded(strict: ServerThread, connection: socket.socket) -> None:
    connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
    assert read_all(connection).count(b"HTTP/1.1 200") < 100
    assert alive(strict)


def test_a_connection_survives_a_mistake(strict: ServerThread) -> None:
    with strict.http() as http:
        first = ask(http, temperature=9)
        second = ask(http, max_tokens=1)
        assert (first.status_code, second.status_code) == (400, 200)
        assert "connection" not in first.headers
        assert len(strict.connections) == 1


# Keys, and web pages of others


@pytest.fixture(scope="module")
def locked() -> Iterator[ServerThread]:
    keys = ("first-key", "schlüssel 2")
    with ServerThread(api_keys=keys, cors_origin=("https://chat.example",)) as running:
        yield running


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer first-key", 200),
        ("Bearer schlüssel 2", 200),
        ("Bearer first-ke", 401),
        ("Bearer first-key2", 401),
        ("Bearer", 401),
        ("first-key", 401),
        ("Basic first-key", 401),
        (None, 401),
    ],
)
def test_keys(locked: ServerThread, sent: str | None, status: int) -> None:
    headers = [] if sent is None else [(b"Authorization", sent.encode())]
    with locked.http(headers=headers) as http:
        answers = [
            http.get("/v1/models"),
            http.get("/version"),
            http.post("/tokenize", json={"prompt": "a"}),
            ask(http, max_tokens=1),
        ]
        assert {answer.status_code for answer in answers} == {status}
        if status == 401:
            assert all(answer.headers["www-authenticate"] == "Bearer" for answer in answers)
            assert answers[-1].json()["error"]["code"] == "invalid_api_key"
            assert http.get("/v1/nothing").status_code == 401, "what there is, is not told to strangers"
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200


def preflight(http: httpx.Client, origin: str) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return http.request("OPTIONS", "/v1/chat/completions", headers={"Origin": origin, **asked})


def test_pages_of_others_may_ask_where_they_are_named(locked: ServerThread, strict: ServerThread) -> None:
    def allowed(server: ServerThread, origin: str) -> list[Any]:
        with server.http() as http:
            answers = [preflight(http, origin), http.get("/v1/models", headers={"Origin": origin})]
            return [answer.headers.get("access-control-allow-origin") for answer in answers]

    assert allowed(locked, "https://chat.example") == ["https://chat.example"] * 2
    assert allowed(locked, "https://evil.example") == [None, None]
    assert allowed(strict, "https://chat.example") == [None, None]
