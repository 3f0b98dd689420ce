"""Conversations as clients send them, through Cog's server: what they say reaches the model, or is refused by name."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from cog_local.client import Client

from .conftest import data_url, picture

SUM = "What is 12 + 30?"
THOUGHT = "The question is 12 + 30. Ones: 2 + 0 = 2. Tens: 1 + 3 = 4. So 42."


def predicted(client: Client, **inputs: Any) -> dict[str, Any]:
    response = client.predict({"temperature": 0, "max_length_tokens": 200, "output_format": "answer", **inputs})
    assert response["status"] == "succeeded", response
    return response


def said(client: Client, *messages: Any, **inputs: Any) -> tuple[str, int]:
    """The answer, and how many tokens the prompt has."""
    response = predicted(client, messages=list(messages), **inputs)
    return "".join(response["output"]), response["metrics"]["input_token_count"]


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 8, 12, 40])
def test_output_that_is_cut_has_whole_markers(client: Client, length: int) -> None:
    for form, opener, closer in (("text", "◁think▷", "◁/think▷"), ("think_tags", "<think>", "</think>")):
        output = "".join(
            predicted(client, prompt=SUM, max_length_tokens=length, output_format=form).get("output") or []
        )
        assert output.count(opener) == output.count(closer) <= 1
        rest = output.replace(opener, "", 1).replace(closer, "", 1)
        assert not any(piece in rest for piece in ("◁", "▷", "think", "\ufffd"))


def test_developer_is_system(client: Client) -> None:
    told = "You are a helpful assistant"
    plain = said(client, {"role": "user", "content": SUM})
    assert plain[0] == "12 + 30 = 42"
    for role in ("system", "developer"):
        assert said(client, {"role": role, "content": told}, {"role": "user", "content": SUM}) == plain


def test_null_is_absent(client: Client) -> None:
    plain = said(client, user(text(SUM)))
    nulls = {"image_url": None, "image": None, "cache_control": None}
    assert said(client, user({**text(SUM), **nulls})) == plain
    assert said(client, {**user(text(SUM)), "name": None, "tool_calls": None, "image_url": None}) == plain
    assert plain[0] == "12 + 30 = 42"


def test_thinking_in_history_is_left_out(client: Client) -> None:
    first, last = {"role": "user", "content": SUM}, {"role": "user", "content": "What is 12 + 31?"}
    answer = {"role": "assistant", "content": "12 + 30 = 42"}
    plain = said(client, first, answer, last)
    for opener, closer in (("◁think▷", "◁/think▷"), ("<think>", "</think>")):
        kept = opener + THOUGHT + closer + "12 + 30 = 42"
        parts = [text(kept[begin : begin + 5]) for begin in range(0, len(kept), 5)]
        for content in (kept, "\n " + kept, parts):
            assert said(client, first, {"role": "assistant", "content": content}, last) == plain
        cut = said(client, first, {"role": "assistant", "content": opener + THOUGHT}, last)
        assert cut[1] == said(client, first, {"role": "assistant", "content": ""}, last)[1]
    assert said(client, first, {**answer, "reasoning_content": THOUGHT}, last) == plain
    mentions = {"role": "assistant", "content": "A ◁/think▷ closes it; 12 + 30 = 42"}
    assert said(client, first, mentions, last)[1] > plain[1]


def test_images_of_other_apis(client: Client) -> None:
    ask = text("What colour is the object?")
    red = picture("red")
    encoded = base64.b64encode(red).decode()
    plain = said(client, user({"type": "image"}, ask), image=data_url(red))
    for part in (
        {"type": "image_url", "image_url": {"url": data_url(red), "detail": None}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}},
        {"type": "image", "base64": encoded},
        {"type": "image", "data": encoded, "mimeType": "image/png"},
        {"type": "input_image", "image_url": data_url(red)},
        {"inline_data": {"mime_type": "image/png", "data": encoded}},
    ):
        assert said(client, user(part, ask)) == plain


def test_an_image_without_a_text_is_answered_in_both_forms(client: Client) -> None:
    red = data_url(picture("red"))
    by_prompt = predicted(client, image=red)
    by_messages = predicted(client, messages=[user({"type": "image"})], image=red)
    assert "".join(by_prompt["output"]) == "".join(by_messages["output"]) != ""
    assert by_prompt["metrics"]["input_token_count"] == by_messages["metrics"]["input_token_count"]


PATH = "/etc/hostname"


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"role": "User", "content": "hi"}], "E_MESSAGES_INVALID"),
        ([{"role": "human", "content": "hi"}], "E_MESSAGES_INVALID"),
        ([{"role": "", "content": "hi"}], "E_MESSAGES_INVALID"),
        ([{"role": "<|im_user|>", "content": "hi"}], "E_MESSAGES_INVALID"),
        ([{"role": None, "content": "hi"}], "E_MESSAGES_INVALID"),
        ([{"role": "tool", "content": "hi"}], "E_MESSAGES_INVALID"),
        ([{"role": "user", "content": None}], "E_MESSAGES_INVALID"),
        ([{"role": "user", "content": ""}], "E_PROMPT_EMPTY"),
        ([{"role": "user", "content": " \n"}], "E_PROMPT_EMPTY"),
        ([user()], "E_PROMPT_EMPTY"),
        ([user(text(" "))], "E_PROMPT_EMPTY"),
        ([{"role": "system", "content": "Be brief."}], "E_PROMPT_EMPTY"),
        ([user(text("hi"), {"type": "image", "path": PATH})], "E_IMAGE_SOURCE"),
        ([user(text("hi"), {"type": "image", "source": {"type": "file", "file_id": "1"}})], "E_IMAGE_SOURCE"),
        ([user(text("hi"), {"type": "image", "blob": "AAAA"})], "E_MESSAGES_INVALID"),
    ],
    ids=json.dumps,
)
def test_what_says_nothing_or_is_not_understood(client: Client, messages: Any, code: str) -> None:
    beside: list[dict[str, Any]] = [{}, {"image": data_url(picture())}] if code == "E_IMAGE_SOURCE" else [{}]
    for image in beside:
        response = client.predict({"messages": messages, **image})
        assert response["status"] == "failed"
        assert f"{code}: " in response["error"] and "hostname" not in response["error"]
