"""A conversation as a person has it: asking, reading, stopping, editing, asking again."""

from __future__ import annotations

import threading

from playwright.sync_api import Page, expect

from .reading import ask, is_done, last_answer, said
from .scripted import Answer, Pause, Raw, ScriptedServer, Thinking


def test_thinking_is_open_while_it_lasts_and_folded_when_the_answer_begins(page: Page, server: ScriptedServer) -> None:
    answers, ends = threading.Event(), threading.Event()
    server.scripts.append([Thinking("One and one"), Pause(answers), Answer("It is "), Pause(ends), Answer("two.")])
    ask(page, "1 + 1?")
    expect(said(page, "One and one")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    answers.set()
    expect(said(page, "It is")).to_be_visible()
    expect(said(page, "One and one")).to_be_hidden()
    expect(said(page, "Thought for")).to_be_visible()
    ends.set()
    expect(said(page, "It is two.")).to_be_visible()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    said(page, "Thought for").click()
    expect(said(page, "One and one")).to_be_visible()


def test_a_reader_who_has_folded_or_unfolded_is_not_overruled(page: Page, server: ScriptedServer) -> None:
    more, answers, ends = threading.Event(), threading.Event(), threading.Event()
    server.scripts.append(
        [Thinking("first"), Pause(more), Thinking(" second"), Pause(answers), Answer("x"), Pause(ends)]
    )
    ask(page, "?")
    fold = page.locator("summary")
    fold.click()
    expect(page.locator("details")).not_to_have_attribute("open", "")
    more.set()
    expect(said(page, "first second")).to_be_attached()
    expect(page.locator("details")).not_to_have_attribute("open", "")
    fold.click()
    answers.set()
    expect(said(page, "Thought for")).to_be_visible()
    expect(said(page, "first second")).to_be_visible()
    ends.set()
    is_done(page)
    expect(said(page, "first second")).to_be_visible()


def test_turns_make_one_conversation_and_thinking_is_not_sent_back(page: Page, server: ScriptedServer) -> None:
    server.scripts += [[Thinking("hm"), Answer("**Blue**.")], [Answer("Yes.")]]
    ask(page, "Which colour?")
    is_done(page)
    ask(page, "Sure?")
    expect(said(page, "Yes.")).to_be_visible()
    first, second = server.seen
    assert second.body["messages"] == [
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "**Blue**."},
        {"role": "user", "content": "Sure?"},
    ]
    assert first.headers["x-session-id"] == second.headers["x-session-id"]
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    ask(page, "Other")
    is_done(page)
    assert server.seen[2].body["messages"] == [{"role": "user", "content": "Other"}]
    assert server.seen[2].headers["x-session-id"] != first.headers["x-session-id"]


