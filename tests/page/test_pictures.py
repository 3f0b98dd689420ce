"""Pictures by the file chooser, by pasting and by dropping; what is no picture or too large is said before sending."""

from __future__ import annotations

import base64
import io

from PIL import Image
from playwright.sync_api import FilePayload, Page, expect

from .conftest import png
from .reading import ask, is_done, said
from .scripted import ScriptedServer

# What a browser sends when something is pasted or dropped.
GIVE = """([kind, files, text]) => {
    const data = new DataTransfer();
    for (const [name, type, bytes] of files)
        data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type }));
    if (text) data.setData("text/plain", text);
    const event = kind === "paste"
        ? new ClipboardEvent(kind, { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
    return document.activeElement.dispatchEvent(event);
}"""


def give(page: Page, kind: str, *files: FilePayload, text: str = "") -> bool:
    sent = [[file["name"], file["mimeType"], base64.b64encode(file["buffer"]).decode()] for file in files]
    return page.evaluate(GIVE, [kind, sent, text])


def file(name: str, content: bytes, kind: str = "image/png") -> FilePayload:
    return {"name": name, "mimeType": kind, "buffer": content}


def choose(page: Page, *files: FilePayload) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add files").click()
    chooser.value.set_files(list(files))


def waiting(page: Page):
    return page.get_by_role("list", name="Files to send").get_by_role("listitem")


def sent_images(server: ScriptedServer) -> list[bytes]:
    parts = server.seen[-1].body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/") for url in urls)
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_pictures_come_by_three_ways_and_go_unchanged(page: Page, server: ScriptedServer) -> None:
    red, green, blue, grey = (png(colour=colour) for colour in ("red", "green", "blue", "grey"))
    choose(page, file("red.png", red), file("green.png", green))
    expect(waiting(page)).to_have_count(2)
    give(page, "paste", file("image.png", blue))
    expect(waiting(page)).to_have_count(3)
    give(page, "dragenter", file("grey.png", grey))
    expect(page.get_by_text("Drop files to add them")).to_be_visible()
    give(page, "drop", file("grey.png", grey))
    expect(waiting(page)).to_have_count(4)
    expect(page.get_by_text("Drop files to add them")).to_be_hidden()
    page.get_by_role("button", name="Remove green.png").click()
    expect(waiting(page)).to_have_count(3)
    ask(page, "What are these?")
    is_done(page)
    assert sent_images(server) == [red, blue, grey]
    assert server.seen[-1].body["messages"][-1]["content"][-1] == {"type": "text", "text": "What are these?"}
    expect(page.get_by_role("article", name="You").get_by_role("img")).to_have_count(3)
    expect(waiting(page)).to_have_count(0)
    ask(page, "And now?")
    is_done(page)
    assert len(server.seen[-1].body["messages"][0]["content"]) == 4  # the pictures of the first turn go along


def test_a_picture_needs_no_text(page: Page, server: ScriptedServer) -> None:
    choose(page, file("a.png", png()))
    expect(waiting(page)).to_have_count(1)
    page.get_by_role("button", name="Send", exact=True).click()
    is_done(page)
    assert sent_images(server) == [png()]
    assert len(server.seen[-1].body["messages"][0]["content"]) == 1


def test_pictures_of_an_earlier_message_are_edited_with_it(page: Page, server: ScriptedServer) -> None:
    choose(page, file("a.png", png(colour="red")), file("b.png", png(colour="blue")))
    expect(waiting(page)).to_have_count(2)
    ask(page, "Which?")
    is_done(page)
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_role("button", name="Remove a.png").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("article", name="You").get_by_role("img")).to_have_count(2)
    page.get_by_role("button", name="Edit and send again").click()
    expect(waiting(page)).to_have_count(2)
    page.get_by_role("button", name="Remove a.png").click()
    ask(page, "This one?")
    is_done(page)
    assert sent_images(server) == [png(colour="blue")]


def test_what_is_no_file_of_a_known_kind_is_said_at_once(page: Page, server: ScriptedServer) -> None:
    notice = page.locator("#notice")
    choose(page, file("notes.png", b"just a text"))
    expect(notice).to_contain_text("notes.png: this is no picture (PNG, JPEG, WebP, GIF, BMP, TIFF), video")
    choose(page, file("broken.png", png()[:40]))
    expect(notice).to_have_text("broken.png: it cannot be read. It may be damaged.")
    choose(
        page, file("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), file("ok.png", png())
    )
    expect(notice).to_contain_text("vector.svg: this is no picture")
    expect(waiting(page)).to_have_count(1)
    assert server.seen == []


def test_a_picture_is_what_it_holds_not_what_it_is_called(page: Page, server: ScriptedServer) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "JPEG")
    tiff = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(tiff, "TIFF")
    choose(page, file("page.html", buffer.getvalue(), "text/html"), file("scan.tif", tiff.getvalue(), "image/tiff"))
    expect(waiting(page)).to_have_count(2)
    expect(waiting(page).nth(1)).to_contain_text("scan.tif")  # browsers do not show TIFF; the server reads it
    ask(page, "?")
    is_done(page)
    content = server.seen[-1].body["messages"][0]["content"]
    assert [part["image_url"]["url"].partition(";")[0] for part in content[:2]] == [
        "data:image/jpeg",
        "data:image/tiff",
    ]
    assert sent_images(server) == [buffer.getvalue(), tiff.getvalue()]
    # An address of a file that a browser takes for a document would be one of this page's origin.
    kept = """async (bytes) => (await (await import("/page/attachments.js")).read(
        new File([Uint8Array.from(bytes)], "page.html", { type: "text/html" }))).blob.type"""
    assert page.evaluate(kept, list(buffer.getvalue())) == "image/jpeg"


