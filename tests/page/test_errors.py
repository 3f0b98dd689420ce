"""What goes wrong is said so that a person understands it, nothing that was typed is lost, and trying again helps."""

from __future__ import annotations

import json
import threading

import pytest
from playwright.sync_api import Page, expect

from .reading import ask, is_done, last_answer, said
from .scripted import Answer, Break, Pause, Raw, Refusal, ScriptedServer

REFUSALS = {
    "The server did not accept this.": Refusal(400, "e_image_format", "an image is not a PNG file; convert it first."),
    "The conversation is too long": Refusal(400, "context_length_exceeded", "the prompt takes 9000 tokens of 8192."),
    "The message is too large.": Refusal(413, "request_too_large", "a body may have 9 MiB."),
    "This model is not served here.": Refusal(404, "model_not_found", "there is no model x."),
    "Something went wrong on the server.": Refusal(500, "internal_error", "x", {"x-request-id": "req-17"}),
    "The server is busy.": Refusal(429, "overloaded", "too many requests wait."),
    "The server is not ready.": Refusal(503, "service_unavailable", "loading."),
    "The server does not allow this.": Refusal(403, "", "", body="<html><b>Forbidden</b></html>"),
    "The request took too long.": Refusal(504, "deadline_exceeded", "the request was not done in time."),
}


def test_a_refusal_is_told_and_nothing_is_lost(page: Page, server: ScriptedServer) -> None:
    for title, refusal in REFUSALS.items():
        server.scripts.append(refusal)
        ask(page, f"Question before: {title}")
        alert = page.get_by_role("main").get_by_role("alert")
        expect(alert).to_contain_text(title)
        expect(alert).not_to_contain_text("<")
        expect(page.get_by_role("article", name="You").last).to_contain_text(f"Question before: {title}")
        alert.get_by_role("button", name="Edit the message").click()
        expect(page.locator("#text")).to_have_value(f"Question before: {title}")
        page.keyboard.press("Escape")
        alert.get_by_role("button", name="Try again").click()
        expect(page.locator("#text")).to_be_focused()
        is_done(page)
        expect(last_answer(page)).to_contain_text("Here it is.")
        expect(alert).to_have_count(0)
        assert server.seen[-1].body == server.seen[-2].body


def test_the_server_says_what_to_do_and_the_page_repeats_it(page: Page, server: ScriptedServer) -> None:
    server.scripts.append(REFUSALS["The server did not accept this."])
    ask(page, "?")
    expect(said(page, "An image is not a PNG file; convert it first.")).to_be_visible()
    server.scripts.append(REFUSALS["The message is too large."])
    ask(page, "?")
    expect(said(page, "A body may have 9 MiB. Take a file out or make it smaller")).to_be_visible()
    server.scripts.append(REFUSALS["Something went wrong on the server."])
    ask(page, "?")
    expect(said(page, "req-17")).to_be_visible()


def test_a_server_that_is_gone(page: Page, server: ScriptedServer) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    ask(page, "Are you there?")
    expect(said(page, "The server cannot be reached.")).to_be_visible()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_contain_text("Here it is.")


def test_a_server_that_is_gone_when_the_page_is_opened(page: Page, server: ScriptedServer) -> None:
    page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
    page.reload()
    notice = page.get_by_role("alert").filter(has_text="The server cannot be reached.")
    expect(notice).to_be_visible()
    page.unroute("**/v1/models")
    notice.get_by_role("button", name="Try again").click()
    expect(notice).to_be_hidden()
    expect(page.locator("#model-name")).to_have_text("kimi-vl-demo")


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (Break(), "The connection ended before the answer was complete."),
        (
            Raw(b'data: {"error": {"message": "the model is lost.", "code": "internal_error"}}\n\n'),
            "The model is lost.",
        ),
        (Raw(b"data: {not json\n\n"), "The connection ended before the answer was complete."),
    ],
)
def test_an_answer_that_breaks_off_keeps_what_has_come(page: Page, server: ScriptedServer, end, told: str) -> None:
    server.scripts.append([Answer("The first half"), end])
    ask(page, "?")
    expect(said(page, "The answer broke off.")).to_be_visible()
    expect(said(page, told)).to_be_visible()
    expect(said(page, "The first half")).to_be_visible()


