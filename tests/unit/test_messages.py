"""What messages say, however a client spells it: roles, nulls, texts, images and earlier thinking, at every way in."""

from __future__ import annotations

import base64
import builtins
import copy
import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import predict
from kimi_vl.errors import UserError
from kimi_vl.media.images import ImageOptions
from kimi_vl.pipeline import Pipeline
from kimi_vl.text import chat
from kimi_vl.text.messages import ImagePart, Turn, asked_image, asks_something, read
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN, answer_of
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
TOKENIZER = Tokenizer.from_directory(CHECKPOINT)

Asked = tuple[list[int], list[Any]]
Door = Callable[..., Asked]


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (56, 28), colour).save(stream, "PNG")
    return stream.getvalue()


RED, BLUE = png("red"), png("blue")
RED64 = base64.b64encode(RED).decode()
RED_URL = "data:image/png;base64," + RED64


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """A pipeline whose requests are not run: the ids and the patches for the engine are handed back."""
    whole = Pipeline(loader.load(CHECKPOINT, dtype=torch.float32), TOKENIZER, ImageOptions.from_directory(CHECKPOINT))
    whole.close()
    whole.engine = SimpleNamespace(model=whole.model, submit=lambda *request: request[:2])  # pyright: ignore[reportAttributeAccessIssue]
    return whole


@pytest.fixture(scope="module", params=["python", "cog"])
def door(request: pytest.FixtureRequest, pipeline: Pipeline) -> Door:
    """Both ways to the engine: the Python pipeline, and Cog's inputs, which have been JSON."""

    def by_python(messages: Any, images: Any = ()) -> Asked:
        return pipeline.submit(messages, images, lambda event: None)  # pyright: ignore[reportReturnType]

    def by_cog(messages: Any, images: Any = ()) -> Asked:
        files = []
        for number, image in enumerate(images):
            path = predict.Path(request.getfixturevalue("tmp_path_factory").mktemp("upload") / f"{number}.png")
            path.write_bytes(image)
            files.append(path)
        return by_python(*predict.build_chat("", "", json.loads(json.dumps(messages)), None, files))

    return by_python if request.param == "python" else by_cog


def text(content: Any) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


ASK = {"role": "user", "content": "What is 12 + 30?"}


def same(left: Asked, right: Asked) -> bool:
    """Whether two requests are the same to the engine."""
    images = [[(image.grid, image.digest) for image in asked[1]] for asked in (left, right)]
    return left[0] == right[0] and images[0] == images[1]


def refusal(door: Door, messages: Any, images: Any = ()) -> str:
    with pytest.raises(UserError) as caught:
        door(messages, images)
    assert "Traceback" not in str(caught.value) and caught.value.message.endswith(".")
    return caught.value.code


# Roles


def test_developer_is_system(door: Door) -> None:
    for place in (0, 1, 2):
        asked = []
        for role in ("system", "developer"):
            messages = [ASK, assistant("42"), {"role": "user", "content": "And 12 + 31?"}]
            messages.insert(place, {"role": role, "content": "Be brief."})
            asked.append(door(messages))
        assert same(*asked)
    (ids, _) = door([{"role": "developer", "content": "Be brief."}, ASK])
    told = TOKENIZER.decode(ids)
    assert told.startswith("<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>")
    assert told.count("<|im_system|>") == 1


@pytest.mark.parametrize(
    "role",
    [
        "User", "USER", "human", "usr", "asistant", "Assistant", "System", "Developer", "user ", " user", "user\n",
        "users", "model", "bot", "ai", "", " ", "\0", "<|im_user|>", "<|im_system|>", "[EOS]", "◁think▷", "ｕｓｅｒ",
        "us\u200ber", None, 3, True, [], {}, ["user"], {"role": "user"},
    ],
)  # fmt: skip
def test_other_roles_are_refused(door: Door, role: Any) -> None:
    for messages in ([{**ASK, "role": role}], [ASK, {**ASK, "role": role}, ASK]):
        assert refusal(door, messages) == "E_MESSAGES_INVALID"


