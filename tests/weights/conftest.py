"""Fixtures of the tests of the weights: a server, both ways to fetch, starts that can be killed, and disks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kimi_vl.weights import download
from tests.boots import Boots
from tests.weights_world import ROOT, FaultServer

MOUNT = shutil.which("mount") or ""
REAL_PGET = os.environ.get("PGET") or shutil.which("pget")
SETTINGS = ("PGET", "KIMI_VL_MANIFEST", "KIMI_VL_VERIFY", "KIMI_VL_WEIGHTS_URL")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """A server for the name ``thinking``, and short pauses. What it serves is put into its folder."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(download, "LARGEST_CHUNK", 256_000)
    monkeypatch.setattr(download, "CONNECTIONS", 2)
    monkeypatch.setattr(download, "_WATCH_SECONDS", 0.02)
    folder = tmp_path / "site"
    folder.mkdir()
    with FaultServer(folder) as server:
        monkeypatch.setenv("KIMI_VL_WEIGHTS_URL", server.url)
        yield server


@pytest.fixture(scope="session")
def pget_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real pget where there is one, else the stand-in."""
    if REAL_PGET:
        return REAL_PGET
    program = tmp_path_factory.mktemp("bin") / "pget"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{ROOT / "tests" / "pget_stand_in.py"}" "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def no_pget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty_path").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty_path"))
    monkeypatch.delenv("PGET", raising=False)


@pytest.fixture(params=["python", "pget"])
def fetcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to fetch."""
    if request.param == "pget":
        monkeypatch.setenv("PGET", request.getfixturevalue("pget_program"))
    else:
        request.getfixturevalue("no_pget")
    return request.param


@pytest.fixture(scope="session")
def boots() -> Iterator[Boots]:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs pidfd_open, which only Linux has")
    running = Boots()
    yield running
    running.close()


def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """``folder`` as a mount point for the time of a test; skips where this user may not mount."""
    folder.mkdir(exist_ok=True)
    tried = subprocess.run([MOUNT or "mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this user may not mount: {tried.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([MOUNT.removesuffix("mount") + "umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, smaller than the checkpoint."""
    yield from mounted(tmp_path / "small_disk", "-t", "tmpfs", "-o", "size=2M", "tmpfs")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Makes a folder one that nobody can write to, root neither."""
    made: list[Iterator[Path]] = []

    def make(folder: Path) -> Path:
        mount = mounted(folder, "--bind", str(folder))
        made.append(mount)
        next(mount)
        subprocess.run([MOUNT, "-o", "remount,bind,ro", str(folder)], check=True, capture_output=True)
        return folder

    yield make
    for mount in made:
        next(mount, None)
