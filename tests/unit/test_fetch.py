"""Pictures by URL: what is refused is refused with one error and before a connection; what is public arrives."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_vl.errors import UserError
from kimi_vl.serving import fetch
from kimi_vl.serving.fetch import FetchOptions, ImageFetcher, Network

PICTURE = b"\x89PNG a picture"
PUBLIC, PUBLIC_6 = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
QUICK: dict[str, Any] = {"slowest_refusal": 0.0}
Answers = dict[str, bytes | list[bytes]]
Hosts = dict[str, Sequence[str] | Callable[[], list[str]]]


def answer(body: bytes = PICTURE, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *([f"Content-Length: {len(body)}"] if length else []), *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(b"", f"Location: {location}", status=status)


def untrusting() -> ssl.SSLContext:
    """A context that is made quickly, for connections in memory: it trusts no authority."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass
class Imitated:
    """A network in memory: hosts and their addresses, paths and what is sent for them; records all that leaves."""

    hosts: Hosts = field(default_factory=lambda: {"public.test": [PUBLIC]})
    answers: Answers = field(default_factory=lambda: {"/": answer()})
    own: Sequence[str] = ()
    unreachable: Sequence[str] = ()
    resolved: list[str] = field(default_factory=list)
    connected: list[tuple[str, int, str | None]] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    aborted: int = 0

    def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        found = self.hosts.get(host)
        if found is None:
            raise OSError("no such host")
        return list(found() if callable(found) else found)

    async def connect(self, address: fetch.Address, port: int, context: object, host: str | None) -> fetch.Streams:
        self.connected.append((str(address), port, host))
        if str(address) in self.unreachable:
            raise ConnectionRefusedError
        reader = asyncio.StreamReader()
        return reader, SimpleNamespace(  # pyright: ignore[reportReturnType]
            write=lambda request: self.answer(reader, request), transport=SimpleNamespace(abort=self.abort)
        )

    def answer(self, reader: asyncio.StreamReader, request: bytes) -> None:
        self.requests.append(request)
        parts = self.answers[request.split(b" ")[1].decode()]
        for part in [parts] if isinstance(parts, bytes) else parts:
            reader.feed_data(part)
        reader.feed_eof()

    def abort(self) -> None:
        self.aborted += 1

    @property
    def network(self) -> Network:
        own = {ipaddress.ip_address(address) for address in self.own}
        return Network(self.resolve, own.__contains__, self.connect, untrusting)

    def fetch(self, *urls: str, **options: Any) -> list[bytes]:
        async def run() -> list[bytes]:
            fetcher = ImageFetcher(FetchOptions(**(QUICK | options)), self.network)
            try:
                return await fetcher.fetch(urls)
            finally:
                fetcher.close()

        return asyncio.run(run())

    def refuse(self, *urls: str, **options: Any) -> str:
        """The error for ``urls``, which must be the one that there is."""
        with pytest.raises(UserError) as caught:
            self.fetch(*urls, **options)
        assert caught.value.code == "E_IMAGE_URL" and caught.value.__cause__ is None
        return str(caught.value)


def the_error() -> str:
    return Imitated(hosts={}).refuse("https://nowhere.test/")


# What may not be asked at all


