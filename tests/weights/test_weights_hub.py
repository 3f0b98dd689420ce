"""Models from the Hugging Face Hub, against a stub of its interface on loopback and its real client."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from kimi_vl.weights import loader
from tests.boots import Boots
from tests.weights_world import CHECKPOINT, REVISION, FaultServer, blob_name, flip, largest_blob

REPOSITORY = "someone/model"
TREE = "models--someone--model"


class Hub:
    """What the client asks for: a revision's commit, its listing, and the files behind a signed redirect."""

    def __init__(self, server: FaultServer):
        self.server = server
        self.files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
        self.files["modeling.py"] = b"raise SystemExit('remote code')"
        self.damaged = False
        server.override = self.answer
        server.headers_for = self.headers

    def answer(self, path: str) -> bytes | None:
        if re.fullmatch(f"/api/models/{REPOSITORY}/revision/(main|{REVISION})", path):
            return json.dumps({"id": REPOSITORY, "sha": REVISION, "siblings": []}).encode()
        if path == f"/api/models/{REPOSITORY}/tree/{REVISION}":
            return json.dumps([self.listing(name) for name in self.files]).encode()
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{REVISION}/")
        content = self.files.get(name)
        if content is not None and self.damaged and name == "model.safetensors":
            return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        return content

    def listing(self, name: str) -> dict[str, object]:
        size = len(self.files[name])
        entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": self.etag(name)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self.etag(name), "size": size, "pointerSize": 134}
        return entry

    def etag(self, name: str) -> str:
        return blob_name(CHECKPOINT / name) if (CHECKPOINT / name).exists() else "0" * 40

    def headers(self, path: str) -> dict[str, str]:
        name = path.rpartition("/")[2]
        if path.endswith("/revision/other"):
            return {"X-Error-Code": "RevisionNotFound"}
        if name not in self.files:
            return {"Content-Type": "application/json"}
        return {"X-Repo-Commit": REVISION, "ETag": f'"{self.etag(name)}"', "X-Linked-Size": str(len(self.files[name]))}


@pytest.fixture
def hub(site: FaultServer) -> Hub:
    return Hub(site)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def environment(site: FaultServer, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": site.url.rstrip("/"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_hush",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def started(boots: Boots, cache: Path, environment: dict[str, str], model: str = REPOSITORY) -> dict[str, str]:
    report = boots.start(model, cache, environment).wait()
    assert report is not None
    assert "hush" not in json.dumps(report)
    return report


def test_a_repository_is_fetched_verified_and_loads(boots, hub, cache, environment):
    report = started(boots, cache, environment)
    folder = cache / TREE / "snapshots" / REVISION
    assert report.get("folder") == str(folder), report
    loader.load(folder)
    assert not (folder / "modeling.py").exists()
    assert "fetched 2.5 MB in" in report["log"] and "verified 2.5 MB in" in report["log"]
    assert (cache / f"{TREE}.verified").exists()


def test_a_warm_cache_needs_no_network(boots, hub, cache, environment):
    folder = started(boots, cache, environment)["folder"]
    asked = len(hub.server.requests)
    assert started(boots, cache, environment)["folder"] == folder
    gone = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert started(boots, cache, gone)["folder"] == folder
    (cache / f"{TREE}.verified").unlink()
    report = started(boots, cache, gone)
    assert report["folder"] == folder and "verified 2.5 MB" in report["log"]
    assert len(hub.server.requests) == asked


def test_a_revision_has_its_own_marker(boots, hub, cache, environment):
    assert "folder" in started(boots, cache, environment, f"{REPOSITORY}@{REVISION}")
    assert (cache / f"{TREE}@{REVISION}.verified").exists() and not (cache / f"{TREE}.verified").exists()
    assert "no such revision" in started(boots, cache, environment, f"{REPOSITORY}@other").get("error", "")


def test_a_damaged_blob_is_fetched_again(boots, hub, cache, environment):
    folder = Path(started(boots, cache, environment)["folder"])
    flip(largest_blob(cache / TREE))
    (cache / f"{TREE}.verified").unlink()
    report = started(boots, cache, environment)
    assert "model.safetensors: is damaged" in report["log"] and "fetched 2.5 MB" in report["log"]
    loader.load(folder)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_cache_that_is_not_complete_is_completed(boots, hub, cache, environment):
    folder = Path(started(boots, cache, environment)["folder"])
    (folder / "model.safetensors").unlink()
    largest_blob(cache / TREE).unlink()
    (cache / TREE / "blobs" / "abc.incomplete").write_bytes(b"half")
    report = started(boots, cache, environment)
    loader.load(report["folder"])
    assert not list(cache.glob("*/blobs/*.incomplete"))
    assert "fetched 2.5 MB" in report["log"]


NO_LINKS = {"HF_HUB_DISABLE_SYMLINKS": "1"}


def fetched(report: dict[str, str]) -> list[str]:
    return [line for line in report["log"].splitlines() if line.startswith("fetched ")]


def downloads(hub: Hub) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in hub.server.delivered if "/resolve/" in path)


