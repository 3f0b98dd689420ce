"""The real client of OpenAI's API against the server: every answer and every chunk is one of its types."""

from __future__ import annotations

from typing import Any

import httpx
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from .conftest import ask, user

SUM = user("What is 12 + 30?")


def thinking_of(said: Any) -> str:
    """What a message or a delta has of the thinking."""
    return (said.model_extra or {}).get("reasoning_content") or ""


def test_an_answer_has_thinking_and_usage(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="kimi-vl-demo", messages=SUM, temperature=0)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    message = answer.choices[0].message
    assert message.content == "12 + 30 = 42" and "So 42." in thinking_of(message)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "kimi-vl-demo" and answer.id.startswith("chatcmpl-")


def test_a_stream_is_the_same_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="kimi-vl-demo", messages=SUM, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="kimi-vl-demo", messages=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    first, *deltas, last, used = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert used.choices == [] and used.usage is not None
    assert whole.usage and used.usage.completion_tokens == whole.usage.completion_tokens
    assert last.choices[0].finish_reason == "stop" and not last.choices[0].delta.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in deltas)
    thinking = "".join(thinking_of(chunk.choices[0].delta) for chunk in deltas)
    assert text == whole.choices[0].message.content
    assert thinking == thinking_of(whole.choices[0].message)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["kimi-vl-demo"]
    assert client.models.retrieve("moonshotai/Kimi-VL-A3B-Thinking").id == "kimi-vl-demo"


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert ask(http).status_code == 200
