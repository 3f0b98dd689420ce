"""Stands in for `pget -x` where there is none: its command line, what it does to the disk, its last words, its status.

Faults included: it never gives up on a stalled or always cut-off connection, crashes where an answer has no length,
takes an archive cut off between two entries for complete, writes over the first entry of a name that occurs twice,
follows names to `../DEST-something`, leaves what it wrote, and makes links last. `tests/weights/test_pget_stand_in.py`
holds it to the real one. It knows nothing of the package under test. Only its pauses are shorter.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import fcntl
import http.client
import io
import lzma
import os
import posixpath
import re
import signal
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit

PAUSE = 0.02
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
BLOCK = 512
LARGEST_SPECIAL = 2**20


class Failed(Exception):
    """A handled error: the last line on stderr, and status 1."""


class Panic(Exception):
    """What the real one's runtime prints before it ends with status 2."""


class Reader(Protocol):
    def read(self, size: int, /) -> bytes:
        """``size`` bytes, fewer only at the end."""
        ...

    def some(self, size: int, /) -> bytes:
        """What is there, up to ``size`` bytes; nothing only at the end."""
        ...


def words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


# The download


class Chunk:
    """A part of the file that is there as a whole or not at all; whoever fetched it waits until it has been read."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.taken = threading.Event()
        self.content: bytes | Failed = b""

    def deliver(self, content: bytes | Failed) -> None:
        self.content = content
        self.ready.set()
        self.taken.wait()

    def take(self) -> bytes:
        self.ready.wait()
        if isinstance(self.content, Failed):
            raise self.content
        self.taken.set()
        return self.content


class Source:
    """The file at a URL, in chunks that connections fetch side by side. No timeout anywhere."""

    def __init__(self, url: str, chunk: int, connections: int, retries: int, quiet: bool):
        self.url = url
        self.chunk = chunk
        self.connections = connections
        self.attempts = retries + 1
        self.quiet = quiet
        self.size = 0

    def chunks(self) -> Iterator[Chunk]:
        """Raises what the first answer says; the errors of chunks are raised where these are read."""
        check_address(self.url)
        answer, url = self._request(self.url, 0, self.chunk - 1)
        self.size = file_size(answer)
        chunks = [Chunk() for _ in range(0, max(self.size, 1), self.chunk)]
        left = iter(enumerate(chunks[1:], 1))
        lock = threading.Lock()

        def fetch(chunk: Chunk, start: int, answer: http.client.HTTPResponse | None) -> None:
            end = min(start + self.chunk, self.size) - 1 if start else self.chunk - 1
            try:
                chunk.deliver(self._whole(answer or self._request(url, start, end)[0], url, start, end))
            except Failed as error:
                chunk.deliver(error)
            except Panic as panic:
                print(f"panic: runtime error: {panic}\n\ngoroutine 1 [running]:", file=sys.stderr, flush=True)
                os._exit(2)

        def work(first: bool) -> None:
            if first:
                fetch(chunks[0], 0, answer)
            while True:
                with lock:
                    index, chunk = next(left, (0, None))
                if chunk is None:
                    return
                fetch(chunk, index * self.chunk, None)

        for number in range(max(self.connections, 1)):
            threading.Thread(target=work, args=(not number,), daemon=True).start()
        yield from chunks

    def _whole(self, answer: http.client.HTTPResponse, url: str, start: int, end: int) -> bytes:
        """What an answer announces, taken up again as often as the connection breaks."""
        text = answer.headers.get("Content-Length")
        length = -1 if text is None else int(text)
        if not 0 <= length <= self.chunk:
            raise Panic(f"slice bounds out of range [:{length}]")
        data = bytearray()
        while True:
            received = len(data)
            try:
                while len(data) < length and (piece := answer.read(min(2**16, length - len(data)))):
                    data += piece
            except http.client.IncompleteRead as error:
                data += error.partial
            except OSError as error:
                raise Failed(f"read tcp: read: {words(error)}") from None
            finally:
                answer.close()
            if len(data) == length:
                return bytes(data)
            if not self.quiet:
                cut = len(data) - received
                print(f"WARN  | [ Resuming Chunk Download ] connection_interrupted_at_byte={cut}", file=sys.stderr)
            answer, url = self._get(url, start + len(data), end)
            if answer.status != 206:
                raise Failed(f"expected status code 206, got {answer.status}")

    def _request(self, url: str, start: int, end: int) -> tuple[http.client.HTTPResponse, str]:
        answer, url = self._get(url, start, end)
        if not 200 <= answer.status < 300:
            raise Failed(f"unexpected http status {url}: {answer.status} {answer.reason}")
        return answer, url

    def _get(self, url: str, start: int, end: int) -> tuple[http.client.HTTPResponse, str]:
        """The answer, and the address that it comes from after all redirects."""
        said = ""
        for _ in range(self.attempts):
            try:
                answer, final = follow(url, start, end)
                if answer.status != 429 and (answer.status < 500 or answer.status == 501):
                    return answer, final
                answer.close()
            except ssl.SSLCertVerificationError as error:
                raise Failed(f'Get "{url}": tls: failed to verify certificate: {error.verify_message}') from None
            except (OSError, http.client.HTTPException) as error:
                said = f": {words(error) if isinstance(error, OSError) else error}"
            time.sleep(PAUSE)
        raise Failed(
            f'error executing request for {url}: Get "{url}": giving up after {self.attempts} attempt(s){said}'
        )


def check_address(url: str) -> None:
    """As far as the real one's parser is stricter than Python's."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    fault = ""
    if not re.fullmatch(r"[A-Za-z0-9\-._:~!$&'()*+,;=%@]*", login):
        fault = "net/url: invalid userinfo"
    elif found := re.search(r"%(?![0-9A-Fa-f]{2}).{0,2}", login) or re.search(r"%(?![0-9A-Fa-f]{2}).{0,2}", parts.path):
        fault = f'invalid URL escape "{found[0]}"'
    if fault:
        raise Failed(f'failed to download {url}: parse "{url}": {fault}')


