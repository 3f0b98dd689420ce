"""Packing a checkpoint as a tar that verifies itself, and serving it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from kimi_vl.errors import CheckpointError
from kimi_vl.weights import download, loader, pack, resolve, verify
from tests.weights_world import CHECKPOINT, REVISION, ROOT, cache_tree, flip, largest_blob


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy: the demo checkpoint itself may be replaced while this runs."""
    return Path(shutil.copytree(resolve.DEMO, tmp_path / "demo"))


def test_the_demo_packed_and_served(site, fetcher, demo, tmp_path):
    packed = pack.pack(demo, site.folder / "demo.tar")
    folder = resolve.resolve(f"{site.url}demo.tar", has_gpu=False, cache=tmp_path / "cache")
    assert folder.name == packed.revision
    for name in ("config.json", "model.safetensors", "tiktoken.model", "README.md"):
        assert (folder / name).read_bytes() == (demo / name).read_bytes()
    loader.load(folder, dtype=torch.float32)


def test_the_same_files_give_the_same_tar(demo, tmp_path):
    first = pack.pack(demo, tmp_path / "a.tar")
    (tmp_path / "other").mkdir()
    other = Path(shutil.copytree(demo, tmp_path / "other" / "place"))
    for path in sorted(other.iterdir(), reverse=True):
        path.touch()
        path.chmod(0o600)
    second = pack.pack(other, tmp_path / "b.tar")
    assert first == second
    assert first.sha256 == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    assert first.size == (tmp_path / "b.tar").stat().st_size
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert pack.pack(other, tmp_path / "c.tar").revision != first.revision


def test_order_and_owners(demo, tmp_path):
    pack.pack(demo, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    kinds = [member.type for member in members]
    assert kinds == sorted(kinds, key=[tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE].index)
    files = [member for member in members if member.isreg()]
    assert files[0].name == "refs/main" and files[-1].size == max(member.size for member in files)
    assert {(member.uid, member.gid, member.mtime, member.uname, member.gname) for member in members} == {
        (0, 0, 0, "", "")
    }


@pytest.mark.parametrize("place", ["tree", "snapshot"])
def test_a_tree_keeps_its_names(tmp_path, place):
    tree = cache_tree(tmp_path / "made")
    packed = pack.pack(tree if place == "tree" else tree / "snapshots" / REVISION, tmp_path / "a.tar")
    assert packed.revision == REVISION
    with tarfile.open(tmp_path / "a.tar") as tar:
        blobs = {Path(name).name for name in tar.getnames() if name.startswith("blobs/")}
    assert blobs == {path.name for path in (tree / "blobs").iterdir()}


def test_equal_files_are_one_blob_and_code_is_left_out(demo, tmp_path):
    shutil.copy(demo / "config.json", demo / "copy.json")
    (demo / "modeling.py").write_text("raise SystemExit")
    (demo / "LICENSE").write_text("terms")
    packed = pack.pack(demo, tmp_path / "a.tar")
    assert packed.left_out == ["modeling.py"]
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = tar.getnames()
        targets = {Path(member.name).name: member.linkname for member in tar if member.issym()}
    assert targets["copy.json"] == targets["config.json"] and "LICENSE" in targets
    assert len(names) == len(set(names))


def test_what_cannot_be_served_is_not_packed(demo, tmp_path):
    out = tmp_path / "a.tar"
    tree = cache_tree(tmp_path / "made")
    flip(largest_blob(tree))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        pack.pack(tree, out)
    (demo / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="safetensors"):
        pack.pack(demo, out)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        pack.pack(tmp_path / "nowhere", out)
    assert not list(tmp_path.glob("a.tar*"))


def test_nothing_is_written_over(demo, tmp_path):
    out = tmp_path / "a.tar"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        pack.pack(demo, out)
    with pytest.raises(CheckpointError, match=r"does not end in \.tar"):
        pack.pack(demo, tmp_path / "a.zip")
    assert out.read_text() == "mine"


def test_files_that_change_meanwhile(demo, tmp_path, monkeypatch):
    real = pack._write

    def then_touch(*arguments) -> None:
        real(*arguments)
        (demo / "config.json").touch()

    monkeypatch.setattr(pack, "_write", then_touch)
    with pytest.raises(CheckpointError, match="changed while it was packed"):
        pack.pack(demo, tmp_path / "a.tar")
    assert not list(tmp_path.glob("a.tar*"))


@pytest.mark.parametrize("known", [True, False])
def test_a_disk_that_is_too_small(demo, small_disk, monkeypatch, known):
    if not known:
        monkeypatch.setattr(download, "check_space", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"a\.tar needs 7\.\d MB and 2\.\d MB" if known else "no space is left"):
        pack.pack(demo, small_disk / "a.tar")
    assert not list(small_disk.iterdir())


def test_the_command(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "kimi_vl.cli", "pack", str(CHECKPOINT), "out.tar"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = run()
    digest = hashlib.sha256((tmp_path / "out.tar").read_bytes()).hexdigest()
    assert re.match(rf"out\.tar: 2\.5 MB, revision [0-9a-f]{{40}}, sha256 {digest}\n", done.stdout)
    assert "KIMI_VL_MODEL=https://…/out.tar" in done.stdout
    again = run()
    assert again.returncode == 1 and again.stderr.startswith("error: out.tar: is there already; name another")
    assert verify.checkpoint_folder(CHECKPOINT) == CHECKPOINT
