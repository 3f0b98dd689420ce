"""Whatever is sent within the schema, or near it, gets an answer or an error of a promised form, and the server lives.

A few hundred requests; KIMI_VL_FUZZ=20000 sends so many, of other kinds in every run.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from cog_local.client import Client, RequestRefused
from cog_local.server import Server
from kimi_vl.text.tokenizer import Tokenizer

from .conftest import data_url, picture, worker_of
from .scripted import CHECKPOINT
from .test_server import METRICS

EXAMPLES = int(os.environ.get("KIMI_VL_FUZZ", "0"))
NAMES = list(Tokenizer.from_directory(CHECKPOINT).named)
PROMISED = {
    "E_PROMPT_EMPTY", "E_PROMPT_TOO_LONG", "E_MESSAGES_INVALID", "E_PARAMETER", "E_IMAGE_UNREADABLE", "E_IMAGE_FORMAT",
    "E_IMAGE_TOO_LARGE", "E_TOO_MANY_IMAGES", "E_IMAGE_SOURCE",
    "E_VIDEO_SOURCE", "E_VIDEO_FORMAT", "E_VIDEO_UNREADABLE",
    "E_DOCUMENT_SOURCE", "E_DOCUMENT_FORMAT", "E_DOCUMENT_UNREADABLE", "E_GRAMMAR",
}  # fmt: skip
MARKERS = {"text": ("◁think▷", "◁/think▷"), "think_tags": ("<think>", "</think>")}
LIMITS = ("max_length_tokens", "max_tokens", "max_new_tokens")
UNLIKELY = ("video", "document", "fps", "start", "end", "pages")
"""Inputs of which hardly a drawn value is right."""
ASKING = ("prompt", "system_prompt", "messages", "image", "images")

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["What is the result?", "◁think▷", "a,b", "\n", "é" * 300, "🧑‍🚀", "\u202e", "1e5", "null", *NAMES]
    ),
    st.lists(st.sampled_from([*NAMES, " ", "x", "◁/think▷"]), max_size=6).map("".join),
)
GOOD_FILES = [data_url(picture(size=size)) for size in ((40, 30), (1, 1), (300, 5))]
BAD_FILES = [
    data_url(b"no picture"), data_url(picture()[:50]), "data:,", "data:image/png;base64,%%%", "/etc/hostname", "", "x",
    "file:///etc/hostname", "http://127.0.0.1:1/x.png", data_url(b"<svg/>", "image/svg+xml"), "data:image/png;base64",
]  # fmt: skip
SCHEMAS = st.sampled_from(["", "{}", '{"type": "object"}', '{"type": "integer"}', '{"enum": ["yes", "no"]}'])
FILES = st.one_of(st.sampled_from(GOOD_FILES), st.sampled_from(BAD_FILES), st.text(max_size=10))
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)

IMAGE_PARTS = st.one_of(
    st.just({"type": "image"}),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, FILES),
    st.builds(lambda url: {"type": "image", "image": url}, FILES),
    st.builds(lambda url: {"type": "image_url", "image_url": url}, ANYTHING),
)
PARTS = st.one_of(st.builds(lambda text: {"type": "text", "text": text}, TEXTS), IMAGE_PARTS, ANYTHING)
CONTENTS = st.one_of(TEXTS, st.lists(PARTS, max_size=3), ANYTHING)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "<|im_end|>", ""]) | ANYTHING
GOOD_MESSAGES = st.builds(lambda content: {"role": "user", "content": content}, TEXTS)
MESSAGES = st.one_of(
    GOOD_MESSAGES,
    st.fixed_dictionaries({}, optional={"role": ROLES, "content": CONTENTS, "name": ANYTHING}),
    st.dictionaries(st.text(max_size=8), ANYTHING, max_size=3),
)


def numbers(field: dict[str, Any], name: str) -> SearchStrategy[Any]:
    """Values inside the bounds of the schema, on them, and beyond; token limits stay small, or are far too large."""
    low, high = field.get("minimum"), field.get("maximum")
    if name in LIMITS:
        return st.integers(1, 10) | st.sampled_from([0, -1, 4.0, 2.5, 131_073, 10**20])
    least = -(10**20) if low is None else low
    most = 10**20 if high is None else high
    inside = st.integers(least, most) | st.integers(least, min(most, least + 60))
    if field["type"] == "number":
        inside = inside | st.floats(least, most)
    edges = [
        value for bound in (low, high) if bound is not None for value in (bound, bound - 1, bound + 1, bound - 0.5)
    ]
    return inside | st.sampled_from([*edges, 0, 0.0, 7.0, 2.5, 1e300, 2**63, 2**64])


def values(name: str, field: dict[str, Any], schemas: dict[str, Any]) -> SearchStrategy[Any]:
    """What to send for one input, by what the served schema says of it."""
    if "allOf" in field:
        field = {**schemas[field["allOf"][0]["$ref"].rpartition("/")[2]], **field}
    if name == "json_schema":
        good: SearchStrategy[Any] = SCHEMAS | TEXTS
    elif "enum" in field:
        good = st.sampled_from(field["enum"])
    elif field["type"] in ("integer", "number"):
        good = numbers(field, name)
    elif field["type"] == "array":
        good = st.lists(FILES if field["items"].get("format") == "uri" else MESSAGES, max_size=4)
    else:
        assert field["type"] == "string"
        good = FILES if field.get("format") == "uri" else TEXTS
    # one input in twenty is not of its type at all
    return st.integers(0, 19).flatmap(lambda dice: good if dice else ANYTHING)


def right_values(name: str, field: dict[str, Any], schemas: dict[str, Any]) -> SearchStrategy[Any]:
    """What nobody should refuse."""
    if name == "json_schema":
        return SCHEMAS
    if "allOf" in field:
        return st.sampled_from(schemas[field["allOf"][0]["$ref"].rpartition("/")[2]]["enum"])
    if field["type"] == "integer":
        return st.integers(field.get("minimum", 0), field.get("maximum", 2**63)) | st.integers(0, 20)
    if field["type"] == "number":
        return st.floats(field["minimum"], field["maximum"])
    if field["type"] == "array":
        return st.lists(st.sampled_from(GOOD_FILES), max_size=3)
    return st.sampled_from(GOOD_FILES) if field.get("format") == "uri" else st.text(max_size=20)


@st.composite
def requests(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """A request in which most is right: where all is wrong, the first mistake hides the others."""
    schemas = document["components"]["schemas"]
    fields = schemas["Input"]["properties"]
    every = {name: values(name, field, schemas) for name, field in fields.items()}
    right = {
        name: right_values(name, field, schemas)
        for name, field in fields.items()
        if name not in (*LIMITS, *ASKING, *UNLIKELY)  # a length that nobody should refuse could take minutes
    }
    request: dict[str, Any] = {
        "max_length_tokens": draw(st.integers(1, 10)),
        "output_format": draw(right["output_format"]),
    }
    if draw(st.integers(0, 2)):
        request["prompt"] = draw(st.sampled_from(["Hello.", "What is the result?", *NAMES]))
        request |= draw(st.sampled_from([{}, {"image": GOOD_FILES[0]}, {"images": GOOD_FILES[:2]}]))
    else:
        request["messages"] = draw(st.lists(GOOD_MESSAGES | MESSAGES, min_size=1, max_size=3))
    if draw(st.booleans()):
        request["output_format"] = draw(right["output_format"])
    for name in draw(st.lists(st.sampled_from(sorted(right)), max_size=4)):
        request[name] = draw(right[name])
    for name in draw(st.lists(st.sampled_from([*every, *ASKING]), max_size=3)):
        request[name] = draw(every[name])
    return request


def check(inputs: dict[str, Any], body: dict[str, Any]) -> str:
    """The kind of an ended prediction, once it has been found to be of a promised form."""
    if body["status"] == "failed":
        error = body["error"]
        if "Input validation error: " in error:
            assert {"image", "images", "video", "document"} & inputs.keys(), (
                "only what Cog itself cannot fetch or decode"
            )
            return "not fetched"
        found = re.search(r"\b(E_[A-Z_]+): [^\n]*\.$", error)
        assert found and found[1] in PROMISED, error
        assert "Traceback" not in error and "hostname" not in error and "/tmp" not in error
        return found[1]
    assert body["status"] == "succeeded"
    text = "".join(body["output"])
    text.encode("utf-8")
    assert METRICS.keys() <= body["metrics"].keys()
    metrics = body["metrics"]
    assert 1 <= metrics["output_token_count"] <= 8192
    form = inputs.get("output_format", "text")
    if form == "json":
        lines = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
        done = lines.pop()
        assert done["type"] == "done" and done["seed"] == metrics["seed"]
        for kind, whole in (("reasoning", done["reasoning"]), ("answer", done["answer"])):
            assert "".join(line["text"] for line in lines if line["type"] == kind) == whole
    elif form.startswith("grounding"):
        found = json.loads(text)
        assert text.count("\n") == 1 and all(each["span"][1] <= len(found["answer"]) for each in found["findings"])
        assert ("images" in found) == (form == "grounding_image")
    elif form in MARKERS:
        opener, closer = MARKERS[form]
        assert closer in text or not text.startswith(opener)
    return f"answer as {form}"


def send(client: Client, inputs: dict[str, Any], streamed: bool) -> str:
    try:
        if not streamed:
            return check(inputs, client.predict(inputs))
        events = list(client.stream(inputs))
    except RequestRefused as refusal:
        assert refusal.status == 422, refusal.body
        assert refusal.body["detail"]
        for detail in refusal.body["detail"]:
            assert detail["loc"][:2] == ["body", "input"] and detail["msg"] and detail["type"]
        return "422"
    final = events[-1]
    assert (events[0].name, final.name) == ("start", "completed")
    chunks = [event.data["chunk"] for event in events if event.name == "output"]
    assert chunks == (final.data.get("output") or [])
    return check(inputs, final.data)


def test_every_request_gets_an_answer_or_an_error_of_a_promised_form(server: Server) -> None:
    client = server.client
    kinds: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES or 250,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate] if EXAMPLES else [Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(requests(client.schema()), st.booleans())
    def one(inputs: dict[str, Any], streamed: bool) -> None:
        kinds[send(client, inputs, streamed)] += 1
        if EXAMPLES and kinds.total() % 500 == 0:
            print(f"{kinds.total()} requests: {dict(kinds.most_common())}", flush=True)

    worker = worker_of(server)
    one()
    client.settle()
    assert client.health()["status"] == "READY"
    assert worker_of(server) == worker, "the worker is the same"
    answers = {f"answer as {form}" for form in (*MARKERS, "answer", "json", "grounding", "grounding_image")}
    assert answers | {"422", "E_PARAMETER", "E_PROMPT_EMPTY", "E_IMAGE_SOURCE", "E_MESSAGES_INVALID"} <= kinds.keys()


BODIES = st.one_of(
    st.binary(max_size=200),
    ANYTHING.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.sampled_from(["id", "input", "webhook", "webhook_events_filter", "context", "output"]), ANYTHING, max_size=3
    ).map(lambda value: json.dumps({**value, "webhook": 3} if "webhook" in value else value).encode()),
)


@pytest.fixture
def strangers(server: Server) -> Iterator[Client]:
    yield server.client
    assert server.client.health()["status"] in ("READY", "BUSY")


def test_bodies_of_any_kind_are_answered(strangers: Client) -> None:
    statuses: Counter[int] = Counter()

    @settings(max_examples=100, derandomize=True, database=None, deadline=None)
    @given(BODIES)
    def one(body: bytes) -> None:
        connection = http.client.HTTPConnection(strangers.host, strangers.port, timeout=300)
        try:
            connection.request("POST", "/predictions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
        statuses[response.status] += 1
        assert response.status < 500

    one()
    assert {200, 400, 422} <= statuses.keys()


def test_a_file_in_every_form_of_base64_is_answered(strangers: Client) -> None:
    content = base64.b64encode(picture()).decode()
    for spoiled in (content[:-1], content + "=", content.replace("A", "-"), content[:40] + "\n" + content[40:], "é"):
        inputs = {"prompt": "Hello.", "max_length_tokens": 4, "image": "data:image/png;base64," + spoiled}
        assert send(strangers, inputs, streamed=False)
