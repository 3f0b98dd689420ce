"""Stands in for pget where there is none: the same command line, and the faults that were observed in the real one.

It never gives up on a stalled or always cut-off connection, takes an archive cut off between two entries for complete,
writes over the first entry of a name that occurs twice, follows names to `../DEST-something`, leaves what it wrote, and
makes links last. Knows nothing of the package under test. Only its pauses are shorter.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import io
import os
import posixpath
import re
import sys
import tarfile
import time
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit

ATTEMPTS = 6
PAUSE = 0.02
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


class Panic(Exception):
    """What the real one's runtime prints before it ends with status 2."""


def fail(text: str) -> NoReturn:
    print(f"Error: {text}", file=sys.stderr)
    sys.exit(1)


class Source:
    """The file at a URL in chunks. No timeout anywhere."""

    def __init__(self, url: str, chunk: int):
        self.url = url
        self.chunk = chunk
        self.size = 0

    def pieces(self) -> Iterator[bytes]:
        yield self._whole(0, self.chunk)
        for start in range(self.chunk, self.size, self.chunk):
            yield self._whole(start, min(start + self.chunk, self.size))

    def _whole(self, start: int, end: int) -> bytes:
        """One chunk, all of it: taken up again as often as the connection breaks."""
        data = bytearray()
        wanted = end - start
        while True:
            answer = self._get(start + len(data), end)
            if not start and not data:
                length = answer.headers.get("Content-Length")
                if length is None:
                    fail('strconv.ParseInt: parsing "": invalid syntax')
                found = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
                self.size = int(found[1]) if found else int(length)
                wanted = min(wanted, self.size)
                if answer.status == 200 and self.size > self.chunk:
                    raise Panic("runtime error: slice bounds out of range")
            elif answer.status != 206:
                fail(f"expected status code 206, got {answer.status}")
            try:
                while len(data) < wanted and (piece := answer.read(min(2**16, wanted - len(data)))):
                    data += piece
            except (OSError, http.client.HTTPException):
                pass
            finally:
                answer.close()
            if len(data) == wanted:
                return bytes(data)
            print("Resuming Chunk Download", file=sys.stderr)

    def _get(self, start: int, end: int) -> http.client.HTTPResponse:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._follow(start, end)
                if answer.status in (200, 206):
                    return answer
                if answer.status < 500 and answer.status != 429:
                    fail(f"unexpected http status {self.url}: {answer.status} {answer.reason}")
                answer.close()
            except OSError as error:
                if attempt == ATTEMPTS:
                    fail(f'Get "{self.url}": {error}')
            time.sleep(PAUSE)
        fail(f'Get "{self.url}": giving up after {ATTEMPTS} attempt(s)')

    def _follow(self, start: int, end: int) -> http.client.HTTPResponse:
        url = self.url
        while True:
            parts = urlsplit(url)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80)
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Range": f"bytes={start}-{end - 1}"})
            answer = connection.getresponse()
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            url = urljoin(url, answer.headers["Location"])


class Stream(io.RawIOBase):
    """Chunks as a file, for reading in order; a chunk is there as a whole or not at all."""

    def __init__(self, source: Source):
        self.chunks = source.pieces()
        self.buffer = b""

    def read(self, size: int = -1) -> bytes:
        while len(self.buffer) < size:
            chunk = next(self.chunks, b"")
            if not chunk:
                break
            self.buffer += chunk
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data


def extract(stream: Any, dest: str) -> None:
    links = []
    end = 0
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for entry in archive:
            place = posixpath.normpath(posixpath.join(dest, entry.name.lstrip("/")))
            os.makedirs(os.path.dirname(place), exist_ok=True)  # before the next line, as the real one does
            if not place.startswith(dest):
                fail(f"archive (tar) file contains file outside of target directory: {entry.name}")
            if entry.isdir():
                os.makedirs(place, exist_ok=True)
            elif entry.issym() or entry.islnk():
                links.append((entry.issym(), entry.linkname, place))
            elif entry.isreg():
                handle = os.open(place, os.O_WRONLY | os.O_CREAT, entry.mode & 0o777)  # no truncation
                with open(handle, "wb", buffering=0) as file, archive.extractfile(entry) or io.BytesIO() as content:
                    left = entry.size
                    while left:
                        piece = content.read(min(2**16, left))
                        if not piece:
                            fail("unexpected EOF")
                        file.write(piece)
                        left -= len(piece)
            else:
                fail(f"unsupported file type for {entry.name}, typeflag {entry.type.decode()}")
        end = archive.offset
        rest = archive.fileobj
        while rest is not None and end and (piece := rest.read(2**16)):
            if any(piece):
                fail(f"unexpected non-null byte in padding: {next(byte for byte in piece if byte):x}")
    for symbolic, target, place in links:
        if symbolic:
            os.symlink(target, place)
        else:
            os.link(posixpath.join(dest, target), place)


def main() -> None:
    parser = argparse.ArgumentParser(prog="pget")
    parser.add_argument("-x", dest="extract", action="store_true")
    parser.add_argument("-m", dest="chunk", default="125M")
    parser.add_argument("-c", dest="concurrency", type=int)
    parser.add_argument("--pid-file", default="/run/pget.pid")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("url")
    parser.add_argument("dest")
    arguments = parser.parse_args()
    if not (arguments.extract or os.environ.get("PGET_EXTRACT")):
        fail("this stand-in only extracts")
    with open(arguments.pid_file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.lexists(arguments.dest) and not os.environ.get("PGET_FORCE"):
            fail(f"destination {arguments.dest} already exists")
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", arguments.chunk).groups()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            extract(Stream(Source(arguments.url, int(number) * UNITS[unit])), arguments.dest)
        except Panic as panic:
            print(f"panic: {panic}\n\ngoroutine 1 [running]:", file=sys.stderr)
            sys.exit(2)
        except tarfile.ReadError as error:
            empty = "empty" in str(error)
            sys.exit(0) if empty else fail("unexpected EOF" if "end of data" in str(error) else f"archive/tar: {error}")
        except OSError as error:
            fail(f"write {error.filename or arguments.dest}: {(error.strerror or str(error)).lower()}")


if __name__ == "__main__":
    main()
