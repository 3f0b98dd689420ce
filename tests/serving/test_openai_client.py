"""The real clients of OpenAI's API, and the examples of the documents, against the server."""

from __future__ import annotations

import ast
import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from .conftest import PATIENCE_S, ROOT, ServerThread, thinking_of, user

SUM = user("What is 12 + 30?")


def test_an_answer_has_thinking_and_usage(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="kimi-vl-demo", messages=SUM, temperature=0)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    message = answer.choices[0].message
    assert message.content == "12 + 30 = 42" and "So 42." in thinking_of(message)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "kimi-vl-demo" and answer.id.startswith("chatcmpl-")
    assert answer.usage and answer.usage.prompt_tokens_details and answer.usage.completion_tokens_details
    assert answer.usage.completion_tokens_details.reasoning_tokens


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


def test_the_client_for_event_loops(demo: ServerThread) -> None:
    async def main() -> tuple[Any, ...]:
        async with AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            whole, other = await asyncio.gather(
                create(model="kimi-vl-demo", messages=SUM, temperature=0),
                create(model="kimi-vl-demo", messages=user("What is 1 + 1?"), temperature=0),
            )
            text = ""
            async for chunk in await create(model="kimi-vl-demo", messages=SUM, temperature=0, stream=True):
                text += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content, text, other.choices[0].message.content

    assert asyncio.run(main()) == ("12 + 30 = 42", "12 + 30 = 42", "1 + 1 = 2")


def test_models(client: OpenAI) -> None:
    [model] = client.models.list().data
    Model.model_validate(model.model_dump(), strict=True)
    assert model.id == "kimi-vl-demo" and (model.model_extra or {})["max_model_len"] == 8192
    assert client.models.retrieve("moonshotai/Kimi-VL-A3B-Thinking").id == "kimi-vl-demo"


def test_the_client_tries_again_only_where_it_helps(demo: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    from kimi_vl.engine.faults import Overloaded

    causes = {"queue": 2, "memory": 2, "deadline": 1}
    for cause, expected in causes.items():
        calls: list[str] = []

        def refuse(*_: object, cause: Any = cause, calls: list[str] = calls, **__: object) -> None:
            calls.append(cause)
            raise Overloaded("too much.", cause)

        monkeypatch.setattr(demo.pipeline, "submit", refuse)
        with demo.client(max_retries=1) as client, pytest.raises(APIStatusError):
            client.chat.completions.create(model="kimi-vl-demo", messages=SUM)
        assert len(calls) == expected, cause


# The examples of docs/openai.md and of the README

EXAMPLES = [
    (f"{page.name} {number}", *match.groups())
    for page in (ROOT / "docs" / "openai.md", ROOT / "README.md")
    for number, match in enumerate(re.finditer(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    if "localhost:8000" in match.group(2) and match.group(1) in ("python", "sh")
]


@pytest.mark.parametrize(("language", "code"), [example[1:] for example in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_an_example_gets_its_answer(demo: ServerThread, tmp_path: Path, language: str, code: str) -> None:
    code = code.replace("localhost:8000", demo.url.removeprefix("http://"))
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "example").write_text(code, encoding="utf-8")
    command = [sys.executable] if language == "python" else ["bash", "-euo", "pipefail"]
    ended = subprocess.run(
        [*command, str(tmp_path / "example")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    if "grounding" in code:
        assert isinstance(ast.literal_eval(ended.stdout.splitlines()[-1]), list), ended.stdout
    else:
        assert re.search("[=] (38|42)", ended.stdout), ended.stdout


def test_there_are_examples() -> None:
    assert sorted(language for _, language, _ in EXAMPLES).count("python") >= 3
    assert "sh" in [language for _, language, _ in EXAMPLES]


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json()["status"] == "ready"
    assert http.head("/health").status_code == 200
