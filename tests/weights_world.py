"""What tests of the weights share: checkpoints as trees and tars, and a server that misbehaves on demand."""

from __future__ import annotations

import hashlib
import math
import os
import re
import ssl
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests" / "golden" / "golden_a" / "checkpoint"
NAME = "models--moonshotai--Kimi-VL-A3B-Thinking"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def blob_name(path: Path) -> str:
    """As on the Hub: large files by their SHA-256, the others as git does."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def cache_tree(root: Path, checkpoint: Path = CHECKPOINT) -> Path:
    """``checkpoint`` as a Hugging Face cache tree: blobs named by their hashes, a snapshot of links."""
    tree = root / NAME
    snapshot = tree / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (tree / "blobs").mkdir()
    (tree / "refs").mkdir()
    (tree / "refs" / "main").write_text(REVISION)
    for path in sorted(checkpoint.iterdir()):
        name = blob_name(path)
        (tree / "blobs" / name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return tree


def tar_of(tree: Path, path: Path) -> None:
    """The published layout: the tree's own content, without a folder above it."""
    with tarfile.open(path, "w") as tar:
        for entry in sorted(tree.iterdir()):
            tar.add(entry, arcname=entry.name)


def largest_blob(tree: Path) -> Path:
    return max((tree / "blobs").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    """Change one bit near the end, size and time stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# A server


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, which nobody trusts who is not told to."""
    path = folder / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    command = [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@dataclass
class FaultServer:
    """A folder over HTTP on loopback, with ranges; each field is a way to misbehave."""

    folder: Path
    ranges: bool = True
    lengths: bool = True
    length_error: int = 0
    stage: str = ""  # of a download, to which the next four belong: "probe", "contents" or "data"
    statuses: list[int] = field(default_factory=list)  # what the next answers are instead
    cut: int | None = None  # bytes after which a connection is closed
    stall: int | None = None  # bytes after which nothing more comes
    times: int = 10**9  # how many connections are cut or stall
    rate: float = 0  # bytes a second, of all connections together
    limit: float = math.inf  # bytes in all after which it sends nothing more until there is a higher limit
    redirect: str = ""  # where every answer sends to, with the path added
    login: str = ""  # the only Authorization header that is let in
    override: Callable[[str], bytes | None] = lambda path: None  # content that is not in the folder
    headers_for: Callable[[str], dict[str, str]] = lambda path: {}
    requests: list[tuple[str, str]] = field(default_factory=list)  # path with query, range
    delivered: list[str] = field(default_factory=list)  # path of every answer with content
    sent: int = 0
    certificate: Path | None = None  # with its key: then by TLS

    def __enter__(self) -> FaultServer:
        outer = self
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.line_free = 0.0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def do_HEAD(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the other side went away, which is what these tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        span = handler.headers.get("Range", "")
        with self.lock:
            self.requests.append((handler.path, span))
            good = self.stage not in ("", self.stage_of(span))
            status = self.statuses.pop(0) if self.statuses and not good else 0
        path = handler.path.partition("?")[0]
        content = self.content(path)
        if self.login and handler.headers.get("Authorization") != self.login:
            status = 401
        if self.redirect:
            return self.plain(handler, 302, {"Location": self.redirect + handler.path})
        if status or content is None:
            return self.plain(handler, status or 404, self.headers_for(path))
        start, end = self.span(span, len(content)) if self.ranges else (0, len(content))
        partial = self.ranges and bool(span)
        if partial and start >= len(content):
            return self.plain(handler, 416, {})
        if handler.command == "GET":
            self.delivered.append(path)
        handler.send_response(206 if partial else 200)
        if partial:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content) + self.length_error}")
        if self.lengths:
            handler.send_header("Content-Length", str(end - start + (0 if partial else self.length_error)))
        for name, value in self.headers_for(path).items():
            handler.send_header(name, value)
        handler.send_header("Connection", "close")
        handler.close_connection = True
        handler.end_headers()
        if handler.command == "GET":
            self.send(handler, content[start:end], good)

    def content(self, path: str) -> bytes | None:
        made = self.override(path)
        file = self.folder / path.lstrip("/")
        return made if made is not None else file.read_bytes() if file.is_file() else None

    @staticmethod
    def stage_of(span: str) -> str:
        """What a request is for, told by the range it asks for."""
        if span == "bytes=0-0":
            return "probe"
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
        return "contents" if found and int(found[2]) - int(found[1]) < 2**16 else "data"

    @staticmethod
    def span(text: str, size: int) -> tuple[int, int]:
        if not text:
            return 0, size
        first, _, last = text.removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1, size) if last else size

    @staticmethod
    def plain(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def once_more(self) -> bool:
        with self.lock:
            self.times -= 1
            return self.times >= 0

    def send(self, handler: BaseHTTPRequestHandler, data: bytes, good: bool) -> None:
        cut = None if good else self.cut
        stall = None if good else self.stall
        position = 0
        while position < len(data):
            if stall is not None and position >= stall:
                stall = None
                if self.once_more():
                    self.released.wait()
                    return
            if cut is not None and position >= cut:
                cut = None
                if self.once_more():
                    return
            stops = [limit for limit in (cut, stall) if limit is not None]
            end = min(position + 2**15, len(data), *stops)
            while self.sent >= self.limit and not self.released.wait(0.002):
                pass
            if self.rate:
                time.sleep(self.turn((end - position) / self.rate))
            handler.wfile.write(data[position:end])
            self.sent += end - position
            position = end

    def turn(self, seconds: float) -> float:
        """How long to wait for a line that is taken for ``seconds``, behind all who asked before."""
        with self.lock:
            now = time.monotonic()
            self.line_free = max(self.line_free, now) + seconds
            return self.line_free - now