@pytest.mark.parametrize("role", ["tool", "function"])
def test_tools_are_refused_by_name(door: Door, role: str) -> None:
    with pytest.raises(UserError, match=rf"^E_MESSAGES_INVALID: .*tools.*\b{role}\b"):
        door([ASK, {"role": role, "content": "42", "tool_call_id": "1"}])
    call = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": "{}"}}
    for content in (None, "", "I look it up."):
        with pytest.raises(UserError, match=r"^E_MESSAGES_INVALID: .*tools.*\btool_calls\b"):
            door([ASK, assistant(content, tool_calls=[call]), ASK])
        with pytest.raises(UserError, match=r"^E_MESSAGES_INVALID: .*tools.*\bfunction_call\b"):
            door([ASK, assistant(content, function_call=call["function"]), ASK])


def test_keys_that_say_nothing_to_the_model_are_let_pass(door: Door) -> None:
    extras = {"name": "x", "id": 3, "tool_calls": [], "annotations": [], "timestamp": 1.5, "metadata": {"a": 1}}
    messages = [ASK, assistant("42"), user({**text("Why?"), "cache_control": {"type": "ephemeral"}, "citations": []})]
    assert same(door([{**message, **extras} for message in messages]), door(messages))


# Messages that say nothing


SILENT: list[Any] = [
    [],
    [user()],
    [user(text(""))],
    [user(text(" "), text("\n\t"))],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": " \n\u3000"}],
    [{"role": "user", "content": ""}, {"role": "user", "content": []}],
    [{"role": "system", "content": "Be brief."}],
    [{"role": "developer", "content": "Be brief."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " "}],
    [{"role": "user", "content": ""}, assistant("")],
    [assistant("")],
    [assistant(None, reasoning="Hm.")],
    [ASK, assistant("42"), {"role": "user", "content": ""}],
    [ASK, assistant("42"), user()],
    [ASK, assistant("42"), assistant(" ")],
    [assistant("Hello!"), {"role": "user", "content": "  "}],
]


@pytest.mark.parametrize("messages", SILENT)
def test_messages_that_say_nothing(door: Door, messages: Any) -> None:
    assert refusal(door, messages) == "E_PROMPT_EMPTY"


@pytest.mark.parametrize(
    "messages",
    [
        [ASK],
        [user(text(""), text("Why?"))],
        [ASK, {"role": "user", "content": ""}],
        [ASK, assistant("")],
        [ASK, assistant("The answer")],
        [assistant("Once")],
        [ASK, assistant("42"), {"role": "system", "content": "Answer in French."}],
        [ASK, assistant("◁think▷cut off"), {"role": "user", "content": ""}],
        [user({"type": "image_url", "image_url": {"url": RED_URL}})],
        [user({"type": "image_url", "image_url": {"url": RED_URL}}), {"role": "user", "content": " "}],
    ],
)
def test_messages_that_say_something(door: Door, messages: Any) -> None:
    assert door(messages)[0]


def test_an_image_alone_is_asked_about_in_every_way(pipeline: Pipeline, door: Door, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    expected = door([user({"type": "image"})], [RED])
    assert len(expected[1]) == 1
    for prompt in ("", " "):
        by_prompt = predict.build_chat(prompt, "", [], predict.Path(tmp_path / "a.png"), [])
        asked = pipeline.submit(*by_prompt, lambda event: None)
        assert same(asked, door([user({"type": "image"}, text(prompt))], [RED]))  # pyright: ignore[reportArgumentType]
        assert prompt or same(asked, expected)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("prompt", ["", " ", "\n\n", "\u3000"])
def test_a_prompt_that_says_nothing(pipeline: Pipeline, prompt: str) -> None:
    for system in ("", "Be brief."):
        with pytest.raises(UserError, match=r"^E_PROMPT_EMPTY: "):
            pipeline.submit(*predict.build_chat(prompt, system, [], None, []), lambda event: None)


# Null is absent


FULL = [
    {"role": "system", "content": "Be brief."},
    user(text("What is"), {"type": "image_url", "image_url": {"url": RED_URL}}, text(" here?")),
    assistant("A thing."),
    user({"type": "image"}, {"text": "And here?"}),
]
KEYS = st.sampled_from(
    ["name", "id", "text", "content", "image", "image_url", "url", "path", "base64", "data", "source", "detail",
     "tool_calls", "function_call", "reasoning_content", "refusal", "images", "inline_data", "file", "cache_control",
     "role", "type"]
)  # fmt: skip


def places(messages: list[Any]) -> list[dict[str, Any]]:
    """Every object in messages."""
    found = []
    for message in messages:
        found.append(message)
        for part in message["content"] if isinstance(message["content"], list) else []:
            found += [part, *(value for value in part.values() if isinstance(value, dict))]
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), KEYS, st.sampled_from([None, {"url": None}, {}])), max_size=8))
@example([(place, "image_url", None) for place in range(20)])
@example([(place, "text", None) for place in range(20)])
def test_null_changes_nothing(nulls: list[tuple[int, str, Any]]) -> None:
    messages = copy.deepcopy(FULL)
    found = places(messages)
    for place, key, null in nulls:
        found[place % len(found)].setdefault(key, null)
    assert read(messages) == read(FULL)


