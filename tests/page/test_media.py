"""Videos and documents: attached, read as the settings say, estimated before they are sent, and told of afterwards."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from kimi_vl import attachments
from kimi_vl.errors import UserError
from kimi_vl.media import image_files, images, kinds
from kimi_vl.serving.options import ServerOptions
from tests.media import films, papers

from .conftest import png
from .reading import ask, is_done, last_answer
from .scripted import Answer, Details, Refusal, ScriptedServer
from .test_pictures import choose, file, give, waiting

FILM = films.Film("vp8", "webm", films.every(10, 2)).made()
PAPER = papers.GOOD["one page"][0]()
MEDIA = [
    {"kind": "video", "tokens": 244, "width": 320, "height": 240, "taken": [0.0, 0.5, 61.0], "wanted": 6},
    {"kind": "document", "tokens": 1600, "width": 700, "height": 900, "taken": [1, 2, 3, 7], "wanted": 4},
]


def both(page: Page) -> None:
    choose(page, file("clip.webm", FILM, "video/webm"), file("report.pdf", PAPER, "application/pdf"))
    expect(waiting(page)).to_have_count(2)


def sent(server: ScriptedServer, message: int = -1) -> list[dict[str, Any]]:
    return server.seen[-1].body["messages"][message]["content"]


def url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def set_reading(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#{name.replace('_', '-')}").fill(value)
    page.keyboard.press("Escape")


def test_videos_and_documents_come_by_three_ways_and_go_unchanged(page: Page, server: ScriptedServer) -> None:
    choose(page, file("clip.bin", FILM, ""))  # the name says nothing
    give(page, "paste", file("report.pdf", PAPER, "application/pdf"))
    expect(waiting(page)).to_have_text([f"clip.bin{size(FILM)}", f"report.pdf{size(PAPER)}"])
    give(page, "drop", file("third.mp4", FILM, "video/mp4"), file("a.png", png()))
    expect(waiting(page)).to_have_count(4)
    page.get_by_role("button", name="Remove third.mp4").click()
    ask(page, "What?")
    is_done(page)
    assert sent(server)[:2] == [
        {"type": "video_url", "video_url": {"url": url(FILM, "video/webm")}},
        {"type": "file", "file": {"filename": "report.pdf", "file_data": url(PAPER, "application/pdf")}},
    ]
    assert [part["type"] for part in sent(server)[2:]] == ["image_url", "text"]
    question = page.get_by_role("article", name="You")
    expect(question.get_by_label("clip.bin")).to_have_js_property("controls", True)
    expect(question).to_contain_text("report.pdf")


def size(data: bytes) -> str:
    return f"{float(f'{len(data) / 1000:.2g}'):g} KB"


def test_how_files_are_read_is_set_for_the_message_that_has_them(page: Page, server: ScriptedServer) -> None:
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Frames a second")).to_be_hidden()
    expect(page.get_by_label("Pages", exact=True)).to_be_hidden()
    page.keyboard.press("Escape")
    both(page)
    set_reading(page, fps="0.5", max_frames="8", start="1", end="1.5", pages=" 1-3, 7")
    chip = page.get_by_role("button", name="0.5 frames a second, 8 frames at most, 1 s to 1.5 s, pages 1-3, 7")
    expect(chip).to_be_visible()
    ask(page, "What?")
    is_done(page)
    video, document, _ = first = sent(server)
    assert {name: video[name] for name in video.keys() - {"type", "video_url"}} == {
        "fps": 0.5,
        "max_frames": 8,
        "start": 1,
        "end": 1.5,
    }
    assert document["pages"] == "1-3, 7"
    expect(chip).to_be_hidden()
    # What is set later is for what comes later.
    choose(page, file("other.webm", FILM, "video/webm"))
    set_reading(page, fps="", max_frames="", start="", end="", pages="2")
    expect(page.get_by_role("button", name="Frames", exact=True)).to_be_visible()
    ask(page, "And this?")
    is_done(page)
    assert sent(server, 0) == first
    assert sent(server)[0].keys() == {"type", "video_url"}
    # An answer that is asked for again is asked for with what is set now.
    page.get_by_role("button", name="Answer again").first.click()
    is_done(page)
    assert sent(server)[0].keys() == {"type", "video_url"} and sent(server)[1]["pages"] == "2"


NONSENSE = (
    ("fps", "0", "Frames a second must be above 0."),
    ("fps", "61", "Frames a second must be a number from 0 to 60."),
    ("max-frames", "513", "Frames at most must be a whole number from 1 to 512."),
    ("start", "-1", "Start must be a number of at least 0."),
    ("end", "0", "The end must be after the start."),
    ("pages", "1-3;7", "Pages must be numbers and ranges like 1-3,7."),
)


def test_what_makes_no_sense_is_said_and_not_sent(page: Page, server: ScriptedServer) -> None:
    both(page)
    page.locator("#text").fill("What?")
    for field, value, problem in NONSENSE:
        set_reading(page, **{field: value})
        page.locator("#text").press("Enter")
        expect(page.locator(f"#{field}")).to_be_focused()
        expect(page.locator(f"#{field}-problem")).to_have_text(problem)
        if field != "pages":
            page.locator(f"#{field}").fill("")
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Remove clip.webm").click()
    page.get_by_role("button", name="Remove report.pdf").click()
    page.locator("#text").press("Enter")  # nothing is left that it is about
    is_done(page)
    assert sent(server) == "What?"


def test_limits_and_their_sentences_are_the_servers(page: Page, server: ScriptedServer) -> None:
    limits = page.evaluate("import('/page/attachments.js').then(({ LIMITS }) => LIMITS)")
    assert limits == {
        "bytes": {"image": image_files.MAX_BYTES, "video": kinds.MAX_BYTES, "document": kinds.MAX_BYTES},
        "pixels": images.MAX_PIXELS,
        "images": images.MAX_IMAGES,
        "files": attachments.MAX_FILES,
        "body": ServerOptions().max_body_mib * 2**20,
    }
    page.evaluate("""import('/page/attachments.js').then(({ LIMITS }) => Object.assign(LIMITS, {
        bytes: { video: 999, document: 999, image: 9999 }, pixels: 1000 }))""")
    notice = page.locator("#notice")
    for kind, data in ((kinds.VIDEO, FILM), (kinds.DOCUMENT, PAPER)):
        choose(page, file("a.bin", data, ""))
        expect(notice).to_have_text("a.bin: " + kind.too_many_bytes().message.replace("100 MiB", "0 MiB"))
    choose(page, file("a.png", png()))
    with pytest.raises(UserError) as refusal:
        images._check_size(8000, 8000)
    expect(notice).to_contain_text("a.png: " + refusal.value.message.replace("40 million", "0 million"))
    page.evaluate("import('/page/attachments.js').then(({ LIMITS }) => { LIMITS.bytes.document = 2 ** 20; })")
    choose(page, *(file(f"{n}.pdf", PAPER, "application/pdf") for n in range(5)))
    expect(notice).to_have_text("A request may have 4 videos and documents; send fewer.")
    expect(waiting(page)).to_have_count(4)
    assert server.seen == []


HEADS = [
    *(films.GOOD[name].made()[:1024] for name in ("h264 mp4", "mjpeg mov", "mjpeg avi", "one frame of mkv")),
    FILM[:1024],
    PAPER[:1024],
    b"\0" * 1000 + b"%PDF-1.4",
    b"\0" * 1020 + b"%PDF-1.4",
    png()[:1024],
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"RIFF\0\0\0\0WAVEfmt ",
    b"II+\0\x08",
    b"BM",
    b"\0\0\0\x18ftypavif%PDF-",
    b"\0\0\0\x18ftypheic",
    b"\0\0\0\x08wide\0\0\0\x10mdat",
    b"GIF89a",
    b"\xff\xd8\xff\xe0",
    b"text",
    b"",
]


def test_a_file_is_what_the_server_takes_it_for(page: Page, server: ScriptedServer) -> None:
    program = """async (heads) => {
        const { formatOf } = await import("/page/attachments.js");
        return heads.map((head) => formatOf(Uint8Array.from(head))?.kind ?? null);
    }"""
    names = {kinds.VIDEO: "video", kinds.DOCUMENT: "document", None: None}
    wanted = [
        names.get(kinds.of(head), "image" if image_files.is_image(head) else None)  # a still picture that is not read
        for head in HEADS
    ]
    assert page.evaluate(program, [list(head) for head in HEADS]) == wanted
    assert {"image", "video", "document", None} == set(wanted)


def test_what_a_message_costs_is_told_before_it_is_sent(page: Page, server: ScriptedServer) -> None:
    server.estimates.append({"count": 2010, "max_model_len": 8192, "media": MEDIA})
    both(page)
    estimate = page.locator("#estimate")
    expect(estimate).to_have_text("2,010 tokens of 8,192 with this message")
    expect(waiting(page).nth(0)).to_contain_text("3 of 6 frames, 0:00 to 1:01 · 244 tokens")
    expect(waiting(page).nth(1)).to_contain_text("pages 1–3, 7 · 1,600 tokens")
    server.estimates.appendleft(Refusal(400, "e_document_pages", "the document has the pages 1 to 2; ask for these."))
    set_reading(page, pages="9", max_tokens="77")
    expect(estimate).to_have_text("The document has the pages 1 to 2; ask for these.")
    asked = server.estimated[-1]
    assert asked["max_completion_tokens"] == 77 and asked["messages"][0]["content"][1]["pages"] == "9"
    expect(waiting(page).nth(1)).to_have_text(f"report.pdf{size(PAPER)}")
    set_reading(page, pages="1")
    expect(estimate).to_have_text("2,010 tokens of 8,192 with this message")
    server.estimates.appendleft(Refusal(429, "overloaded", "busy."))
    set_reading(page, pages="1-")
    expect(estimate).to_be_hidden()  # that may be over when the message is sent
    ask(page, "What?")
    is_done(page)
    expect(estimate).to_be_hidden()
    assert asked["messages"][0]["content"][0] == sent(server)[0]


def test_a_server_that_estimates_nothing_is_asked_once(page: Page, server: ScriptedServer) -> None:
    with page.expect_response("**/tokenize"):
        both(page)
    expect(page.locator("#estimate")).to_be_hidden()
    page.get_by_role("button", name="Remove clip.webm").click()
    ask(page, "What?")
    is_done(page)
    assert len(server.estimated) == 1


def test_what_was_taken_is_told_with_the_answer(page: Page, server: ScriptedServer) -> None:
    both(page)
    server.scripts.append([Answer("A."), Details({"media": MEDIA})])
    ask(page, "What?")
    is_done(page)
    film, paper = last_answer(page).locator(".taken").all()
    expect(film.locator("summary")).to_have_text("clip.webm: 3 of 6 frames, 0:00 to 1:01 · 244 tokens")
    expect(paper.locator("summary")).to_have_text("report.pdf: pages 1–3, 7 · 1,600 tokens")
    film.locator("summary").click()
    expect(film.get_by_role("button")).to_have_text(["0:00", "0:00.5", "1:01"])
    film.get_by_role("button", name="Show clip.webm at 0:00.5").click()
    player = page.get_by_role("article", name="You").get_by_label("clip.webm")
    expect(player).to_have_js_property("currentTime", 0.5)
    # Of a later question only its own files are told.
    later = {"kind": "document", "tokens": 1, "width": 9, "height": 9, "taken": [1], "wanted": 1}
    choose(page, file("later.pdf", PAPER, "application/pdf"))
    server.scripts += [
        [Answer("B."), Details({"media": [*MEDIA, later]})],
        [Answer("C."), Details({"media": [*MEDIA, later]})],
    ]
    ask(page, "And?")
    is_done(page)
    expect(last_answer(page).locator(".taken")).to_have_text(
        ["later.pdf: page 1 · 1 tokenThe largest page has 9 × 9 pixels."]
    )
    ask(page, "Why?")
    is_done(page)
    expect(last_answer(page)).to_contain_text("C.")
    expect(last_answer(page).locator(".taken")).to_have_count(0)


def test_a_film_that_no_browser_plays_is_shown_by_its_name(page: Page, server: ScriptedServer) -> None:
    choose(page, file("old.avi", films.GOOD["mjpeg avi"].made(), "video/x-msvideo"))
    expect(waiting(page).locator("svg use[href='#icon-video']")).to_be_visible()
    ask(page, "?")
    is_done(page)
    question = page.get_by_role("article", name="You")
    expect(question.locator(".card")).to_contain_text("old.avi")
    expect(question.locator("video")).to_have_count(0)
