"""Whatever is sent to `/v1/chat/completions`, the answer is one of OpenAI's types or an error of the promised form.

A hundred requests; KIMI_VL_FUZZ=20000 sends so many, of other kinds in every run.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image

from kimi_vl.serving.protocol import IGNORED, READ, UNSUPPORTED

from .conftest import ServerThread, until

EXAMPLES = int(os.environ.get("KIMI_VL_FUZZ", "100"))
ERROR_TYPES = {"invalid_request_error", "rate_limit_error"}


def picture(size: tuple[int, int]) -> str:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["What is 12 + 30?", "◁think▷", "◁/think▷", "<|im_end|>", "<|media_pad|>", "\n", "é" * 300, "\0"]),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
URLS = st.sampled_from(
    [
        picture((40, 30)), picture((1, 1)), picture((300, 5)), picture((40, 30))[:90], "data:,", "/etc/hostname", "",
        "data:image/png;base64,%%%", "http://127.0.0.1:1/x.png", "file:///etc/hostname", "data:video/mp4;base64,AAAA",
        "data:application/pdf;base64,JVBERi0=",
    ]
)  # fmt: skip
PART_TYPES = ("text", "refusal", "input_text", "image_url", "input_image", "image", "video_url", "file", "input_file")
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url, "detail": "high"}}, URLS),
    st.builds(lambda url: {"type": "image_url", "image_url": url}, URLS | ANYTHING),
    st.builds(lambda kind, what: {"type": kind, kind: what}, st.sampled_from(PART_TYPES), URLS | ANYTHING),
    ANYTHING,
)
MESSAGES = st.one_of(
    st.builds(lambda text: {"role": "user", "content": text}, TEXTS),
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer"])},
        optional={
            "content": TEXTS | st.lists(PARTS, max_size=3),
            "reasoning_content": TEXTS | ANYTHING,
            "partial": st.booleans() | ANYTHING,
            "name": ANYTHING,
        },
    ),
    st.dictionaries(st.text(max_size=8), ANYTHING, max_size=3),
    ANYTHING,
)
TRUTH = st.booleans()
SCHEMAS = st.sampled_from([{}, {"type": "boolean"}, {"enum": ["a", 1]}, {"not": {}}, {"type": "x"}, {"$ref": "#/a"}])
GOOD: dict[str, SearchStrategy[Any]] = {
    "model": st.sampled_from(["kimi-vl-demo", "API-Kimi-VL", "other"]),
    "messages": st.lists(MESSAGES, max_size=4),
    "stream": TRUTH,
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": TRUTH}),
    "temperature": st.floats(-0.1, 2.1),
    "top_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-2, 100),
    "seed": st.integers(-(2**65), 2**65),
    "n": st.integers(0, 9),
    "stop": TEXTS | st.lists(TEXTS, max_size=70),
    "logprobs": TRUTH,
    "top_logprobs": st.integers(-1, 21),
    "logit_bias": st.dictionaries(st.integers(-1, 2000).map(str) | TEXTS, st.floats(-101, 101), max_size=4),
    "reasoning_effort": st.sampled_from(["none", "minimal", "low", "medium", "high", "xhigh", "max", "most"]),
    "thinking": st.fixed_dictionaries(
        {}, optional={"type": st.sampled_from(["enabled", "disabled"]), "budget_tokens": st.integers(-1, 9)}
    ),
    "reasoning": st.fixed_dictionaries(
        {}, optional={"effort": st.just("low"), "max_tokens": st.integers(0, 9), "enabled": TRUTH, "exclude": TRUTH}
    ),
    "chat_template_kwargs": st.fixed_dictionaries({}, optional={"enable_thinking": TRUTH, "thinking": TRUTH}),
    "response_format": st.one_of(
        st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}]),
        st.builds(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}, SCHEMAS),
    ),
    "structured_outputs": st.one_of(
        st.builds(lambda schema: {"json": schema}, SCHEMAS),
        st.builds(lambda text: {"regex": text}, st.sampled_from(["[ab]+", "(", "a{3}"]) | TEXTS),
        st.builds(lambda texts: {"choice": texts}, st.lists(TEXTS, max_size=3)),
    ),
    "modalities": st.lists(st.sampled_from(["text", "audio"]), max_size=2),
    "media_io_kwargs": st.just({"video": {"fps": 2, "num_frames": 4}}),
    "tools": st.lists(ANYTHING, max_size=1),
    "tool_choice": st.sampled_from(["none", "auto", "required"]),
    "functions": st.lists(ANYTHING, max_size=1),
    "function_call": st.sampled_from(["none", "auto"]),
    **dict.fromkeys(("max_completion_tokens", "max_tokens", "max_new_tokens"), st.integers(0, 9)),
    **dict.fromkeys(("thinking_budget", "thinking_token_budget"), st.integers(-1, 9)),
    **dict.fromkeys(("enable_thinking", "include_reasoning", "separate_reasoning", "continue_final_message"), TRUTH),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), st.sampled_from([0, 0.0, 1])),
    "repetition_penalty": st.sampled_from([1, 1.0, 2]),
    "kimi_vl": st.fixed_dictionaries({}, optional={"grounding": TRUTH, "findings": TRUTH}),
}  # fmt: skip
"""For each field that is read, values of its type, within its bounds and just beyond."""

BASE = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 6}


def field(name: str) -> SearchStrategy[Any]:
    """One value in ten is not of its type at all."""
    good = GOOD.get(name, ANYTHING)
    return st.integers(0, 9).flatmap(lambda dice: good if dice else ANYTHING)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(READ | IGNORED | UNSUPPORTED)), max_size=6, unique=True))
    return {**BASE, **{name: draw(field(name)) for name in names}}


def test_every_field_that_is_read_has_its_values() -> None:
    assert GOOD.keys() == READ


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[int]]:
    seen: Counter[int] = Counter()
    yield seen
    assert seen[200] and seen[400], f"not all kinds of answers were seen: {seen}"


def check_error(answered: dict[str, Any]) -> None:
    assert answered.keys() == {"error"}
    error = answered["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] in ERROR_TYPES and error["code"] and error["message"].strip()
    assert error["param"] is None or isinstance(error["param"], str)


def check_stream(text: str) -> None:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events[-1]
    for event in events[:-1]:
        ChatCompletionChunk.model_validate(json.loads(event))


@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)
@given(body=bodies())
def test_whatever_is_sent_is_answered_or_refused(
    http: httpx.Client, counts: Counter[int], body: dict[str, Any]
) -> None:
    content = json.dumps(body).encode()
    answered = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    counts[answered.status_code] += 1
    assert answered.status_code in (200, 400, 404), answered.text
    if answered.status_code != 200:
        check_error(answered.json())
    elif answered.headers["content-type"].startswith("text/event-stream"):
        check_stream(answered.text)
    else:
        ChatCompletion.model_validate(answered.json())


@settings(max_examples=EXAMPLES // 2 or 1, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, content: bytes) -> None:
    for route in ("/v1/chat/completions", "/tokenize", "/detokenize"):
        answered = http.post(route, content=content, headers={"Content-Type": "application/json"})
        assert 400 <= answered.status_code < 500, answered.text
        check_error(answered.json())


def test_nothing_is_left_of_all_that(demo: ServerThread, http: httpx.Client) -> None:
    until(demo.idle)
    assert http.get("/health").status_code == 200