def test_what_is_sent_and_the_figures(page: Page, server: ScriptedServer) -> None:
    ask(page, "Hello")
    is_done(page)
    assert server.seen[0].body == {
        "model": "kimi-vl-demo",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    figures = last_answer(page).locator(".figures")
    expect(figures).to_contain_text("1,200 prompt (135 image, 1,024 cached) · 20 thinking · 14 answer tokens")
    expect(figures).to_contain_text("first after")


def test_stop_keeps_what_has_come_and_closes_the_connection(page: Page, server: ScriptedServer) -> None:
    never = threading.Event()
    for press in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        server.scripts.append([Answer("Half an"), Pause(never), Answer(" answer")])
        ask(page, "Tell me")
        expect(last_answer(page).get_by_text("Half an")).to_be_visible()
        press()
        expect(last_answer(page).get_by_text("Stopped.")).to_be_visible()
        assert server.seen[-1].gone.wait(20)
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        expect(page.locator("#text")).to_be_focused()
    ask(page, "Go on")
    is_done(page)
    assert [message["content"] for message in server.seen[-1].body["messages"]] == [
        "Tell me",
        "Half an",
        "Tell me",
        "Half an",
        "Go on",
    ]


def test_an_answer_that_never_began_is_not_sent_back(page: Page, server: ScriptedServer) -> None:
    server.scripts.append([Thinking("only thinking"), Pause(threading.Event())])
    ask(page, "one")
    expect(said(page, "only thinking")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(said(page, "Stopped.")).to_be_visible()
    ask(page, "two")
    is_done(page)
    assert [message["content"] for message in server.seen[-1].body["messages"]] == ["one", "two"]


def test_an_earlier_message_is_edited_and_what_follows_is_dropped(page: Page, server: ScriptedServer) -> None:
    server.scripts += [[Answer("A1")], [Answer("A2")], [Answer("A3")]]
    for text in ("one", "two"):
        ask(page, text)
        is_done(page)
    page.locator("#text").fill("a draft")
    page.get_by_role("button", name="Edit and send again").first.click()
    expect(page.locator("#text")).to_have_value("one")
    page.keyboard.press("Escape")
    expect(page.locator("#text")).to_have_value("a draft")
    page.get_by_role("button", name="Edit and send again").first.click()
    ask(page, "one, changed")
    expect(said(page, "A3")).to_be_visible()
    assert server.seen[-1].body["messages"] == [{"role": "user", "content": "one, changed"}]
    expect(page.get_by_role("article", name="You")).to_have_count(1)
    expect(said(page, "A2")).to_have_count(0)
    expect(page.locator("#text")).to_have_value("a draft")


def test_an_answer_is_given_again(page: Page, server: ScriptedServer) -> None:
    server.scripts += [[Answer("old")], [Answer("new")]]
    ask(page, "one")
    expect(said(page, "old")).to_be_visible()
    page.get_by_role("button", name="Answer again").click()
    expect(said(page, "new")).to_be_visible()
    expect(said(page, "old")).to_have_count(0)
    assert server.seen[0].body == server.seen[1].body


def test_asking_anew_while_an_answer_comes_leaves_nothing_of_it(page: Page, server: ScriptedServer) -> None:
    never = threading.Event()
    server.scripts += [[Answer("late"), Pause(never)], [Answer("good")]]
    ask(page, "one")
    expect(said(page, "late")).to_be_visible()
    page.get_by_role("button", name="Edit and send again").click()
    assert server.seen[0].gone.wait(20)
    ask(page, "better")
    expect(said(page, "good")).to_be_visible()
    is_done(page)
    expect(said(page, "late")).to_have_count(0)
    expect(said(page, "Stopped.")).to_have_count(0)


def test_pieces_may_be_cut_anywhere_and_pings_are_nothing(page: Page, server: ScriptedServer) -> None:
    event = 'data: {"choices":[{"delta":{"content":"Grüße 🌙"}}]}\r\n\r\n'.encode()
    script = [piece for at in range(len(event)) for piece in (Raw(event[at : at + 1]), Pause(_soon()))]
    server.scripts.append([Raw(b": ping\n\n"), *script, Raw(b": ping\r\r")])
    ask(page, "?")
    expect(said(page, "Grüße 🌙")).to_be_visible()


def _soon() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_an_answer_is_copied_as_it_was_written(page: Page, server: ScriptedServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.scripts.append([Thinking("no"), Answer("**Bold** and `code`")])
    ask(page, "?")
    is_done(page)
    page.get_by_role("button", name="Copy the answer").click()
    expect(page.get_by_role("status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "**Bold** and `code`"


def test_what_can_be_done_with_an_earlier_answer_is_seen_where_one_looks(page: Page, server: ScriptedServer) -> None:
    for text in ("one", "two"):
        ask(page, text)
        is_done(page)
    first = page.get_by_role("article", name="Answer").first
    copy = first.get_by_role("button", name="Copy the answer")
    opacity = "(node) => getComputedStyle(node.closest('.actions')).opacity"
    assert copy.evaluate(opacity) == "0"
    first.hover()
    assert copy.evaluate(opacity) == "1"
    page.mouse.move(0, 0)
    assert copy.evaluate(opacity) == "0"
    copy.focus()
    assert copy.evaluate(opacity) == "1"
    assert last_answer(page).get_by_role("button", name="Answer again").evaluate(opacity) == "1"


def test_an_answer_that_is_cut_off_says_so(page: Page, server: ScriptedServer) -> None:
    server.finish_reason = "length"
    server.scripts.append([Answer("and then")])
    ask(page, "?")
    expect(said(page, "The answer is cut off")).to_be_visible()


def test_the_end_stays_in_sight_unless_the_reader_has_gone_elsewhere(page: Page, server: ScriptedServer) -> None:
    more, end = threading.Event(), threading.Event()
    lines = "".join(f"line {n}\n\n" for n in range(80))
    server.scripts.append([Answer(lines), Pause(more), Answer(lines), Pause(end), Answer("the end")])
    ask(page, "?")
    expect(said(page, "line 79")).to_be_in_viewport()
    page.evaluate("scrollBy(0, -1500)")
    expect(page.get_by_role("button", name="Go to the latest text")).to_be_visible()
    before = page.evaluate("scrollY")
    more.set()
    expect(said(page, "line 79")).to_have_count(2)
    assert page.evaluate("scrollY") == before
    page.get_by_role("button", name="Go to the latest text").click()
    end.set()
    expect(said(page, "the end")).to_be_in_viewport()