def test_null_is_absent_at_every_way_in(door: Door) -> None:
    plain = door([user(text("What is 12 + 30?"))])
    for key in ("image_url", "image", "url", "source", "inline_data", "path", "cache_control"):
        assert same(door([user({**text("What is 12 + 30?"), key: None})]), plain)
        assert same(door([{**ASK, key: None, "name": None, "tool_calls": None}]), plain)
    shown = door([user({"type": "image"})], [RED])
    for key in ("image_url", "image", "url", "source", "path", "text"):
        assert same(door([user({"type": "image", key: None})], [RED]), shown)
        part = {"type": "image_url", "image_url": {"url": RED_URL, "detail": None}}
        assert same(door([user({**part, key: part.get(key)})]), shown)
    for missing in ("role", "content"):
        assert refusal(door, [{**ASK, missing: None}]) == "E_MESSAGES_INVALID"
    assert refusal(door, [user({"type": "image_url", "image_url": None})], [RED]) == "E_MESSAGES_INVALID"
    assert refusal(door, [user({"type": "text", "text": None})]) == "E_MESSAGES_INVALID"
    assert refusal(door, [user({"type": None, "text": None})]) == "E_MESSAGES_INVALID"


VALUES = st.one_of(
    st.none(), st.sampled_from(["", "words", RED_URL, RED64, "/etc/hostname", "text", "image", "image_url"]),
    st.integers(), st.booleans(), st.just([]), st.just({}),
    st.dictionaries(st.sampled_from(["url", "data", "type", "detail", "file_id"]), st.sampled_from([None, RED_URL, 3])),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.one_of(KEYS, st.text(max_size=4)), VALUES, max_size=5),
    st.sampled_from([None, "text", "image", "image_url", "input_text", "input_image", "video", 3]),
    st.sampled_from(["system", "user", "assistant"]),
)
def test_no_text_of_a_part_is_dropped_and_no_image_is_made_up(part: dict[str, Any], kind: Any, role: str) -> None:
    part = {**part, "type": kind}
    try:
        (turn,) = read([{"role": role, "content": [part]}])
    except UserError as error:
        assert error.code in ("E_MESSAGES_INVALID", "E_IMAGE_SOURCE", "E_VIDEO_SOURCE")
        return
    (said,) = turn.parts
    if part.get("text"):
        assert said == part["text"]
    if isinstance(said, ImagePart) and said.source is None:
        assert kind == "image" and not any(part.get(key) for key in part.keys() - {"type", "id", "detail"} - UNSAID)
    if isinstance(said, ImagePart) and said.source is not None:
        assert any(json.dumps(text)[1:-1] in json.dumps(part) for text in (said.source, said.source[13:]))


UNSAID = {"cache_control", "index", "width", "height"}


# Contents and parts


