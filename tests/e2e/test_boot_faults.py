"""A start whose weights are at fault: Cog's health check carries our sentence, and the next start is none the worse."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from cog_local import schema
from cog_local.client import ServerGone
from cog_local.server import ROOT, Server
from kimi_vl.weights import pack, resolve
from tests.weights_world import FaultServer


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The repository with a cache of its own."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("predict.py", "kimi_vl", "cog.yaml"):
        (root / name).symlink_to(ROOT / name)
    return root


def settings(model: str) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("KIMI_VL_") and name != "PGET"}
    return keep | {"KIMI_VL_MODEL": model, "OMP_NUM_THREADS": "1"}


def health_after_setup(project: Path, model: str) -> dict[str, Any]:
    server = Server(project, environment=settings(model))
    schema.write(project)
    server._start()
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                health = server.client.health()
                if health["status"] not in ("STARTING", "UNKNOWN"):
                    return health
            except ServerGone:
                pass
            time.sleep(0.1)
        raise AssertionError("the set-up does not end")
    finally:
        server.stop(drain=False)


def test_a_damaged_archive_and_then_a_good_one(project, tmp_path):
    with FaultServer(tmp_path) as site:
        model = f"{site.url}demo.tar?token=hush"
        missing = health_after_setup(project, model)
        assert missing["status"] == "SETUP_FAILED"
        assert f"{site.url}demo.tar: the server has no such file (404); check the address" in missing["setup"]["logs"]

        pack.pack(resolve.DEMO, tmp_path / "demo.tar")
        content = (tmp_path / "demo.tar").read_bytes()
        (tmp_path / "demo.tar").write_bytes(content[:3_000_000] + bytes([content[3_000_000] ^ 1]) + content[3_000_001:])
        damaged = health_after_setup(project, model)
        assert damaged["status"] == "SETUP_FAILED"
        assert "model.safetensors: is damaged or was altered" in damaged["setup"]["logs"]
        assert "the archive cannot be used, make or upload it anew" in damaged["setup"]["logs"]
        assert "hush" not in f"{missing}{damaged}"
        assert all(path.suffix == ".lock" for path in (project / "model_cache").iterdir())

        (tmp_path / "demo.tar").write_bytes(content)
        lines: list[str] = []
        with Server(project, environment=settings(model), log=lines.append) as server:
            response = server.client.predict({"prompt": "Hello, who are you?", "temperature": 0})
        assert response["status"] == "succeeded", response
    log = "\n".join(lines)
    assert "fetched 7." in log and "verified 7." in log and "hush" not in log