def test_a_picture_that_is_too_large_can_be_made_smaller(page: Page, server: ScriptedServer) -> None:
    large = png((400, 300)) + b"\0" * 2**20  # what follows a PNG's end is ignored
    page.evaluate("import('/page/attachments.js').then(({ LIMITS }) => { LIMITS.bytes.image = 2 ** 20; })")
    choose(page, file("large.png", large))
    notice = page.locator("#notice")
    expect(notice).to_contain_text("large.png: an image file is larger than 1 MiB; send a smaller one.")
    notice.get_by_role("button", name="Add a smaller copy").click()
    expect(waiting(page)).to_have_count(1)
    expect(notice).to_be_hidden()
    ask(page, "?")
    is_done(page)
    (sent,) = sent_images(server)
    assert len(sent) < 2**19
    assert Image.open(io.BytesIO(sent)).size == (400, 300)


def test_a_picture_is_made_smaller_only_where_that_is_asked_for(page: Page, server: ScriptedServer) -> None:
    wide = png((3000, 1500))
    choose(page, file("wide.png", wide), file("also.png", wide))
    expect(waiting(page)).to_have_count(2)
    page.get_by_role("button", name="Make wide.png smaller: it has 3000 by 1500 pixels").click()
    expect(waiting(page).first).to_contain_text("1792 × 896")
    ask(page, "?")
    is_done(page)
    smaller, kept = sent_images(server)
    assert Image.open(io.BytesIO(smaller)).size == (1792, 896)
    assert kept == wide


def test_too_much_together_is_said_before_it_is_sent(page: Page, server: ScriptedServer) -> None:
    page.evaluate("import('/page/attachments.js').then(({ LIMITS }) => { LIMITS.images = 3; })")
    choose(page, *(file(f"{n}.png", png((300, 300 + n))) for n in range(4)))
    expect(page.locator("#notice")).to_have_text("A request may have 3 images; send fewer.")
    expect(waiting(page)).to_have_count(3)
    page.evaluate("import('/page/attachments.js').then(({ LIMITS }) => { LIMITS.body = 1000; })")
    ask(page, "My question")
    expect(page.locator("#notice")).to_contain_text("The files of this conversation are too large together")
    expect(page.locator("#text")).to_have_value("My question")
    expect(waiting(page)).to_have_count(3)
    assert server.seen == []
    page.evaluate("import('/page/attachments.js').then(({ LIMITS }) => { LIMITS.body = 2 ** 20; })")
    page.locator("#text").press("Enter")
    is_done(page)
    # A request carries the files of earlier messages as well.
    choose(page, file("more.png", png()))
    expect(page.locator("#notice")).to_have_text("A request may have 3 images; send fewer.")
    page.evaluate("import('/page/attachments.js').then(({ LIMITS }) => { LIMITS.images = 4; })")
    choose(page, file("more.png", png()))
    expect(waiting(page)).to_have_count(1)
    for limits, problem in (
        ("LIMITS.images = 3;", "A request may have 3 images; send fewer."),
        ("LIMITS.images = 4; LIMITS.body = 3000;", "The files of this conversation are too large together"),
    ):
        page.evaluate(f"import('/page/attachments.js').then(({{ LIMITS }}) => {{ {limits} }})")
        ask(page, "More")
        expect(page.locator("#notice")).to_contain_text(problem)
    assert len(server.seen) == 1


def test_text_is_pasted_as_text(page: Page, server: ScriptedServer) -> None:
    # An office program copies a table as a text and as a picture of it.
    page.locator("#text").focus()
    assert give(page, "paste", file("image.png", png()), text="a table")  # left to the browser
    assert not give(page, "paste", file("image.png", png()))
    expect(waiting(page)).to_have_count(1)


def test_names_of_files_are_no_markup(page: Page, server: ScriptedServer) -> None:
    name = "<img src=x onerror=alert(1)>\u202egnp.png"
    choose(page, file(name, b"no"), file(name, png()))
    expect(waiting(page)).to_have_count(1)
    expect(page.locator("#notice")).to_contain_text("<img src=x onerror=alert(1)>gnp.png: this is no picture")
    ask(page, "?")
    is_done(page)
    expect(page.get_by_role("article", name="You").get_by_role("img")).to_have_attribute(
        "alt", "<img src=x onerror=alert(1)>gnp.png"
    )
    assert page.locator("img:not([src^='blob:'])").count() == 0


def test_ideas_fill_the_box(page: Page, server: ScriptedServer) -> None:
    for name, text, pictures in (
        ("Read a sum", "What is the result?", 1),
        ("Describe some shapes", "Describe this image in detail.", 1),
        ("Ask without a picture", "What is a mixture of experts?", 0),
    ):
        page.get_by_role("button", name=name).click()
        expect(page.locator("#text")).to_have_value(text)
        expect(waiting(page)).to_have_count(pictures)
        expect(page.locator("#text")).to_be_focused()
    page.keyboard.press("Enter")
    is_done(page)
    expect(said(page, "What would you like to know?")).to_be_hidden()