@pytest.mark.parametrize(
    "content",
    [
        None, 3, True, {"type": "text", "text": "hi"}, ["hi"], [None], [[]], [3], [{}], [{"type": "text"}],
        [{"type": "text", "text": 3}], [{"type": "text", "text": ["hi"]}], [{"type": "text", "content": "hi"}],
        [{"type": "Text", "text": "hi"}], [{"type": "markdown", "text": "hi"}], [{"type": 3, "text": "hi"}],
        [{"type": [], "text": "hi"}], [{"type": "video"}], [{"type": "file"}],
        [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
        [{"type": "document", "source": {"type": "text", "data": "hi"}}], [{"type": "tool_result", "content": "hi"}],
        [{"type": "text", "text": "hi", "image_url": {"url": RED_URL}}], [{"type": "image", "text": "hi"}],
        [{"type": "thinking", "thinking": "hm"}], [{"url": RED_URL}], [{"path": "/x.png"}],
    ],
)  # fmt: skip
def test_contents_that_are_not_understood(door: Door, content: Any) -> None:
    assert refusal(door, [{"role": "user", "content": content}], []) == "E_MESSAGES_INVALID"
    assert refusal(door, [ASK, {"role": "user", "content": content}], []) == "E_MESSAGES_INVALID"


@pytest.mark.parametrize("messages", ["hi", b"hi", {"role": "user", "content": "hi"}, None, 3, ["hi"], [None], [[]]])
def test_what_is_no_list_of_messages(pipeline: Pipeline, messages: Any) -> None:
    with pytest.raises(UserError, match=r"^E_MESSAGES_INVALID: "):
        pipeline.submit(messages, (), lambda event: None)


@pytest.mark.parametrize("key", ["images", "image", "image_url", "attachments", "experimental_attachments"])
def test_images_beside_the_content_are_refused_by_name(door: Door, key: str) -> None:
    with pytest.raises(UserError, match=rf"^E_MESSAGES_INVALID: {key} of a message"):
        door([{**ASK, key: [RED64]}])
    assert door([{**ASK, key: []}]) == door([ASK])


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text", None])
def test_texts_of_every_api(door: Door, kind: str | None) -> None:
    part = {"text": "What is 12 + 30?"} if kind is None else {"type": kind, "text": "What is 12 + 30?"}
    assert same(door([user(part)]), door([ASK]))
    assert same(door([user({"type": kind, "text": "What is "}, text("12 + 30?"))]), door([ASK]))


def test_a_refusal_is_what_the_assistant_said(door: Door) -> None:
    plain = door([ASK, assistant("I cannot."), ASK])
    assert same(door([ASK, assistant(None, refusal="I cannot."), ASK]), plain)
    assert same(door([ASK, assistant([{"type": "refusal", "refusal": "I cannot."}]), ASK]), plain)


# Images


SPELLINGS: dict[str, dict[str, Any]] = {
    "OpenAI": {"type": "image_url", "image_url": {"url": RED_URL}},
    "OpenAI, with detail": {"type": "image_url", "image_url": {"url": RED_URL, "detail": "low"}},
    "OpenAI, flat": {"type": "image_url", "image_url": RED_URL},
    "OpenAI, no type": {"image_url": {"url": RED_URL}},
    "OpenAI Responses": {"type": "input_image", "image_url": RED_URL, "detail": "auto", "file_id": None},
    "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED64}},
    "Anthropic, cached": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": RED64},
        "cache_control": {"type": "ephemeral"},
    },
    "Anthropic, by URL": {"type": "image", "source": {"type": "url", "url": RED_URL}},
    "transformers, base64": {"type": "image", "base64": RED64},
    "transformers, URL": {"type": "image", "url": RED_URL},
    "transformers, image": {"type": "image", "image": RED_URL},
    "MCP": {"type": "image", "data": RED64, "mimeType": "image/png"},
    "LangChain": {"type": "image", "source_type": "base64", "data": RED64, "mime_type": "image/png"},
    "Gemini": {"inline_data": {"mime_type": "image/png", "data": RED64}},
    "Gemini, camel case": {"inlineData": {"mimeType": "image/png", "data": RED64}},
    "Bedrock": {"image": {"format": "png", "source": {"bytes": RED64}}},
    "a data URL for base64": {"type": "image", "source": {"type": "base64", "data": RED_URL}},
    "url beside image_url": {"type": "image_url", "url": RED_URL},
    "line breaks": {"type": "image", "base64": base64.encodebytes(RED).decode()},
    "all the rest null": {
        "type": "image", "image": RED_URL, "image_url": None, "url": None, "path": None, "source": {"data": None},
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_images_of_every_api(door: Door, spelling: str) -> None:
    part = SPELLINGS[spelling]
    plain = door([user({"type": "image"}, text("What is it?"))], [RED])
    assert same(door([user(part, text("What is it?"))]), plain)
    assert refusal(door, [user(part, text("What is it?"))], [BLUE]) == "E_MESSAGES_INVALID", "another one is not shown"
    both = door([user({"type": "image"}, part, {"type": "image"})], [BLUE, BLUE])
    assert same(both, door([user(*[{"type": "image"}] * 3)], [BLUE, RED, BLUE]))


HERE = str(Path(__file__))
ELSEWHERE: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    {"type": "image_url", "image_url": "HTTP://example.org/a.png"},
    {"type": "image_url", "image_url": {"url": ""}},
    {"type": "image", "image": HERE},
    {"type": "image", "image": "file://" + HERE},
    {"type": "image", "url": HERE},
    {"type": "image", "path": HERE},
    {"type": "image", "source": HERE},
    {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
    {"type": "image", "source": {"type": "file", "file_id": "file-1"}},
    {"type": "image", "file": HERE},
    {"type": "image", "file": {"path": HERE}},
    {"type": "image", "file_path": HERE},
    {"type": "image", "image": RED64},
    {"type": "input_image", "file_id": "file-1"},
    {"type": "image", "file_uri": "gs://a/b.png"},
    {"image": {"format": "png", "source": {"s3Location": {"uri": "s3://a/b.png"}}}},
]


@pytest.mark.parametrize("part", ELSEWHERE, ids=json.dumps)
def test_images_elsewhere_are_neither_opened_nor_replaced(
    door: Door, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bare, images in ((0, []), (0, [BLUE]), (1, [BLUE])):
        messages = [user(part, text("What is it?"), *[{"type": "image"}] * bare)]
        assert refusal(door, messages, images) == "E_IMAGE_SOURCE"
    monkeypatch.setattr(builtins, "open", lambda *arguments, **options: pytest.fail("a file was opened"))
    with pytest.raises(UserError) as caught:
        door([user(part)])
    assert HERE not in str(caught.value) and "example.org" not in str(caught.value)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "blob": RED64},
        {"type": "image", "img": RED_URL},
        {"type": "image", "content": RED64},
        {"type": "image", "picture": {"url": RED_URL}},
        {"type": "image", "Image": RED_URL},
        {"type": "image", "image_data": RED64},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png"}},
        {"type": "image", "source": [RED64]},
        {"type": "image", "image": 3},
        {"type": "image", "image": False},
        {"type": "image", "image": {"image": {"image": {"image": {"url": RED_URL}}}}},
        {"type": "image", "image": RED_URL, "url": RED_URL},
        {"type": "image", "image": {"url": RED_URL, "data": RED64}},
        {"type": "image_url"},
        {"type": "image_url", "image_url": [RED_URL]},
        {"type": "image_url", "image_url": {"uri": 3, "url": RED_URL}},
        {"type": "input_image"},
        {"type": "image_file", "image_file": {"file_id": "file-1"}},
        {"type": "media", "mime_type": "image/png", "data": RED64},
        {"source": {"type": "base64", "media_type": "image/png", "data": RED64}},
    ],
    ids=json.dumps,
)
def test_images_that_are_not_understood_take_no_other_image(door: Door, part: dict[str, Any]) -> None:
    for images in ([], [BLUE]):
        assert refusal(door, [user(part, text("What is it?"))], images) == "E_MESSAGES_INVALID"


