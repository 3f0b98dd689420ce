"""Slow lines, certificates, redirects, addresses, proxies and answers that are hardly HTTP: the file, or a sentence."""

from __future__ import annotations

import base64
import gzip
import io
import logging
import re
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from kimi_vl.errors import CheckpointError
from kimi_vl.weights import download, http
from kimi_vl.weights.progress import Progress
from tests.weights_world import FaultServer, self_signed


def tar(size: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.size = size
        archive.addfile(info, io.BytesIO(bytes(size)))
    return file.getvalue()


TAR = tar(5000)
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *(name.upper() for name in PROXIES), "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    return tmp_path / "private"


def fetched(url: str, private: Path) -> None:
    tree = download.fetch(url, private)
    assert [(path.name, path.stat().st_size) for path in tree.iterdir()] == [("a", 5000)]


def refused(url: str, private: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        download.fetch(url, private)
    text = str(caught.value)
    assert "\n" not in text and "; " in text, "one sentence that says what to do"
    return text


# Slow lines


def test_a_slow_line_is_seen_to_bring_something(site, pget_program, private, monkeypatch, caplog):
    """A pget that waits for one chunk on each connection writes long before it has half of the file."""
    monkeypatch.setenv("PGET", pget_program)
    monkeypatch.setattr(download, "CONNECTIONS", 4)
    monkeypatch.setattr(download, "LEAST_CHUNK", 16_000)
    monkeypatch.setattr(download, "LARGEST_CHUNK", 16_000_000)
    monkeypatch.setattr(download, "FIRST_SECONDS", 0.3)
    seen: list[tuple[int, int]] = []  # bytes on the disk, bytes on the line

    class Watched(Progress):
        def reach(self, done: int) -> None:
            seen.append((done, site.sent))
            super().reach(done)

    monkeypatch.setattr(download, "Progress", Watched)
    content = tar(3_000_000)
    site.override = lambda path: content
    site.rate = 1e6
    download.fetch(site.url + "a.tar", private)
    assert "failed" not in caplog.text
    first = next(sent for done, sent in seen if done)
    assert first < len(content) / 2


def test_a_chunk_is_what_the_line_brings(site, monkeypatch):
    """On a line of 1 MB/s 2 s bring 2 MB, shared among 16 connections; a slower machine sees less."""
    monkeypatch.setattr(download, "CONNECTIONS", 16)
    monkeypatch.setattr(download, "LEAST_CHUNK", 1)
    monkeypatch.setattr(download, "LARGEST_CHUNK", 16_000_000)
    content = bytes(40_000_000)
    site.override = lambda path: content
    site.rate = 1e6
    assert 1 < download._chunk(site.url + "a.tar", len(content)) <= 1.2 * 2e6 / 16


@pytest.mark.parametrize("pieces", [[], [bytes(10**6)]])
def test_a_chunk_of_a_line_that_cannot_be_measured_is_a_small_one(monkeypatch, pieces):
    """What comes at once says nothing about the line."""

    @contextmanager
    def answer(url: str, span: str) -> Iterator[httpx.Response]:
        yield httpx.Response(206, stream=httpx.ByteStream(b"".join(pieces)))

    monkeypatch.setattr(http, "get", answer)
    assert download._chunk("http://host/a.tar", 10**9) == download.LEAST_CHUNK


def test_a_chunk_of_a_server_that_fails_is_a_small_one(site):
    site.statuses = [500] * 9
    assert download._chunk(site.url + "a.tar", 10**9) == download.LEAST_CHUNK


# Certificates


@pytest.fixture
def tls(tmp_path: Path, site: FaultServer) -> Iterator[FaultServer]:
    with FaultServer(tmp_path, certificate=self_signed(tmp_path), override=lambda path: TAR) as server:
        yield server


def test_a_certificate_that_nobody_trusts_is_refused_at_once(tls, fetcher, private, caplog):
    text = refused(tls.url + "a.tar?token=hush", private)
    assert text.startswith(f"{tls.url}a.tar: the server's certificate is not trusted; ")
    assert "SSL_CERT_FILE" in text
    assert not tls.requests
    assert "failed" not in caplog.text, "none of the three tries is spent on it"


def test_a_certificate_for_another_name_is_refused_at_once(tls, fetcher, private, monkeypatch, caplog):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    assert "certificate is not trusted" in refused(tls.url.replace("127.0.0.1", "localhost") + "a.tar", private)
    assert not tls.requests
    assert "failed" not in caplog.text


def test_a_certificate_that_the_environment_names_is_trusted(tls, fetcher, private, monkeypatch, caplog):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    fetched(tls.url + "a.tar", private)
    assert "failed" not in caplog.text


def test_a_redirect_out_of_encryption_is_refused_by_a_server_too(tls, fetcher, private, site, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    site.override = lambda path: TAR
    tls.redirect = site.url.rstrip("/")
    text = refused(tls.url + "a.tar?token=hush", private)
    assert "without encryption" in text
    assert "hush" not in text
    assert not site.requests


def test_certificates_are_loaded_once_for_the_same_variables(site, tls, monkeypatch):
    made: list[object] = []
    create = httpx.create_ssl_context
    monkeypatch.setattr(httpx, "create_ssl_context", lambda *given: made.append(given) or create(*given))
    http._tls_context.cache_clear()
    site.override = lambda path: TAR

    def ranges() -> None:
        for first in range(0, 5000, 1000):
            with http.get(f"{site.url}a.tar", f"{first}-{first + 9}") as answer:
                assert answer.read() == TAR[first : first + 10]

    ranges()
    assert len(made) == 1
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    ranges()
    assert len(made) == 2


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSLKEYLOGFILE"])
def test_certificates_that_cannot_be_read(site, no_pget, private, monkeypatch, name):
    monkeypatch.setenv(name, "/nowhere/hush.pem")
    text = refused(site.url + "a.tar", private)
    assert name in text
    assert "hush" not in text
    assert "disk" not in text


# Logins


@pytest.mark.parametrize(
    ("login", "meant"),
    [
        ("us%40er:p%3Aa%2Fs%20s", "us@er:p:a/s s"),
        ("user:p@ss", "user:p@ss"),
        ("us%C3%A9r:p%C3%A4ss", "usér:päss"),
        ("usér:p ss", "usér:p ss"),
        ("user:100%^", "user:100%^"),
        ("user:", "user:"),
    ],
)
def test_a_login_is_sent_as_it_is_meant(site, fetcher, private, login, meant, caplog):
    caplog.set_level(logging.DEBUG)
    site.override = lambda path: TAR
    site.login = f"Basic {base64.b64encode(meant.encode()).decode()}"
    fetched(site.url.replace("://", f"://{login}@") + "a.tar", private)
    assert "failed" not in caplog.text, "none of the three tries is spent on it"
    assert login not in caplog.text


@pytest.mark.parametrize(
    ("path", "asked"), [("a b.tar", "/a%20b.tar"), ("ä%2F.tar?x=%2F&y=a+b/c=", "/%C3%A4%2F.tar?x=%2F&y=a+b/c=")]
)
def test_a_path_is_asked_for_as_it_is_meant(site, fetcher, private, path, asked, caplog):
    site.override = lambda path: TAR
    fetched(site.url + path + "#fragment", private)
    assert "failed" not in caplog.text
    assert {place for place, _ in site.requests} == {asked}


def test_another_server_does_not_see_the_login(site, fetcher, private, tmp_path):
    seen = []

    def content(handler_path: str) -> bytes:
        return TAR

    site.override = content
    answer = site.answer
    site.answer = lambda handler: (seen.append(handler.headers.get("Authorization")), answer(handler))
    with FaultServer(tmp_path, redirect=site.url.rstrip("/"), login="Basic dTpw") as front:
        fetched(front.url.replace("://", "://u:p@").replace("127.0.0.1", "localhost") + "a.tar", private)
    assert seen
    assert set(seen) == {None}


@pytest.mark.parametrize("place", ["user:hush#pass@host/a.tar", "user:hush?pass@host/a.tar"])
def test_a_login_that_breaks_its_address_is_not_shown(no_pget, private, place):
    assert "hush" not in refused(f"http://{place}", private)


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:/host/a.tar",
        "http://[::1/a.tar",
        "http://a..b/a.tar",
        f"http://{'a' * 300}.invalid/a.tar",
        "http://xn--/a.tar",
        "http://127.0.0.1:70000/a.tar",
        "http://127.0.0.1:abc/a.tar",
        "ftp://127.0.0.1/a.tar",
        "http://127.0.0.1/a\nb.tar",
        "http://127.0.0.1/a.tar\0",
        f"http://127.0.0.1/{'x' * 70_000}",
    ],
)
def test_what_is_no_address_is_refused_at_once(no_pget, private, url, caplog):
    assert "is not a valid address; check its spelling" in refused(url, private)
    assert "failed" not in caplog.text


# Proxies


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"http_proxy": "http://user:hush@127.0.0.1:9"}, "Connection refused"),
        ({"HTTP_PROXY": "127.0.0.1:9"}, "Connection refused"),
        ({"http_proxy": "http://[::1"}, "HTTP_PROXY"),
        ({"http_proxy": "gopher://127.0.0.1:9"}, "HTTP_PROXY"),
        ({"http_proxy": "http://127.0.0.1:9", "no_proxy": "[::1]:x,garbage/33"}, "NO_PROXY"),
        ({"all_proxy": "socks5h://user:hush@127.0.0.1:9"}, "SOCKS"),
    ],
)
def test_proxies_that_do_not_work(site, no_pget, private, monkeypatch, settings, says):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    text = refused(site.url + "a.tar", private)
    assert says in text
    assert "hush" not in text
    assert not site.requests


