"""The browser of the tests: one that is installed, or the one that scripts/browser.sh has fetched into .chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FETCHED = Path(__file__).resolve().parents[2] / ".chromium" / "root" / "usr"
INSTALLED = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find() -> tuple[str, dict[str, str]] | None:
    """The program, and what its environment needs beside this process's; None where there is no browser."""
    program = FETCHED / "lib" / "chromium" / "chromium-headless-shell"
    if program.exists():
        folders = [FETCHED / "lib", *FETCHED.glob("lib/*-linux-gnu*"), *FETCHED.glob("lib/*-linux-gnu*/pulseaudio")]
        return str(program), {"LD_LIBRARY_PATH": os.pathsep.join(map(str, folders))}
    for name in INSTALLED:
        if path := shutil.which(name):
            return path, {}
    return None


@contextmanager
def launched(environment: dict[str, str] | None = None) -> Iterator[Browser]:
    """A browser that reaches no other host than this machine. Raises RuntimeError where there is none."""
    found = find()
    if found is None:
        raise RuntimeError("no browser: scripts/browser.sh fetches one")
    program, needs = found
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=list(OPTIONS), env={**os.environ, **needs, **(environment or {})}
        )
        try:
            yield browser
        finally:
            browser.close()
