"""What `pget -x` does with servers, archives and disks: its status, its last words, and what it leaves on the disk.

For the stand-in of the other tests, and for the real program where there is one, so that both stay alike.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import lzma
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.weights.conftest import REAL_PGET
from tests.weights_world import ROOT, FaultServer, cache_tree, self_signed, tar_of

STAND_IN = [sys.executable, "-S", str(ROOT / "tests" / "pget_stand_in.py")]
CHUNK = 4000
PATIENCE_S = 300
FILES = {"d": "dir", "d/a": b"a" * 700, "d/b": b"b" * 1024, "d/c": b"c" * 9000}
Tree = dict[str, bytes | str]


def tar(*entries: tuple[str, Any], format: int = tarfile.GNU_FORMAT, end: bool = True) -> bytes:
    """Of ``(name, content)``: bytes, "dir", "-> target" for a link, "=> target" for a hard link, or a kind's letter."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            if isinstance(content, bytes):
                info.size = len(content)
            elif content == "dir":
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif content.startswith(("->", "=>")):
                info.type = tarfile.SYMTYPE if content[0] == "-" else tarfile.LNKTYPE
                info.linkname = content[3:]
            else:
                info.type = content.encode()
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
        whole = archive.offset
    return file.getvalue() if end else file.getvalue()[:whole]


def tree_of(folder: Path) -> Tree | None:
    """In the words of :func:`tar`; none where there is no such folder."""
    if not os.path.lexists(folder):
        return None
    tree: Tree = {}
    for path, names, files in os.walk(folder):
        for name in (*names, *files):
            place = Path(path, name)
            what = f"-> {os.readlink(place)}" if place.is_symlink() else "dir" if place.is_dir() else place.read_bytes()
            tree[str(place.relative_to(folder))] = what
    return tree


ENTRIES = tuple(FILES.items())
TAR = tar(*ENTRIES)
LINKED = tar(("l", "-> d/a"), *ENTRIES)
BARE = tar(*ENTRIES, end=False)
SPARSE_MAP = b"2\n0\n3\n1000\n2\n".ljust(512, b"\0")


def sparse_tar() -> bytes:
    """As `tar --format=pax --sparse` makes it: "one" at 0 and "tw" at 1000, 1500 bytes in all."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("GNUSparseFile.0/p")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "p",
            "GNU.sparse.realsize": "1500",
        }
        info.size = 512 + 5
        archive.addfile(info, io.BytesIO(SPARSE_MAP + b"onetw"))
    return file.getvalue()


def global_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as archive:
        info = tarfile.TarInfo("p")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    return file.getvalue()


def old_tar() -> bytes:
    """Without a magic number, and with no letter for a file."""
    archive = tar(("p", b"hi"))
    header = bytearray(archive[:512])
    header[257:512], header[156] = bytes(255), 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + archive[512:]


@dataclass
class Case:
    """``left`` is DEST's tree, ``beside`` what else there is where it stands."""

    content: bytes
    status: int
    left: Tree | None
    says: str = ""
    flags: tuple[str, ...] = ()
    server: dict[str, Any] = field(default_factory=dict)
    before: Tree = field(default_factory=dict)  # paths beside DEST or in it
    beside: Tree = field(default_factory=dict)


def old(**files: bytes | str) -> Tree:
    return {"dest": "dir"} | {f"dest/{name}": content for name, content in files.items()}


def one_status(status: int, times: int = 1) -> dict[str, Any]:
    return {"statuses": [status] * times}