def test_a_proxy_is_used_and_left_out_where_it_is_said(site, no_pget, private, monkeypatch):
    site.override = lambda path: TAR
    monkeypatch.setenv("http_proxy", site.url)
    fetched("http://weights.invalid/a.tar", private)
    assert site.requests[0][0] == "http://weights.invalid/a.tar"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    download.remove(private)
    private.mkdir()
    fetched(site.url + "a.tar", private)


# Answers


class RawServer:
    """Answers what ``answer`` makes of a request's text, byte for byte, and closes."""

    def __init__(self, answer: Callable[[str, str], bytes]):
        self.answer = answer
        self.requests = 0
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            text = b""
            while b"\r\n\r\n" not in text:
                piece = connection.recv(2**16)
                if not piece:
                    return
                text += piece
            self.requests += 1
            connection.sendall(self.answer(text.decode("latin-1"), self.url))
            connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def part(text: str, extra: bytes = b"", shift: int = 0) -> bytes:
    """The answer of a server that can do ranges."""
    found = re.search(r"(?i)^range: bytes=(\d+)-(\d*)", text, re.MULTILINE)
    start, end = (int(found[1]), min(int(found[2] or 10**9) + 1, len(TAR))) if found else (0, len(TAR))
    shift = min(shift, start)
    head = b"HTTP/1.1 206 Partial\r\nConnection: close\r\nContent-Range: bytes %d-%d/%d\r\nContent-Length: %d\r\n%s\r\n"
    return head % (start - shift, end - 1 - shift, len(TAR), end - start, extra) + TAR[start - shift : end - shift]


