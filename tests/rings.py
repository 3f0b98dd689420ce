"""Which tests run: the fast ring, the default ring, or all of them, or those of MindSpore (``--ring``).

``slow`` marks what starts a process or a server, mounts, compiles, or computes for long, as everything in some folders
does. The fast ring goes without it, and holds the other tests to it. ``nightly`` marks what only the ring of all tests
runs. A test that draws examples takes more of them, other ones in every run, where ``KIMI_VL_FUZZ`` is a number.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

LEFT_OUT = {"fast": ("slow", "nightly"), "default": ("nightly",), "all": (), "mindspore": ()}
SLOW_FOLDERS = {"bench", "e2e", "media", "page", "serving", "weights"}
FIRST = ("bench", "e2e", "weights", "page", "serving", "media", "parity")
"""Folders whose files take longest. Processes of pytest-xdist take a file each as they are free, in this order: with
the quick ones last all end at about the same time."""
MINDSPORE_FOLDER = "on_mindspore"  # for an environment of its own: collected in its ring alone
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "socket.bind")

NIGHTLY = pytest.StashKey[dict[str, int]]()  # how many nightly cases were left out of each test function

_guarded = ""  # the test of the fast ring that runs now


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    if _guarded and event in STARTS:
        raise RuntimeError(f"{event} in a test of the fast ring: mark {_guarded} with pytest.mark.slow")


sys.addaudithook(_guard)

# What is drawn differs from run to run only where that was asked for, and no example fails for taking long.
settings.register_profile(
    "rings", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="KIMI_VL_FUZZ" not in os.environ
)
settings.load_profile("rings")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ring", choices=LEFT_OUT, default="default", help="which tests run (default: default)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast ring does not even import what is in the slow folders, and only one ring what needs MindSpore."""
    ring, parts = config.getoption("--ring"), collection_path.relative_to(config.rootpath).parts
    ignored = (ring == "fast" and SLOW_FOLDERS & {*parts}) or (ring != "mindspore" and MINDSPORE_FOLDER in parts)
    return True if ignored else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays to the end: the garbage collector need not look at it, now or ever again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = LEFT_OUT[str(config.getoption("--ring"))]
    chosen, others = [], []
    for item in items:
        if SLOW_FOLDERS & {*item.path.relative_to(config.rootpath).parts}:
            item.add_marker(pytest.mark.slow)
        (others if any(item.get_closest_marker(name) for name in left_out) else chosen).append(item)
    items[:] = sorted(chosen, key=lambda item: _rank(item.path.relative_to(config.rootpath)))
    config.hook.pytest_deselected(items=others)
    nightly = Counter(item.nodeid.partition("[")[0] for item in others if item.get_closest_marker("nightly"))
    config.stash[NIGHTLY] = dict(nightly)
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist
        config.workeroutput["nightly"] = dict(nightly)  # pyright: ignore[reportAttributeAccessIssue]


def pytest_collection_finish(session: pytest.Session) -> None:
    """The first use on a machine compiles the native kernels, which no test of the fast ring may."""
    if session.items and not _guarded and session.config.getoption("--ring") == "fast":
        from kimi_vl.kernels.cpu import build

        with contextlib.suppress(build.Unavailable):
            build.library()


def _rank(path: Path) -> int:
    return next((rank for rank, folder in enumerate(FIRST) if folder in path.parts), len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every process of pytest-xdist has collected the same tests; the one that prints has collected none."""
    node.config.stash[NIGHTLY] = getattr(node, "workeroutput", {}).get("nightly", {})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    global _guarded
    _guarded = item.nodeid if item.config.getoption("--ring") == "fast" else ""
    try:
        return (yield)
    finally:
        _guarded = ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    nightly = config.stash.get(NIGHTLY, {})
    if config.getoption("--ring") != "default" or not nightly:
        return
    terminalreporter.section("only with scripts/test --all")
    for name, count in sorted(nightly.items()):
        terminalreporter.line(f"{name} ({count})" if count > 1 else name)
