"""The page by keyboard alone, by ear, in the dark, with little contrast to spare, and on a phone."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from kimi_vl.text.grounding import grounding

from .conftest import png
from .reading import ask, is_done, last_answer
from .scripted import Answer, Details, Refusal, ScriptedServer, Thinking
from .test_media import FILM, MEDIA, PAPER
from .test_pictures import choose, file, waiting

WIDE = f"""# {"Long" * 40}

| {" | ".join(["a column of a table"] * 8)} |
|{"-|" * 8}
| {" | ".join(["cell"] * 8)} |

```
{"code " * 60}
```

{"unbroken" * 60} `{"code" * 60}`

- {"item" * 60}
  1. {"inner" * 60}
"""
CONTROLS = ":is(button, input, textarea, select, summary, a, [tabindex='0'])"


def full(page: Page, server: ScriptedServer) -> None:
    """A conversation with everything in it that a page can show at a time."""
    film, paper = file(f"{'long' * 30}.webm", FILM, "video/webm"), file("report.pdf", PAPER, "application/pdf")
    choose(page, file("a.png", png((900, 600))), file("b.png", png()), film, paper)
    expect(waiting(page)).to_have_count(4)
    named = f'[{{"bbox": [0, 0, 1, 1], "label": "{"name" * 60}"}}, {{"point": [0.99, 0.99]}}]'
    details = Details({"media": MEDIA, "grounding": grounding(named, (900, 600)).to_dict()})
    server.scripts += [[Thinking("hm " * 50), Answer(WIDE), details], Refusal(429, "overloaded", "busy.")]
    ask(page, "word" * 90)
    is_done(page)
    ask(page, "again")
    expect(page.get_by_role("main").get_by_role("alert")).to_be_visible()
    for each in page.locator(".taken summary").all():
        each.click()
    choose(page, file("c.png", png((4000, 100))), film, file("none.png", b"none"))
    expect(page.locator("#notice")).to_be_visible()


def test_every_control_has_a_name(page: Page, server: ScriptedServer) -> None:
    full(page, server)
    for place in ("header", "main", "footer"):
        for control in page.locator(f"{place} {CONTROLS}:visible").all():
            expect(control).to_have_accessible_name(re.compile(r"\w"))
    page.get_by_role("button", name="Settings").click()
    fields = page.locator(f"dialog[open] {CONTROLS}").all()
    assert len(fields) > 9
    for control in fields:
        expect(control).to_have_accessible_name(re.compile(r"\w"))


def test_the_page_has_an_outline_that_can_be_heard(page: Page, server: ScriptedServer) -> None:
    server.scripts.append([Thinking("hm"), Answer("## Two\n\n- **a**")])
    ask(page, "One?")
    is_done(page)
    expect(page.locator("body")).to_match_aria_snapshot("""
        - banner:
            - heading "Kimi-VL" [level=1]
            - button "New chat"
            - button /Colours/
            - button "Settings"
        - main:
            - list "Conversation":
                - listitem:
                    - article "You":
                        - paragraph: One?
                        - button "Edit and send again"
                    - article "Answer":
                        - group: /Thought for .* s/
                        - heading "Two" [level=4]
                        - list:
                            - listitem:
                                - strong: a
                        - button "Copy the answer"
                        - button "Answer again"
                        - button "Copy this request for curl"
                        - button "Copy this request for Python"
                        - paragraph: /tokens/
        - contentinfo:
            - form "Message":
                - textbox "Message"
                - button "Add files"
                - button "Thinking" [pressed]
                - button "Send"
        - status: /Answer/
    """)


def test_an_answer_is_announced_once_and_not_by_its_tokens(page: Page, server: ScriptedServer) -> None:
    page.evaluate("""() => {
        window.heard = [];
        const status = document.getElementById("status");
        new MutationObserver(() => status.textContent && heard.push(status.textContent)).observe(status,
            { childList: true, characterData: true, subtree: true });
    }""")
    server.scripts.append([*[Thinking("t ")] * 30, *[Answer("word ")] * 30])
    ask(page, "?")
    is_done(page)
    heard = page.evaluate("heard")
    assert heard[0] == "Waiting for the answer" and heard[-1] == "Answer: " + "word " * 30
    assert len(heard) <= 4 and set(heard[1:-1]) <= {"Thinking", "Answering"}
    for node in page.locator("[aria-live], [role=status], [role=alert], [role=log]").all():
        assert node.evaluate("(node) => !node.querySelector('.prose, .thought')")


def test_a_conversation_by_keyboard_alone(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    is_done(page)
    assert server.seen[0].body["messages"][0]["content"] == "one\ntwo"
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#text")).to_have_value("")
    names = []
    for _ in range(20):  # every stop of the round, each of which is seen
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if focused.count():
            names.append(focused.evaluate("(node) => node.getAttribute('aria-label') ?? node.textContent.trim()"))
            assert focused.evaluate(
                "(node) => node.matches(':focus-visible') && getComputedStyle(node).outlineStyle"
            ) in (
                "solid",
                "auto",
            ) or focused.evaluate("(node) => node.id === 'text'")
    wanted = ["Add files", "Thinking", "Send", "New chat", "Settings", "Edit and send again", "Answer again"]
    assert set(wanted) <= set(names)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.locator("summary").focus()
    page.keyboard.press("Space")
    expect(last_answer(page).locator(".thought")).to_be_visible()
    page.get_by_role("button", name="Edit and send again").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#text")).to_have_value("")
    page.keyboard.type("   ")
    page.keyboard.press("Enter")
    assert len(server.seen) == 1  # nothing is asked


def test_enter_that_ends_a_composition_does_not_send(page: Page, server: ScriptedServer) -> None:
    page.locator("#text").fill("にほん")
    page.evaluate("""() => document.getElementById("text").dispatchEvent(
        new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true }))""")
    expect(page.get_by_role("article")).to_have_count(0)
    assert server.seen == []


# The lowest contrast of a text that is seen with what is behind it, and which text it is.
CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, below) => top.slice(0, 3).map((value, at) => value * top[3] + below[at] * (1 - top[3]));
    const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
    const behind = (node) => node
        ? over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement)) : [255, 255, 255];
    let worst = [99, ""];
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || !node.checkVisibility({ opacityProperty: true }) || node.closest(".unseen, option")) continue;
        const ground = behind(node);
        const text = over(rgba(getComputedStyle(node).color), ground);
        const [low, high] = [light(ground), light(text)].sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < worst[0]) worst = [ratio, node.textContent.slice(0, 40)];
    }
    return worst;
}"""


