"""The page and the real server, with the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from kimi_vl import __version__
from tests.e2e.scripted import make_thinker
from tests.serving.conftest import ServerThread, until

from .conftest import Noise
from .reading import ask, is_done, last_answer
from .test_media import FILM, PAPER

PICTURE = Path(__file__).resolve().parents[2] / "images" / "math_problem.png"
KEY = "a-key-of-the-tests"
# What stands in the settings after this; and places are asked for.
SET = """(values) => {
    for (const [id, value] of Object.entries(values)) document.getElementById(id).value = value;
    document.getElementById("places").click();
}"""


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerThread]:
    with ServerThread(api_keys=(KEY,)) as running:
        yield running


@pytest.fixture
def page(context: BrowserContext, demo: ServerThread, noise: Noise) -> Iterator[Page]:
    page = context.new_page()
    noise.listen(page)
    page.goto(demo.url)
    yield page
    assert noise.foreign() == []
    assert [text for text in noise.errors if not text.startswith("Failed to load resource")] == []


def enter_key(page: Page) -> None:
    expect(page.get_by_role("dialog", name="This server asks for an API key")).to_be_visible()
    page.get_by_label("API key").and_(page.locator(":focus")).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("kimi-vl-demo")


def test_a_picture_is_read_and_its_thinking_is_folded(page: Page, demo: ServerThread) -> None:
    enter_key(page)
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"Version {__version__}, context of 8,192 tokens")
    page.get_by_label("Temperature").fill("0")
    page.keyboard.press("Escape")
    page.locator("#files").set_input_files(PICTURE)
    expect(page.get_by_role("img", name="math_problem.png")).to_be_visible()
    ask(page, "What is the result?")
    is_done(page)
    expect(last_answer(page)).to_contain_text("25 + 13 = 38")
    expect(last_answer(page).locator(".thought")).to_be_hidden()
    last_answer(page).get_by_text("Thought for").click()
    expect(last_answer(page).locator(".thought")).to_contain_text("Ones: 5 + 3 = 8.")
    expect(last_answer(page).locator(".figures")).to_contain_text("image")
    ask(page, "Which number comes first?")
    is_done(page)
    expect(last_answer(page)).to_contain_text("25")
    expect(last_answer(page).locator(".figures")).to_contain_text("cached")
    page.get_by_role("button", name="Thinking").click()
    ask(page, "What is 12 + 30?")
    is_done(page)
    expect(last_answer(page).locator("details")).to_be_hidden()


def test_a_film_and_a_document_are_counted_read_and_not_read_again(page: Page, demo: ServerThread) -> None:
    enter_key(page)
    estimate = page.locator("#estimate")
    page.locator("#files").set_input_files(
        [
            {"name": "clip.webm", "mimeType": "", "buffer": FILM},
            {"name": "report.pdf", "mimeType": "", "buffer": PAPER},
            {"name": "a.png", "mimeType": "", "buffer": PICTURE.read_bytes()},
        ]
    )
    page.locator("#text").fill("What is the result?")
    values = {"fps": "2", "end": "1.5", "pages": "1", "max-tokens": "24", "temperature": "0"}
    with page.expect_response("**/tokenize"):  # one for all
        page.evaluate(SET, values)
    expect(estimate).to_contain_text("with this message")
    counted = estimate.inner_text().partition(" ")[0]
    page.locator("#text").press("Enter")
    is_done(page)
    expect(last_answer(page).locator(".figures")).to_contain_text(f"{counted} prompt")
    film, paper = last_answer(page).locator(".taken").all()
    expect(film).to_contain_text("clip.webm: 3 frames, 0:00 to 0:01 · ")
    expect(paper).to_contain_text("report.pdf: page 1 · ")
    expect(last_answer(page)).to_contain_text("The answer names no place in a picture.")
    costs = [
        int(re.sub(r".* · ([\d,]+) tokens.*", r"\1", each.inner_text().replace("\n", " ")).replace(",", ""))
        for each in (film, paper)
    ]
    ask(page, "And now?")
    is_done(page)
    figures = last_answer(page).locator(".figures").inner_text()
    cached = re.search(r"([\d,]+) cached", figures)
    assert cached and int(cached[1].replace(",", "")) >= sum(costs)


def test_an_answer_follows_a_schema(page: Page, demo: ServerThread) -> None:
    enter_key(page)
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,  # the demo model would go on with its own
    }
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("1")
    page.get_by_label("JSON schema of the answer").fill(json.dumps(schema))
    page.keyboard.press("Escape")
    ask(page, "Which colour?")
    is_done(page)
    answer = last_answer(page).get_by_role("group", name="JSON").inner_text()
    assert json.loads(answer)["colour"] in ("red", "green")
    expect(page.get_by_role("main").get_by_role("alert")).to_have_count(0)
    page.get_by_role("button", name="JSON schema").click()
    page.get_by_label("JSON schema of the answer").fill('{"not": {}}')
    page.keyboard.press("Escape")
    ask(page, "Which colour?")
    expect(page.get_by_role("main").get_by_role("alert")).to_contain_text("The server did not accept this.")


def test_stop_frees_the_server(context: BrowserContext, tmp_path: Path) -> None:
    with ServerThread(make_thinker(tmp_path)) as endless:
        page = context.new_page()
        page.goto(endless.url)
        ask(page, "Go on")
        expect(last_answer(page).locator(".thought")).to_have_text(re.compile(r"\S"))
        assert not endless.idle()
        page.get_by_role("button", name="Stop").click()
        expect(last_answer(page)).to_contain_text("Stopped.")
        until(endless.idle)
        page.close()
