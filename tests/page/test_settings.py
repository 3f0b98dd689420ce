"""Settings, the forms in which a request is copied, colours, and the schema of an answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from .conftest import png
from .reading import ask, is_done, last_answer
from .scripted import Answer, ScriptedServer, Thinking
from .test_media import FILM, PAPER
from .test_pictures import choose, file, waiting

SCHEMA = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}


def fill(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.get_by_role("dialog").locator(f"#{name.replace('_', '-')}").fill(value)


def test_what_is_set_is_sent_and_what_is_not_is_left_out(page: Page, server: ScriptedServer) -> None:
    fill(page, system="Be brief.", budget="256", max_tokens="900", temperature="0.25", top_p="0.9", seed="0")
    page.get_by_role("button", name="Close the settings").click()
    ask(page, "?")
    is_done(page)
    body = server.seen[0].body
    assert body.pop("messages") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    assert body == {
        "model": "kimi-vl-demo",
        "stream": True,
        "stream_options": {"include_usage": True},
        "thinking_budget": 256,
        "max_completion_tokens": 900,
        "temperature": 0.25,
        "top_p": 0.9,
        "seed": 0,
    }
    page.get_by_role("button", name="Thinking").click()
    ask(page, "?")
    is_done(page)
    assert server.seen[1].body["thinking_budget"] == 0
    fill(page)
    page.get_by_role("button", name="Reset the settings").click()
    page.keyboard.press("Escape")
    ask(page, "?")
    is_done(page)
    assert set(server.seen[2].body) == {"model", "messages", "stream", "stream_options"}
    assert server.seen[2].body["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("temperature", "3", "Temperature must be a number from 0 to 2."),
        ("budget", "1.5", "Thinking budget must be a whole number from 0 to 131,072."),
        ("seed", "-1", "Seed must be a whole number from 0 to 9,007,199,254,740,991."),
        ("schema", '{"type": ', "This is no JSON yet: look at its end, where something is missing."),
        ("schema", '{\n  "type": "object",\n  "a": [1, 2,]\n}', "This is no JSON yet: look at line 3, column 14."),
        ("schema", "[1]", "A JSON schema is an object: { … }."),
    ],
)
def test_a_wrong_value_is_said_at_once_and_not_sent(
    page: Page, server: ScriptedServer, field: str, value: str, problem: str
) -> None:
    fill(page, **{field: value})
    box = page.locator(f"#{field}")
    expect(page.locator(f"#{field}-problem")).to_contain_text(problem)
    expect(box).to_have_attribute("aria-invalid", "true")
    expect(box).to_have_accessible_description(re.compile(re.escape(problem)))
    page.keyboard.press("Escape")
    ask(page, "My question")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    expect(box).to_be_focused()
    box.fill("")
    expect(page.locator(f"#{field}-problem")).to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator("#text")).to_have_value("My question")
    assert server.seen == []


def test_an_answer_in_the_form_of_a_schema(page: Page, server: ScriptedServer) -> None:
    fill(page, schema=json.dumps(SCHEMA))
    expect(page.get_by_text("A grammar gives form, not sense")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="JSON schema")).to_be_visible()
    server.scripts.append([Thinking("38"), Answer('{"resu'), Answer('lt":38}')])
    ask(page, "?")
    is_done(page)
    assert server.seen[0].body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
    }
    assert last_answer(page).get_by_role("group", name="JSON").inner_text() == '{\n  "result": 38\n}'
    page.get_by_role("button", name="JSON schema").click()
    expect(page.locator("#schema")).to_be_focused()


def test_models_can_be_chosen_where_there_are_several(page: Page, server: ScriptedServer) -> None:
    server.models = ["one", "two"]
    page.reload()
    page.get_by_label("Model").select_option("two")
    ask(page, "?")
    is_done(page)
    assert server.seen[0].body["model"] == "two"


AWKWARD = 'It\'s "$HOME" `id` $(id) \\ 100% – ü 🌙\nJSON\n</script>'
NAME = 'it\'s $(touch hacked) "`id`".png'


def test_a_request_is_copied_for_curl_and_python_and_does_the_same(
    page: Page, server: ScriptedServer, tmp_path: Path
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    (tmp_path / NAME).write_bytes(png())
    (tmp_path / "clip.webm").write_bytes(FILM)
    (tmp_path / "report.pdf").write_bytes(PAPER)
    choose(
        page,
        file(NAME, png()),
        file("clip.webm", FILM, "video/webm"),
        file("report.pdf", PAPER, "application/pdf"),
    )
    expect(waiting(page)).to_have_count(3)
    fill(page, seed="7", budget="99", schema=json.dumps(SCHEMA), fps="2", pages="1")
    page.get_by_label("Draw the places that an answer names").check()
    page.keyboard.press("Escape")
    ask(page, AWKWARD)
    is_done(page)
    for name in ("curl", "Python"):
        page.get_by_role("button", name=f"Copy this request for {name}").click()
        expect(page.get_by_role("status")).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "base64," not in copied.replace("base64,$(base64", "").replace("base64,{data}", "")
        if name == "curl":
            command = ["bash", "-c", copied.replace("curl ", "curl --silent --noproxy '*' ", 1)]
        else:
            command = [sys.executable, "-c", copied]
        environment = {"PATH": "/usr/bin:/bin", "NO_PROXY": "*", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Here it is." in done.stdout
        assert server.seen[-1].body == server.seen[0].body
    assert len(server.seen) == 3
    assert {path.name for path in tmp_path.iterdir()} == {NAME, "clip.webm", "report.pdf"}
    assert server.seen[0].body["kimi_vl"] == {"grounding": True}


def test_the_key_is_not_written_into_what_is_copied(page: Page, server: ScriptedServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    fill(page, key="secret")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New chat").click()
    page.evaluate("sessionStorage.setItem('api-key', 'secret')")
    ask(page, "?")
    is_done(page)
    for name in ("curl", "Python"):
        page.get_by_role("button", name=f"Copy this request for {name}").click()
        expect(page.get_by_role("status")).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "KIMI_VL_API_KEY" in copied and "secret" not in copied