@pytest.mark.parametrize("data", ["@@@", "", "AAAA", base64.b64encode(RED[:40]).decode()])
def test_base64_that_holds_no_image(door: Door, data: str) -> None:
    assert refusal(door, [user({"type": "image", "base64": data})]).startswith("E_IMAGE_")


def test_bare_parts_may_have_what_describes_them(door: Door) -> None:
    plain = door([user({"type": "image"})], [RED])
    extras = {"detail": "high", "cache_control": {"type": "ephemeral"}, "max_pixels": 10**6, "index": 0, "text": ""}
    assert same(door([user({"type": "image", **extras})], [RED]), plain)


@pytest.mark.parametrize(("bare", "beside"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_bare_parts_and_images_are_equal_in_number(door: Door, bare: int, beside: int) -> None:
    messages = [user(text("Why?"), *[{"type": "image"}] * bare, {"type": "image", "base64": RED64})]
    assert refusal(door, messages, [BLUE] * beside) == "E_MESSAGES_INVALID"


def test_images_in_messages_count_for_the_limit(door: Door) -> None:
    assert refusal(door, [user(*[{"type": "image", "base64": "broken"}] * 65)]) == "E_TOO_MANY_IMAGES"


@pytest.mark.parametrize("key", ["image", "data", "path", "url"])
def test_values_of_a_program_are_images(pipeline: Pipeline, key: str, tmp_path: Path) -> None:
    def asked(messages: Any, images: Any = ()) -> Any:
        return pipeline.submit(messages, images, lambda event: None)

    (tmp_path / "a.png").write_bytes(RED)
    plain = asked([user({"type": "image"})], [RED])
    with Image.open(io.BytesIO(RED)) as opened:
        for value in (RED, bytearray(RED), tmp_path / "a.png", opened):
            assert same(asked([user({"type": "image", key: value})]), plain)
    with pytest.raises(UserError, match="E_MESSAGES_INVALID"):
        asked([user({"type": "image", key: object()})])


# Earlier thinking


def expected_answer(said: str) -> str:
    """The rule, character by character."""
    at = 0
    while at < len(said) and said[at].isspace():
        at += 1
    for opener, closer in ((THINK_OPEN, THINK_CLOSE), ("<think>", "</think>")):
        if said[at : at + len(opener)] == opener:
            for end in range(at + len(opener), len(said) + 1):
                if said[end : end + len(closer)] == closer:
                    return said[end + len(closer) :]
            return ""
    return said


HISTORIES = {
    "◁think▷x◁/think▷42": "42",
    "<think>x</think>42": "42",
    "<think>\nx\n</think>\n\n42": "\n\n42",
    " \n<think>x</think>42": "42",
    "\n◁think▷x◁/think▷ 42": " 42",
    "◁think▷cut off": "",
    "<think>cut off": "",
    "<think></think>42": "42",
    "◁think▷◁/think▷": "",
    "<think>": "",
    "<think>a ◁/think▷ b</think>42": "42",
    "◁think▷a </think> b◁/think▷42": "42",
    "<think>a</think>b</think>42": "b</think>42",
    "<think>a</think><think>b</think>42": "<think>b</think>42",
    "Use </think> to close it.": "Use </think> to close it.",
    "Use ◁/think▷ to close it.": "Use ◁/think▷ to close it.",
    "It begins with <think> and ends with </think>.": "It begins with <think> and ends with </think>.",
    "x◁think▷y◁/think▷z": "x◁think▷y◁/think▷z",
    "x</think>42": "x</think>42",
    "`<think>`x</think>": "`<think>`x</think>",
    "◁think": "◁think",
    "<thinking>x</thinking>42": "<thinking>x</thinking>42",
    "< think>x</think>42": "< think>x</think>42",
    "": "",
    " ": " ",
}


@pytest.mark.parametrize("said", HISTORIES)
def test_earlier_thinking_is_left_out(door: Door, said: str) -> None:
    kept = HISTORIES[said]
    plain = chat.encode(TOKENIZER, [ASK, assistant(kept), ASK], []), []
    assert same(door([ASK, assistant(said), ASK]), plain)
    assert same(door([ASK, assistant([text(said)]), ASK]), plain)
    assert same(door([ASK, assistant([text(letter) for letter in said]), ASK]), plain)
    told = TOKENIZER.decode(plain[0])
    assert f"assistant<|im_middle|>{kept}<|im_end|>" in told
    for role in ("user", "system"):
        assert f"{role}<|im_middle|>{said}<|im_end|>" in TOKENIZER.decode(
            door([{"role": role, "content": said}, ASK])[0]
        ), "others than the assistant are quoted"


PIECES = st.sampled_from(["<think>", "</think>", "◁think▷", "◁/think▷", "<thi", "◁", "x", "\n", " ", "42"])


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8), st.lists(st.integers(0, 30), max_size=6))
def test_the_answer_does_not_depend_on_the_parts(pieces: list[str], cuts: list[int]) -> None:
    said = "".join(pieces)
    ends = sorted({0, len(said), *(cut for cut in cuts if cut < len(said))})
    parts = tuple(said[begin:end] for begin, end in pairwise(ends))
    (turn,) = chat.without_earlier_thinking([Turn("assistant", parts)])
    assert turn.text == answer_of(said) == expected_answer(said)