def test_answering_again_in_vain_leaves_the_former_answer(page: Page, server: ScriptedServer) -> None:
    server.scripts += [[Answer("The good answer")], REFUSALS["The server is busy."], [Answer("Another one")]]
    ask(page, "?")
    is_done(page)
    page.get_by_role("button", name="Answer again").click()
    expect(said(page, "The server is busy.")).to_be_visible()
    expect(said(page, "The good answer")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(said(page, "Another one")).to_be_visible()
    expect(page.get_by_role("main").get_by_role("alert")).to_have_count(0)


def test_a_busy_server_is_asked_again_after_its_time(page: Page, server: ScriptedServer) -> None:
    page.clock.install()
    server.scripts += [Refusal(429, "overloaded", "busy.", {"Retry-After": "2"})] * 6
    ask(page, "?")
    for asked in range(1, 6):  # by itself only so often
        expect(said(page, "Trying again in 2 s.")).to_be_visible()
        page.clock.run_for(1000)
        expect(said(page, "Trying again in 1 s.")).to_be_visible()
        assert len(server.seen) == asked
        page.clock.run_for(1000)
    expect(said(page, "The server is busy.")).to_be_visible()
    expect(said(page, "Trying again in")).to_have_count(0)
    page.clock.run_for(60_000)
    assert len(server.seen) == 6
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_contain_text("Here it is.")


def test_the_waiting_for_a_busy_server_can_be_ended(page: Page, server: ScriptedServer) -> None:
    page.clock.install()
    server.scripts += [Refusal(503, "service_unavailable", "loading.", {"Retry-After": "30"})] * 2
    ask(page, "?")
    expect(said(page, "Trying again in 30 s.")).to_be_visible()
    page.get_by_role("button", name="Try now").click()
    expect(said(page, "Trying again in 30 s.")).to_be_visible()
    page.clock.run_for(12_000)
    expect(said(page, "Trying again in 18 s.")).to_be_visible()
    page.keyboard.press("Escape")
    expect(said(page, "Trying again in")).to_have_count(0)
    page.clock.run_for(60_000)
    assert len(server.seen) == 2
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_another_message_ends_the_waiting_for_a_busy_server(page: Page, server: ScriptedServer) -> None:
    server.scripts.append(Refusal(429, "overloaded", "busy.", {"Retry-After": "30"}))
    ask(page, "one")
    expect(said(page, "Trying again in")).to_be_visible()
    ask(page, "two")
    expect(last_answer(page)).to_contain_text("Here it is.")
    expect(said(page, "Trying again in")).to_have_count(0)
    assert [message["content"] for message in server.seen[-1].body["messages"]] == ["one", "two"]


def test_a_key_is_asked_for_kept_for_the_tab_and_sent(page: Page, server: ScriptedServer) -> None:
    server.key = "the-key"
    ask(page, "My question")
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    dialog.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_be_visible()
    expect(dialog.get_by_label("API key")).to_have_value("")
    dialog.get_by_role("button", name="Cancel").click()
    expect(said(page, "This server asks for an API key.")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    dialog.get_by_label("API key").fill("the-key")
    dialog.get_by_role("button", name="Continue").click()
    expect(last_answer(page)).to_contain_text("Here it is.")
    page.reload()
    ask(page, "Again")
    expect(last_answer(page)).to_contain_text("Here it is.")
    assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer the-key"] * 2
    assert page.evaluate("JSON.stringify(localStorage)") == "{}"


def test_a_message_typed_while_an_answer_comes_waits_in_the_box(page: Page, server: ScriptedServer) -> None:
    end = threading.Event()
    server.scripts.append([Answer("one"), Pause(end)])
    ask(page, "first")
    ask(page, "second")
    expect(page.locator("#text")).to_have_value("second")
    end.set()
    is_done(page)
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="You")).to_have_count(2)


def test_words_of_a_server_are_no_markup(page: Page, server: ScriptedServer) -> None:
    message = "<img src=x onerror=alert(1)> [a](javascript:x) " + "x" * 5000
    server.scripts.append(Refusal(400, "e_parameter", message))
    ask(page, "<img src=x onerror=alert(1)>")
    expect(page.get_by_role("main").get_by_role("alert")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.get_by_role("article", name="You")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("main :is(img, a, script, iframe)").count() == 0
    assert len(page.get_by_role("main").get_by_role("alert").inner_text()) < 600


def test_a_body_that_is_no_answer_at_all(page: Page, server: ScriptedServer) -> None:
    body = json.dumps({"error": ["not", "an", "object"]})
    server.scripts.append(Refusal(400, body=body))
    ask(page, "?")
    expect(said(page, "It answered with status 400.")).to_be_visible()
