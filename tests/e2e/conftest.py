"""Cog's real HTTP server on the demo model, once for all tests here."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from cog_local.client import Client
from cog_local.server import ROOT, Server

# One thread: on matrices as small as the demo model's, more only wait for each other.
DEMO = {"KIMI_VL_MODEL": "demo", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server(environment={**os.environ, **DEMO}) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Client:
    return server.client


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends its turn, with a long context: for what needs a request that goes on."""
    folder = tmp_path_factory.mktemp("endless")
    shutil.copytree(ROOT / "tests" / "golden" / "golden_a" / "checkpoint", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 131072
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    first_special = config["text_config"]["bos_token_id"]
    tensors["language_model.lm_head.weight"][first_special:] = 0  # never the best of a thousand random scores
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def endless_server(endless_model: Path) -> Iterator[Server]:
    with Server(environment={**os.environ, **DEMO, "KIMI_VL_MODEL": str(endless_model)}) as running:
        yield running


@pytest.fixture
def endless(endless_server: Server) -> Client:
    return endless_server.client


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def file_url(path: Path) -> str:
    return data_url(path.read_bytes())


def picture(colour: str = "red", size: tuple[int, int] = (112, 84)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def worker_of(server: Server) -> list[int]:
    """The processes below the server's, where /proc tells."""
    assert server.process is not None
    tasks = f"/proc/{server.process.pid}/task"
    try:
        return [int(child) for task in os.listdir(tasks) for child in open(f"{tasks}/{task}/children").read().split()]
    except OSError:
        return []


@pytest.fixture
def processes() -> Callable[[str], list[int]]:
    """The running processes that have a text in their environment."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")

    def find(mark: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    return find