SMALL = ("-m", str(CHUNK), "-c", "2")
LONG = "n" * 120 + "/" + "m" * 90
NO_DEST = None
CASES: dict[str, Case] = {
    # archives that are right
    "an archive": Case(TAR, 0, FILES),
    "in chunks": Case(TAR, 0, FILES, flags=SMALL),
    "in more chunks than connections": Case(TAR, 0, FILES, flags=("-m", "500", "-c", "3")),
    "links": Case(LINKED, 0, FILES | {"l": "-> d/a"}),
    "pax": Case(tar(*ENTRIES, (LONG, b"1"), format=tarfile.PAX_FORMAT), 0, FILES | {"n" * 120: "dir", LONG: b"1"}),
    "long names of GNU": Case(
        tar((LONG, b"1"), ("l", f"-> {LONG}")), 0, {"n" * 120: "dir", LONG: b"1", "l": f"-> {LONG}"}
    ),
    "long names of ustar": Case(tar((LONG, b"1"), format=tarfile.USTAR_FORMAT), 0, {"n" * 120: "dir", LONG: b"1"}),
    "v7": Case(old_tar(), 0, {"p": b"hi"}),
    "a pax global header": Case(global_tar(), 0, {"p": b"hi"}),
    "a sparse file of pax": Case(sparse_tar(), 0, {"p": b"one" + bytes(997) + b"tw" + bytes(498)}),
    "parents that the archive does not name": Case(tar(("x/y/z", b"1")), 0, {"x": "dir", "x/y": "dir", "x/y/z": b"1"}),
    "a hard link": Case(tar(("a", b"1"), ("b", "=> a")), 0, {"a": b"1", "b": b"1"}),
    "an absolute name": Case(tar(("/x", b"1")), 0, {"x": b"1"}),
    "the end of a larger archive": Case(TAR + bytes(20480), 0, FILES),
    # the destination
    "DEST is there": Case(TAR, 1, {}, "dest already exists", before=old()),
    "DEST is a file": Case(TAR, 1, {}, "dest already exists", before={"dest": b"1"}, beside={"dest": b"1"}),
    "DEST is below a file": Case(TAR, 1, {}, "already exists", ("under",), before={"f": b"1"}, beside={"f": b"1"}),
    "DEST is there, forced": Case(
        LINKED,
        0,
        FILES | {"l": "-> d/a", "k": b"kept"},
        "",
        ("-f",),
        before=old(l="-> z", k=b"kept", d="dir") | {"dest/d/a": b"z" * 999},
    ),
    "DEST is a file, forced": Case(
        TAR, 1, {}, "not a directory", ("-f",), before={"dest": b"1"}, beside={"dest": b"1"}
    ),
    "DEST is a link, forced": Case(
        TAR,
        0,
        FILES,
        "",
        ("-f",),
        before={"real": "dir", "dest": "-> real"},
        beside={"real": "dir", "dest": "-> real"} | {f"real/{name}": what for name, what in FILES.items()},
    ),
    "DEST is a link to nothing": Case(TAR, 1, {}, "file exists", before={"dest": "-> no"}, beside={"dest": "-> no"}),
    "a directory in a file's place": Case(
        tar(("a", b"1"), ("x", b"2")), 1, {"a": b"1", "x": "dir"}, "is a directory", ("-f",), before=old(x="dir")
    ),
    "a file in a directory's place": Case(
        tar(("a", b"1"), ("x/y", b"2")), 1, {"a": b"1", "x": b"0"}, "not a directory", ("-f",), before=old(x=b"0")
    ),
    # archives at fault
    "no tar": Case(b"no tar at all" * 100, 1, NO_DEST, "archive/tar: invalid tar header"),
    "zstd": Case(b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 8, 1, NO_DEST, "archive/tar: invalid tar header"),
    "7 bytes": Case(b"1234567", 1, NO_DEST, "error reading peek data: EOF"),
    "100 bytes": Case(TAR[:100], 1, NO_DEST, "unexpected EOF"),
    "only zeros": Case(bytes(10240), 0, NO_DEST),
    "cut in a header": Case(TAR[:700], 1, {"d": "dir"}, "unexpected EOF"),
    "cut after a header": Case(TAR[:1024], 1, {"d": "dir", "d/a": b""}, "unexpected EOF"),
    "cut at 512 bytes": Case(TAR[:512], 0, {"d": "dir"}),
    "cut at 512 bytes, pax": Case(tar((LONG * 2, b"1"), format=tarfile.PAX_FORMAT)[:512], 1, NO_DEST, "unexpected EOF"),
    "cut inside a file": Case(LINKED[:1836], 1, {"d": "dir", "d/a": b"a" * 300}, "unexpected EOF"),
    "cut in what fills up a file": Case(TAR[: 1024 + 900], 0, {"d": "dir", "d/a": FILES["d/a"]}),
    "cut between files": Case(TAR[: 1024 + 1024], 0, {"d": "dir", "d/a": FILES["d/a"]}),
    "no end": Case(BARE, 0, FILES),
    "half an end": Case(BARE + bytes(512), 0, FILES),
    "half an end and a half": Case(BARE + bytes(700), 1, FILES, "unexpected EOF"),
    "half an end and junk": Case(BARE + bytes(512) + b"J" * 512, 1, FILES, "archive/tar: invalid tar header"),
    "junk after the end": Case(LINKED + b"JUNK", 1, FILES | {"l": "-> d/a"}, "unexpected non-null byte in padding: 4a"),
    "a second archive after the end": Case(
        LINKED + tar(("second", b"2")), 1, FILES | {"l": "-> d/a"}, "unexpected non-null byte in padding: 73"
    ),
    "a checksum that is wrong": Case(TAR[:520] + b"?" + TAR[521:], 1, {"d": "dir"}, "archive/tar: invalid tar header"),
    "gzip": Case(gzip.compress(LINKED), 1, FILES | {"l": "-> d/a"}, "unexpected non-null byte in padding"),
    "gzip of an archive without filling": Case(
        gzip.compress(tar(("l", "-> a"), ("a", b"1"), end=False) + bytes(1024)), 0, {"l": "-> a", "a": b"1"}
    ),
    "gzip, cut": Case(gzip.compress(os.urandom(512) + TAR)[:400], 1, NO_DEST, "unexpected EOF"),
    "bzip2": Case(bz2.compress(LINKED), 1, FILES | {"l": "-> d/a"}, "unexpected non-null byte in padding"),
    "xz": Case(lzma.compress(LINKED), 1, FILES | {"l": "-> d/a"}, "unexpected non-null byte in padding"),
    "a fifo": Case(
        tar(("a", b"1"), ("p", "6"), ("z", b"2")), 1, {"a": b"1"}, "unsupported file type for p, typeflag 6"
    ),
    "a device": Case(
        tar(("a", b"1"), ("p", "3"), ("z", b"2")), 1, {"a": b"1"}, "unsupported file type for p, typeflag 3"
    ),
    "a sparse file of GNU": Case(
        tar(("l", "-> a"), ("a", b"1"), ("p", "S")), 1, {"a": b"1"}, "unsupported file type for p, typeflag S"
    ),
    "a contiguous file": Case(tar(("a", b"1"), ("p", "7")), 1, {"a": b"1"}, "unsupported file type for p, typeflag 7"),
    "a name twice": Case(tar(("a", b"first-long"), ("a", b"2nd")), 0, {"a": b"2ndst-long"}),
    "a name twice, forced": Case(tar(("a", b"first-long"), ("a", b"2nd")), 0, {"a": b"2nd"}, "", ("-f",)),
    "a link twice": Case(tar(("l", "-> a"), ("l", "-> b")), 1, {"l": "-> a"}, "file exists"),
    "a link twice, forced": Case(tar(("l", "-> a"), ("l", "-> b")), 0, {"l": "-> b"}, "", ("-f",)),
    "a hard link to nothing": Case(tar(("a", b"1"), ("b", "=> no")), 1, {"a": b"1"}, "no such file or directory"),
    # names that mean harm
    "a name that climbs out": Case(
        tar(("a", b"1"), ("../out/x", b"2")),
        1,
        {"a": b"1"},
        "archive (tar) file contains file outside of target directory",
        beside={"out": "dir"},
    ),
    "a name that climbs out beside": Case(
        tar(("a", b"1"), ("../dest-evil/x", b"2")), 0, {"a": b"1"}, beside={"dest-evil": "dir", "dest-evil/x": b"2"}
    ),
    "a link that leads out": Case(tar(("l", "-> ../../x"), ("m", "-> /etc")), 0, {"l": "-> ../../x", "m": "-> /etc"}),
    "a file through a link": Case(tar(("l", "-> ../out"), ("l/x", b"1")), 1, {"l": "dir", "l/x": b"1"}, "file exists"),
    "a file through a link that is there": Case(
        tar(("l/x", b"1")),
        0,
        {"l": "-> ../out"},
        "",
        ("-f",),
        before=old(l="-> ../out") | {"out": "dir"},
        beside={"out": "dir", "out/x": b"1"},
    ),
    "a hard link to what is outside": Case(
        tar(("a", "=> ../victim")), 0, {"a": b"v"}, before={"victim": b"v"}, beside={"victim": b"v"}
    ),
    # servers
    **{
        f"status {status}": Case(TAR, 1, NO_DEST, f"unexpected http status URL: {status}", server=one_status(status))
        for status in (400, 401, 403, 404, 410, 416, 501)
    },
    "status 500 for ever": Case(TAR, 1, NO_DEST, "giving up after 1 attempt(s)", ("-r", "0"), one_status(500, 99)),
    "status 503 once": Case(TAR, 0, FILES, server=one_status(503), flags=("-r", "1")),
    "a later chunk is not there": Case(
        LINKED,
        1,
        {"d": "dir", "d/a": FILES["d/a"]},
        "unexpected http status",
        ("-m", "3000", "-c", "1"),
        {"late_status": 404},
    ),
    "a later chunk fails": Case(
        LINKED,
        1,
        {"d": "dir", "d/a": FILES["d/a"]},
        "giving up",
        ("-m", "3000", "-c", "1", "-r", "0"),
        {"late_status": 500},
    ),
    "a connection that breaks once": Case(TAR, 0, FILES, "Resuming Chunk Download", server={"cut": 700, "times": 1}),
    "connections that break": Case(TAR, 0, FILES, "Resuming Chunk Download", server={"cut": 1500}),
    "connections that break, in chunks": Case(TAR, 0, FILES, "Resuming Chunk Download", SMALL, {"cut": 1500}),
    "no ranges": Case(TAR, 0, FILES, server={"ranges": False}),
    "no ranges, in chunks": Case(
        TAR, 2, NO_DEST, "panic: runtime error: slice bounds out of range", SMALL, {"ranges": False}
    ),
    "no ranges, a connection that breaks": Case(
        TAR, 1, NO_DEST, "expected status code 206, got 200", server={"ranges": False, "cut": 700, "times": 1}
    ),
    "no length": Case(
        TAR, 1, NO_DEST, 'strconv.ParseInt: parsing "": invalid syntax', server={"ranges": False, "lengths": False}
    ),
    "no length of a part": Case(
        TAR, 2, NO_DEST, "panic: runtime error: slice bounds out of range", server={"lengths": False}
    ),
    "a length that is too long": Case(LINKED, 1, FILES | {"l": "-> d/a"}, "bytes, read", server={"length_error": 3000}),
    "a length that is too long, in chunks": Case(
        LINKED, 1, FILES | {"l": "-> d/a"}, "bytes, read", ("-m", "10000"), {"length_error": 3000}
    ),
    "parts that are shorter than asked for": Case(
        LINKED, 1, {"d": "dir", "d/a": b"a" * 300}, "unexpected EOF", (), {"shorter": len(LINKED) - 1836}
    ),
    "an empty file": Case(b"", 1, NO_DEST, "416"),
    "an empty file, no ranges": Case(b"", 1, NO_DEST, "error reading peek data: EOF", server={"ranges": False}),
    "a redirect": Case(TAR, 0, FILES, server={"redirected": True}),
    "a redirect, in chunks": Case(TAR, 0, FILES, flags=SMALL, server={"redirected": True}),
}


