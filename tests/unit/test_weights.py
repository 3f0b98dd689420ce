"""From a name to a verified folder, against a real HTTP server on loopback that serves good and bad archives."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from kimi_vl import loader, weights
from kimi_vl.errors import CheckpointError

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
NAME = "models--moonshotai--Kimi-VL-A3B-Thinking"
REVISION = "0123456789abcdef"


def cache_tree(root: Path) -> Path:
    """The golden checkpoint as a Hugging Face cache tree: blobs named by their hashes, a snapshot of links."""
    tree = root / NAME
    snapshot = tree / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (tree / "blobs").mkdir()
    (tree / "refs").mkdir()
    (tree / "refs" / "main").write_text(REVISION)
    for path in CHECKPOINT.iterdir():
        content = path.read_bytes()
        large = path.suffix == ".safetensors"
        digest = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
        (tree / "blobs" / digest.hexdigest()).write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest.hexdigest())
    return tree


def archive(tree: Path, path: Path) -> None:
    """The published layout: the tree's own content, without a folder above it."""
    with tarfile.open(path, "w") as tar:
        for entry in sorted(tree.iterdir()):
            tar.add(entry, arcname=entry.name)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Path]:
    """A served folder; archives come from it, without pget."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("KIMI_VL_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.delenv("PGET", raising=False)
    monkeypatch.setattr(weights.shutil, "which", lambda _: None)
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(tmp_path: Path) -> Path:
    return weights.resolve("thinking", has_gpu=False, cache=tmp_path / "cache")


def test_an_archive_is_fetched_checked_and_loads(site, tmp_path, monkeypatch):
    archive(cache_tree(tmp_path), site / f"{NAME}.tar")
    folder = fetched(tmp_path)
    assert folder == tmp_path / "cache" / NAME / "snapshots" / REVISION
    assert loader.load(folder, dtype=torch.float32).device.type == "cpu"
    monkeypatch.setattr(weights, "_fetch", None)  # a second time needs neither the network nor a check
    monkeypatch.setattr(weights, "verify", None)
    assert fetched(tmp_path) == folder


def test_a_cache_without_its_mark_is_checked_again(site, tmp_path):
    tree = cache_tree(tmp_path)
    shutil.copytree(tree, tmp_path / "cache" / NAME, symlinks=True)
    assert fetched(tmp_path).is_dir()
    (tmp_path / "cache" / NAME / weights._MARKER).unlink()
    blob = max((tmp_path / "cache" / NAME / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=blob.name):
        fetched(tmp_path)


def _flip(tree: Path) -> None:
    blob = max((tree / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)


def _drop(tree: Path) -> None:
    (tree / "snapshots" / REVISION / "model.safetensors").unlink()


def _link_out(tree: Path) -> None:
    (tree / "snapshots" / REVISION / "extra.json").symlink_to("/etc/hostname")


@pytest.mark.parametrize("harm", [_flip, _drop, _link_out])
def test_a_harmed_archive_leaves_nothing(site, tmp_path, harm: Callable[[Path], None]):
    tree = cache_tree(tmp_path)
    harm(tree)
    archive(tree, site / f"{NAME}.tar")
    with pytest.raises(CheckpointError):
        fetched(tmp_path)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{NAME}.lock"]


@pytest.mark.parametrize("length", [0, 1000, 700_000])
def test_a_cut_off_archive_leaves_nothing(site, tmp_path, length):
    path = site / f"{NAME}.tar"
    archive(cache_tree(tmp_path), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError):
        fetched(tmp_path)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{NAME}.lock"]


def test_an_archive_that_climbs_out_is_refused(site, tmp_path):
    with tarfile.open(site / f"{NAME}.tar", "w") as tar:
        entry = tarfile.TarInfo("../../escaped")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(CheckpointError):
        fetched(tmp_path)
    assert not (tmp_path / "escaped").exists()


def test_what_a_killed_boot_left_is_cleared(site, tmp_path):
    archive(cache_tree(tmp_path), site / f"{NAME}.tar")
    (tmp_path / "cache" / f"{NAME}.part-99999").mkdir(parents=True)
    fetched(tmp_path)
    assert not list((tmp_path / "cache").glob("*.part-*"))


def test_a_missing_archive_is_named_without_credentials(site, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be fetched") as caught:
        fetched(tmp_path)
    assert f"{NAME}.tar" in str(caught.value)
    url = "http://127.0.0.1:9/secret-user/a.tar?token=hidden"
    with pytest.raises(CheckpointError) as caught:
        weights.resolve(url, has_gpu=False, cache=tmp_path / "cache")
    assert "hidden" not in str(caught.value)


def test_names(tmp_path):
    assert weights.resolve("auto", has_gpu=False) == weights.resolve("demo", has_gpu=False) == weights.DEMO
    assert weights.resolve(str(CHECKPOINT), has_gpu=False) == CHECKPOINT
    for bad in ("nonsense", "ftp://host/a.tar", "../x/y", ""):
        with pytest.raises(CheckpointError, match="neither"):
            weights.resolve(bad, has_gpu=False, cache=tmp_path)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        weights.resolve(str(tmp_path), has_gpu=False)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="model_type"):
        loader.load(weights.resolve(str(tmp_path), has_gpu=False))