def test_a_cache_without_links_is_fetched_once(boots, hub, cache, environment):
    report = started(boots, cache, environment | NO_LINKS)
    folder = Path(report["folder"])
    assert not any(path.is_symlink() for path in folder.iterdir()) and len(fetched(report)) == 1
    loader.load(folder)
    assert len(downloads(hub)) == len(set(downloads(hub))) == 6
    before = len(hub.server.requests)
    for name in (".DS_Store", "Thumbs.db", "._config.json", ".nfs01"):
        (folder / name).write_text("x")
    assert started(boots, cache, environment | NO_LINKS)["folder"] == str(folder)
    (cache / f"{TREE}.verified").unlink()
    report = started(boots, cache, environment)
    assert report["folder"] == str(folder) and "no hash is known of any file" in report["log"]
    assert len(hub.server.requests) == before


def test_a_cache_without_links_is_completed_by_what_is_missing(boots, hub, cache, environment):
    folder = Path(started(boots, cache, environment | NO_LINKS)["folder"])
    (folder / "config.json").unlink()
    assert started(boots, cache, environment | NO_LINKS)["folder"] == str(folder)
    assert downloads(hub).count("config.json") == 2 and downloads(hub).count("model.safetensors") == 1


def test_a_cache_without_links_that_cannot_be_used_is_fetched_anew(boots, hub, cache, environment):
    folder = Path(started(boots, cache, environment | NO_LINKS)["folder"])
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2_000_000)
    report = started(boots, cache, environment | NO_LINKS)
    assert "is not a complete safetensors file" in report["log"]
    assert Path(report["folder"], "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_copied_cache_with_an_altered_file_is_repaired_without_a_download(boots, hub, cache, environment):
    folder = Path(started(boots, cache, environment)["folder"])
    (cache / f"{TREE}.verified").unlink()
    shutil.copytree(cache / TREE, cache / "copied")
    shutil.rmtree(cache / TREE)
    (cache / "copied").rename(cache / TREE)
    flip(folder / "model.safetensors")
    report = started(boots, cache, environment)
    assert "model.safetensors: is damaged" in report["log"]
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert downloads(hub).count("model.safetensors") == 1


def test_a_damaged_source_is_refused(boots, hub, cache, environment):
    hub.damaged = True
    report = started(boots, cache, environment)
    assert "model.safetensors: is damaged" in report["error"] and "the copy on the Hub" in report["error"]
    assert not (cache / f"{TREE}.verified").exists()
    hub.damaged = False
    loader.load(started(boots, cache, environment)["folder"])


def test_a_cache_that_is_not_complete_and_no_network(boots, hub, cache, environment):
    folder = Path(started(boots, cache, environment)["folder"])
    (folder / "model.safetensors").unlink()
    report = started(boots, cache, environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert re.fullmatch(
        r"someone/model: could not be fetched from the Hub \(.+\); check the network.*", report["error"]
    )


@pytest.mark.parametrize(
    ("status", "says"), [(404, "is not on the Hub or is private"), (401, "set HF_TOKEN"), (500, "could not be fetched")]
)
def test_a_repository_that_cannot_be_had(boots, hub, cache, environment, status, says):
    hub.server.statuses = [status] * 100
    report = started(boots, cache, environment)
    assert report.get("error", "").startswith(f"{REPOSITORY}: ") and says in report["error"]


def test_a_disk_that_is_too_small(boots, hub, small_disk, environment):
    report = started(boots, small_disk, environment)
    assert re.search(r"someone/model needs 2\.\d MB and 2\.[01] MB are free", report["error"])


def test_a_read_only_cache(boots, hub, cache, environment, read_only):
    folder = started(boots, cache, environment)["folder"]
    asked = len(hub.server.requests)
    (cache / f"{TREE}.verified").unlink()
    (cache / "empty").mkdir()
    shutil.copytree(cache / TREE, cache / "bad" / TREE, symlinks=True)
    flip(largest_blob(cache / "bad" / TREE))
    read_only(cache)
    assert started(boots, cache, environment)["folder"] == folder
    assert "cannot be written" in started(boots, cache / "empty", environment)["error"]
    assert "read-only" in started(boots, cache / "bad", environment)["error"]
    assert len(hub.server.requests) == asked