@pytest.fixture(params=["stand-in", *(["real"] if REAL_PGET else [])])
def pget(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The start of a command; of the program too where there is one."""
    for name in list(os.environ):
        if name.startswith("PGET"):
            monkeypatch.delenv(name)
    program = STAND_IN if request.param == "stand-in" else [str(REAL_PGET)]
    return [*program, "-x", "--pid-file", str(tmp_path / "pid"), "--log-level", "warn"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where DEST stands, alone."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultServer]:
    (tmp_path / "site").mkdir()
    with FaultServer(tmp_path / "site") as server:
        yield server


def make(home: Path, tree: Tree) -> None:
    for name, what in tree.items():
        if isinstance(what, bytes):
            (home / name).write_bytes(what)
        elif what == "dir":
            (home / name).mkdir()
        else:
            (home / name).symlink_to(what[3:])


def serve(server: FaultServer, content: bytes, faults: dict[str, Any]) -> None:
    faults = copy.deepcopy(faults)
    server.override = lambda path: content
    if status := faults.pop("late_status", 0):
        server.stage_of = lambda span: "probe" if span.startswith("bytes=0-") else "data"  # type: ignore[method-assign]
        server.stage, server.statuses = "data", [status] * 99
    if shorter := faults.pop("shorter", 0):
        whole = server.span
        server.span = lambda text, size: (whole(text, size)[0], whole(text, size)[1] - shorter)  # type: ignore[method-assign]
    for name, value in faults.items():
        setattr(server, name, value)


@pytest.mark.parametrize("name", CASES)
def test_what_pget_does(pget, home, server, tmp_path, name):
    case = CASES[name]
    make(home, case.before)
    with FaultServer(tmp_path, redirect=server.url.rstrip("/")) as front:
        url = (front if case.server.get("redirected") else server).url + "a.tar"
        serve(server, case.content, {key: value for key, value in case.server.items() if key != "redirected"})
        flags = [flag for flag in case.flags if flag != "under"]
        dest = home / "f" / "dest" if "under" in case.flags else home / "dest"
        ended = subprocess.run(
            [*pget, *flags, url, str(dest)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert ended.returncode == case.status, ended.stderr
    assert case.says.replace("URL", url) in ended.stderr if case.says else not ended.stderr
    assert not ended.stdout
    if case.status == 1:
        assert ended.stderr.splitlines()[-1].startswith("Error: ")
    if "dest" not in case.beside:
        assert tree_of(home / "dest") == (case.left if case.left != {} or "dest" in case.before else None)
    everything = tree_of(home) or {}
    assert {
        name: what
        for name, what in everything.items()
        if not name.startswith("dest/") and (name != "dest" or name in case.beside)
    } == case.beside


def start(
    pget: list[str], server: FaultServer, dest: Path, *flags: str, content: bytes = LINKED
) -> subprocess.Popen[str]:
    serve(server, content, {})
    command = [*pget, *flags, server.url + "a.tar", str(dest)]
    heard = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, which a process hands on
    try:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, heard)


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    process.send_signal(number)
    return process.communicate(timeout=PATIENCE_S)[1]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_what_is_written(pget, home, server, number):
    """Files as far as whole chunks came, and none of the links."""
    server.stage_of = lambda span: "late" if span == "bytes=12000-14999" else "data"
    server.stage, server.stall = "late", 0
    process = start(pget, server, home / "dest", "-m", "3000", "-c", "2")
    whole = {"d": "dir", "d/a": FILES["d/a"], "d/b": FILES["d/b"]}
    wait_until(lambda: len((tree_of(home / "dest") or {}).get("d/c", b"")) >= 4096)
    assert not end(process, number)
    assert process.returncode == -number
    left = tree_of(home / "dest") or {}
    assert FILES["d/c"].startswith(left.pop("d/c", b"?"))  # type: ignore[arg-type]
    assert left == whole


def test_nothing_is_written_before_a_chunk_is_whole(pget, home, server):
    server.stall = 12_000
    process = start(pget, server, home / "dest")
    wait_until(lambda: server.sent >= 12_000)
    time.sleep(0.1)
    assert process.poll() is None
    end(process)
    assert not os.path.lexists(home / "dest")


def test_connections_fetch_side_by_side(pget, home, server):
    """As many chunks as there are connections are asked for though the first of them never comes."""
    server.stall = 100
    process = start(pget, server, home / "dest", "-m", "1000", "-c", "4")
    wait_until(lambda: len(server.requests) == 4)
    time.sleep(0.1)
    end(process)
    spans = [f"bytes={start}-{start + 999}" for start in range(0, 4000, 1000)]
    assert sorted(span for _, span in server.requests) == spans


def test_connections_that_always_break_are_taken_up_for_ever(pget, home, server):
    server.cut = 0
    process = start(pget, server, home / "dest", "--log-level", "error")
    wait_until(lambda: len(server.requests) > 50)
    assert process.poll() is None
    end(process)
    assert not os.path.lexists(home / "dest")


def test_modes_are_the_archive_s(pget, home, server):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, mode in {"a": 0o777, "b": 0o4755, "c": 0o600, "d": 0o444}.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size = mode, 1
            archive.addfile(info, io.BytesIO(b"1"))
    make(home, old(a=b"old"))
    (home / "dest" / "a").chmod(0o640)
    process = start(pget, server, home / "dest", "-f", content=file.getvalue())
    assert process.wait(PATIENCE_S) == 0
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home / "dest").iterdir()}
    assert modes == {"a": 0o640, "b": 0o755 & ~umask, "c": 0o600, "d": 0o444 & ~umask}


def test_one_at_a_time(pget, home, server, tmp_path):
    """For one file of the process id; the lock goes with its holder."""
    server.stall, server.times = 1000, 1
    first = start(pget, server, home / "first")
    wait_until(lambda: server.sent >= 1000)
    second = start(pget, server, home / "second")
    time.sleep(0.2)
    assert second.poll() is None
    assert len(server.requests) == 1
    end(first)
    assert second.wait(PATIENCE_S) == 0
    assert (tmp_path / "pid").exists()


def test_a_file_for_the_process_id_that_cannot_be_made(pget, home, server):
    process = start(pget, server, home / "dest", "--pid-file", str(home / "no" / "pid"))
    assert f"Error: open {home / 'no' / 'pid'}: no such file or directory" in process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1
    assert not server.requests


def test_a_disk_that_is_full(pget, small_disk, server):
    process = start(
        pget, server, small_disk / "dest", content=tar(("l", "-> a"), ("a", b"a" * 1000), ("b", b"b" * 3_000_000))
    )
    assert "no space left on device" in process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1
    left = tree_of(small_disk / "dest") or {}
    assert left["a"] == b"a" * 1000
    assert "l" not in left
    assert 10**6 < len(left["b"]) < 2 * 2**20


def test_a_disk_that_cannot_be_written(pget, home, server, read_only):
    process = start(pget, server, read_only(home) / "dest")
    assert "read-only file system" in process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("name", "value", "status", "says"),
    [
        ("PGET_FORCE", "1", 0, ""),
        ("PGET_RESOLVE", "host:443", 1, "invalid resolve host format, expected <hostname>:port:<ip>, got: host:443"),
    ],
)
def test_settings_in_the_environment_count(pget, home, server, monkeypatch, name, value, status, says):
    make(home, old(d="dir"))
    monkeypatch.setenv(name, value)
    process = start(pget, server, home / "dest", *(["-f"] if status else []))
    assert says in process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == status


def test_a_certificate_that_nobody_trusts_is_not_tried_again(pget, home, tmp_path, monkeypatch):
    with FaultServer(tmp_path, certificate=self_signed(tmp_path)) as server:
        process = start(pget, server, home / "dest")
        assert "certificate" in process.communicate(timeout=PATIENCE_S)[1]
        assert process.returncode == 1
        assert not server.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
        assert start(pget, server, home / "dest").wait(30) == 0
    assert tree_of(home / "dest") == FILES | {"l": "-> d/a"}


@pytest.mark.parametrize(
    ("login", "path", "says"),
    [
        ("u%40s:p%3Aa", "/a%20b.tar?x=%2F&y=a+b/c=", ""),
        ("user:p@ss", "/a b.tar?x=%zz", ""),
        ("us er:p", "/a.tar", "net/url: invalid userinfo"),
        ("usér:p", "/a.tar", "net/url: invalid userinfo"),
        ("user:p^", "/a.tar", "net/url: invalid userinfo"),
        ("user:100%", "/a.tar", 'invalid URL escape "%"'),
        ("user:p", "/a%zzz.tar", 'invalid URL escape "%zz"'),
    ],
)
def test_addresses(pget, home, server, login, path, says):
    serve(server, LINKED, {})
    url = server.url.replace("://", f"://{login}@").rstrip("/") + path
    ended = subprocess.run(
        [*pget, url, str(home / "dest")], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert says in ended.stderr
    assert ended.returncode == bool(says)
    assert [asked for asked, _ in server.requests] == ([] if says else [path.replace(" ", "%20")])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_cache_tree(pget, home, server, tmp_path, monkeypatch, format):
    """As it was before it was packed, links included."""
    monkeypatch.setattr(tarfile, "DEFAULT_FORMAT", format)
    tree = cache_tree(tmp_path / "made")
    tar_of(tree, tmp_path / "a.tar")
    process = start(
        pget, server, home / "new" / "dest", "-m", "256K", "-c", "3", content=(tmp_path / "a.tar").read_bytes()
    )
    assert process.wait(60) == 0
    assert tree_of(home / "new" / "dest") == tree_of(tree)