SPELLINGS = [
    # schemes
    "file:///etc/passwd",
    "ftp://public.test/",
    "gopher://public.test/",
    "//public.test/",
    "public.test",
    "",
    "https:",
    "https://",
    "https:///x",
    "https:public.test",
    "http://public.test/",
    "data:image/png;base64,AAAA",
    # users, passwords and other ports
    "https://user@public.test/",
    "https://user:password@public.test/",
    "https://public.test@127.0.0.1/",
    "https://@public.test/",
    "https://public.test:80/",
    "https://public.test:22/",
    "https://public.test:8443/",
    "https://public.test:/",
    "https://public.test:0443000/",
    "https://public.test:-443/",
    "https://public.test:４４３/",
    # characters that programs read differently
    "https://public.test\\@127.0.0.1/",
    "https:\\\\public.test/",
    "https://public.test/\\x",
    " https://public.test/",
    "https://public.test/ ",
    "https://pub\tlic.test/",
    "https://public.test/\r\nX: y",
    "https://public.test/\x00",
    "https://public.test/\x7f",
    "https://public.test/\x85",
    "https://public.test/\ud800",
    # hosts that are none
    "https://public..test/",
    "https://.public.test/",
    "https://public.test./",
    "https://-public.test/",
    "https://public-.test/",
    "https://pub%6cic.test/",
    "https://127.0.0.1%2f.public.test/",
    "https://public.test,127.0.0.1/",
    "https://" + "a" * 64 + ".test/",
    "https://" + "a." * 127 + "test/",
    "https://public.test/" + "a" * fetch.MAX_URL,
    "https://xn--a\u0300.test/",
    "https://ℂ\u200b\u2028.test/",
    "https://public.test／127.0.0.1/",
    # brackets
    "https://[public.test]/",
    "https://[127.0.0.1]/",
    "https://[2606:2800::1]x/",
    "https://[2606:2800::1/",
    "https://[v1.x]/",
    f"https://{PUBLIC_6}/",
    "https://[fe80::1%25eth0]/",
    f"https://[{PUBLIC_6}%25eth0]/",
    f"https://[{PUBLIC_6}%eth0]/",
    # other spellings of 127.0.0.1 and of a public address
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://0177.0.0.1/",
    "https://0177.0.0.01/",
    "https://127.1/",
    "https://127.0.1/",
    "https://127.0.0.1.1/",
    "https://127.0.0.0x1/",
    "https://0x/",
    "https://127.0.0.256/",
    "https://127.0.0.1./",
    "https://0x5d.0xb8.0xd7.0x0e/",
    "https://１２７.１/",
]


@pytest.mark.parametrize("url", SPELLINGS, ids=ascii)
def test_a_url_that_could_be_read_in_two_ways_is_refused_unasked(url: str) -> None:
    class Everywhere(dict):
        def get(self, *_: object) -> list[str]:
            return [PUBLIC]

    world = Imitated(hosts=Everywhere())
    assert world.refuse(url) == the_error()
    assert not world.resolved and not world.connected


NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.9",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:a9fe:a9fe",
    "::ffff:0:7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::7f00:1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_never_reached(address: str) -> None:
    literal = f"[{address}]" if ":" in address else address
    unlike: Hosts = {
        "alone.test": [address],
        "after.test": [PUBLIC, address],
        "before.test": [address, PUBLIC],
        "both.test": [PUBLIC_6, PUBLIC, address],
        "public.test": [PUBLIC],
    }
    for name in [*unlike][:4]:
        world = Imitated(hosts=unlike)
        assert world.refuse(f"https://{name}/") == the_error()
        assert world.refuse(f"http://{name}/", http=True) == the_error()
        assert not world.connected
    world = Imitated(hosts=unlike)
    assert world.refuse(f"https://{literal}/") == the_error()
    assert world.refuse(f"http://{literal}/", http=True) == the_error()
    assert not world.connected and not world.resolved
    for name in ("alone.test", "after.test", literal):
        world = Imitated(hosts=unlike, answers={"/": redirect(f"https://{name}/")})
        assert world.refuse("https://public.test/") == the_error()
        assert world.connected == [(PUBLIC, 443, "public.test")]


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", PUBLIC, PUBLIC_6, "2a00:1450::1", "192.0.1.1", "100.128.0.1"]
)
def test_a_public_address_is_public(address: str) -> None:
    assert fetch.is_public(ipaddress.ip_address(address))
    assert not fetch.is_own(ipaddress.ip_address(address))


@pytest.mark.parametrize("zone", ["fe80::1%eth0", f"{PUBLIC_6}%1", "not an address", ""])
def test_an_answer_of_the_resolver_that_is_no_plain_address_is_refused(zone: str) -> None:
    world = Imitated(hosts={"public.test": [PUBLIC, zone]})
    assert world.refuse("https://public.test/") == the_error()
    assert not world.connected


def test_the_machines_own_addresses_are_refused_though_public() -> None:
    world = Imitated(hosts={"public.test": [PUBLIC], "mapped.test": [f"::ffff:{PUBLIC}"]}, own=[PUBLIC])
    assert world.refuse("https://public.test/") == the_error()
    assert world.refuse("https://mapped.test/") == the_error()
    assert world.refuse(f"https://{PUBLIC}/") == the_error()
    assert not world.connected


def test_an_own_address_is_known_by_what_the_system_sends_from() -> None:
    assert fetch.is_own(ipaddress.ip_address("127.0.0.1"))
    assert fetch.is_own(ipaddress.ip_address("127.9.9.9")) in (True, False)  # the loopback network has one source
    assert not fetch.is_own(ipaddress.ip_address("192.0.2.1"))


