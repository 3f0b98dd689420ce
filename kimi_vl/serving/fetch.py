"""Pictures by URL, fetched for strangers: only from public addresses, within fixed bounds, and every failure alike.

A caller chooses the URL, and the request leaves from this machine, which may stand in a network that the caller cannot
reach. So each URL, and each one that it redirects to, passes the same checks: its spelling, its host and its port; then
all addresses that the host resolves to, once. The connection goes to one of the checked addresses and the host is not
resolved again, while TLS verifies the certificate for the host. Nothing of a failure tells what is at the other end:
there is one error, and where a name had to be resolved it does not come earlier than a resolver may take.

Knows nothing of the project but its errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import quote, urljoin, urlsplit

import h11
import idna

from ..errors import UserError

MAX_BYTES = 32 << 20
"""Of one picture; counted while it is read, with its headers on top."""
MAX_REQUEST_BYTES = 100 << 20
"""Of all pictures of a request: as much as its body might bring as data URLs."""
MAX_URL = 8192
MAX_REDIRECTS = 3
AT_ONCE, AT_ONCE_PER_REQUEST = 16, 4
SECONDS, RESOLVER_SECONDS, CONNECT_SECONDS = 10.0, 3.0, 3.0

_MAX_HEADER_BYTES = 32 << 10
_PORTS = {"https": 443, "http": 80}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)")
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\xa0\\\ud800-\udfff]")
_AUTHORITY = re.compile(r"(?:\[(?P<literal>[^\[\]@]*)\]|(?P<name>[^\[\]:@]*))(?::(?P<port>[0-9]{1,5}))?")
_URL_CHARACTERS = "!$%&'()*+,;=:@/?~[]"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# Not public, whatever the registry of special addresses says: ways into IPv4 from IPv6, and a platform's own services.
_REFUSED_IPV4 = tuple(
    map(ipaddress.IPv4Network, ("100.64.0.0/10", "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/3"))
)
_REFUSED_IPV6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

log = logging.getLogger(__name__)


class _Refused(Exception):
    """Why a picture is not fetched, in words for the log that name neither the URL nor what was found there."""


@dataclass(frozen=True)
class FetchOptions:
    """Whose pictures are fetched: ``hosts`` None is any public host, otherwise only these (``*.name`` for those
    below it); ``http`` allows URLs without encryption. ``slowest_refusal`` is the time, in seconds, before which a
    failure that involved the resolver is not told."""

    hosts: frozenset[str] | None = None
    http: bool = False
    slowest_refusal: float = RESOLVER_SECONDS
    seconds: float = SECONDS

    @classmethod
    def of(cls, hosts: Iterable[str] = (), http: bool = False) -> FetchOptions:
        """From what an operator writes. Raises ValueError naming a host that no URL can have."""
        listed = set()
        for host in hosts:
            wildcard, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
            try:
                listed.add(wildcard + (_ipv6(name) if ":" in name else _host(name)))
            except _Refused:
                raise ValueError(f"{host!r} is not a host name; write it without scheme, port and path") from None
        return cls(frozenset(listed) or None, http)

    def allows(self, host: str) -> bool:
        if self.hosts is None or host in self.hosts:
            return True
        labels = host.split(".")
        return any("*." + ".".join(labels[start:]) in self.hosts for start in range(1, len(labels)))


def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, as the system resolves it; blocks. Raises OSError."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_own(address: Address) -> bool:
    """Whether ``address`` is one of this machine's: then it is also the source of what is sent there. Sends nothing."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(address), 9))
        return ipaddress.ip_address(probe.getsockname()[0]) == address
    return False


async def connect(address: Address, port: int, context: ssl.SSLContext | None, host: str | None) -> Streams:
    """A connection to exactly this address; with ``context``, over TLS and to a server that proves to be ``host``."""
    return await asyncio.open_connection(
        str(address), port, ssl=context, server_hostname=host, flags=socket.AI_NUMERICHOST
    )


@dataclass(frozen=True)
class Network:
    """What is outside of this process: tests put a network of their own here."""

    resolve: Callable[[str, int], list[str]] = resolve
    is_own: Callable[[Address], bool] = is_own
    connect: Callable[[Address, int, ssl.SSLContext | None, str | None], Awaitable[Streams]] = connect
    context: Callable[[], ssl.SSLContext] = ssl.create_default_context


