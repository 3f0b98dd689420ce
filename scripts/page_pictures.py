"""Takes the pictures of the chat page in docs/images, with the demo model: python scripts/page_pictures.py

The places in one of them are the true ones of its picture, in an answer that is written here. A browser is needed, as
for tests/page. In a font that Debian packages, where it can be fetched, so that pictures taken on machines with few
fonts look alike.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from kimi_vl.text.grounding import grounding  # noqa: E402
from tests.page import browser  # noqa: E402
from tests.page.reading import ask, is_done, last_answer  # noqa: E402
from tests.page.scripted import Answer, Details, ScriptedServer, Thinking  # noqa: E402
from tests.serving.conftest import ServerProcess  # noqa: E402

IMAGES = ROOT / "docs" / "images"
FONT = "fonts-inter"
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd"><fontconfig>
<dir>{folder}</dir><dir>/usr/share/fonts</dir><cachedir>{folder}/cache</cachedir>
<match target="pattern"><test name="family"><string>system-ui</string></test>
<edit name="family" mode="assign" binding="strong"><string>Inter</string></edit></match></fontconfig>"""


def fonts(folder: Path) -> dict[str, str]:
    """The environment in which a browser finds the font, or an empty one."""
    if shutil.which("apt-get") is None:
        return {}
    fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", FONT]
    subprocess.run(fetch, cwd=folder, check=False, stdout=subprocess.DEVNULL)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
        (folder / "fonts.conf").write_text(FONTS.format(folder=folder))
        return {"FONTCONFIG_FILE": str(folder / "fonts.conf")}
    return {}


def conversation(page: Page) -> None:
    page.locator("#temperature").evaluate("(field) => { field.value = 0; }")
    page.locator("#files").set_input_files(ROOT / "images" / "demo1.jpeg")
    page.get_by_role("button", name="Remove demo1.jpeg").wait_for()
    ask(page, "Describe this image in detail.")
    is_done(page)
    ask(page, "What colour is the star?")
    is_done(page)


Scheme = Literal["light", "dark"]


def take(
    running: Browser, url: str, name: str, size: tuple[int, int], scheme: Scheme, prepare: Callable[[Page], None]
) -> None:
    """Write a picture of the page as it is after ``prepare``, in a window of ``size`` (width, height)."""
    viewport: ViewportSize = {"width": size[0], "height": size[1]}
    page = running.new_page(viewport=viewport, device_scale_factor=2, color_scheme=scheme, reduced_motion="reduce")
    page.goto(url)
    page.wait_for_function("document.getElementById('model-name').textContent")
    prepare(page)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    small = picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(IMAGES / f"{name}.png", optimize=True)
    page.close()


def dark(page: Page) -> None:
    conversation(page)
    last_answer(page).get_by_text("Thought for").click()
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")


PLACES = """```json
[
  {"bbox_2d": [0.07, 0.13, 0.31, 0.46], "label": "red circle"},
  {"bbox_2d": [0.67, 0.16, 0.93, 0.5], "label": "blue star"},
  {"bbox_2d": [0.39, 0.5, 0.62, 0.8], "label": "green triangle"}
]
```"""


def places(page: Page) -> None:
    page.locator("#files").set_input_files(ROOT / "images" / "demo1.jpeg")
    page.get_by_label("Ask for").select_option("detect")
    ask(page, "shape")
    is_done(page)
    last_answer(page).locator(".places").get_by_role("button").nth(1).click()
    last_answer(page).locator(".figures").evaluate("(node) => node.remove()")  # nothing was computed


def main() -> None:
    with Image.open(ROOT / "images" / "demo1.jpeg") as picture:
        found = grounding(PLACES, picture.size).to_dict()
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess() as server,
        ScriptedServer() as scripted,
        browser.launched(fonts(Path(folder))) as running,
    ):
        scripted.scripts.append([Thinking("Three shapes."), Answer(PLACES), Details({"grounding": found})])
        take(running, scripted.url, "page_places", (900, 840), "light", places)
        take(running, server.url, "page_light", (900, 840), "light", conversation)
        take(running, server.url, "page_dark", (900, 840), "dark", dark)
        take(running, server.url, "page_phone", (390, 780), "light", conversation)


if __name__ == "__main__":
    main()