def test_images_among_the_thinking_stay(door: Door) -> None:
    turn = Turn("assistant", ("<think>a", ImagePart(RED), "b</think>c", ImagePart(BLUE), "d"))
    (kept,) = chat.without_earlier_thinking([turn])
    assert [part for part in kept.parts if part] == [ImagePart(RED), "c", ImagePart(BLUE), "d"]


def test_what_the_service_writes_is_left_out_when_it_comes_back(door: Door) -> None:
    from kimi_vl.events import Answer, Done, Reasoning, Usage

    plain = door([ASK, assistant("42"), ASK])
    done = Done("Hm.", "42", "stop", "model", Usage(1, 0, 1, 1), 0, 0.0, 0.0)
    for form in ("text", "think_tags", "answer"):
        for events in ([Reasoning("H"), Reasoning("m."), Answer("4"), Answer("2"), done], [Answer("42"), done]):
            said = "".join(predict.format_events(iter(events), form))
            assert same(door([ASK, assistant(said), ASK]), plain)
        cut = "".join(predict.format_events(iter([Reasoning("Hm."), done]), form))
        assert same(door([ASK, assistant(cut), ASK]), door([ASK, assistant(""), ASK]))


@pytest.mark.parametrize(
    "message",
    [
        assistant("42", reasoning_content="Hm."),
        assistant("42", reasoning="Hm."),
        assistant("42", reasoning_content="Hm.", reasoning="Hm.", reasoning_details=[{"type": "reasoning.text"}]),
        assistant("42", reasoning_content=""),
        assistant([{"type": "thinking", "thinking": "Hm.", "signature": "x"}, text("42")]),
        assistant([{"type": "redacted_thinking", "data": "x"}, text("42")]),
        assistant([{"type": "reasoning", "text": "Hm."}, text("42")]),
    ],
)
def test_thinking_beside_the_answer_is_left_out(door: Door, message: dict[str, Any]) -> None:
    assert same(door([ASK, message, ASK]), door([ASK, assistant("42"), ASK]))
    assert same(door([ASK, message]), door([ASK, assistant("42")]))


