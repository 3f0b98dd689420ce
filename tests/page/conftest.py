"""A browser for all tests here, a server that answers as a test says, and a page that must stay quiet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect

from . import browser as browsers
from .scripted import ScriptedServer

PATIENCE_MS = 120_000  # on a machine that does much else
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")  # its event loop runs in this thread as long as it lives: other tests start their own
def browser() -> Iterator[Browser]:
    if browsers.find() is None:
        pytest.skip("no browser is installed; `source scripts/browser.sh; kimi_vl_browser` fetches one")
    with browsers.launched() as running:
        yield running


@pytest.fixture(scope="module")
def module_server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


@pytest.fixture
def server(module_server: ScriptedServer) -> ScriptedServer:
    module_server.reset()
    return module_server


@dataclass
class Noise:
    """What a page did that nobody sees."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def listen(self, page: Page) -> None:
        page.on("request", self._asked)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._logged)

    def _asked(self, request: Request) -> None:
        if urlsplit(request.url).scheme not in ("data", "blob"):
            self.requests.append(request.url)

    def _logged(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def foreign(self) -> list[str]:
        return [url for url in self.requests if urlsplit(url).hostname != "127.0.0.1"]


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1000, "height": 800}, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    yield context
    context.close()


@pytest.fixture
def noise() -> Noise:
    return Noise()


@pytest.fixture
def page(context: BrowserContext, server: ScriptedServer, noise: Noise) -> Iterator[Page]:
    """The page as it is when it has met the server. Nothing may be asked of another host, and no error be logged,
    but for what the browser itself logs of a status that a test provokes."""
    page = context.new_page()
    noise.listen(page)
    page.goto(server.url)
    expect(page.locator("#model-name")).to_have_text("kimi-vl-demo")
    yield page
    assert noise.foreign() == []
    assert [text for text in noise.errors if not text.startswith("Failed to load resource")] == []


def png(size: tuple[int, int] = (64, 48), colour: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()