def test_a_host_is_resolved_once_and_the_connection_goes_to_what_was_checked() -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
    world = Imitated(hosts={"public.test": lambda: next(answers)})
    assert world.fetch("https://public.test/") == [PICTURE]
    assert world.resolved == ["public.test"]
    assert world.connected == [(PUBLIC, 443, "public.test")]
    assert world.refuse("https://public.test/") == the_error()  # what it resolves to now
    assert len(world.connected) == 1


def test_a_redirect_to_the_same_host_is_resolved_and_checked_again() -> None:
    answers = iter([[PUBLIC], ["10.0.0.1"]])
    world = Imitated(hosts={"public.test": lambda: next(answers)}, answers={"/": redirect("/inner")})
    assert world.refuse("https://public.test/") == the_error()
    assert world.connected == [(PUBLIC, 443, "public.test")]


def test_an_address_that_takes_no_connection_is_followed_by_the_next() -> None:
    world = Imitated(hosts={"public.test": [PUBLIC_6, PUBLIC, PUBLIC]}, unreachable=[PUBLIC_6])
    assert world.fetch("https://public.test/") == [PICTURE]
    assert [address for address, *_ in world.connected] == [PUBLIC_6, PUBLIC]
    world = Imitated(hosts={"public.test": [PUBLIC_6, PUBLIC]}, unreachable=[PUBLIC, PUBLIC_6])
    assert world.refuse("https://public.test/") == the_error()


def test_the_mapped_form_of_a_public_address_is_that_address() -> None:
    world = Imitated(hosts={"public.test": [f"::ffff:{PUBLIC}"]})
    assert world.fetch("https://public.test/", f"https://[::ffff:{PUBLIC}]/") == [PICTURE] * 2
    assert {address for address, *_ in world.connected} == {PUBLIC}


# What is sent


def test_a_request_has_a_host_and_nothing_of_the_callers() -> None:
    world = Imitated(answers={"/a%20b/%C3%BC%22?q=%C3%A4&r": answer()})
    assert world.fetch('https://Public.TEST:443/a%20b/ü"?q=ä&r#fragment') == [PICTURE]
    lines = world.requests[0].decode().split("\r\n")
    assert lines[0] == "GET /a%20b/%C3%BC%22?q=%C3%A4&r HTTP/1.1"
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    assert headers == {
        "Host": "public.test",
        "User-Agent": "kimi-vl",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    assert world.connected == [(PUBLIC, 443, "public.test")] and world.aborted == 1


def test_hosts_in_other_alphabets_are_asked_for_in_ascii() -> None:
    world = Imitated(hosts={"xn--bcher-kva.test": [PUBLIC], "localhost": ["127.0.0.1", "::1"]})
    assert world.fetch("https://Bücher.test/") == [PICTURE]
    assert world.connected == [(PUBLIC, 443, "xn--bcher-kva.test")]
    assert b"Host: xn--bcher-kva.test\r\n" in world.requests[0]
    for url in ("https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", "https://ｌｏｃａｌｈｏｓｔ/", "https://①②⑦.⓪.⓪.①/", "https://127。0。0。1/"):
        assert world.refuse(url) == the_error()
    assert len(world.connected) == 1


def test_without_encryption_only_where_that_is_allowed() -> None:
    world = Imitated()
    assert world.fetch("http://public.test/", "http://public.test:80/", http=True) == [PICTURE] * 2
    assert world.connected == [(PUBLIC, 80, None)] * 2
    assert world.refuse("http://public.test/") == the_error()
    assert world.refuse("http://public.test:443/", http=True) == the_error()


def test_only_hosts_of_the_list() -> None:
    hosts = ["a.test", "b.a.test", "c.b.a.test", "xa.test", "*.c.test", "c.test", "d.c.test", "e.d.c.test", "xc.test"]
    world = Imitated({host: [PUBLIC] for host in hosts}, {"/": answer(), "/r": redirect("https://xa.test/")})
    listed = FetchOptions.of(["A.test", "*.C.test", "1.2.3.4", "Bücher.test"]).hosts
    assert listed == {"a.test", "*.c.test", "1.2.3.4", "xn--bcher-kva.test"}
    reached = []
    for host in hosts:
        try:
            world.fetch(f"https://{host}/", hosts=listed)
            reached.append(host)
        except UserError as error:
            assert str(error) == the_error()
    assert reached == ["a.test", "d.c.test", "e.d.c.test"]
    before = len(world.resolved)
    assert world.refuse("https://a.test/r", hosts=listed) == the_error()
    assert world.resolved[before:] == ["a.test"]


@pytest.mark.parametrize(
    "host", ["https://a.test", "a.test/", "a.test:443", "*", "*.", "a..test", "127.1", "", "a test"]
)
def test_a_list_of_hosts_that_could_never_match_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="is not a host name"):
        FetchOptions.of([host])