def test_texts_stand_out_from_their_ground(page: Page, server: ScriptedServer) -> None:
    def worst() -> dict[float, str]:
        """The texts of the lowest contrast, in both schemes."""
        page.emulate_media(color_scheme="light")
        light = page.evaluate(CONTRAST)
        page.emulate_media(color_scheme="dark")
        return dict([light, page.evaluate(CONTRAST)])

    assert min(found := worst()) >= 4.5, found
    full(page, server)
    page.locator("summary").first.click()
    page.get_by_role("button", name="Edit and send again").last.click()
    page.evaluate("document.querySelectorAll('.dropped').forEach((node) => node.classList.remove('dropped'))")
    assert min(found := worst()) >= 4.5, found
    page.get_by_role("button", name="Settings").click()
    page.locator("#temperature").fill("9")
    assert min(found := worst()) >= 4.5, found
    page.evaluate("document.getElementById('about').style.color = getComputedStyle(document.body).backgroundColor")
    assert min(worst()) < 1.5


GROUND = "getComputedStyle(document.documentElement).backgroundColor"


def test_dark_and_light_are_the_systems_unless_chosen(page: Page, server: ScriptedServer) -> None:
    page.emulate_media(color_scheme="light")
    light = page.evaluate(GROUND)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(GROUND)
    assert light != dark
    switch = page.get_by_role("button", name="Colours")
    seen = []
    for _ in range(3):
        switch.click()
        seen.append((switch.get_attribute("aria-label"), page.evaluate(GROUND)))
        page.reload()
        assert (switch.get_attribute("aria-label"), page.evaluate(GROUND)) == seen[-1]
    assert seen == [("Colours: light", light), ("Colours: dark", dark), ("Colours: as the system", dark)]


SCROLLS_SIDEWAYS = "document.documentElement.scrollWidth > innerWidth || document.body.scrollWidth > innerWidth"
OUTSIDE = """() => [...document.querySelectorAll("main *, footer *, header *")].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1 || box.left < -1) && !node.closest("pre, .table, .unseen");
}).map((node) => node.outerHTML.slice(0, 80))"""
# What a finger hits: 24 pixels at least, but for links in a sentence.
SMALL = """() => [...document.querySelectorAll("button, summary")].filter((node) => {
    const box = node.getBoundingClientRect();
    return node.checkVisibility() && !node.matches(".link") && Math.min(box.width, box.height) < 24;
}).map((node) => node.outerHTML.slice(0, 80))"""


def test_a_phone_needs_no_scrolling_sideways(page: Page, server: ScriptedServer) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    assert not page.evaluate(SCROLLS_SIDEWAYS)
    full(page, server)
    for width in (360, 320):
        page.set_viewport_size({"width": width, "height": 640})
        assert not page.evaluate(SCROLLS_SIDEWAYS)
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(SMALL) == []
        for control in ("Send", "Add files"):
            expect(page.get_by_role("button", name=control, exact=True)).to_be_in_viewport()
        page.get_by_role("button", name="Settings").click()
        settings = page.get_by_role("dialog", name="Settings")
        assert settings.evaluate("(node) => node.scrollWidth <= node.clientWidth")
        box = settings.bounding_box()
        assert box and box["x"] >= 0 and box["width"] <= width
        page.keyboard.press("Escape")
