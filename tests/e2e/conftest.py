"""Cog's real HTTP server on the demo model, once for all tests here."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from cog_local.client import Client
from cog_local.server import ROOT, Server

DEMO_WEIGHTS = ROOT / "kimi_vl" / "demo" / "model.safetensors"
needs_trained_model = pytest.mark.skipif(not DEMO_WEIGHTS.is_file(), reason="no trained demo model")


# One thread: on matrices as small as the demo model's, more only wait for each other.
DEMO = {"KIMI_VL_MODEL": "demo", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server(environment={**os.environ, **DEMO}) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Client:
    return server.client


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def file_url(path: Path) -> str:
    return data_url(path.read_bytes())


def picture(colour: str = "red", size: tuple[int, int] = (112, 84)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


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
