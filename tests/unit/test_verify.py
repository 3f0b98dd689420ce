"""A folder to the byte: what a tree's names say, what a manifest says, and what a marker remembers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from kimi_vl.errors import CheckpointError
from kimi_vl.weights import progress, verify
from kimi_vl.weights.foreign import is_foreign
from kimi_vl.weights.http import redact, shown
from kimi_vl.weights.tar_contents import Contents, end_fault
from tests.weights_world import CHECKPOINT, NAME, REVISION, blob_name, cache_tree, flip, largest_blob


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return cache_tree(tmp_path / "made")


@pytest.fixture
def snapshot(tree: Path) -> Path:
    return tree / "snapshots" / REVISION


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    shutil.copytree(CHECKPOINT, tmp_path / "plain")
    return tmp_path / "plain"


def test_a_tree_carries_its_own_hashes(tree, snapshot):
    assert {len(path.name) for path in (tree / "blobs").iterdir()} == {40, 64}
    assert verify.check(snapshot, inside=tree).keys() == {path.name for path in CHECKPOINT.iterdir()}


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKPOINT.iterdir()))
def test_one_bit_of_any_file(snapshot, name):
    flip(snapshot / name)
    with pytest.raises(verify.DamagedError, match=f"{name}: is damaged") as caught:
        verify.check(snapshot)
    assert caught.value.files == [(snapshot / name).resolve()]


def test_all_damaged_files_are_listed(snapshot):
    for name in ("config.json", "model.safetensors", "tiktoken.model"):
        flip(snapshot / name)
    with pytest.raises(verify.DamagedError, match="2 more") as caught:
        verify.check(snapshot)
    assert len(caught.value.files) == 3


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_file_that_the_model_needs_is_missing(snapshot, name):
    (snapshot / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: is missing"):
        verify.check(snapshot)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/etc/hostname", "does not link to a blob of its own tree"),
        ("../../../other/blobs/" + "0" * 64, "links to nothing"),
        ("../../refs/main", "does not link to a blob"),
        ("config.json", "does not link to a blob"),
        ("../../blobs/name", "whose name is no hash"),
    ],
)
def test_a_link_that_is_not_to_a_blob(tree, snapshot, target, says):
    (tree / "blobs" / "name").write_text("x")
    (snapshot / "extra").symlink_to(target)
    with pytest.raises(CheckpointError, match=says):
        verify.check(snapshot)


def test_an_absolute_link_to_a_good_blob(tree, snapshot):
    blob = os.readlink(snapshot / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to((snapshot / blob).resolve())
    with pytest.raises(CheckpointError, match=r"config\.json: does not link"):
        verify.check(snapshot)


def test_what_lies_elsewhere_in_a_tree_from_elsewhere(tree, snapshot):
    (tree / "other").symlink_to("/etc")
    verify.check(snapshot)
    with pytest.raises(CheckpointError, match="other: links to a place outside"):
        verify.check(snapshot, inside=tree)
    (tree / "other").unlink()
    os.mkfifo(tree / "pipe")
    with pytest.raises(CheckpointError, match="pipe: is neither"):
        verify.check(snapshot, inside=tree)


def test_a_file_in_a_folder_of_the_snapshot(tree, snapshot):
    (snapshot / "figures").mkdir()
    (tree / "blobs" / "x").write_text("x")
    name = blob_name(tree / "blobs" / "x")
    (tree / "blobs" / "x").rename(tree / "blobs" / name)
    (snapshot / "figures" / "a.txt").symlink_to(f"../../../blobs/{name}")
    assert "figures/a.txt" in verify.check(snapshot)
    flip_small(tree / "blobs" / name)
    with pytest.raises(CheckpointError, match=r"figures/a\.txt: is damaged"):
        verify.check(snapshot)


def flip_small(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]))


# Files in place of links, and files that are no part of a checkpoint

FOREIGN = (
    ".DS_Store", "._config.json", "._model.safetensors", "Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini",
    ".nfs000000000012ab34", ".fuse_hidden0001", ".gitattributes", "__pycache__/modeling.cpython-311.pyc",
    ".cache/huggingface/download/config.json.metadata", "lost+found/#123", "@eaDir/config.json@SynoEAStream",
    "System Volume Information/x", ".ipynb_checkpoints/config.json", "figures/.DS_Store",
)  # fmt: skip


def leave_foreign_files(folder: Path) -> None:
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not ours")


def files_for_links(snapshot: Path, *, keep_blobs: bool) -> None:
    """As a copy of the tree has them, or as the client leaves them where it makes no links."""
    for path in list(snapshot.iterdir()):
        blob = path.resolve()
        path.unlink()
        shutil.copyfile(blob, path)
        if not keep_blobs:
            blob.unlink()


@pytest.mark.parametrize("form", ["links", "copies", "moved", "plain"])
def test_foreign_files_are_no_part_of_a_checkpoint(tree, snapshot, plain, tmp_path, form):
    folder = plain if form == "plain" else snapshot
    if form in ("copies", "moved"):
        files_for_links(snapshot, keep_blobs=form == "copies")
    clean = verify.check(folder)
    verify.write_manifest(folder, "mine", tmp_path / "manifest.json")
    manifest = verify.Manifest.read(tmp_path / "manifest.json")
    verify.mark(tmp_path / "x.verified", folder, None, clean)
    leave_foreign_files(folder)
    leave_foreign_files(tree / "blobs")
    leave_foreign_files(tree.parent)
    assert verify.check(folder, inside=tree if form != "plain" else None) == clean
    assert verify.check(folder, manifest) == clean
    assert verify.is_marked(tmp_path / "x.verified", folder, None)
    verify.write_manifest(folder, "mine", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "manifest.json").read_text()


def test_a_manifest_may_list_files_that_are_no_part(plain, tmp_path):
    verify.write_manifest(plain, "mine", tmp_path / "manifest.json")
    data = json.loads((tmp_path / "manifest.json").read_text())
    data["files"][".gitattributes"] = {"size": 3, "sha256": "0" * 64}
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    verify.check(plain, verify.Manifest.read(tmp_path / "manifest.json"))


@pytest.mark.parametrize("name", ["config.json", "DS_Store", "a.DS_Store.json", "nfs", "model.safetensors", "cache/x"])
def test_names_that_are_not_foreign(name):
    assert not is_foreign(name)


def test_files_in_place_of_links_are_compared_with_the_blobs(snapshot, caplog):
    caplog.set_level(logging.INFO)
    files_for_links(snapshot, keep_blobs=True)
    verify.check(snapshot)
    assert "no hash is known" not in caplog.text
    for path in snapshot.iterdir():
        flip(path)
        with pytest.raises(verify.DamagedError, match=f"{path.name}: is damaged") as caught:
            verify.check(snapshot)
        assert caught.value.files == [path]
        flip(path)


def test_files_whose_blobs_were_moved_are_checked_as_a_plain_folder_is(snapshot, caplog):
    caplog.set_level(logging.INFO)
    files_for_links(snapshot, keep_blobs=False)
    verify.check(snapshot)
    assert "no hash is known of any file, so only names, shapes and types are checked" in caplog.text
    content = (snapshot / "model.safetensors").read_bytes()
    (snapshot / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a complete safetensors file"):
        verify.check(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_and_files_in_one_snapshot(tree, snapshot, caplog, name):
    """The client was kept from making links half-way: what has a link is proven, the rest is not, and no blob of a
    link is taken for that of a file of its size."""
    caplog.set_level(logging.INFO)
    blob = (snapshot / name).resolve()
    (snapshot / name).unlink()
    blob.rename(snapshot / name)
    older = tree / "snapshots" / ("f" * 40)
    older.mkdir()
    other = tree / "blobs" / ("e" * 64)
    other.write_bytes(bytes((snapshot / name).stat().st_size))
    (older / name).symlink_to(f"../../blobs/{other.name}")
    verify.check(snapshot)
    assert "no hash is known of 1 of 6 files" in caplog.text
    flip(snapshot / "tiktoken.model")
    with pytest.raises(verify.DamagedError, match=r"tiktoken\.model: is damaged"):
        verify.check(snapshot)


def test_which_snapshot(tree, snapshot):
    shutil.copytree(snapshot, snapshot.with_name("f" * 40), symlinks=True)
    for root in (tree, tree.parent, snapshot):
        assert verify.checkpoint_folder(root) == snapshot
    (tree / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match="more than one"):
        verify.checkpoint_folder(tree)
    (tree / "refs" / "main").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="more than one"):
        verify.checkpoint_folder(tree)


# Manifests


@pytest.fixture
def manifest_path(plain: Path, tmp_path: Path) -> Path:
    verify.write_manifest(plain, "mine", tmp_path / "manifest.json")
    return tmp_path / "manifest.json"


def test_a_manifest_of_a_plain_folder(plain, manifest_path):
    data = json.loads(manifest_path.read_text())
    assert data["model"] == "mine" and data["revision"] == ""
    assert data["files"]["config.json"].keys() == {"size", "sha256"}
    verify.check(plain, verify.Manifest.read(manifest_path))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "tiktoken.model").unlink(), "tiktoken.model: is missing, but the manifest lists it"),
        (lambda folder: (folder / "extra.json").write_text("{}"), "extra.json: is not in the manifest"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json: has 2 bytes, but the manifest says"),
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: is damaged"),
    ],
)
def test_a_folder_that_is_not_its_manifest(plain, manifest_path, harm, says):
    manifest = verify.Manifest.read(manifest_path)
    harm(plain)
    with pytest.raises(CheckpointError, match=says):
        verify.check(plain, manifest)


def test_a_manifest_is_checked_beside_the_names_of_blobs(tree, snapshot, tmp_path):
    path = tmp_path / "manifest.json"
    verify.write_manifest(snapshot, "mine", path)
    manifest = verify.Manifest.read(path)
    assert manifest.revision == REVISION
    verify.check(snapshot, manifest)
    blob = snapshot / os.readlink(snapshot / "config.json")
    content = blob.read_bytes()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_bytes(content)
    verify.check(snapshot, manifest)  # a file of the snapshot itself is fine where a manifest has its hash
    snapshot.rename(snapshot.with_name("f" * 40))
    with pytest.raises(CheckpointError, match="another revision"):
        verify.check(snapshot.with_name("f" * 40), manifest)


def test_a_consistent_tree_of_something_else_is_not_its_manifest(tree, snapshot, tmp_path):
    """Whoever makes a tree can name its blobs; a manifest is what they cannot make."""
    verify.write_manifest(snapshot, "mine", tmp_path / "manifest.json")
    blob = snapshot / os.readlink(snapshot / "generation_config.json")
    blob.write_bytes(blob.read_bytes().replace(b" ", b"\t", 1))
    name = blob_name(blob)
    blob.rename(blob.with_name(name))
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to(f"../../blobs/{name}")
    verify.check(snapshot)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: is damaged or was altered"):
        verify.check(snapshot, verify.Manifest.read(tmp_path / "manifest.json"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"files": {}}', '{"files": {"a": 1}}', '{"files": {"a": {"size": 1, "sha256": "00"}}}', "\ud800"],
)
def test_what_is_no_manifest(tmp_path, content):
    (tmp_path / "m.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"m\.json: .*; write"):
        verify.Manifest.read(tmp_path / "m.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify.Manifest.read(tmp_path / "other.json")


# Markers


def test_a_marker_is_whole_or_not_there(snapshot, tmp_path, monkeypatch):
    marker = tmp_path / "x.verified"
    stamps = verify.check(snapshot)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            verify.mark(marker, snapshot, None, stamps)
    assert not list(tmp_path.glob("x.verified*"))
    verify.mark(marker, snapshot, None, stamps)
    assert verify.is_marked(marker, snapshot, None)
    data = json.loads(marker.read_text())
    for harm in ({"version": 0}, {"folder": "other"}, {"manifest": "x"}, {"files": {}}):
        marker.write_text(json.dumps(data | harm))
        assert not verify.is_marked(marker, snapshot, None)


def test_a_folder_that_changes_while_it_is_verified(snapshot, monkeypatch):
    real = verify._hash

    def then_touch(*arguments) -> None:
        real(*arguments)
        (snapshot / "config.json").touch()

    monkeypatch.setattr(verify, "_hash", then_touch)
    with pytest.raises(CheckpointError, match="changed while it was verified"):
        verify.check(snapshot)


def test_a_file_that_cannot_be_read(snapshot, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    expected = {"config.json": [("0" * 64,)]}
    stamps = verify._stamps(snapshot)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(Input/output error\)"):
        verify._hash(snapshot, stamps, expected)


# Lines and addresses


def test_lines_of_progress(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stage = progress.Progress("fetching", 33_000_000_000)
    for seconds, done in ((4.9, 1e9), (10, 4e9), (12, 5e9), (15, 6_150_000_000)):
        now[0] = 100 + seconds
        stage.reach(int(done))
    stage.finish("fetched")
    assert caplog.messages == [
        "fetching: 4.0 of 33.0 GB, 400 MB/s, 72 s left",
        "fetching: 6.2 of 33.0 GB, 430 MB/s, 65 s left",
        "fetched 6.2 GB in 15.0 s (0.41 GB/s)",
    ]
    caplog.clear()
    slow, unknown = progress.Progress("fetching", 5_000_000_000), progress.Progress("fetching", None)
    now[0] += 10
    slow.add(0)
    now[0] += 10
    slow.add(20_000_000)
    unknown.add(30_000_000)
    assert caplog.messages == [
        "fetching: 0.0 of 5.0 GB, 0.0 MB/s",
        "fetching: 0.0 of 5.0 GB, 2.0 MB/s, 83 min left",
        "fetching: 30.0 MB, 1.5 MB/s",
    ]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ('Get "https://a:b@h.org/x.tar?sig=c": timeout', 'Get "https://h.org/x.tar": timeout'),
        ("HTTP://h/x?y and https://h/z#t", "http://h/x and https://h/z"),
        ("https://[bad/x?y", "(an address that cannot be read)"),
        ("nothing here?a=b", "nothing here?a=b"),
    ],
)
def test_addresses_lose_what_gives_access(text, printed):
    assert redact(text) == printed


def test_shown_addresses():
    assert shown("https://u:p@host:8443/a/b.tar?x=1#y") == "https://host:8443/a/b.tar"


def test_what_an_archive_is_compared_with(tmp_path):
    import tarfile

    contents = Contents("a.tar")
    for name, kind, target in (("a/b", tarfile.REGTYPE, ""), ("a/c", tarfile.SYMTYPE, "b"), ("d", tarfile.DIRTYPE, "")):
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, target, 3 if kind == tarfile.REGTYPE else 0
        contents.add(member)
    assert "'a' of the archive was not extracted" in contents.difference(tmp_path / "x")
    (tmp_path / "x" / "a").mkdir(parents=True)
    (tmp_path / "x" / "d").mkdir()
    (tmp_path / "x" / "a" / "b").write_text("123")
    assert "'a/c' of the archive" in contents.difference(tmp_path / "x")
    (tmp_path / "x" / "a" / "c").symlink_to("b")
    assert contents.difference(tmp_path / "x") == ""
    (tmp_path / "x" / "a" / "b").write_text("12")
    assert "'a/b' was not extracted as" in contents.difference(tmp_path / "x")
    (tmp_path / "x" / "a" / "b").write_text("123")
    (tmp_path / "x" / "a" / ".nfs0001").touch()
    assert contents.difference(tmp_path / "x") == ""
    (tmp_path / "x" / "e").touch()
    assert "'e' was not extracted as" in contents.difference(tmp_path / "x")


def test_ends_of_archives():
    assert end_fault(bytes(1024)) == end_fault(bytes(10240)) == ""
    assert "no end mark" in end_fault(bytes(1023))
    assert "other data" in end_fault(bytes(1024) + b"x")
    assert "other data" in end_fault(bytes(2**20))


def test_names_of_this_test_are_those_of_the_published_tree(tree):
    assert tree.name == NAME and largest_blob(tree).name == blob_name(CHECKPOINT / "model.safetensors")
