"""Answers and chunks put together from events: in any grouping the same text, and each one of OpenAI's types."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from kimi_vl.events import Answer, Done, Event, Reasoning, TokenLogprob, Usage
from kimi_vl.serving.errors import ApiError, bad_request
from kimi_vl.serving.protocol import ReasoningForm
from kimi_vl.serving.responses import Chunks, Head, completion, error_event, usage
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN

FORMS: tuple[ReasoningForm, ...] = ("separate", "inline", "omitted")
TOKEN = TokenLogprob(5, b"\xf0\x9f", -0.5, (TokenLogprob(5, b"\xf0\x9f", -0.5), TokenLogprob(6, b"a", float("-inf"))))


def head(form: ReasoningForm = "separate", field: str = "reasoning_content") -> Head:
    return Head("chatcmpl-1", 1, 'a "name"', "fp_1", form, field)


def done(reasoning: str = "", answer: str = "", **others: Any) -> Done:
    values = {"finish_reason": "stop", "thinking_closed_by": "model", "usage": Usage(10, 4, 7, 3, 2), "seed": 5}
    return Done(reasoning, answer, **{**values, "time_to_first_token": 0.25, "tokens_per_second": 9.0, **others})


def parsed(text: bytes) -> list[dict[str, Any]]:
    events = text.decode().split("\n\n")
    assert events.pop() == "" and all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def said(chunks: list[dict[str, Any]], field: str) -> str:
    return "".join(chunk["choices"][0]["delta"].get(field) or "" for chunk in chunks if chunk["choices"])


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(st.lists(TEXTS), st.lists(TEXTS), st.lists(st.integers(1, 4)), st.sampled_from(FORMS), st.booleans())
def test_a_stream_says_what_the_whole_answer_says(
    thinking: list[str], answer: list[str], groups: list[int], form: ReasoningForm, logprobs: bool
):
    tokens = (TOKEN,) if logprobs else ()
    events: list[Event] = [*map(Reasoning, thinking), *(Answer(text, tokens) for text in answer)]
    end = done("".join(thinking), "".join(answer), logprobs=tokens * len(answer))
    items = [(0, event) for event in [*events, end]]
    chunks = Chunks(head(form), include_usage=True)
    written = chunks.start(1)
    for size in groups:
        written += chunks.events(items[:size])
        items = items[size:]
    written += chunks.events(items) + chunks.usage([end])
    found = parsed(written)
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
    whole = completion(head(form), [end])
    ChatCompletion.model_validate(whole)
    message = whole["choices"][0]["message"]
    assert said(found, "content") == message["content"]
    assert said(found, "reasoning_content") == (message.get("reasoning_content") or "")
    streamed = [choice["logprobs"] or {"content": []} for chunk in found for choice in chunk["choices"]]
    expected = (whole["choices"][0]["logprobs"] or {"content": []})["content"]
    assert [token for each in streamed for token in each["content"]] == expected
    assert found[-1]["usage"] == whole["usage"] and found[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert found[-2]["choices"][0]["delta"] == {} and found[-2]["choices"][0]["finish_reason"] == "stop"


def test_the_three_places_of_thinking():
    messages = [completion(head(form), [done("why", "so")])["choices"][0]["message"] for form in FORMS]
    assert messages == [
        {"role": "assistant", "content": "so", "refusal": None, "reasoning_content": "why"},
        {"role": "assistant", "content": f"{THINK_OPEN}why{THINK_CLOSE}so", "refusal": None},
        {"role": "assistant", "content": "so", "refusal": None},
    ]
    renamed = completion(head(field="reasoning"), [done("why", "so")])["choices"][0]["message"]
    assert renamed["reasoning"] == "why" and "reasoning_content" not in renamed
    chunk = parsed(Chunks(head(field="reasoning"), False).events([(0, Reasoning("why"))]))[0]
    assert chunk["choices"][0]["delta"] == {"reasoning": "why"}


def test_neighbours_are_joined_by_choice_and_kind():
    chunks = Chunks(head(), include_usage=False)
    items: list[tuple[int, Event]] = [(0, Reasoning("a")), (1, Reasoning("x")), (0, Reasoning("b")), (0, Answer("c"))]
    found = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in parsed(chunks.events(items))]
    assert found == [(0, {"reasoning_content": "ab"}), (0, {"content": "c"}), (1, {"reasoning_content": "x"})]
    assert "usage" not in parsed(chunks.events(items))[0] and chunks.usage([done()]) == b""


def test_thinking_that_was_cut_off_is_closed_where_it_is_inline():
    chunks = Chunks(head("inline"), include_usage=False)
    found = parsed(chunks.events([(0, Reasoning("a")), (0, done("a", finish_reason="length"))]))
    assert said(found, "content") == f"{THINK_OPEN}a{THINK_CLOSE}"
    assert found[-1]["choices"][0]["finish_reason"] == "length"


def test_usage_of_several_choices():
    used = usage([done(usage=Usage(10, 4, 7, 3, 2)), done(usage=Usage(10, 4, 5, 1, 8))])
    assert used == {
        "prompt_tokens": 10,
        "completion_tokens": 12,
        "total_tokens": 22,
        "completion_tokens_details": {"reasoning_tokens": 4},
        "prompt_tokens_details": {"cached_tokens": 2, "image_tokens": 4},
    }


@pytest.mark.parametrize(("reason", "told"), [("stop", "stop"), ("stop_sequence", "stop"), ("length", "length")])
def test_reasons_to_end(reason: Any, told: str):
    assert completion(head(), [done(finish_reason=reason)])["choices"][0]["finish_reason"] == told


def test_log_probabilities_are_valid_json():
    found = completion(head(), [done(answer="a", logprobs=(TOKEN,))])["choices"][0]["logprobs"]
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "content": [
            {
                "token": "�",
                "logprob": -0.5,
                "bytes": [240, 159],
                "top_logprobs": [
                    {"token": "�", "logprob": -0.5, "bytes": [240, 159]},
                    {"token": "a", "logprob": -9999.0, "bytes": [97]},
                ],
            }
        ],
        "refusal": None,
    }


def test_an_error_in_a_stream():
    [event] = parsed(error_event(bad_request("a.b", "say it right.")))
    expected = {"message": "say it right.", "type": "invalid_request_error", "param": "a.b", "code": "e_parameter"}
    assert event == {"error": expected}
    assert ApiError(500, "x").object() == json.loads(ApiError(500, "x").body())


def test_places_are_found_when_they_are_asked_for():
    answer = '{"bbox_2d": [0.1, 0.2, 0.5, 0.5], "label": "dog"}'
    end = done(answer=answer, image_sizes=((100, 50),))
    asked = dataclasses.replace(head(), grounding=True)
    whole = completion(asked, [end])["choices"][0]["kimi_vl"]["grounding"]
    streamed = parsed(Chunks(asked, include_usage=False).events([(0, Answer(answer)), (0, end)]))
    assert streamed[-1]["choices"][0]["kimi_vl"]["grounding"] == whole
    assert whole["unit"] == "relative" and whole["findings"][0]["box"] == [10.0, 10.0, 50.0, 25.0]
    later = done(answer=answer, image_sizes=((100, 50), (200, 100)), asked_image=1)
    [finding] = completion(asked, [later])["choices"][0]["kimi_vl"]["grounding"]["findings"]
    assert (finding["image"], finding["box"]) == (1, [20.0, 20.0, 100.0, 50.0])
    assert "grounding" not in completion(head(), [end])["choices"][0]["kimi_vl"]
    without_picture = completion(asked, [done(answer=answer)])["choices"][0]["kimi_vl"]
    assert without_picture["grounding"] == {"unit": None, "findings": []}