class ImageFetcher:
    """Fetches pictures for any number of requests of one event loop, :data:`AT_ONCE` at a time in all."""

    def __init__(self, options: FetchOptions, network: Network | None = None):
        self._options, self._network = options, network or Network()
        self._context = self._network.context()
        self._context.set_alpn_protocols(["http/1.1"])
        self._slots = asyncio.Semaphore(AT_ONCE)
        # Threads of its own: a resolver that hangs must not hold up those that decode pictures.
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="kimi_vl resolver")

    async def fetch(self, urls: Sequence[str]) -> list[bytes]:
        """The bytes behind each of ``urls``, in order; equal ones are fetched once.

        Raises :class:`UserError` (E_IMAGE_URL), always the same one, as soon as one of them fails; the others are
        given up.
        """
        slots, room = asyncio.Semaphore(AT_ONCE_PER_REQUEST), _Room(MAX_REQUEST_BYTES)

        async def one(url: str) -> bytes:
            async with slots:
                return await self._fetch(url, room)

        distinct = list(dict.fromkeys(urls))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(url)) for url in distinct]
        except BaseExceptionGroup as failures:
            refused = next((failure for failure in failures.exceptions if isinstance(failure, _Refused)), None)
            if refused is None:
                raise
            log.info("a picture was not fetched: %s", refused)
            raise UserError(
                "E_IMAGE_URL", "an image could not be fetched from its URL; check the URL, or send a data URL."
            ) from None
        found = dict(zip(distinct, (task.result() for task in tasks), strict=True))
        return [found[url] for url in urls]

    def close(self) -> None:
        """Let go of the resolver's threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, url: str, room: _Room) -> bytes:
        loop = asyncio.get_running_loop()
        attempt = _Attempt()
        try:
            async with self._slots, asyncio.timeout(self._options.seconds) as limit:
                attempt.deadline = limit.when()
                return await self._follow(url, room, attempt)
        except (_Refused, OSError, h11.RemoteProtocolError, ssl.CertificateError) as error:
            # Outside of the slots: who is refused holds up nobody else.
            if attempt.resolved_at is not None:
                told_at = min(attempt.resolved_at + self._options.slowest_refusal, attempt.deadline or 0)
                await asyncio.sleep(told_at - loop.time())
            raise error if isinstance(error, _Refused) else _Refused(type(error).__name__) from None

    async def _follow(self, url: str, room: _Room, attempt: _Attempt) -> bytes:
        """What ``url`` leads to, each hop checked from the start."""
        before = None
        for _ in range(1 + MAX_REDIRECTS):
            target = _Target.of(url, self._options)
            if before == "https" and target.scheme == "http":
                raise _Refused("a redirect to an address without encryption")
            attempt.resolved_at = asyncio.get_running_loop().time()
            addresses = await self._addresses(target)
            answer = await self._get(target, addresses, room)
            if isinstance(answer, bytes):
                return answer
            before = target.scheme
            try:
                url = urljoin(target.url, answer)
            except ValueError:
                raise _Refused("a redirect to no URL") from None
        raise _Refused("too many redirects")

    async def _addresses(self, target: _Target) -> list[Address]:
        """All addresses of the target's host, each of them public; a host with a single one that is not is refused."""
        if target.literal is not None:
            found = [target.literal]
        else:
            work = asyncio.get_running_loop().run_in_executor(
                self._threads, self._network.resolve, target.host, target.port
            )
            async with asyncio.timeout(RESOLVER_SECONDS):
                texts = await work
            try:
                found = [ipaddress.ip_address(text) for text in dict.fromkeys(texts)]
            except ValueError:  # an address with a zone, which is of this link
                raise _Refused("an address that is not public") from None
        found = [_unmapped(address) for address in found]
        if not found:
            raise _Refused("no address")
        if not all(is_public(address) and not self._network.is_own(address) for address in found):
            raise _Refused("an address that is not public")
        return found

    async def _get(self, target: _Target, addresses: Sequence[Address], room: _Room) -> bytes | str:
        """The picture, or where the server redirects to."""
        reader, writer = await self._connect(target, addresses)
        try:
            client = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
            request = h11.Request(method="GET", target=target.path, headers=target.headers)
            writer.write((client.send(request) or b"") + (client.send(h11.EndOfMessage()) or b""))
            return await _read(client, reader, room)
        finally:
            writer.transport.abort()  # nothing is waited for, neither here nor by a server that does not close

    async def _connect(self, target: _Target, addresses: Sequence[Address]) -> Streams:
        """A connection to the first of ``addresses`` that takes one."""
        context = self._context if target.scheme == "https" else None
        host = target.host if context else None
        error: OSError = OSError()
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await self._network.connect(address, target.port, context, host)
            except OSError as failed:
                error = failed
        raise error