def follow(url: str, start: int, end: int) -> tuple[http.client.HTTPResponse, str]:
    while True:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port)
        headers = {"Range": f"bytes={start}-{end}"}
        login, has_login, _ = parts.netloc.rpartition("@")
        if has_login:
            headers["Authorization"] = "Basic " + base64.b64encode(unquote(login).encode()).decode()
        place = quote(parts.path or "/", safe="/%!$&'()*+,;=:@~") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", place, headers=headers)
        answer = connection.getresponse()
        place = answer.headers.get("Location")
        if answer.status not in (301, 302, 303, 307, 308) or not place:
            return answer, url
        url = urljoin(url, place)


def file_size(answer: http.client.HTTPResponse) -> int:
    """As the first answer announces it."""
    span = answer.headers.get("Content-Range", "")
    if answer.status == 200 and not span:
        length = answer.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Failed(f'strconv.ParseInt: parsing "{length}": invalid syntax')
        return int(length)
    found = re.search(r"^bytes .*/([0-9]+)$", span)
    if not found:
        raise Failed(f"couldn't parse Content-Range: {span}")
    return int(found[1])


class Stream:
    """Chunks one after the other."""

    def __init__(self, source: Source):
        self.chunks = source.chunks()
        self.content = b""
        self.start = 0  # of what is left of the content
        self.position = 0

    def read(self, size: int) -> bytes:
        data = self.peek(size)
        self.start += len(data)
        self.position += len(data)
        return data

    def some(self, size: int) -> bytes:
        self.peek(1)
        return self.read(min(size, len(self.content) - self.start))

    def peek(self, size: int) -> bytes:
        while len(self.content) - self.start < size and (chunk := next(self.chunks, None)):
            self.content, self.start = self.content[self.start :] + chunk.take(), 0
        return self.content[self.start : self.start + size]


class Unpacked:
    """A compressed stream's content."""

    def __init__(self, stream: Stream, unpack: Any, always_left: bool):
        self.stream = stream
        self.unpack = unpack
        self.always_left = always_left
        self.buffer = b""

    def read(self, size: int) -> bytes:
        while len(self.buffer) < size and not self.unpack.eof:
            packed = self.stream.read(2**12)
            if not packed:
                raise Failed("unexpected EOF")
            try:
                self.buffer += self.unpack.decompress(packed)
            except (zlib.error, lzma.LZMAError, OSError) as error:
                raise Failed(str(error)) from None
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def some(self, size: int) -> bytes:
        return self.read(size)

    def rest(self) -> bytes:
        """What is looked at for bytes that are not null: the end of the compressed stream, not of its content.

        A gzip stream alone is read to its end, and only where all of its content was asked for.
        """
        return b"\1" if self.buffer or self.always_left else b""


# The archive


@dataclass
class Entry:
    name: str
    kind: str
    mode: int
    size: int
    link: str
    sparse: bool


