"""Places that an answer names: asked for, drawn over the right picture, and listed."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from kimi_vl.text import prompts
from kimi_vl.text.grounding import grounding

from .conftest import png
from .reading import ask, is_done, last_answer
from .scripted import Answer, Details, ScriptedServer, Step, Thinking
from .test_access import CONTRAST
from .test_pictures import choose, file, waiting

SIZE = (400, 200)
BOXES = '[{"bbox_2d": [0.1, 0.2, 0.5, 0.8], "label": "dog"}, {"bbox_2d": [0.6, 0.5, 0.9, 1.0], "label": "cat"}]'
DRAG = "pyautogui.dragTo(from_coord=[0.25, 0.5], to_coord=[0.75, 0.5])"


def naming(answer: str, *sizes: tuple[int, int]) -> list[Step]:
    """An answer with the places that the server finds in it."""
    return [Answer(answer), Details({"grounding": grounding(answer, sizes or [SIZE]).to_dict()})]


def asked(page: Page, server: ScriptedServer, script: list[Step], *pictures: str) -> Locator:
    """Ask about pictures, and give the answer that the script makes."""
    choose(page, *(file(name, png(SIZE, name.partition(".")[0])) for name in pictures or ("red.png",)))
    expect(waiting(page)).to_have_count(len(pictures or ("red.png",)))
    server.scripts.append(script)
    ask(page, "Where?")
    is_done(page)
    return last_answer(page)


def fractions(shape: Locator, picture: Locator) -> list[float]:
    """Left, top, right and bottom of a shape in those of its picture."""
    inner, outer = shape.bounding_box(), picture.bounding_box()
    assert inner and outer
    left, top = (inner["x"] - outer["x"]) / outer["width"], (inner["y"] - outer["y"]) / outer["height"]
    return [left, top, left + inner["width"] / outer["width"], top + inner["height"] / outer["height"]]


@pytest.mark.parametrize("width", [1000, 390])
def test_boxes_stand_where_the_answer_says_at_any_width(page: Page, server: ScriptedServer, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    answer = asked(page, server, naming(BOXES))
    picture = answer.get_by_role("img", name="red.png")
    boxes = answer.locator("rect:not(.outline)")
    for number, wanted in enumerate(([0.1, 0.2, 0.5, 0.8], [0.6, 0.5, 0.9, 1.0])):
        assert fractions(boxes.nth(number), picture) == pytest.approx(wanted, abs=0.01)
    lines = answer.get_by_role("list", name="Places in red.png").get_by_role("button")
    expect(lines).to_have_text(["1 dog 40, 40 to 200, 160 px", "2 cat 240, 100 to 360, 200 px"])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_clicks_and_drags_are_points(page: Page, server: ScriptedServer) -> None:
    answer = asked(page, server, naming("pyautogui.doubleClick(x=0.25, y=0.5)"))
    left, top, right, bottom = fractions(answer.locator("circle:not(.outline)"), answer.get_by_role("img"))
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((0.25, 0.5), abs=0.01)
    expect(answer.locator(".places").get_by_role("button")).to_have_text("1 double click 100, 100 px")
    answer = asked(page, server, naming(DRAG, SIZE, SIZE), "blue.png")
    expect(answer.locator("circle:not(.outline)")).to_have_count(2)
    start, _, end, _ = fractions(answer.locator("line:not(.outline)"), answer.get_by_role("img"))
    assert (start, end) == pytest.approx((0.25, 0.75), abs=0.01)
    expect(answer.locator(".places").get_by_role("button")).to_contain_text("100, 100 to 300, 100 px")


def test_each_place_is_drawn_over_its_own_picture(page: Page, server: ScriptedServer) -> None:
    box = '"bbox_2d": [0.1, 0.2, 0.5, 0.8]'
    text = f'[{{{box}, "image": 2, "label": "b"}}, {{{box}, "image": 1, "label": "a"}}]'
    answer = asked(page, server, naming(text, SIZE, SIZE, SIZE), "red.png", "green.png", "blue.png")
    expect(answer.get_by_role("list", name="Places in red.png").get_by_role("button")).to_have_text(
        "2 a 40, 40 to 200, 160 px"
    )
    expect(answer.get_by_role("list", name="Places in green.png").get_by_role("button")).to_contain_text("1 b")
    expect(answer.get_by_role("list", name="Places in blue.png")).to_have_count(0)
    # The pictures of a request are those of the whole conversation.
    server.scripts.append(naming(text, SIZE, SIZE, SIZE))
    ask(page, "Again?")
    is_done(page)
    expect(last_answer(page).get_by_role("list", name="Places in green.png")).to_be_visible()


def test_a_place_stands_out_while_it_is_pointed_at_in_focus_or_chosen(page: Page, server: ScriptedServer) -> None:
    answer = asked(page, server, naming(BOXES))
    marked = answer.locator("rect.marked:not(.outline)")
    first, second = answer.locator(".places").get_by_role("button").all()
    second.hover()
    expect(marked).to_have_attribute("data-place", "2")
    page.mouse.move(0, 0)
    expect(marked).to_have_count(0)
    first.focus()
    expect(marked).to_have_attribute("data-place", "1")
    page.keyboard.press("Tab")
    expect(second).to_be_focused()
    expect(marked).to_have_attribute("data-place", "2")
    page.keyboard.press("Enter")
    expect(second).to_have_attribute("aria-pressed", "true")
    page.locator("#text").focus()
    expect(marked).to_have_attribute("data-place", "2")  # it was chosen
    answer.locator(".over .badge").first.hover()
    expect(marked).to_have_attribute("data-place", "1")
    expect(first).to_have_class("marked")
    second.click()
    page.mouse.move(0, 0)
    page.locator("#text").focus()
    expect(marked).to_have_count(0)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST)[0] >= 4.5


def test_places_are_asked_for_by_a_setting_where_there_is_a_picture(page: Page, server: ScriptedServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Draw the places that an answer names").check()
    page.keyboard.press("Escape")
    ask(page, "Hello")
    is_done(page)
    assert "kimi_vl" not in server.seen[-1].body
    answer = asked(page, server, naming("I see no dog."))
    assert server.seen[-1].body["kimi_vl"] == {"grounding": True}
    expect(answer).to_contain_text("The answer names no place in a picture.")


def test_ready_messages_are_those_of_the_package(page: Page, server: ScriptedServer) -> None:
    form = page.get_by_label("Ask for")
    expect(form).to_be_hidden()
    choose(page, file("red.png", png(SIZE)))
    form.select_option(label="Find objects")
    server.scripts.append(naming(BOXES))
    ask(page, "dog, red car")
    is_done(page)
    image = {"type": "image_url", "image_url": {"url": "data"}}

    def sent() -> list[dict[str, Any]]:
        messages = server.seen[-1].body["messages"]
        for part in messages[-1]["content"]:
            if part["type"] == "image_url":
                part["image_url"]["url"] = "data"
        return messages

    def ready(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        messages[-1]["content"][0] = image
        return messages

    assert server.seen[-1].body["kimi_vl"] == {"grounding": True}
    assert sent() == ready(prompts.detect(["dog", "red car"]))
    expect(page.get_by_role("article", name="You")).to_contain_text("Find objectsdog, red car")
    page.get_by_role("button", name="New chat").click()
    choose(page, file("red.png", png(SIZE)))
    expect(form).to_have_value("")
    form.select_option(label="Click on a screen")
    ask(page, "open $& settings")
    is_done(page)
    assert sent() == ready(prompts.click("open $& settings"))
    page.get_by_role("button", name="Edit and send again").click()
    expect(form).to_have_value("click")
    form.select_option(label="Ask freely")
    ask(page, "What is it?")
    is_done(page)
    assert "kimi_vl" not in server.seen[-1].body and len(server.seen[-1].body["messages"]) == 1


def test_names_of_places_are_no_markup_and_odd_places_are_left_out(page: Page, server: ScriptedServer) -> None:
    hostile = '<img src=x onerror=alert(1)><svg onload=alert(1)>[a](javascript:alert(1)) <a href="javascript:x">b</a>'
    good = grounding(BOXES, SIZE).to_dict()["findings"][0]
    odd: list[Any] = ["1", None, -0.5, 1.5, '0" onclick="alert(1)', [0.1], {}]
    findings = [{**good, "label": hostile}]
    findings += [{**good, "relative_box": [value, 0.2, 0.5, 0.8]} for value in odd]
    findings += [{**good, "relative_box": None, "relative_points": [[value, 0.5]]} for value in odd]
    findings += [
        {**good, "relative_box": [0.1, 0.2]},
        {**good, "relative_box": "0000"},
        {**good, "image": 7},
        {**good, "image": "0"},
        {},
    ]
    answer = asked(page, server, [Answer(hostile), Details({"grounding": {"unit": "relative", "findings": findings}})])
    lines = answer.locator(".places").get_by_role("button")
    expect(lines).to_have_count(1)
    expect(lines).to_contain_text(hostile)
    assert page.locator("main :is(a, script, iframe, foreignObject, [onload], [onclick], [onerror])").count() == 0
    assert page.locator("main img:not([src^='blob:'])").count() == 0
    assert answer.locator("svg svg").count() == 0


def test_a_picture_that_no_browser_shows_has_its_list_alone(page: Page, server: ScriptedServer) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, "red").save(buffer, "TIFF")
    choose(page, file("scan.tif", buffer.getvalue(), "image/tiff"))
    expect(waiting(page)).to_have_count(1)
    server.scripts.append(naming(BOXES))
    ask(page, "Where?")
    is_done(page)
    expect(last_answer(page)).to_contain_text("This browser does not show scan.tif.")
    expect(last_answer(page).locator(".places").get_by_role("button")).to_have_count(2)
    expect(last_answer(page).locator("rect")).to_have_count(0)


def test_why_the_thinking_ended_is_told(page: Page, server: ScriptedServer) -> None:
    server.scripts.append([Thinking("hm"), Answer("x"), Details({"thinking_closed_by": "budget"})])
    ask(page, "?")
    is_done(page)
    expect(last_answer(page)).to_contain_text("up to its budget")