# What comes back


@pytest.mark.parametrize(
    "parts",
    [
        answer(),
        answer(length=False),  # up to the end of the connection
        [answer()[:20], answer()[20:]],
        [bytes([byte]) for byte in answer()],
        answer(b"6\r\n\x89PNG a\r\n8\r\n picture\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer(),
        answer(PICTURE, "Content-Encoding: identity", "Content-Type: text/html"),
        answer() + b"more",
    ],
    ids=lambda _: "answer",
)
def test_a_body_arrives_as_it_is(parts: bytes | list[bytes]) -> None:
    world = Imitated(answers={"/": parts})
    assert world.fetch("https://public.test/") == [PICTURE]
    assert world.aborted == 1


HEADERS = [f"X-{number}: {'x' * 1000}" for number in range(100)]


@pytest.mark.parametrize(
    "parts",
    [
        b"",
        b"\x00" * 100,
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"HTTP/1.1 200 OK\r\n",
        answer(b""),
        answer(b"", length=False),
        answer()[:-1],
        answer(b"7\r\n\x89PNG", "Transfer-Encoding: chunked", length=False),
        answer(b"zz\r\n", "Transfer-Encoding: chunked", length=False),
        answer(PICTURE, "Content-Length: 3"),
        answer(PICTURE, "Transfer-Encoding: gzip", length=False),
        *(answer(PICTURE, f"Content-Encoding: {coding}") for coding in ("gzip", "br", "deflate", "zstd", "gzip, gzip")),
        *(answer(PICTURE, status=status) for status in ("204 No", "206 Partial", "304 Same", "404 No", "500 No")),
        answer(PICTURE, status="300 Many"),
        answer(b"", status="302 Found"),
        answer(b"", "Location: ", status="302 Found"),
        answer(PICTURE, f"Content-Length: {fetch.MAX_BYTES + 1}", length=False),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + PICTURE,
        [answer(PICTURE, *HEADERS)[at : at + 5000] for at in range(0, 100_000, 5000)],
        [b"HTTP/1.1 200 OK\r\nX: ", *[b"x" * 5000] * 20],
    ],
    ids=lambda _: "answer",
)
def test_what_is_no_picture_by_http_is_refused(parts: bytes | list[bytes]) -> None:
    world = Imitated(answers={"/": parts})
    assert world.refuse("https://public.test/") == the_error()
    assert world.aborted == 1


def test_the_largest_picture_arrives_and_a_byte_more_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    chunks = b"64\r\n" + b"x" * 100 + b"\r\n"
    largest = answer(chunks * 10 + b"0\r\n\r\n", "Transfer-Encoding: chunked", length=False)
    larger = answer(chunks * 10 + b"1\r\nx\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False)
    world = Imitated(answers={"/": answer(b"x" * 1000), "/chunks": largest, "/more": larger, "/end": b""})
    assert world.fetch("https://public.test/", "https://public.test/chunks") == [b"x" * 1000] * 2
    assert world.refuse("https://public.test/more") == the_error()
    world.answers["/end"] = answer(b"x" * 1001, length=False)
    assert world.refuse("https://public.test/end") == the_error()


def test_what_surrounds_a_body_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    hints = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    assert Imitated(answers={"/": hints * 100 + answer()}).fetch("https://public.test/") == [PICTURE]
    world = Imitated(answers={"/": [*[hints] * 2000, answer()]})
    assert world.refuse("https://public.test/") == the_error()


def test_all_pictures_of_a_request_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_REQUEST_BYTES", 3 * len(PICTURE))
    world = Imitated(answers={f"/{number}": answer() for number in range(4)})
    urls = [f"https://public.test/{number}" for number in range(4)]
    assert world.fetch(*urls[:3]) == [PICTURE] * 3
    assert world.fetch(*urls[:3]) == [PICTURE] * 3
    assert world.refuse(*urls) == the_error()


def test_equal_urls_are_fetched_once_and_all_stay_in_order() -> None:
    world = Imitated(answers={f"/{number}": answer(b"%d" % number) for number in range(9)})
    order = [3, 1, 3, 8, 0, 1, 3]
    found = world.fetch(*(f"https://public.test/{number}" for number in order))
    assert found == [b"%d" % number for number in order]
    assert len(world.connected) == 4
    assert world.fetch() == []


# Redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent"])
def test_three_redirects_are_followed_and_no_more(status: str) -> None:
    hops: Answers = {f"/{hop}": redirect(f"{hop + 1}", status) for hop in range(4)}
    hops["/4"] = answer()
    world = Imitated(answers=hops)
    assert world.fetch("https://public.test/1") == [PICTURE]
    assert len(world.connected) == world.aborted == 4
    assert world.refuse("https://public.test/0") == the_error()
    assert len(world.connected) == 8
    assert Imitated(answers={"/": redirect("/")}).refuse("https://public.test/") == the_error()


@pytest.mark.parametrize(
    ("location", "reached"),
    [
        ("https://other.test/", [PUBLIC, PUBLIC_6]),
        ("//other.test/", [PUBLIC, PUBLIC_6]),
        ("/", [PUBLIC, PUBLIC, PUBLIC, PUBLIC]),
        ("http://other.test/", [PUBLIC]),
        ("https://other.test:8443/", [PUBLIC]),
        ("https://user@other.test/", [PUBLIC]),
        ("https://169.254.169.254/latest/meta-data/", [PUBLIC]),
        ("https://metadata.test/", [PUBLIC]),
        ("https://[::ffff:169.254.169.254]/", [PUBLIC]),
        ("https://[fe80::1%25eth0]/", [PUBLIC]),
        ("https://[", [PUBLIC]),
        ("https://2130706433/", [PUBLIC]),
        ("file:///etc/passwd", [PUBLIC]),
        ("\\\\other.test/", [PUBLIC]),
        ("https://other.test/\tx", [PUBLIC]),
    ],
)
def test_each_redirect_is_checked_from_the_start(location: str, reached: list[str]) -> None:
    hosts: Hosts = {"public.test": [PUBLIC], "other.test": [PUBLIC_6], "metadata.test": ["169.254.169.254"]}
    world = Imitated(hosts=hosts)
    plain = world.answer

    def first_redirects(reader: asyncio.StreamReader, request: bytes) -> None:
        world.answers["/"] = redirect(location) if b"Host: public.test" in request else answer()
        plain(reader, request)

    world.answer = first_redirects
    options: list[dict[str, Any]] = [{}, {"http": True}]
    for option in options:
        world.connected.clear()
        if len(reached) == 2:
            assert world.fetch("https://public.test/", **option) == [PICTURE]
        else:
            assert world.refuse("https://public.test/", **option) == the_error()
        assert [address for address, *_ in world.connected] == reached


def test_a_redirect_may_add_encryption_but_not_drop_it() -> None:
    up = Imitated(answers={"/": redirect("https://public.test/x"), "/x": answer()})
    assert up.fetch("http://public.test/", http=True) == [PICTURE]
    assert [port for _, port, _ in up.connected] == [80, 443]
    down = Imitated(answers={"/": redirect("http://public.test/x"), "/x": answer()})
    assert down.refuse("https://public.test/", http=True) == the_error()
    assert [port for _, port, _ in down.connected] == [443]


# Time and number


BEGINNING = 1000.0


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once where everything waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGINNING
        self.threads = 0
        select = self._selector.select  # pyright: ignore[reportAttributeAccessIssue]

        def passing(timeout: float | None = None) -> Any:
            if timeout and not self.threads:
                self.now += timeout
                timeout = 0
            return select(timeout if not self.threads else None)

        self._selector.select = passing  # pyright: ignore[reportAttributeAccessIssue]

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # in this thread, at once
        future = self.create_future()
        try:
            result = func(*args)
        except OSError as error:
            future.set_exception(error)
        else:
            if isinstance(result, float):  # the resolver takes so long
                self.call_later(result, lambda: future.cancelled() or future.set_result([PUBLIC]))
            else:
                future.set_result(result)
        return future


def timed(world: Imitated, url: str, resolve: Any = None, **options: Any) -> tuple[float, bool]:
    """Seconds of the clock that a URL takes, and whether its picture arrives."""

    async def run() -> tuple[float, bool]:
        network = Network(resolve or world.resolve, lambda address: False, world.connect, untrusting)
        fetcher = ImageFetcher(FetchOptions(**options), network)
        try:
            await fetcher.fetch([url])
        except UserError as error:
            assert str(error) == the_error_text
            return asyncio.get_running_loop().time() - BEGINNING, False
        finally:
            fetcher.close()
        return asyncio.get_running_loop().time() - BEGINNING, True

    the_error_text = the_error()
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(run())


def slow(world: Imitated, send: Callable[[asyncio.StreamReader], Awaitable[None]]) -> Imitated:
    """``world`` whose server sends in its own time."""
    tasks = []
    world.answer = lambda reader, request: tasks.append(asyncio.ensure_future(send(reader)))
    return world


def test_a_drip_ends_after_ten_seconds_in_all() -> None:
    async def drip(reader: asyncio.StreamReader) -> None:
        for byte in answer(b"x" * 1000):
            await asyncio.sleep(0.5)
            reader.feed_data(bytes([byte]))

    assert timed(slow(Imitated(), drip), "https://public.test/") == (10, False)


def test_silence_ends_after_ten_seconds_in_all() -> None:
    async def silence(reader: asyncio.StreamReader) -> None:
        await asyncio.sleep(3600)

    assert timed(slow(Imitated(), silence), "https://public.test/") == (10, False)


def test_slow_redirects_share_the_ten_seconds() -> None:
    async def late(reader: asyncio.StreamReader) -> None:
        await asyncio.sleep(4)
        reader.feed_data(redirect("/"))
        reader.feed_eof()

    world = slow(Imitated(), late)
    assert timed(world, "https://public.test/") == (10, False)
    assert len(world.connected) == 3


def test_an_endless_body_ends_at_the_limit() -> None:
    sent = 0

    async def endless(reader: asyncio.StreamReader) -> None:
        nonlocal sent
        reader.feed_data(answer(b"", length=False))
        while not world.aborted:
            reader.feed_data(b"x" * 2**20)
            sent += 1
            await asyncio.sleep(0)

    world = slow(Imitated(), endless)
    took, arrived = timed(world, "https://public.test/")
    assert not arrived and took == fetch.RESOLVER_SECONDS  # stopped at once, and told with the others
    assert 32 < sent < 64


def test_a_connection_that_is_not_taken_leaves_time_for_the_next_address() -> None:
    class Hanging(Imitated):
        async def connect(self, address: fetch.Address, *rest: Any) -> fetch.Streams:
            if str(address) == PUBLIC_6:
                await asyncio.sleep(3600)
            return await super().connect(address, *rest)

    both = Hanging(hosts={"public.test": [PUBLIC_6, PUBLIC]})
    assert timed(both, "https://public.test/") == (fetch.CONNECT_SECONDS, True)
    assert timed(Hanging(hosts={"public.test": [PUBLIC_6]}), "https://public.test/") == (fetch.CONNECT_SECONDS, False)


def test_a_refusal_that_asked_the_resolver_is_not_told_before_a_slow_one_would_be() -> None:
    hosts: Hosts = {"private.test": ["10.0.0.1"], "public.test": [PUBLIC], "dead.test": ["8.8.8.8"]}
    world = Imitated(hosts=hosts, answers={"/": answer(status="404 No"), "/x": answer()}, unreachable=["8.8.8.8"])
    for url in (
        "https://private.test/",
        "https://unknown.test/",
        "https://dead.test/",
        "https://public.test/",
        "https://10.0.0.1/",
    ):
        assert timed(world, url) == (3, False)
    assert timed(world, "https://public.test/", lambda *_: 3600.0) == (3, False)  # a resolver that hangs
    assert timed(world, "https://public.test/x", lambda *_: 2.0) == (2, True)
    assert timed(world, "https://public.test:22/") == (0, False)  # what the URL alone tells is told at once


def test_a_refusal_after_a_redirect_tells_no_more() -> None:
    for name in ("private.test", "unknown.test"):

        async def late(reader: asyncio.StreamReader, name: str = name) -> None:
            await asyncio.sleep(2.5)
            reader.feed_data(redirect(f"https://{name}/"))
            reader.feed_eof()

        world = slow(Imitated(hosts={"public.test": [PUBLIC], "private.test": ["10.0.0.1"]}), late)
        assert timed(world, "https://public.test/") == (5.5, False)


def test_four_at_once_for_a_request_and_sixteen_in_all() -> None:
    class Counted(Imitated):
        now = most = 0

        async def connect(self, *arguments: Any) -> fetch.Streams:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(1)
            self.now -= 1
            return await super().connect(*arguments)

    async def run(world: Counted, requests: int) -> float:
        network = Network(world.resolve, lambda address: False, world.connect, untrusting)
        fetcher = ImageFetcher(FetchOptions(), network)
        urls = [f"https://public.test/{number}" for number in range(8)]
        await asyncio.gather(*(fetcher.fetch(urls) for _ in range(requests)))
        fetcher.close()
        return asyncio.get_running_loop().time() - BEGINNING

    for requests, most, seconds in ((1, 4, 2), (4, 16, 2), (8, 16, 4)):
        world = Counted(answers={f"/{number}": answer() for number in range(8)})
        with asyncio.Runner(loop_factory=Clock) as runner:
            assert runner.run(run(world, requests)) == seconds
        assert world.most == most


def test_one_failure_gives_up_the_others() -> None:
    async def silence(reader: asyncio.StreamReader) -> None:
        await asyncio.sleep(3600)

    async def run(world: Imitated) -> float:
        fetcher = ImageFetcher(FetchOptions(), world.network)
        with pytest.raises(UserError):
            await fetcher.fetch(["https://public.test/", "https://public.test:1/"])
        fetcher.close()
        return asyncio.get_running_loop().time() - BEGINNING

    world = slow(Imitated(), silence)
    with asyncio.Runner(loop_factory=Clock) as runner:
        assert runner.run(run(world)) == 0
    assert world.aborted == len(world.connected) == 1


def test_a_caller_who_goes_away_ends_the_connection() -> None:
    async def silence(reader: asyncio.StreamReader) -> None:
        await asyncio.sleep(3600)

    async def run(world: Imitated) -> None:
        fetcher = ImageFetcher(FetchOptions(), world.network)
        task = asyncio.ensure_future(fetcher.fetch(["https://public.test/"]))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        fetcher.close()

    world = slow(Imitated(), silence)
    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(run(world))
    assert world.aborted == 1


# Anything at all


@settings(max_examples=int(os.environ.get("KIMI_VL_FUZZ", "150")))
@given(
    st.one_of(
        st.text(),
        st.text().map("https://".__add__),
        st.tuples(st.sampled_from(["https://", "https://["]), st.text("0123456789.x:abcdef[]%@\\/")).map("".join),
        st.tuples(st.sampled_from(SPELLINGS), st.text(max_size=3)).map("".join),
    )
)
def test_no_url_ends_in_another_error_or_reaches_this_machine(url: str) -> None:
    world = Imitated(hosts={"public.test": [PUBLIC]})
    for http in (False, True):
        try:
            world.fetch(url, http=http)
        except KeyError:  # a path without an answer: a public address was reached
            pass
        except UserError as error:
            assert error.code == "E_IMAGE_URL"
    assert all(fetch.is_public(ipaddress.ip_address(address)) for address, *_ in world.connected)


@settings(max_examples=int(os.environ.get("KIMI_VL_FUZZ", "100")))
@given(
    st.binary(max_size=200),
    st.sampled_from(["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 302 Found\r\nLocation: ", "HTTP/1.1 "]),
)
def test_no_answer_ends_in_another_error(rest: bytes, beginning: str) -> None:
    world = Imitated(answers={"/": beginning.encode() + rest})
    try:
        world.fetch("https://public.test/")
    except KeyError:
        pass
    except UserError as error:
        assert error.code == "E_IMAGE_URL"


# A server on this machine, over TLS


HOST = "pictures.test"


def certificate(folder: Path, host: str) -> tuple[Path, ssl.SSLContext]:
    """An authority of its own, and a server's side with a certificate of it for ``host``."""
    authority, server = folder / f"{host}.ca.pem", folder / f"{host}.pem"
    new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subprocess.run(
        f"{new} -x509 -subj /CN=authority -keyout ca.key -out {authority.name} && "
        f"{new} -subj /CN={host} -keyout server.key -out server.csr && "
        f"printf 'subjectAltName=DNS:{host}' > names && "
        f"openssl x509 -req -in server.csr -CA {authority.name} -CAkey ca.key -days 2 -extfile names "
        f"-out server.crt && "
        f"cat server.crt server.key > {server.name}",
        shell=True,
        cwd=folder,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server)
    return authority, context


class Loopback:
    """A server on this machine that counts its connections; public addresses lead to it where tests say so."""

    def __init__(self, context: ssl.SSLContext | None):
        self.context, self.connections, self.names, self.requests = context, 0, [], []
        if context:
            context.sni_callback = lambda _, name, __: self.names.append(name)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer())
            await writer.drain()
        writer.close()

    def run(self, work: Callable[[int], Coroutine[Any, Any, Any]]) -> Any:
        async def run() -> Any:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
            async with server:
                return await work(server.sockets[0].getsockname()[1])

        return asyncio.run(run())


def network_to(port: int, hosts: Hosts, authority: Path | None = None) -> Network:
    async def connect(address: fetch.Address, _: int, context: Any, host: str | None) -> fetch.Streams:
        assert str(address) == PUBLIC  # the address that the tests allow
        return await fetch.connect(ipaddress.ip_address("127.0.0.1"), port, context, host)

    world = Imitated(hosts=hosts)
    return Network(world.resolve, fetch.is_own, connect, lambda: ssl.create_default_context(cafile=authority))


@pytest.mark.slow
def test_the_server_must_prove_to_be_the_host_of_the_url(tmp_path: Path) -> None:
    authority, context = certificate(tmp_path, HOST)
    server = Loopback(context)

    async def work(port: int) -> None:
        hosts: Hosts = {HOST: [PUBLIC], "other.test": [PUBLIC]}
        fetcher = ImageFetcher(FetchOptions(**QUICK), network_to(port, hosts, authority))
        assert await fetcher.fetch([f"https://{HOST}/"]) == [PICTURE]
        with pytest.raises(UserError, match="E_IMAGE_URL"):  # a certificate for another name
            await fetcher.fetch(["https://other.test/"])
        fetcher.close()
        fetcher = ImageFetcher(FetchOptions(**QUICK), network_to(port, hosts))
        with pytest.raises(UserError, match="E_IMAGE_URL"):  # an authority that nobody knows
            await fetcher.fetch([f"https://{HOST}/"])
        fetcher.close()

    server.run(work)
    assert server.names == [HOST, "other.test", HOST]
    assert len(server.requests) == 1 and f"Host: {HOST}\r\n".encode() in server.requests[0]


@pytest.mark.slow
def test_nothing_that_leads_to_this_machine_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the checks, the resolver and the sockets of the real network; only the port is the listener's."""
    server = Loopback(None)

    async def work(port: int) -> None:
        monkeypatch.setattr(fetch, "_PORTS", {"https": port, "http": port})
        fetcher = ImageFetcher(FetchOptions(http=True, **QUICK))
        hosts = ["127.0.0.1", "127.0.0.2", "[::1]", "[::ffff:127.0.0.1]", "localhost", "0.0.0.0", "[::]", "127.1", "0"]
        hosts += [
            "2130706433",
            "0x7f.1",
            "0177.0.0.1",
            "[::127.0.0.1]",
            "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
        ]
        for host in hosts:
            for scheme in ("http", "https"):
                with pytest.raises(UserError) as caught:
                    await fetcher.fetch([f"{scheme}://{host}/", f"{scheme}://{host}:{port}/x"])
                assert str(caught.value) == error
        assert server.connections == 0
        monkeypatch.setattr(fetch, "is_public", lambda address: True)
        careless = ImageFetcher(FetchOptions(http=True, **QUICK), Network(is_own=lambda address: False))
        assert await careless.fetch(["http://127.0.0.1/"]) == [PICTURE]  # what the checks keep out is there
        assert server.connections == 1
        fetcher.close()
        careless.close()

    error = the_error()
    server.run(work)


@pytest.mark.slow
def test_a_resolver_that_hangs_holds_up_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RESOLVER_SECONDS", 0.02)
    release = threading.Event()

    async def work() -> None:
        world = Imitated(hosts={f"{number}.test": lambda: [str(release.wait())] for number in range(64)})
        fetcher = ImageFetcher(FetchOptions(**QUICK), world.network)
        try:
            for number in range(24):
                with pytest.raises(UserError, match="E_IMAGE_URL"):
                    await fetcher.fetch([f"https://{number}.test/"])
            names = [thread.name for thread in threading.enumerate()]
            assert sum(name.startswith("kimi_vl resolver") for name in names) == fetch.AT_ONCE
        finally:
            release.set()
            fetcher.close()

    asyncio.run(work())