class Archive:
    """The entries of a tar, read in order. :attr:`left` bytes of the current one's content are still to come."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.left = 0
        self.padding = 0

    def content(self, size: int) -> bytes:
        """What comes next of an entry, ``size`` bytes at most; raises where the archive ends before the entry does."""
        data = self.reader.some(min(size, self.left))
        self.left -= len(data)
        if not data and self.left:
            raise Failed("unexpected EOF")
        return data

    def special(self) -> bytes:
        if self.left > LARGEST_SPECIAL:
            raise Failed("archive/tar: header field too long")
        pieces = []
        while self.left:
            pieces.append(self.content(self.left))
        return b"".join(pieces)

    def next(self) -> Entry | None:
        settings: dict[str, str] = {}
        while True:
            if len(self.reader.read(self.padding)) < self.padding:
                return None  # cut off in what fills up a block: taken for the end
            self.padding = 0
            header = self._block()
            if header is None:
                return None
            try:
                entry = entry_of(header)
                self.left = 0 if entry.kind in "123456" else entry.size
                self.padding = -self.left % BLOCK
                if entry.kind in ("x", "g"):
                    read = pax_settings(self.special())
                    settings |= read if entry.kind == "x" else {}
                    continue
                if entry.kind in ("L", "K"):
                    name = "path" if entry.kind == "L" else "linkpath"
                    settings[name] = self.special().partition(b"\0")[0].decode(errors="surrogateescape")
                    continue
                entry.name = settings.get("GNU.sparse.name", settings.get("path", entry.name))
                entry.link = settings.get("linkpath", entry.link)
                if "size" in settings and self.left:
                    self.left = int(settings["size"])
                    self.padding = -self.left % BLOCK
                entry.size = int(settings.get("GNU.sparse.realsize", self.left))
                entry.sparse = settings.get("GNU.sparse.major") == "1"
            except (ValueError, IndexError):
                raise Failed("archive/tar: invalid tar header") from None
            return entry

    def _block(self) -> bytes | None:
        """A header; none at the end of the archive: two empty blocks, one, or nothing at all."""
        empty = 0
        while block := self.reader.read(BLOCK):
            if len(block) < BLOCK:
                raise Failed("unexpected EOF")
            if any(block) and empty:
                raise Failed("archive/tar: invalid tar header")
            if any(block):
                return block
            empty += 1
            if empty == 2:
                break
        return None

    def pieces(self, entry: Entry) -> Iterator[tuple[int, bytes]]:
        """The content of a file, each piece with its place."""
        if not entry.sparse:
            place = 0
            while self.left:
                piece = self.content(2**15)
                yield place, piece
                place += len(piece)
            return
        for place, size in self._map():
            while size:
                piece = self.content(min(size, 2**15))
                yield place, piece
                place, size = place + len(piece), size - len(piece)

    def _map(self) -> list[tuple[int, int]]:
        """Where the pieces of a sparse file belong, as the first blocks of its content say."""
        text = self.content(BLOCK)
        while len(text) % BLOCK or text.count(b"\n") < 1 + 2 * int(text.partition(b"\n")[0]):
            text += self.content(BLOCK - len(text) % BLOCK)
        count, *numbers = [int(number) for number in text.split(b"\n")[:-1]]
        return list(zip(numbers[: 2 * count : 2], numbers[1 : 2 * count : 2], strict=True))


def entry_of(header: bytes) -> Entry:
    """What a header says by itself; ``ValueError`` where it is none."""
    bare = header[:148] + b" " * 8 + header[156:]
    if number(header[148:156]) not in (sum(bare), sum(byte - 256 * (byte > 127) for byte in bare)):
        raise ValueError("checksum")
    name = text(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := text(header[345:500])):
        name = f"{prefix}/{name}"
    kind = chr(header[156])
    if kind == "\0":
        kind = "5" if name.endswith("/") else "0"
    return Entry(name, kind, number(header[100:108]), number(header[124:136]), text(header[157:257]), False)


def text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def number(field: bytes) -> int:
    """Octal digits, or binary where the first bit is set."""
    if field[0] & 128:
        return int.from_bytes(bytes([field[0] & 127]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def pax_settings(data: bytes) -> dict[str, str]:
    settings = {}
    while data:
        size = int(data.partition(b" ")[0])
        name, found, value = data[:size].partition(b" ")[2].partition(b"=")
        if not found or not value.endswith(b"\n"):
            raise ValueError("record")
        settings[name.decode()] = value[:-1].decode(errors="surrogateescape")
        data = data[size:]
    return settings


# The extraction


def extract(stream: Stream, dest: str, force: bool) -> None:
    if len(beginning := stream.peek(8)) < 8:
        raise Failed("error reading peek data: EOF")
    unpacked: Unpacked | None = None
    if beginning.startswith(b"\x1f\x8b"):
        unpacked = Unpacked(stream, zlib.decompressobj(31), False)
    elif beginning.startswith(b"BZ"):
        unpacked = Unpacked(stream, bz2.BZ2Decompressor(), True)
    elif beginning.startswith(b"\xfd7zXZ\0"):
        unpacked = Unpacked(stream, lzma.LZMADecompressor(), True)
    archive = Archive(unpacked or stream)
    links = []
    while entry := archive.next():
        place = posixpath.normpath(f"{dest}/{entry.name}")
        make_directories(posixpath.dirname(place))  # before the name is looked at, as the real one does
        if not entry.name:
            raise Failed("tar file contains entry with empty name")
        if not posixpath.abspath(place).startswith(posixpath.abspath(dest)):
            raise Failed(f"archive (tar) file contains file outside of target directory: `{place}` outside of `{dest}`")
        if entry.kind == "5":
            make_directories(place, entry.mode & 0o777)
        elif entry.kind == "0":
            write(archive, entry, place, force)
        elif entry.kind in "12":
            links.append((entry.kind == "2", entry.link, place))
        else:
            raise Failed(f"unsupported file type for {entry.name}, typeflag {entry.kind}")
    for symbolic, target, place in links:
        make_link(symbolic, target, place, dest, force)
    rest = unpacked.rest() if unpacked else b""
    while piece := stream.read(2**16):
        rest = rest.strip(b"\0") or piece
    if rest := rest.strip(b"\0"):
        raise Failed(f"unexpected non-null byte in padding: {rest[0]:x}")


def write(archive: Archive, entry: Entry, place: str, force: bool) -> None:
    try:
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else 0), entry.mode & 0o777)
    except OSError as error:
        raise Failed(f"open {place}: {words(error)}") from None
    with io.FileIO(handle, "w") as file:
        try:
            for position, piece in archive.pieces(entry):
                file.seek(position)
                while piece:
                    piece = piece[file.write(piece) :]
            if entry.sparse:
                file.truncate(entry.size)
        except OSError as error:
            raise Failed(f"write {place}: {words(error)}") from None


def make_directories(path: str, mode: int = 0o755) -> None:
    try:
        os.makedirs(path, mode, exist_ok=True)
    except FileExistsError as error:
        raise Failed(f"mkdir {path}: {'not a directory' if os.path.exists(path) else words(error)}") from None
    except OSError as error:
        raise Failed(f"mkdir {error.filename}: {words(error)}") from None


def make_link(symbolic: bool, target: str, place: str, dest: str, force: bool) -> None:
    make_directories(posixpath.dirname(place))
    try:
        if force and os.path.lexists(place):
            os.rmdir(place) if os.path.isdir(place) and not os.path.islink(place) else os.unlink(place)
        if symbolic:
            os.symlink(target, place)
        else:
            os.link(posixpath.normpath(f"{dest}/{target}"), place)
    except OSError as error:
        raise Failed(f"error creating links: from {target} to {place}: {words(error)}") from None


def destination_exists(dest: str) -> bool:
    """Whatever else looking for it says than that there is none counts as one that is there."""
    try:
        os.stat(dest)
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


def run(arguments: argparse.Namespace) -> None:
    setting = os.environ.get
    if not (arguments.extract or setting("PGET_EXTRACT")):
        raise Failed("this stand-in only extracts")
    try:
        lock = os.open(arguments.pid_file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Failed(f"open {arguments.pid_file}: {words(error)}") from None
    fcntl.flock(lock, fcntl.LOCK_EX)
    force = arguments.force or bool(setting("PGET_FORCE"))
    if not force and destination_exists(arguments.dest):
        raise Failed(f"destination {arguments.dest} already exists")
    size = re.fullmatch(r"(\d+)([KMG]?)", arguments.chunk)
    if size is None:
        raise Failed("error parsing chunk size")
    if resolve := setting("PGET_RESOLVE"):
        raise Failed(f"invalid resolve host format, expected <hostname>:port:<ip>, got: {resolve}")
    quiet = arguments.log_level == "error"
    chunk = int(size[1]) * UNITS[size[2]] or 125 * 2**20
    source = Source(arguments.url, chunk, arguments.concurrency, arguments.retries, quiet)
    stream = Stream(source)
    extract(stream, arguments.dest, force)
    if stream.position != source.size:
        raise Failed(f"expected {source.size} bytes, read {stream.position} from archive")


def main() -> None:
    parser = argparse.ArgumentParser(prog="pget")
    parser.add_argument("-x", dest="extract", action="store_true")
    parser.add_argument("-f", dest="force", action="store_true")
    parser.add_argument("-m", dest="chunk", default="125M")
    parser.add_argument("-c", dest="concurrency", type=int, default=8)
    parser.add_argument("-r", dest="retries", type=int, default=5)
    parser.add_argument("--pid-file", default="/run/pget.pid")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("url")
    parser.add_argument("dest")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        run(arguments)
    except Failed as failure:
        print(f"Error: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