def test_a_turn_of_nothing_but_thinking_is_empty(door: Door) -> None:
    plain = door([ASK, assistant(""), ASK])
    for key in ("reasoning", "reasoning_content"):
        assert same(door([ASK, assistant(None, **{key: "Hm."}), ASK]), plain)
        assert same(door([ASK, {"role": "assistant", key: "Hm."}, ASK]), plain)
    assert same(door([ASK, assistant("<think>Hm."), ASK]), plain)
    assert refusal(door, [ASK, assistant(None), ASK]) == "E_MESSAGES_INVALID"


@pytest.mark.parametrize("said", ["◁think▷Hm", "◁think▷Hm◁/think▷The", "<think>Hm</think>The", "The ◁think▷"])
def test_a_last_turn_keeps_its_thinking(door: Door, said: str) -> None:
    assert TOKENIZER.decode(door([ASK, assistant(said)])[0]).endswith("assistant<|im_middle|>" + said)


def test_what_was_read_is_read_again_unchanged() -> None:
    turns = read(FULL)
    assert read(turns) == turns
    assert asks_something(turns)
    assert chat.render(turns) == chat.render(FULL)


@pytest.mark.parametrize(
    ("kinds", "asked"),
    [
        ([["image"], ["document"]], None),
        ([["video"]], None),
        ([["document", "image"]], 0),
        ([["image", "image"], ["video"], ["image", "document"], []], 2),
        ([["video"], []], None),
    ],
)
def test_pages_and_frames_are_no_image_that_is_asked_about(kinds: list[list[str]], asked: int | None) -> None:
    """What is asked about a document is not about an image of an earlier message."""
    turns = read([{"role": "user", "content": [{"type": kind} for kind in each] or "Where?"} for each in kinds])
    assert asked_image(turns) == asked
