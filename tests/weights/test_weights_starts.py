"""Starts as processes: two at once, and killed at any moment."""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from kimi_vl.errors import CheckpointError
from kimi_vl.weights import loader, verify
from tests.boots import Boot, Boots
from tests.weights_world import NAME, REVISION, FaultServer, cache_tree, tar_of

QUICK = {"PAUSE_SECONDS": 0.01, "LARGEST_CHUNK": 256_000, "CONNECTIONS": 2, "_WATCH_SECONDS": 0.02}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def served(site: FaultServer, tmp_path: Path) -> FaultServer:
    tar_of(cache_tree(tmp_path / "made"), site.folder / f"{NAME}.tar")
    return site


@pytest.fixture
def environment(served: FaultServer, fetcher: str) -> dict[str, str]:
    return {"KIMI_VL_WEIGHTS_URL": served.url, "PATH": os.environ["PATH"], "PGET": os.environ.get("PGET", "")}


def start(boots: Boots, cache: Path, environment: dict[str, str]) -> Boot:
    return boots.start("thinking", cache, environment, **QUICK)


def finished(boot: Boot) -> dict[str, str]:
    report = boot.wait()
    assert report is not None and "folder" in report, report
    return report


def waiting_for(lock: Path) -> bool:
    """Whether somebody waits for a lock on a file."""
    return any(
        f":{lock.stat().st_ino} " in line for line in Path("/proc/locks").read_text().splitlines() if "->" in line
    )


def probes(served: FaultServer) -> int:
    return len([span for _, span in served.requests if span == "bytes=0-0"])


def test_two_starts_at_once_fetch_once(boots, served, cache, environment):
    served.limit = 200_000
    first = start(boots, cache, environment)
    while served.sent < served.limit:
        time.sleep(0.01)
    second = start(boots, cache, environment)
    while not waiting_for(cache / f"{NAME}.lock"):
        assert first.running() and second.running() and probes(served) == 1
        time.sleep(0.01)
    served.limit = math.inf
    reports = [finished(first), finished(second)]
    assert reports[0]["folder"] == reports[1]["folder"] == str(cache / NAME / "snapshots" / REVISION)
    assert "another start is at work" in reports[1]["log"]
    assert served.sent < 1.5 * (served.folder / f"{NAME}.tar").stat().st_size
    assert probes(served) == 1


def test_a_start_takes_over_from_one_that_is_killed_while_it_waits(boots, served, cache, environment):
    served.stall = 150_000
    served.stage, served.times = "data", 1
    first = start(boots, cache, environment)
    while served.times > 0:
        time.sleep(0.01)
    second = start(boots, cache, environment)
    time.sleep(0.1)
    assert second.running()
    first.kill()
    finished(second)
    assert sorted(path.name for path in cache.iterdir()) == [NAME, f"{NAME}.lock", f"{NAME}.verified"]


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.nightly)])
def test_killed_at_any_moment(boots, served, cache, environment, fetcher, kills):
    """After each kill nothing incomplete has the final name, and the next start begins with what the last one left.

    Moments are counted in bytes that the server sent, not in seconds: it sends no more until the start is killed. Every
    fourth lies after the last of them.
    """
    finished(start(boots, cache, environment))
    whole = served.sent
    forget(cache)
    dice = random.Random(20260103 + (fetcher == "pget"))
    stages = {"nothing": 0, "part": 0, "in place": 0, "marked": 0}
    for kill in range(kills):
        after = kill % 4 == 3
        until = served.sent + (whole if after else dice.uniform(0, whole))
        pause = dice.uniform(0, 0.5) if after else 0
        served.limit = math.inf if after else until
        boot = start(boots, cache, environment)
        while boot.running() and served.sent < until:
            time.sleep(0.001)
        time.sleep(pause)
        if boot.running():
            boot.kill()
        boot.wait()
        assert_no_survivors(cache)
        stages[stage_of(cache)] += 1
        if (cache / NAME).exists():
            verify.check(verify.checkpoint_folder(cache / NAME), inside=cache / NAME)
            forget(cache)
    print(f"killed {kills} times ({fetcher}): {stages}")
    assert stages["part"] >= kills / 4, "most moments are in the middle of the download"
    served.limit = math.inf
    report = finished(start(boots, cache, environment))
    loader.load(report["folder"], dtype=torch.float32)
    assert sorted(path.name for path in cache.iterdir()) == [NAME, f"{NAME}.lock", f"{NAME}.verified"]


def forget(cache: Path) -> None:
    """Else all starts that follow would find the work done."""
    shutil.rmtree(cache / NAME)
    (cache / f"{NAME}.verified").unlink(missing_ok=True)


def test_a_download_ends_with_the_start_that_it_is_for(boots, served, cache, environment):
    """On a server that stalls, pget would never end by itself."""
    served.stage, served.stall = "data", 150_000
    boot = start(boots, cache, environment)
    while served.sent < 200_000:
        time.sleep(0.005)
    assert working_in(cache) or not environment["PGET"]
    boot.kill()
    assert_no_survivors(cache)


def test_killed_right_after_it_is_in_place(boots, served, cache, environment):
    """Between the rename and the marker there are only milliseconds: aimed at, not left to chance."""
    for _ in range(5):
        boot = start(boots, cache, environment)
        while boot.running() and not (cache / NAME).exists():
            time.sleep(0.0005)
        if boot.running():
            boot.kill()
        boot.wait()
        verify.check(verify.checkpoint_folder(cache / NAME), inside=cache / NAME)
        asked = len(served.requests)
        finished(start(boots, cache, environment))
        assert len(served.requests) == asked, "what is in place is complete and not fetched again"
        forget(cache)


def stage_of(cache: Path) -> str:
    if (cache / f"{NAME}.verified").exists():
        return "marked"
    if (cache / NAME).exists():
        return "in place"
    return "part" if cache.exists() and list(cache.glob("*.part-*")) else "nothing"


def assert_no_survivors(cache: Path) -> None:
    """pget dies with the start that it works for: nobody else would end it."""
    deadline = time.monotonic() + 300
    while working_in(cache) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not working_in(cache)


def working_in(cache: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(cache) + b"/" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_killed_while_the_old_copy_is_removed(boots, served, cache, environment):
    """A folder that is half removed is no checkpoint, marked or not."""
    finished(start(boots, cache, environment))
    shutil.rmtree(cache / NAME / "blobs")
    (cache / f"{NAME}.verified").unlink()
    with pytest.raises(CheckpointError):
        verify.check(verify.checkpoint_folder(cache / NAME), inside=cache / NAME)
    loader.load(finished(start(boots, cache, environment))["folder"])
