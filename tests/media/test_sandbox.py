"""Whatever becomes of the process that reads a file, its request gets a promised error and nothing is left of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kimi_vl.errors import UserError
from kimi_vl.media import sandbox
from kimi_vl.media.documents import Document
from kimi_vl.media.images import ImageOptions
from kimi_vl.media.video import Video, VideoOptions

from .backends import FILM, file

ROOT = Path(__file__).parents[2]
WAYS = {
    "exit": "UNREADABLE",
    "SIGSEGV": "UNREADABLE",
    "SIGABRT": "TOO_LARGE",
    "SIGKILL": "TOO_LARGE",
    "eat": "TOO_LARGE",
    "spin": "TOO_LARGE",
    "hang": "TOO_LARGE",
    "hang later": "TOO_LARGE",
    "raise": "UNREADABLE",
    "noise": "UNREADABLE",
    "list": "UNREADABLE",
    "endless line": "UNREADABLE",
    "other fields": "UNREADABLE",
    "an error of no kind": "UNREADABLE",
    "half a picture": "UNREADABLE",
    "no picture": "UNREADABLE",
    "dies later": "UNREADABLE",
    "odd turns": "UNREADABLE",
}


@pytest.fixture(autouse=True)
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, library in (("video", "av"), ("document", "pypdfium2")):
        monkeypatch.setitem(sandbox._BACKENDS, name, ("tests.media.backends", library))
    monkeypatch.setattr(sandbox, "CPU_S", 1)


def film(order: str, options: ImageOptions) -> int:
    """How many frames are read."""
    with Video(file(order), VideoOptions()) as video:
        return len(list(video.read(video.sizes(video.wanted, 1.0, options))))


def paper(order: str, options: ImageOptions) -> int:
    with Document(file(order), None, options) as document:
        return len(list(document.read(document.sizes(document.wanted, 0.5, options))))


BOTH = {"exit", "eat", "hang later", "raise", "other fields", "half a picture"}


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        *(("VIDEO", order) for order in WAYS),
        *(pytest.param("DOCUMENT", order, marks=() if order in BOTH else pytest.mark.nightly) for order in WAYS),
    ],
)
def test_a_process_that_fails_is_an_error_of_its_request(
    kind: str, order: str, options: ImageOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "DOCUMENT" and order == "odd turns":
        assert paper(order, options) == 3  # pages are upright
        return
    if order.startswith("hang"):
        monkeypatch.setattr(sandbox, "WALL_S", 0.7)
    with pytest.raises(UserError) as caught:
        (film if kind == "VIDEO" else paper)(order, options)
    assert caught.value.code == f"E_{kind}_{WAYS[order]}"
    assert "library" not in caught.value.message and "/" not in caught.value.message
    monkeypatch.undo()


def test_a_reader_that_behaves_is_read(options: ImageOptions) -> None:
    assert (film("", options), paper("", options)) == (3, 3)
    assert (film("print", options), paper("print", options)) == (3, 3), "what a library prints is no answer"


@pytest.mark.parametrize("order", ["open", "connect", "write", "pipe"])
def test_nothing_can_be_opened(order: str) -> None:
    with sandbox.Sandbox("video", file(order)) as process:
        assert process.hello()["frames"] == errno.EMFILE
    with sandbox.Sandbox("video", file("")) as process:
        assert process.hello() == FILM


def test_a_file_is_seen_whole_and_has_no_name() -> None:
    data = file("x" * 3_000_000)
    with sandbox.Sandbox("video", data) as process:
        process.hello()
        links = [os.readlink(fd) for fd in Path(f"/proc/{process._process.pid}/fd").iterdir()]
    assert sum("memfd:" in link for link in links) == 1
    assert not any(link.startswith("/") and "memfd" not in link and link != "/dev/null" for link in links)


def test_a_missing_package_is_named(options: ImageOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("video", "document"):
        monkeypatch.setitem(sandbox._BACKENDS, name, ("tests.media.backends", "no_such_package"))
    with pytest.raises(UserError, match=r"^E_VIDEO_UNAVAILABLE: .*kimi-vl\[video\]"):
        film("", options)
    with pytest.raises(UserError, match=r"^E_DOCUMENT_UNAVAILABLE: .*kimi-vl\[pdf\]"):
        paper("", options)


def test_a_package_that_cannot_be_imported_is_named_in_the_log(
    options: ImageOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("raise ImportError('libfoo.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, read in (("video", film), ("document", paper)):
        monkeypatch.setitem(sandbox._BACKENDS, name, ("broken_package", "broken_package"))
        caplog.clear()
        with pytest.raises(UserError, match=f"^E_{name.upper()}_UNAVAILABLE: "):
            read("", options)
        assert "broken_package" in caplog.text and "libfoo" not in caplog.text


def test_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WAIT_S", 0.01)
    with sandbox.turn(), sandbox.turn():
        with pytest.raises(UserError) as caught, sandbox.turn():
            pass
        assert caught.value.code == "E_OVERLOADED"
    with sandbox.turn(), sandbox.turn():
        pass


def test_the_process_ends_with_the_service() -> None:
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from kimi_vl.media import sandbox\n"
        "sandbox._BACKENDS['video'] = ('tests.media.backends', 'av')\n"
        "from tests.media.backends import file\n"
        "process = sandbox.Sandbox('video', file('hang later'))\n"
        "process.hello(); print(process._process.pid, flush=True); process.ask(times=[])"
    )
    service = subprocess.Popen([sys.executable, "-c", program, str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    reader = int(service.stdout.readline())
    service.send_signal(signal.SIGKILL)
    service.wait()
    service.stdout.close()
    ends = time.monotonic() + 300
    while _runs(reader) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not _runs(reader)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