def head(status: int, *lines: bytes, body: bytes = b"") -> Callable[[str, str], bytes]:
    start = b"HTTP/1.1 %d Some words\r\nConnection: close\r\n" % status
    return lambda text, url: start + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def moved(place: bytes) -> Callable[[str, str], bytes]:
    """Everything but /b.tar to ``place``."""

    def answer(text: str, url: str) -> bytes:
        if re.match("GET [^ ]*/b", text):
            return part(text)
        return head(302, b"Content-Length: 0", b"Location: " + place.replace(b"URL/", url.encode()))(text, url)

    return answer


GOOD: dict[str, Callable[[str, str], bytes]] = {
    "a path": moved(b"/b.tar"),
    "a relative path": moved(b"b.tar"),
    "the same scheme": moved(b"URL/b.tar".replace(b"http:", b"")),
    "a fragment": moved(b"/b.tar#c"),
    "a space": moved(b"/b c.tar"),
    "letters beyond ASCII": moved("/bä.tar".encode()),
    "a login": moved(b"URL/b.tar"),
    "long headers": lambda text, url: part(text, b"X-A: " + b"x" * 60_000 + b"\r\n"),
    "many headers": lambda text, url: part(text, b"".join(b"X-%d: y\r\n" % number for number in range(2000))),
    "a part that says it is compressed": lambda text, url: part(text, b"Content-Encoding: gzip\r\n"),
    "chunks": head(200, b"Transfer-Encoding: chunked", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(TAR), TAR)),
    "an old version": lambda text, url: b"HTTP/1.0 200 OK\r\n\r\n" + TAR,
    "something before": lambda text, url: b"HTTP/1.1 100 Continue\r\n\r\n" + part(text),
    "more than it says": lambda text, url: part(text) + b"JUNK" * 99,
}
CUT = "in 3 tries (the connection was cut off)"
NO_HTTP = "in 3 tries (the server's answer is not one of HTTP)"
NO_TAR = "is not a complete, uncompressed tar archive"
LEADS_NOWHERE = "the server's redirects lead to nothing (302)"
BAD: dict[str, tuple[Callable[[str, str], bytes], str]] = {
    "a circle": (moved(b"URL/a.tar"), LEADS_NOWHERE),
    "no place": (head(302, b"Content-Length: 0"), LEADS_NOWHERE),
    "an empty place": (moved(b""), LEADS_NOWHERE),
    "no words": (moved(b"\xff\xfe"), LEADS_NOWHERE),
    "another protocol": (moved(b"ftp://127.0.0.1/a?hush"), "redirects to ftp://127.0.0.1/a, which is no valid https"),
    "a file": (moved(b"file:///etc/passwd"), "which is no valid https"),
    "a port that is none": (moved(b"http://127.0.0.1:99999/a"), "which is no valid https"),
    "a server that is off": (moved(b"http://127.0.0.1:9/a?hush"), "Connection refused"),
    "not modified": (head(304), "lead to nothing (304)"),
    "no content": (head(204), "in 3 tries (the server answers 204)"),
    "a status that is none": (head(999, b"Content-Length: 0"), "in 3 tries (the server answers 999)"),
    "a status of four digits": (head(1000, b"Content-Length: 0"), NO_HTTP),
    "a range that is none": (head(206, b"Content-Range: bytes x-y/z", b"Content-Length: 1", body=b"x"), NO_TAR),
    "a size in 5000 digits": (
        head(206, b"Content-Range: bytes 0-0/" + b"9" * 5000, b"Content-Length: 1", body=b"x"),
        NO_TAR,
    ),
    "a size that nothing has": (
        head(206, b"Content-Range: bytes 0-0/999999999999999999", b"Content-Length: 1", body=b"x"),
        "in 3 tries (the file on the server changed",
    ),
    "a length in 5000 digits": (head(200, b"Content-Length: " + b"9" * 5000, body=b"x"), NO_HTTP),
    "a length below zero": (head(200, b"Content-Length: -5", body=b"x"), NO_HTTP),
    "two lengths": (head(200, b"Content-Length: 5", b"Content-Length: 6", body=b"xxxxx"), NO_HTTP),
    "headers without end": (lambda text, url: part(text, b"X-A: " + b"x" * 300_000 + b"\r\n"), "in 3 tries ("),
    "half of the headers": (lambda text, url: b"HTTP/1.1 200 OK\r\nContent-", CUT),
    "nothing": (lambda text, url: b"", CUT),
    "another protocol's words": (lambda text, url: b"SSH-2.0-Server\r\n", CUT),
    "no headers": (lambda text, url: TAR, CUT),
    "compressed, no length": (head(200, b"Content-Encoding: gzip", body=gzip.compress(TAR)), NO_TAR[3:]),
    "chunks, cut": (head(200, b"Transfer-Encoding: chunked", body=b"%x\r\n%s" % (len(TAR), TAR[:700])), CUT),
    "chunks, cut between": (head(200, b"Transfer-Encoding: chunked", body=b"2bc\r\n%s\r\n" % TAR[:700]), CUT),
    "chunks that are none": (head(200, b"Transfer-Encoding: chunked", body=b"zz\r\nhello"), NO_HTTP),
}


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, str], bytes]], RawServer]]:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
    servers: list[RawServer] = []

    def start(answer: Callable[[str, str], bytes]) -> RawServer:
        servers.append(RawServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("name", GOOD)
def test_odd_answers_that_hold_the_file(raw, fetcher, private, name):
    fetched(raw(GOOD[name]).url + "a.tar", private)


@pytest.mark.parametrize("name", BAD)
def test_answers_that_do_not_hold_the_file(raw, no_pget, private, name):
    answer, says = BAD[name]
    server = raw(answer)
    text = refused(server.url + "a.tar", private)
    assert says in text
    assert "hush" not in text
    assert server.requests <= 40


def test_another_part_than_was_asked_for_is_not_taken(raw):
    """One byte before it."""
    url = raw(lambda text, url: part(text, shift=1)).url + "a.tar"
    file = download._RangedFile(url, len(TAR))
    file.seek(600)
    with pytest.raises(http.Retry, match="the file on the server changed"):
        file.read(10)
    body = download._Body(url, http.Remote(len(TAR), True, True), Progress("fetching", len(TAR)))
    body.received = 600
    with pytest.raises(http.Retry, match="the file on the server changed"):
        body.read(10)


def test_what_a_redirect_cannot_mend_is_not_tried_again(raw, no_pget, private):
    server = raw(moved(b"URL/a.tar"))
    refused(server.url + "a.tar", private)
    assert server.requests == 1 + http._REDIRECTS