@dataclass
class _Attempt:
    """When the host of the latest hop began to be resolved, and when the time is over; seconds of the loop's clock."""

    resolved_at: float | None = None
    deadline: float | None = None


@dataclass
class _Room:
    """How many bytes a request's pictures may still have."""

    left: int

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _Refused("too many bytes in a request")


@dataclass(frozen=True)
class _Target:
    """A URL that may be asked for, taken apart once."""

    scheme: str
    host: str
    literal: Address | None
    path: str
    port: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "port", _PORTS[self.scheme])

    @classmethod
    def of(cls, url: str, options: FetchOptions) -> _Target:
        """Raises :class:`_Refused` for whatever two programs might read differently."""
        if len(url) > MAX_URL or _UNSAFE.search(url):
            raise _Refused("a URL that is too long, or has a character that none may have")
        try:
            parts = urlsplit(url)
        except ValueError:
            raise _Refused("a URL that cannot be read") from None
        if parts.scheme != "https" and not (parts.scheme == "http" and options.http):
            raise _Refused("another scheme")
        authority = _AUTHORITY.fullmatch(parts.netloc)
        if authority is None:
            raise _Refused("a user, a password, or a host that cannot be read")
        if int(authority["port"] or _PORTS[parts.scheme]) != _PORTS[parts.scheme]:
            raise _Refused("another port")
        host = _host(authority["name"]) if authority["literal"] is None else _ipv6(authority["literal"])
        if not options.allows(host):
            raise _Refused("a host that is not on the list")
        path = quote(parts.path or "/", safe=_URL_CHARACTERS) + (
            "?" + quote(parts.query, safe=_URL_CHARACTERS) if parts.query else ""
        )
        return cls(parts.scheme, host, _literal(host), path)

    @property
    def authority(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def headers(self) -> list[tuple[str, str]]:
        """No cookies, no credentials, and nothing that a server would have to decompress."""
        return [
            ("Host", self.authority),
            ("User-Agent", "kimi-vl"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]


def _ipv6(text: str) -> str:
    """What stands in brackets, in one form."""
    try:
        return ipaddress.IPv6Address(text).compressed
    except ValueError:
        raise _Refused("a host that is no IPv6 address") from None


def _host(text: str) -> str:
    """A host in the one form in which it is compared, resolved, sent and verified: lower case and ASCII."""
    try:
        host = text.lower() if text.isascii() else idna.encode(text, uts46=True).decode("ascii")
    except UnicodeError:
        raise _Refused("a host that is no name") from None
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise _Refused("a host that is no name")
    if _NUMBER.fullmatch(host.rpartition(".")[2]) and _literal(host) is None:
        raise _Refused("an IPv4 address in another spelling")
    return host


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _unmapped(address: Address) -> Address:
    """The IPv4 address that the system would connect to in place of ``::ffff:…``."""
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address


def is_public(address: Address) -> bool:
    """Whether ``address`` can only be that of a machine on the public Internet."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in network for network in _REFUSED_IPV4)
    public = address.is_global and address in _GLOBAL_UNICAST and address.scope_id is None
    return public and not any(address in network for network in _REFUSED_IPV6)


async def _read(client: h11.Connection, reader: asyncio.StreamReader, room: _Room) -> bytes | str:
    """The body of the answer, or the address of its redirect."""
    body, received = bytearray(), 0
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(1 << 16)
            received += len(data)
            if received > MAX_BYTES + _MAX_HEADER_BYTES:
                raise _Refused("too many bytes")
            client.receive_data(data)
        elif isinstance(event, h11.Response):
            redirect = _judge(event)
            if redirect is not None:
                return redirect
        elif isinstance(event, h11.Data):
            room.take(len(event.data))
            body += event.data
            if len(body) > MAX_BYTES:
                raise _Refused("too many bytes")
        elif isinstance(event, h11.EndOfMessage):
            if not body:
                raise _Refused("no bytes")
            return bytes(body)
        elif not isinstance(event, h11.InformationalResponse):
            raise _Refused("the connection was cut off")


def _judge(response: h11.Response) -> str | None:
    """Where the response redirects to; None where its body is to be read."""
    headers = {name.decode("ascii"): value.decode("utf-8", "surrogateescape") for name, value in response.headers}
    if response.status_code in _REDIRECTS:
        location = headers.get("location")
        if not location or _UNSAFE.search(location):  # joining would drop some of these without a word
            raise _Refused("a redirect to no URL")
        return location
    if response.status_code != 200:
        raise _Refused("another status")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise _Refused("a compressed body")
    if int(headers.get("content-length", "0")) > MAX_BYTES:
        raise _Refused("too many bytes")
    return None
