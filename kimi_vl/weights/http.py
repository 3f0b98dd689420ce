"""GET requests to a server of weights: redirects are checked, and failures are sentences. Never prints a query or a
password.

A failure that another try may not meet is a :class:`Retry`, any other a :class:`~kimi_vl.errors.CheckpointError`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import httpx

from ..errors import CheckpointError

for _library in ("httpx", "httpcore"):  # they would log URLs with their signatures
    logging.getLogger(_library).setLevel(logging.WARNING)

STALL_SECONDS = 120.0  # pget has no read timeout, and retries for ever when each response is cut off
_REDIRECTS = 10
_NUMBER = "[0-9]{1,18}"
_REFUSALS = {
    401: "the server asks for a login (401); check the user, password or token in the address",
    403: "the server refuses access (403); check the address, and that a signed link has not expired",
    404: "the server has no such file (404); check the address",
    410: "the server no longer has this file (410); check the address",
    416: "the server's file is empty (416); upload it again",
}
_TRANSIENT = (408, 425, 429)


class Retry(Exception):
    """A failure that another try may not meet; the text goes into parentheses of a sentence."""


def shown(url: str) -> str:
    """``url`` for messages and logs: without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(an address that cannot be read)"
    if not parts.path and "@" in parts.query + parts.fragment and "@" not in parts.netloc:
        return "(an address that cannot be read)"  # a password with "?" or "#", whose first part would be shown
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redact(text: str) -> str:
    """``text`` with each URL in it as :func:`shown` gives it."""
    return re.sub(r"https?://[^\s\"'<>\\]+", lambda found: shown(found[0]), text, flags=re.IGNORECASE)


class Redaction(logging.Filter):
    """Applies :func:`redact` to what a library logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


@dataclass(frozen=True)
class Remote:
    """A file on a server: its size in bytes, and whether responses are ranges and have a Content-Length."""

    size: int | None
    ranges: bool
    lengths: bool


@contextmanager
def get(url: str, span: str = "") -> Iterator[httpx.Response]:
    """The response to a GET of ``url``, to be read inside the block. With ``span`` ("0-99") a range is asked for, and
    the whole file may come."""
    # some content delivery networks refuse the names of HTTP libraries
    headers = {"User-Agent": "kimi-vl", "Accept-Encoding": "identity"} | ({"Range": f"bytes={span}"} if span else {})
    try:
        with closing(_client()) as client:
            request = client.build_request("GET", url, headers=headers)
            if _port_too_large(request.url):
                raise httpx.InvalidURL("port")
            answer = client.send(request, stream=True)
            for _ in range(_REDIRECTS):
                if answer.next_request is None:
                    break
                answer.close()
                _refuse_redirect(answer.request.url, answer.next_request.url)
                answer = client.send(answer.next_request, stream=True)
            with closing(answer):
                _refuse_status(url, answer)
                yield answer
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError):  # UnicodeError: of invalid host names
        raise CheckpointError(f"{shown(url)}: is not a valid address; check its spelling") from None
    except httpx.TransportError as error:
        if _is_certificate(error):
            raise CheckpointError(
                f"{shown(url)}: the server's certificate is not trusted; check the address and the clock, or name the "
                "authority that signed it with SSL_CERT_FILE"
            ) from None
        raise Retry(_reason(error)) from None


def _client() -> httpx.Client:
    """With the proxies and the certificates that the environment names."""
    try:
        variables = (os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"))
        return httpx.Client(timeout=STALL_SECONDS, verify=_tls_context(*variables))
    except OSError:
        raise CheckpointError(
            "the files that SSL_CERT_FILE, SSL_CERT_DIR or SSLKEYLOGFILE name cannot be used; correct or unset these"
        ) from None
    except ImportError:
        raise CheckpointError("a SOCKS proxy is set, which needs the package socksio; install it or unset it") from None
    except (httpx.InvalidURL, ValueError):
        raise CheckpointError(
            "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY is not as it should be; correct or unset it"
        ) from None


@functools.lru_cache(maxsize=1)
def _tls_context(*variables: str | None) -> ssl.SSLContext:
    """The context for these values of the variables that it depends on. Made once, since loading certificates takes
    20 to 30 ms and an archive's headers are read in many requests."""
    return httpx.create_ssl_context()


def _refuse_redirect(before: httpx.URL, after: httpx.URL) -> None:
    place = f"{shown(str(before))}: redirects to {shown(str(after))}"
    if before.scheme == "https" and after.scheme == "http":
        raise CheckpointError(f"{place}, an address without encryption; use an https address that does not")
    if after.scheme not in ("http", "https") or not after.host or _port_too_large(after):
        raise CheckpointError(f"{place}, which is no valid https address; use one that does not")


def _port_too_large(url: httpx.URL) -> bool:
    """Sockets would use the lower 16 bits."""
    return (url.port or 0) >= 2**16


def _refuse_status(url: str, answer: httpx.Response) -> None:
    status = answer.status_code
    if status in (200, 206):
        return
    if status in _REFUSALS:
        raise CheckpointError(f"{shown(url)}: {_REFUSALS[status]}")
    if 300 <= status < 400:
        raise CheckpointError(f"{shown(url)}: the server's redirects lead to nothing ({status}); check the address")
    if 400 <= status < 500 and status not in _TRANSIENT:
        raise CheckpointError(f"{shown(url)}: the server refuses the request ({status}); check the address")
    raise Retry(f"the server answers {status}")


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _reason(error: httpx.TransportError) -> str:
    """The reason of a network failure in a few words."""
    if isinstance(error, httpx.TimeoutException):
        return f"no byte arrived for {STALL_SECONDS:g} s"
    if isinstance(error, httpx.RemoteProtocolError):
        cut_off = "disconnected" in str(error) or "closed" in str(error)
        return "the connection was cut off" if cut_off else "the server's answer is not one of HTTP"
    inner: BaseException | None = error
    while inner is not None and not (isinstance(inner, OSError) and inner.strerror):
        inner = inner.__cause__ or inner.__context__
    if isinstance(inner, OSError):
        return redact(inner.strerror or "")
    return redact(str(error)) or type(error).__name__


def probe(url: str) -> Remote:
    """Asks for the first byte of the file."""
    with get(url, "0-0") as answer:
        length = re.fullmatch(_NUMBER, answer.headers.get("Content-Length", ""))
        if answer.status_code == 206:
            return Remote(total_size(answer), True, length is not None)
        return Remote(int(length[0]) if length else None, False, length is not None)


def total_size(answer: httpx.Response, start: int = 0) -> int | None:
    """The whole file's size from a response with the range from ``start`` on; None without a valid Content-Range."""
    found = re.fullmatch(f"bytes ({_NUMBER})-{_NUMBER}/({_NUMBER})", answer.headers.get("Content-Range", ""))
    return int(found[2]) if found and int(found[1]) == start else None
