"""Servers, archives and disks at fault: nothing incomplete or altered is left, and one sentence says what to do.

Each fault by both fetchers, Python and pget, unless it is of one of them.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from kimi_vl.errors import CheckpointError
from kimi_vl.weights import download, http, loader, resolve
from tests.weights_world import NAME, REVISION, FaultServer, cache_tree, flip, largest_blob, tar_of

TAR = f"{NAME}.tar"
STAGES = ["probe", "contents", "data"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return cache_tree(tmp_path / "made")


@pytest.fixture
def served(site: FaultServer, tree: Path) -> FaultServer:
    tar_of(tree, site.folder / TAR)
    return site


def refused(cache: Path, model: str = "thinking") -> str:
    """The sentence of a start that fails; asserts that it is one, and that nothing but locks is left."""
    with pytest.raises(CheckpointError) as caught:
        resolve.resolve(model, has_gpu=False, cache=cache)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".") and "; " in text, "one sentence that says what to do"
    assert not [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]
    return text


def accepted(cache: Path) -> Path:
    folder = resolve.resolve("thinking", has_gpu=False, cache=cache)
    loader.load(folder)
    return folder


# Servers


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_final_answer_is_asked_for_once(served, fetcher, cache, status):
    served.statuses = [status] * 9
    text = refused(cache)
    assert text.startswith(f"{served.url}{TAR}: ") and f"({status})" in text and "check" in text
    assert len(served.requests) == 1


def test_an_answer_that_may_change_is_asked_for_again(served, fetcher, cache):
    served.statuses = [500, 503]
    accepted(cache)


def test_a_server_that_stays_broken_is_given_up(served, fetcher, cache):
    served.statuses = [500] * 100
    assert "in 3 tries (the server answers 500)" in refused(cache)


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_breaks_half_way(served, fetcher, cache, stage):
    served.stage, served.statuses = stage, [500] * 1000
    text = refused(cache)
    assert "in 3 tries" in text and "500" in text


def test_nobody_listens(site, fetcher, cache, monkeypatch):
    monkeypatch.setenv("KIMI_VL_WEIGHTS_URL", "http://127.0.0.1:9/")
    assert "Connection refused" in refused(cache)


def test_a_redirect_is_followed_and_its_signature_not_shown(served, fetcher, cache, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with FaultServer(tmp_path, redirect=f"{served.url.rstrip('/')}") as front:
        monkeypatch.setenv("KIMI_VL_WEIGHTS_URL", f"{front.url}?signature=hush")
        accepted(cache)
        served.statuses = [500] * 1000
        text = refused(cache / "second")
    assert "hush" not in caplog.text + text


def test_a_redirect_out_of_encryption_is_refused(monkeypatch):
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.scheme == "https", "nothing is asked for without encryption"
        return httpx.Response(302, headers={"Location": "http://host/b.tar?token=hush"})

    client = functools.partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(http.httpx, "Client", client)
    with (
        pytest.raises(CheckpointError, match="without encryption") as caught,
        http.get("https://host/a.tar?token=hush"),
    ):
        pass
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [1, 700, 100_000])
def test_connections_that_break_are_taken_up_again(served, fetcher, cache, stage, after, caplog):
    served.stage, served.cut, served.times = stage, after, 5
    accepted(cache)
    assert "failed" not in caplog.text, "none of the three tries is spent on it"


@pytest.mark.parametrize("stage", STAGES)
def test_connections_that_always_break_at_once(served, fetcher, cache, stage, monkeypatch):
    """The real pget never ends here: only the watchdog does."""
    served.stage, served.cut = stage, 0
    if stage == "probe":  # its answer is in the headers
        accepted(cache)
    else:
        monkeypatch.setattr(http, "STALL_SECONDS", 0.4)
        assert re.search(r"in 3 tries \((the connection was cut off|no byte arrived)", refused(cache))


@pytest.mark.parametrize("stage", ["contents", "data"])
def test_a_server_that_stalls(served, fetcher, cache, stage, monkeypatch):
    monkeypatch.setattr(http, "STALL_SECONDS", 0.4)
    served.stage, served.stall = stage, 0
    assert "in 3 tries (no byte arrived for 0.4 s)" in refused(cache)


def test_a_stall_that_does_not_come_again(served, fetcher, cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(http, "STALL_SECONDS", 5)  # so long that a busy machine is not taken for a second stall
    served.stage, served.stall, served.times = "data", 150_000, 1
    accepted(cache)
    assert ("pget wrote nothing" if fetcher == "pget" else "no byte arrived") + " for 5 s" in caplog.text


@pytest.mark.parametrize("lengths", [True, False])
def test_a_server_without_ranges(served, fetcher, cache, lengths, caplog):
    caplog.set_level(logging.INFO)
    served.ranges, served.lengths = False, lengths
    accepted(cache)
    assert ("does not support ranges" in caplog.text) == (fetcher == "pget")


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("after", [0, 100_000, 2_400_000])
def test_a_server_without_ranges_that_breaks(served, fetcher, cache, lengths, after):
    served.ranges, served.lengths, served.cut = False, lengths, after
    assert "in 3 tries" in refused(cache)
    served.times = 2
    accepted(cache)


@pytest.mark.parametrize("error", [-20_000, 3000, 10**9])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_wrong_length(served, fetcher, cache, error, ranges):
    served.length_error, served.ranges = error, ranges
    refused(cache)


def test_a_file_that_is_replaced_between_two_requests(served, fetcher, cache):
    """Blobs that are half of one archive and half of another, in a file of the same size."""
    other = bytearray((served.folder / TAR).read_bytes())
    for position in range(200_000, 2_000_000, 1000):
        other[position] ^= 255
    served.override = lambda _: bytes(other) if 9 < len(served.requests) < 16 else None
    accepted(cache)


def test_a_file_whose_size_changes_between_two_requests(served, fetcher, cache, caplog):
    longer = (served.folder / TAR).read_bytes() + bytes(10_240)
    served.override = lambda _: longer if len(served.requests) == 1 else None
    accepted(cache)
    assert "the file on the server changed" in caplog.text


def test_an_error_page_instead_of_the_archive(site, fetcher, cache):
    (site.folder / TAR).write_bytes(b"<html>come back later</html>" * 1000)
    assert "is not a complete, uncompressed tar archive" in refused(cache)


def test_an_empty_file(site, fetcher, cache):
    (site.folder / TAR).write_bytes(b"")
    assert "empty" in refused(cache)


# Archives


def _flip(tree: Path) -> None:
    flip(largest_blob(tree))


def _drop_shard(tree: Path) -> None:
    (tree / "snapshots" / REVISION / "model.safetensors").unlink()


def _drop_blob(tree: Path) -> None:
    largest_blob(tree).unlink()


def _no_checkpoint(tree: Path) -> None:
    shutil.rmtree(tree / "snapshots")


def _plain_file(tree: Path) -> None:
    """A file in place of a link that is not the blob beside it."""
    path = tree / "snapshots" / REVISION / "config.json"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b" ", b"\t", 1))


def _unhashed(tree: Path) -> None:
    path = tree / "snapshots" / REVISION / "config.json"
    (tree / "blobs" / "config").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to("../../blobs/config")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_flip, "is damaged or was altered"),
        (_drop_shard, "holds neither"),
        (_drop_blob, "links to nothing"),
        (_no_checkpoint, "holds no checkpoint"),
        (_plain_file, "config.json: is damaged or was altered"),
        (_unhashed, "whose name is no hash"),
    ],
)
def test_an_archive_of_a_harmed_tree(site, fetcher, cache, tree, harm: Callable[[Path], None], says):
    harm(tree)
    tar_of(tree, site.folder / TAR)
    text = refused(cache)
    assert says in text and text.endswith("; the archive cannot be used, make or upload it anew")
    assert text.startswith(f"{site.url}{TAR}: ") and ".part-" not in text


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, target: str = "", content: bytes = b"", **extended: str
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.pax_headers = {key.replace("_", "."): value for key, value in extended.items()}
    info.type, info.linkname, info.size = kind, target, len(content)
    return info, content


SNAPSHOT = f"snapshots/{REVISION}"
HOSTILE = {
    "climbs": [entry("../escaped", content=b"x")],
    "climbs_in_the_middle": [entry("blobs/../../escaped", content=b"x")],
    "next_to_the_destination": [entry("../tree-evil/x", content=b"x")],
    "absolute": [entry("/tmp/w-escaped", content=b"x")],
    "link_outside": [entry(f"{SNAPSHOT}/x.json", tarfile.SYMTYPE, "/etc/hostname")],
    "relative_link_outside": [entry(f"{SNAPSHOT}/x.json", tarfile.SYMTYPE, "../../../../x")],
    "link_through_a_link": [
        entry("loop", tarfile.SYMTYPE, "blobs"),
        entry("out", tarfile.SYMTYPE, "loop/../../.."),
    ],
    "through_a_link": [entry("loop", tarfile.SYMTYPE, "blobs"), entry("loop/x", content=b"x")],
    "link_over_a_folder": [entry("deep/x", content=b"x"), entry("deep", tarfile.SYMTYPE, "blobs")],
    "hard_link_outside": [entry("blobs/x", tarfile.LNKTYPE, "../../../etc/hostname")],
    "hard_link_to_a_link": [entry("blobs/x", tarfile.LNKTYPE, f"{SNAPSHOT}/config.json")],
    "device": [entry("blobs/x", tarfile.CHRTYPE)],
    "fifo": [entry("blobs/x", tarfile.FIFOTYPE)],
    "sparse": [entry("blobs/x", tarfile.GNUTYPE_SPARSE)],
    "sparse_in_the_newer_way": [
        entry("blobs/x", content=b"1\n0\n1\n".ljust(512, b"\0") + b"x", GNU_sparse_major="1", GNU_sparse_minor="0")
    ],
    "duplicate": [entry("refs/main", content=b"short")],
    "duplicate_by_another_spelling": [entry("refs/./main", content=b"short")],
    "folder_over_a_file": [entry("refs/main", tarfile.DIRTYPE)],
    "no_name": [entry("./", content=b"x")],
}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_entry(site, fetcher, cache, tree, kind, ranges, tmp_path):
    tar_of(tree, site.folder / TAR)
    with tarfile.open(site.folder / TAR, "a") as tar:
        for info, content in HOSTILE[kind]:
            tar.addfile(info, io.BytesIO(content))
    site.ranges = ranges
    text = refused(cache)
    assert text.startswith(f"{site.url}{TAR}: the entry '") and text.endswith("the archive must be made anew")
    assert not list(tmp_path.glob("**/*escaped")) and not list(tmp_path.glob("**/*evil"))
    assert not Path("/tmp/w-escaped").exists()
    if ranges:
        assert all(span for _, span in site.requests) and site.sent < 3 * 2**16 * len(site.requests)


def test_too_many_entries(site, fetcher, cache):
    with tarfile.open(site.folder / TAR, "w") as tar:
        for number in range(10_001):
            tar.addfile(tarfile.TarInfo(f"{number}"))
    assert "is one too many" in refused(cache)


@pytest.mark.parametrize("ranges", [True, False])
def test_links_and_folders_that_are_fine(site, fetcher, cache, tree, ranges):
    site.ranges = ranges
    (tree / "empty").mkdir()
    (tree / "loop").symlink_to("blobs")
    with tarfile.open(site.folder / TAR, "w") as tar:
        tar.add(tree, arcname=".")
        tar.addfile(entry("./refs", tarfile.DIRTYPE)[0])
        tar.addfile(entry("refs/pr/1", tarfile.LNKTYPE, "refs/main")[0])
    folder = accepted(cache)
    assert (folder.parents[1] / "empty").is_dir() and (folder.parents[1] / "loop").is_symlink()
    assert (folder.parents[1] / "refs/pr/1").read_text() == REVISION


@pytest.mark.parametrize("ranges", [True, False])
def test_an_archive_cut_off_anywhere(site, fetcher, cache, tree, ranges):
    """Also exactly between two entries, and before the second block of the end mark."""
    whole = site.folder / TAR
    tar_of(tree, whole)
    with tarfile.open(whole) as tar:
        members = tar.getmembers()
        end = tar.offset
    content = whole.read_bytes()
    site.ranges = ranges
    for length in (100, 512, members[3].offset, members[3].offset_data + 5, members[-1].offset, end, end + 512):
        whole.write_bytes(content[:length])
        refused(cache)


@pytest.mark.parametrize("ranges", [True, False])
def test_what_follows_an_archive(site, fetcher, cache, tree, ranges):
    site.ranges = ranges
    whole = site.folder / TAR
    tar_of(tree, whole)
    content = whole.read_bytes()
    whole.write_bytes(content + b"junk")
    assert "other data follows" in refused(cache)
    whole.write_bytes(content + content)
    assert "other data follows" in refused(cache)


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_archive(site, fetcher, cache, ranges):
    site.ranges = ranges
    with tarfile.open(site.folder / TAR, "w"):
        pass
    assert "holds no files" in refused(cache)


def test_a_compressed_archive(site, fetcher, cache, tree):
    with tarfile.open(site.folder / TAR, "w:gz") as tar:
        tar.add(tree, arcname=".")
    assert "uncompressed" in refused(cache)


# pget alone


def test_without_pget_python_fetches_and_says_so(served, no_pget, cache, caplog):
    caplog.set_level(logging.INFO)
    accepted(cache)
    assert "no pget: fetching with Python" in caplog.text


def test_a_pget_that_is_not_there(served, no_pget, cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("PGET", "/nowhere/pget")
    accepted(cache)
    assert "PGET=/nowhere/pget is no program" in caplog.text


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "pget"
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PGET", str(path))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("#!/bin/sh\necho 'Error: unknown flag: --pid-file' >&2; echo Usage >&2; exit 1\n", "status 1: unknown flag"),
        ("#!/bin/sh\necho 'panic: runtime error' >&2; exit 2\n", "status 2: panic: runtime error"),
        ("#!/bin/sh\nexit 0\n", "was not extracted"),
        ("#!/bin/sh\nkill -9 $$\n", "status -9"),
        ("no program at all\n", "cannot be started"),
    ],
)
def test_a_pget_that_does_not_work_is_done_without(served, cache, tmp_path, monkeypatch, caplog, script, says):
    program(tmp_path, monkeypatch, script)
    accepted(cache)
    assert says in caplog.text


def test_addresses_in_what_pget_says_are_not_shown_whole(served, cache, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    said = 'Error: Get "https://user:hush@cdn.example/x.tar?sig=hush": dial tcp'
    program(tmp_path, monkeypatch, f"#!/bin/sh\necho '{said}' >&2; exit 1\n")
    accepted(cache)
    assert "https://cdn.example/x.tar" in caplog.text and "hush" not in caplog.text


def test_settings_of_pget_in_the_environment_do_not_count(served, cache, tmp_path, monkeypatch, pget_program):
    for name in (
        "PGET_EXTRACT",
        "PGET_FORCE",
        "PGET_OUTPUT",
        "PGET_PID_FILE",
        "PGET_CHUNK_SIZE",
        "PGET_LOG_LEVEL",
        "PGET_RESOLVE",
    ):
        monkeypatch.setenv(name, "1")
    seen = tmp_path / "seen"
    program(tmp_path, monkeypatch, f'#!/bin/sh\nenv >"{seen}"\nexec "{pget_program}" "$@"\n')
    accepted(cache)
    assert "PGET_" not in seen.read_text() and "PATH=" in seen.read_text()


def test_what_pget_writes_beside_its_destination_is_gone(served, cache, tmp_path, monkeypatch, pget_program):
    """Its guard against names that climb out is a comparison of prefixes."""
    script = f'#!/bin/sh\nfor last; do :; done\nmkdir "$last-evil"; touch "$last-evil/x"\nexec "{pget_program}" "$@"\n'
    program(tmp_path, monkeypatch, script)
    accepted(cache)
    assert sorted(path.name for path in cache.iterdir()) == [NAME, f"{NAME}.lock", f"{NAME}.verified"]


# Disks


def test_a_disk_that_is_too_small_is_said_before_the_download(served, fetcher, small_disk):
    text = refused(small_disk)
    assert re.search(r"needs 2\.6 MB and 2\.[01] MB are free; free 0\.\d MB", text)
    assert served.sent < 10 * 2**16


@pytest.mark.parametrize("lengths", [True, False])
def test_a_disk_that_fills_up(served, fetcher, small_disk, lengths, monkeypatch):
    """Another process took the space, or the server never said how much is needed."""
    if lengths:
        monkeypatch.setattr(download, "check_space", lambda *_: None)
    else:
        served.ranges = served.lengths = False
    text = refused(small_disk)
    assert text.startswith(f"{small_disk}: no space is left") and "free" in text
    assert shutil.disk_usage(small_disk).used < 10**5


def test_a_cache_that_cannot_be_made(served, no_pget, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*\); make it writable"):
        resolve.resolve("thinking", has_gpu=False, cache=tmp_path / "file" / "cache")


def test_other_disk_errors_are_one_sentence(served, no_pget, cache, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(resolve, "_sync", fail)
    assert "cannot be written (Input/output error); check the disk" in refused(cache)


@pytest.mark.parametrize("marked", [True, False])
def test_a_read_only_cache_that_is_complete_serves(served, no_pget, cache, read_only, marked):
    folder = resolve.resolve("thinking", has_gpu=False, cache=cache)
    if not marked:
        (cache / f"{NAME}.verified").unlink()
    asked = len(served.requests)
    read_only(cache)
    assert accepted(cache) == folder
    assert accepted(cache) == folder
    assert len(served.requests) == asked


@pytest.mark.parametrize("harm", ["nothing there", "damaged"])
def test_a_read_only_cache_that_is_not_complete(served, no_pget, cache, tree, read_only, harm):
    cache.mkdir()
    if harm == "damaged":
        flip(largest_blob(tree))
        shutil.copytree(tree, cache / NAME, symlinks=True)
    read_only(cache)
    says = "does not hold .* cannot be written .*; make it writable" if harm != "damaged" else "damaged.*read-only"
    with pytest.raises(CheckpointError, match=says):
        resolve.resolve("thinking", has_gpu=False, cache=cache)
    assert not served.requests
