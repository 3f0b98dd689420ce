"""From a name to a verified folder: where models come from, what a second start costs, and what is kept apart."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kimi_vl import pipeline
from kimi_vl.errors import CheckpointError
from kimi_vl.weights import download, loader, resolve, verify
from tests.weights_world import (
    CHECKPOINT,
    NAME,
    REVISION,
    ROOT,
    FaultServer,
    cache_tree,
    flip,
    largest_blob,
    tar_of,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetched(cache: Path, model: str = "thinking") -> Path:
    return resolve.resolve(model, has_gpu=False, cache=cache)


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def serve(site: FaultServer, tmp_path: Path) -> Path:
    """Put a good archive on the server; the tree that it is of."""
    tree = cache_tree(tmp_path / "made")
    tar_of(tree, site.folder / f"{NAME}.tar")
    return tree


def test_an_archive_is_fetched_verified_and_loads(site, fetcher, tmp_path, cache):
    serve(site, tmp_path)
    folder = fetched(cache)
    assert folder == cache / NAME / "snapshots" / REVISION
    assert loader.load(folder, dtype=torch.float32).config
    assert leftovers(cache) == [NAME, f"{NAME}.verified"]


def test_a_second_start_needs_no_server_and_reads_no_content(site, fetcher, tmp_path, cache, monkeypatch):
    serve(site, tmp_path)
    folder = fetched(cache)
    asked = len(site.requests)
    monkeypatch.setattr(verify, "check", None)
    assert fetched(cache) == folder
    assert len(site.requests) == asked


def test_only_headers_travel_before_the_download_is_decided(site, no_pget, tmp_path, cache, monkeypatch):
    serve(site, tmp_path)
    monkeypatch.setattr(download, "_WINDOW", 2048)
    monkeypatch.setattr(download, "_extract_with_python", None)
    with pytest.raises(TypeError):
        fetched(cache)
    assert site.sent < (site.folder / f"{NAME}.tar").stat().st_size / 20


def test_an_address_is_a_name_of_its_own(site, no_pget, tmp_path, cache):
    tree = serve(site, tmp_path)
    for place in ("a", "b"):
        (site.folder / place).mkdir()
        tar_of(tree, site.folder / place / "model.tar")
    first, second = fetched(cache, f"{site.url}a/model.tar?token=one"), fetched(cache, f"{site.url}b/model.tar")
    assert first != second
    asked = len(site.requests)
    assert fetched(cache, f"{site.url}a/model.tar?token=two") == first
    assert len(site.requests) == asked


@pytest.mark.parametrize("name", ["..", ".", "", ".hidden", "a.part-1.tar", "a.lock", "a.verified.tar", "a b.tar"])
def test_an_address_whose_name_would_touch_other_entries_is_refused(site, cache, name):
    with pytest.raises(CheckpointError, match=r"must end in NAME\.tar"):
        fetched(cache, f"{site.url}x/{name}")
    assert not cache.exists() and not site.requests


def test_the_query_of_the_weights_address_goes_with_the_name(site, fetcher, tmp_path, cache, monkeypatch):
    serve(site, tmp_path)
    monkeypatch.setenv("KIMI_VL_WEIGHTS_URL", f"{site.url}?key=secret")
    fetched(cache)
    assert {path for path, _ in site.requests} == {f"/{NAME}.tar?key=secret"}


def test_the_weights_address_must_be_one(site, cache, monkeypatch):
    monkeypatch.setenv("KIMI_VL_WEIGHTS_URL", "file:///etc")
    with pytest.raises(CheckpointError, match="KIMI_VL_WEIGHTS_URL"):
        fetched(cache)


def test_a_login_in_the_address_is_used_and_never_shown(site, no_pget, tmp_path, cache, caplog):
    caplog.set_level(logging.DEBUG)
    serve(site, tmp_path)
    url = f"{site.url}{NAME}.tar".replace("http://", "http://someone:hush@")
    site.login = "Basic c29tZW9uZTpodXNo"
    fetched(cache, url)
    site.login = "Basic other"
    with pytest.raises(CheckpointError, match="401") as caught:
        fetched(cache / "second", url + "?token=hush")
    assert "hush" not in caplog.text + str(caught.value)


def test_a_person_can_follow(site, fetcher, tmp_path, cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("kimi_vl.weights.progress.INTERVAL_SECONDS", 0.1)
    serve(site, tmp_path)
    site.rate = 5e6
    fetched(cache, f"{site.url}{NAME}.tar?token=hush")
    text = caplog.text
    assert f"from {site.url}{NAME}.tar with {'pget' if fetcher == 'pget' else 'Python'}" in text
    assert " of 2.5 MB, " in text and " MB/s, " in text and " s left" in text
    assert "fetched 2.5 MB in " in text and "verified 2.5 MB in " in text and " GB/s)" in text
    assert "hush" not in text


# The marker


def test_a_cache_without_its_marker_is_verified_again(site, no_pget, tmp_path, cache, monkeypatch):
    shutil.copytree(cache_tree(tmp_path / "made"), cache / NAME, symlinks=True)
    fetched(cache)
    assert not site.requests and (cache / f"{NAME}.verified").exists()


@pytest.mark.parametrize("harm", ["flip", "grow", "swap", "add", "remove", "marker"])
def test_a_cache_that_changed_is_fetched_again(site, fetcher, tmp_path, cache, harm):
    serve(site, tmp_path)
    folder = fetched(cache)
    blob = largest_blob(cache / NAME)
    if harm == "flip":  # the only one that a marker cannot see
        flip(blob)
        (cache / f"{NAME}.verified").unlink()
    elif harm == "grow":
        with blob.open("ab") as file:
            file.write(b"x")
    elif harm == "swap":  # same size, same time
        status = blob.stat()
        shutil.copy(blob, blob.with_name("copy"))
        flip(blob.with_name("copy"))
        os.utime(blob.with_name("copy"), ns=(status.st_atime_ns, status.st_mtime_ns))
        blob.with_name("copy").replace(blob)
    elif harm == "add":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    elif harm == "remove":
        (folder / "tiktoken.model").unlink()
    else:
        (cache / f"{NAME}.verified").write_text("{")
    before = len(site.requests)
    fetched(cache)
    assert (len(site.requests) > before) == (harm != "marker")
    verify.check(folder)


def test_a_setting_hashes_at_every_start(site, no_pget, tmp_path, cache, monkeypatch):
    serve(site, tmp_path)
    fetched(cache)
    flip(largest_blob(cache / NAME))
    before = len(site.requests)
    fetched(cache)
    assert len(site.requests) == before, "the marker sees sizes and times, and these are the same"
    monkeypatch.setenv("KIMI_VL_VERIFY", "always")
    verify.check(fetched(cache))
    assert len(site.requests) > before
    monkeypatch.setenv("KIMI_VL_VERIFY", "yes")
    with pytest.raises(CheckpointError, match="KIMI_VL_VERIFY=yes"):
        fetched(cache)


def test_a_warm_start_reads_the_marker_alone(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number in range(60):
        with (tmp_path / "blobs" / f"{number:064x}").open("wb") as file:
            file.truncate(5 * 10**9)
        (folder / f"model-{number}.safetensors").symlink_to(Path("../../blobs") / f"{number:064x}")
    marker = tmp_path / "marker"
    verify.mark(marker, folder, None, verify._stamps(folder))
    opened: list[str] = []
    real = io.open

    def counting(path, *more, **named):
        opened.append(str(path))
        return real(path, *more, **named)

    for place in ("io.open", "builtins.open"):
        monkeypatch.setattr(place, counting)
    monkeypatch.setattr(os, "open", lambda *given: pytest.fail("opened"))
    assert verify.is_marked(marker, folder, None)
    assert opened == [str(marker)]


def test_what_a_killed_start_left_is_cleared(site, no_pget, tmp_path, cache):
    serve(site, tmp_path)
    left = cache / f"{NAME}.part-abc" / "tree" / "blobs"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    (cache / f"{NAME}.verified.part-abc").write_text("half")
    (cache / "another.part-abc").mkdir()
    fetched(cache)
    assert leftovers(cache) == sorted(["another.part-abc", NAME, f"{NAME}.verified"])


# Other names


def test_names(tmp_path):
    assert resolve.resolve("auto", has_gpu=False) == resolve.resolve("demo", has_gpu=False) == resolve.DEMO
    assert resolve.resolve(str(CHECKPOINT), has_gpu=False) == CHECKPOINT
    for bad in (
        "nonsense",
        "ftp://host/a.tar",
        "http://example.org/a.tar",
        "../x/y",
        "",
        "a/..",
        "a/b@../c",
        "http://[",
    ):
        with pytest.raises(CheckpointError, match=r"neither .* set KIMI_VL_MODEL"):
            resolve.resolve(bad, has_gpu=False, cache=tmp_path)


# Whether a model thinks

INSTRUCT = "moonshotai/Kimi-VL-A3B-Instruct"
INSTRUCT_TREE = "models--moonshotai--Kimi-VL-A3B-Instruct"


@pytest.mark.parametrize(
    ("model", "thinks"),
    [
        ("thinking", True),
        ("thinking-2506", True),
        ("instruct", False),
        (INSTRUCT, False),
        (f"{INSTRUCT}@{REVISION}", False),
        (INSTRUCT.lower(), False),
        ("moonshotai/Kimi-VL-A3B-Thinking", True),
        ("someone/instructor", True),
        ("someone/Kimi-VL-A3B-Instruct", True),
        ("https://host/instruct.tar", True),
        ("https://host/instruct/model.tar", True),
        ("demo", True),
    ],
)
def test_whether_what_was_asked_for_thinks(tmp_path, monkeypatch, model, thinks):
    monkeypatch.delenv("KIMI_VL_THINKING", raising=False)
    assert resolve.thinks(model, tmp_path) is thinks


@pytest.mark.parametrize(
    ("place", "thinks"),
    [
        ("instructor/model", True),
        ("instruct", True),
        ("Kimi-VL-A3B-Instruct", True),
        (INSTRUCT, True),
        (INSTRUCT_TREE, True),
        (f"{INSTRUCT_TREE}/snapshots", True),
        (f"{INSTRUCT_TREE}/snapshots/{REVISION}", False),
        (f"{INSTRUCT_TREE}-2/snapshots/{REVISION}", True),
        (f"models--someone--Kimi-VL-A3B-Instruct/snapshots/{REVISION}", True),
        (f"instruct/{NAME}/snapshots/{REVISION}", True),
    ],
)
def test_what_a_folder_is_called_says_nothing_but_in_a_tree_of_the_hub(tmp_path, monkeypatch, place, thinks):
    monkeypatch.delenv("KIMI_VL_THINKING", raising=False)
    (tmp_path / place).mkdir(parents=True)
    assert resolve.thinks(str(tmp_path / place), tmp_path / place) is thinks
    monkeypatch.chdir(tmp_path)
    assert resolve.thinks(place, Path(place)) is thinks
    (tmp_path / "current").symlink_to(tmp_path / place)
    assert resolve.thinks("current", Path("current")) is thinks


@pytest.mark.parametrize(
    ("origin", "thinks"),
    [(INSTRUCT, False), ("moonshotai/Kimi-VL-A3B-Thinking", True), ("/data/instruct", True), (None, True), (7, True)],
)
def test_what_a_configuration_says_of_its_origin(tmp_path, monkeypatch, origin, thinks):
    monkeypatch.delenv("KIMI_VL_THINKING", raising=False)
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": origin}))
    assert resolve.thinks(str(tmp_path), tmp_path) is thinks
    assert resolve.thinks("instruct", tmp_path) is False  # what was asked for and fetched comes first


def test_what_a_manifest_says_of_the_model(tmp_path, monkeypatch):
    monkeypatch.delenv("KIMI_VL_THINKING", raising=False)
    verify.write_manifest(CHECKPOINT, "instruct", tmp_path / "manifest.json")
    assert resolve.thinks(str(CHECKPOINT), CHECKPOINT) is True
    monkeypatch.setenv("KIMI_VL_MANIFEST", str(tmp_path / "manifest.json"))
    assert resolve.thinks(str(CHECKPOINT), CHECKPOINT) is False


def test_a_setting_says_whether_the_model_thinks(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_VL_THINKING", "off")
    assert resolve.thinks("thinking", tmp_path) is False
    monkeypatch.setenv("KIMI_VL_THINKING", "on")
    assert resolve.thinks("instruct", tmp_path) is True
    monkeypatch.setenv("KIMI_VL_THINKING", "yes")
    with pytest.raises(CheckpointError, match="KIMI_VL_THINKING=yes: must be 'on' or 'off'"):
        resolve.thinks("instruct", tmp_path)


def test_a_pipeline_asks_whether_its_model_thinks(tmp_path, monkeypatch):
    monkeypatch.delenv("KIMI_VL_THINKING", raising=False)
    place = tmp_path / "instructor" / "instruct"
    shutil.copytree(resolve.DEMO, place)
    for thinks, wanted in ((None, True), (False, False)):
        with contextlib.closing(pipeline.load(str(place), "cpu", thinks=thinks)) as loaded:
            assert loaded.thinks is wanted
    monkeypatch.setenv("KIMI_VL_THINKING", "off")
    with contextlib.closing(pipeline.load("demo", "cpu")) as loaded:
        assert loaded.thinks is False


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resolve.resolve(str(tmp_path), has_gpu=False)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="model_type"):
        resolve.resolve(str(tmp_path), has_gpu=False)


def test_a_plain_folder_has_no_hashes_and_leaves_nothing_in_the_cache(cache, caplog):
    caplog.set_level(logging.INFO)
    assert resolve.resolve(str(CHECKPOINT), has_gpu=False, cache=cache) == CHECKPOINT
    assert "no hash is known of any file" in caplog.text and not cache.exists()


@pytest.mark.parametrize("place", ["tree", "snapshot", "above"])
def test_a_local_tree_is_verified_once(tmp_path, cache, monkeypatch, place):
    tree = cache_tree(tmp_path / "made")
    snapshot = tree / "snapshots" / REVISION
    root = {"tree": tree, "snapshot": snapshot, "above": tree.parent}[place]
    assert resolve.resolve(str(root), has_gpu=False, cache=cache) == snapshot
    with monkeypatch.context() as patched:
        patched.setattr(verify, "check", None)
        assert resolve.resolve(str(root), has_gpu=False, cache=cache) == snapshot
    flip(largest_blob(tree))
    largest_blob(tree).touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged .* KIMI_VL_MODEL"):
        resolve.resolve(str(root), has_gpu=False, cache=cache)


def test_a_local_tree_needs_no_cache(tmp_path):
    tree = cache_tree(tmp_path / "made")
    (tmp_path / "file").write_text("")
    assert resolve.resolve(str(tree), has_gpu=False, cache=tmp_path / "file" / "cache").name == REVISION


def test_a_manifest_covers_a_plain_folder(tmp_path, cache, monkeypatch):
    folder = tmp_path / "plain"
    shutil.copytree(CHECKPOINT, folder)
    manifest = tmp_path / "manifest.json"
    verify.write_manifest(folder, "mine", manifest)
    monkeypatch.setenv("KIMI_VL_MANIFEST", str(manifest))
    assert resolve.resolve(str(folder), has_gpu=False, cache=cache) == folder
    flip(folder / "model.safetensors")
    (folder / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        resolve.resolve(str(folder), has_gpu=False, cache=cache)


def test_a_manifest_is_applied_to_what_is_fetched_and_outdates_a_marker(site, no_pget, tmp_path, cache, monkeypatch):
    serve(site, tmp_path)
    folder = fetched(cache)
    manifest = tmp_path / "manifest.json"
    verify.write_manifest(folder, "thinking", manifest)
    assert json.loads(manifest.read_text())["revision"] == REVISION
    monkeypatch.setattr(resolve, "MANIFESTS", tmp_path)
    manifest.rename(tmp_path / "thinking.json")
    assert fetched(cache) == folder
    data = json.loads((tmp_path / "thinking.json").read_text())
    data["files"]["config.json"]["sha256"] = "0" * 64
    (tmp_path / "thinking.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"config\.json: is damaged"):
        fetched(cache)
    assert leftovers(cache) == []


# The command


def test_the_command_fetches_and_writes_a_manifest(site, tmp_path, monkeypatch):
    tree = cache_tree(tmp_path / "made")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-P", "-m", "kimi_vl.cli", "fetch", "made", "--write-manifest", "out.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == Path("made") / NAME / "snapshots" / REVISION
    manifest = verify.Manifest.read(tmp_path / "out.json")
    assert manifest.revision == REVISION and set(manifest.files) == {path.name for path in CHECKPOINT.iterdir()}
    assert manifest.files["model.safetensors"][1] == largest_blob(tree).name
