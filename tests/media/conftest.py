"""What is true after every test here: no process, no descriptor and no file is left."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_vl.media.images import ImageOptions

DEMO = Path(__file__).parents[2] / "kimi_vl" / "demo"


def children() -> set[str]:
    """Processes of this one, ended ones that nobody waited for included."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def descriptors() -> set[str]:
    return {f"{fd.name} {os.readlink(fd)}" for fd in Path("/proc/self/fd").iterdir() if os.path.lexists(fd)}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = children(), len(descriptors()), set(os.listdir(tempfile.gettempdir()))
    yield
    gc.collect()
    assert children() <= before[0]
    assert len(descriptors()) <= before[1], descriptors()
    ours = {name for name in set(os.listdir(tempfile.gettempdir())) - before[2] if "media" in name or "film" in name}
    assert not ours


@pytest.fixture(scope="session")
def options() -> ImageOptions:
    return ImageOptions.from_directory(DEMO)
