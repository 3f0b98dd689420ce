"""Every field of a chat completion's body: taken, ignored, or refused with its path; and what stands next to each."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kimi_vl.serving.errors import ApiError
from kimi_vl.serving.protocol import (
    IGNORED,
    READ,
    SEEDS,
    UNSUPPORTED,
    ChatRequest,
    Fields,
    Rules,
    read_chat,
    read_estimated,
)
from kimi_vl.text import grammar
from kimi_vl.text.messages import ImagePart, Turn
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN

ASK = [{"role": "user", "content": "Hello?"}]


def read(rules: Rules = Rules(), **body: Any) -> ChatRequest:
    """The request of a body that has been through JSON."""
    return read_chat(json.loads(json.dumps({"messages": ASK, **body})), rules)


def refused(rules: Rules = Rules(), **body: Any) -> tuple[str | None, str | None]:
    """Param and code of a refusal, which is always a 400 with a sentence."""
    with pytest.raises(ApiError) as caught:
        read(rules, **body)
    error = caught.value
    assert error.status == 400 and error.type == "invalid_request_error"
    assert error.message.endswith(".") and "\n" not in error.message
    return error.param, error.code


def budget(**body: Any) -> int | None:
    return read(**body).params.get("thinking_budget")


# Taken


def test_defaults_are_those_of_the_pipeline():
    request = read()
    assert dict(request.params) == {"stop_sequences": ()}
    assert (request.model, request.n, request.stream, request.include_usage) == (None, 1, False, False)
    assert request.reasoning == "separate" and request.turns == (Turn("user", ("Hello?",)),)


def test_an_estimate_keeps_the_room_that_the_request_would():
    for name in ("max_completion_tokens", "max_tokens", "max_new_tokens"):
        assert read_estimated(Fields.of({name: 7})) == {"max_length_tokens": 7}
    assert read_estimated(Fields.of({"media_io_kwargs": {"video": {"fps": 2}}})) == {"fps": 2}


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ({"temperature": 0}, "temperature", 0),
        ({"temperature": 2.0}, "temperature", 2),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_p": 0}, "top_p", 0),
        ({"top_k": 7}, "top_k", 7),
        ({"top_k": 0}, "top_k", 0),
        ({"top_k": -1}, "top_k", 0),
        ({"max_tokens": 5}, "max_length_tokens", 5),
        ({"max_tokens": 5.0}, "max_length_tokens", 5),
        ({"max_tokens": 131072}, "max_length_tokens", 131072),
        ({"max_new_tokens": 5}, "max_length_tokens", 5),
        ({"max_completion_tokens": 7, "max_tokens": 5, "max_new_tokens": 3}, "max_length_tokens", 7),
        ({"max_completion_tokens": None, "max_tokens": 5, "max_new_tokens": 3}, "max_length_tokens", 5),
        ({"stop": "a"}, "stop_sequences", ("a",)),
        ({"stop": ["a", "b"]}, "stop_sequences", ("a", "b")),
        ({"stop": ["", "b"]}, "stop_sequences", ("b",)),
        ({"stop": ""}, "stop_sequences", ()),
        ({"stop": []}, "stop_sequences", ()),
        ({"stop": ["a"] * 64}, "stop_sequences", ("a",) * 64),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": None}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 20}, "logprobs", 20),
        ({"logit_bias": {"5": -100, "7": 0.5}}, "logit_bias", {5: -100, 7: 0.5}),
    ],
)
def test_what_is_taken(body: dict[str, Any], name: str, value: Any):
    assert read(**body).params[name] == value


@pytest.mark.parametrize("name", sorted(READ - {"messages"} | IGNORED | UNSUPPORTED))
def test_a_null_is_an_absent_field(name: str):
    assert read(Rules(), **{name: None}).params == read().params


@pytest.mark.parametrize("name", sorted(IGNORED))
@pytest.mark.parametrize("value", [True, "x", {"a": 1}, [1]], ids=str)
def test_what_is_ignored_may_be_anything(name: str, value: Any):
    request = read(**{name: value})
    assert request.params == read().params and request.unknown == ()


def test_unknown_keys_are_ignored_and_named():
    assert read(ignore_eos=True, zzz={"a": [1]}, user="x").unknown == ("ignore_eos", "zzz")


@pytest.mark.parametrize(
    ("given", "seed"), [(0, 0), (7, 7), (2**63 - 1, 2**63 - 1), (-1, SEEDS - 1), (-(2**63), 0), (5.0, 5)]
)
def test_any_64_bit_integer_is_a_seed(given: Any, seed: int):
    assert read(seed=given).seed == seed


def test_each_choice_has_a_seed_of_its_own():
    request = read(seed=SEEDS - 1, n=3)
    assert [request.params_of(choice)["seed"] for choice in range(3)] == [SEEDS - 1, 0, 1]
    assert {read().seed for _ in range(5)} != {read().seed}


def test_usage_in_a_stream():
    assert read(stream=True, stream_options={"include_usage": True}).include_usage
    others = {"include_obfuscation": True, "continuous_usage_stats": True}
    assert not read(stream=True, stream_options=others).include_usage
    assert not read(stream=True, stream_options={"include_usage": None}).include_usage


# The thinking


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "minimal"}, 256),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "medium"}, 4096),
        ({"reasoning_effort": "high"}, None),
        ({"reasoning_effort": "xhigh"}, None),
        ({"reasoning_effort": "max"}, None),
        ({"reasoning": {"effort": "low"}}, 1024),
        ({"reasoning": {"max_tokens": 9}}, 9),
        ({"reasoning": {"enabled": False}}, 0),
        ({"reasoning": {"enabled": True, "effort": "low"}}, None),
        ({"thinking": {"type": "disabled"}}, 0),
        ({"thinking": {"type": "enabled"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 9),
        ({"thinking": {"type": "enabled", "keep": None}}, None),
        ({"thinking_budget": 0}, 0),
        ({"thinking_budget": 9}, 9),
        ({"thinking_token_budget": 9}, 9),
        ({"enable_thinking": False}, 0),
        ({"enable_thinking": True}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"chat_template_kwargs": {"thinking": False}}, 0),
        ({"chat_template_kwargs": {"thinking": True, "other": [1]}}, None),
        # a number counts before an on or off, and that before an effort
        ({"thinking_budget": 9, "enable_thinking": False, "reasoning_effort": "low"}, 9),
        ({"enable_thinking": False, "reasoning_effort": "low"}, 0),
        ({"enable_thinking": True, "reasoning_effort": "none"}, None),
        ({"thinking": {"type": "disabled"}, "thinking_token_budget": 9}, 9),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning": {"effort": "high"}}, 0),
    ],
    ids=str,
)
def test_every_way_to_set_the_thinking_budget(body: dict[str, Any], tokens: int | None):
    assert budget(**body) == tokens


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({}, "separate"),
        ({"include_reasoning": True}, "separate"),
        ({"include_reasoning": False}, "omitted"),
        ({"separate_reasoning": True}, "separate"),
        ({"separate_reasoning": False}, "inline"),
        ({"reasoning": {"exclude": True}}, "omitted"),
        ({"reasoning": {"exclude": False}}, "separate"),
        ({"include_reasoning": False, "separate_reasoning": False}, "omitted"),
    ],
    ids=str,
)
def test_where_the_thinking_goes(body: dict[str, Any], form: str):
    assert read(**body).reasoning == form


# Messages


def test_parts_of_every_client():
    image = "data:image/png;base64,AAAA"
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "refusal", "refusal": "c"},
        {"type": "image_url", "image_url": {"url": image, "detail": "high"}},
        {"type": "image_url", "image_url": image},
        {"type": "input_image", "image_url": image, "detail": "low"},
    ]
    [turn] = read(messages=[{"role": "user", "content": parts}]).turns
    assert turn.parts == ("a", "b", "c", ImagePart(image), ImagePart(image), ImagePart(image))


def test_roles_and_what_history_may_hold():
    turns = read(
        messages=[
            {"role": "developer", "content": "S", "name": "x"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": "dropped"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "reasoning": "dropped"},
            {"role": "user", "content": "q"},
            {"role": "assistant"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "user", "content": "q"},
        ]
    ).turns
    assert [turn.role for turn in turns] == ["system", *["user", "assistant"] * 4, "user"]
    assert [turn.text for turn in turns if turn.role == "assistant"] == ["a", "", "", "no"]


@pytest.mark.parametrize(
    ("flags", "extra"),
    [({}, {}), ({"partial": True}, {}), ({"prefix": True}, {}), ({}, {"continue_final_message": True})],
    ids=str,
)
def test_a_last_message_of_the_assistant_is_continued(flags: dict[str, Any], extra: dict[str, Any]):
    last = {"role": "assistant", "content": "The", **flags}
    assert read(messages=[*ASK, last], **extra).turns[-1] == Turn("assistant", ("The",))
    thought = {**last, "reasoning_content": "hm"}
    assert read(messages=[*ASK, thought], **extra).turns[-1].text == f"{THINK_OPEN}hm{THINK_CLOSE}The"
    assert read(messages=[*ASK, {**last, "reasoning": "hm"}], **extra).turns[-1].text.startswith(THINK_OPEN)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ({}, "messages"),
        ([1], "messages[0]"),
        ([*ASK, {"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[1]"),
        ([{"role": "function", "content": "x"}], "messages[0]"),
        ([{"role": "nobody", "content": "x"}], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": 5}], "messages[0]"),
        ([*ASK, {"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[1]"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}], "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}], "messages[0].content[0]"),
        ([*ASK, {"role": "user", "content": [{"type": "audio_url", "audio_url": "x"}]}], "messages[1].content[0]"),
        ([{"role": "user", "content": "x", "partial": True}], "messages[0].partial"),
        ([{"role": "user", "content": "x", "prefix": True}], "messages[0].prefix"),
        ([*ASK, {"role": "assistant", "content": "x", "prefix": "yes"}], "messages[1].prefix"),
        ([*ASK, {"role": "assistant", "content": "x", "reasoning_content": 1}], "messages[1].reasoning_content"),
    ],
    ids=str,
)
def test_messages_that_are_refused(messages: Any, param: str):
    assert refused(messages=messages)[0] == param


VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
FILE = {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}


@pytest.mark.parametrize(
    ("part", "code", "sentence"),
    [
        ({"type": "video"}, "e_messages_invalid", 'write a video as {"type": "video_url", '),
        ({"type": "file"}, "e_messages_invalid", 'write a document as {"type": "file", '),
        ({"type": "image"}, "e_messages_invalid", 'write an image as {"type": "image_url", '),
        ({**VIDEO, "fps": 0}, "e_parameter", "fps must be above 0"),
        ({**VIDEO, "end": 10**400}, "e_parameter", "end must be a finite number"),
        ({**VIDEO, "max_frames": 3, "num_frames": 5}, "e_parameter", "max_frames and num_frames of a video differ"),
        ({**FILE, "pages": "5-2"}, "e_parameter", "a range in pages "),
    ],
    ids=str,
)
def test_parts_are_refused_by_their_path(part: dict[str, Any], code: str, sentence: str):
    with pytest.raises(ApiError, match=re.escape(sentence)) as caught:
        read(messages=[*ASK, {"role": "user", "content": [{"type": "text", "text": "a"}, VIDEO, part]}])
    assert (caught.value.param, caught.value.code) == ("messages[1].content[2]", code)


def test_how_many_frames_are_refused_as_they_were_asked_for():
    for count in (-1, 600):
        with pytest.raises(ApiError, match=r"^media_io_kwargs\.video\.num_frames must be from 1 to 512; "):
            read(media_io_kwargs={"video": {"num_frames": count}})


def test_continuing_needs_something_to_continue():
    assert refused(continue_final_message=True)[0] == "continue_final_message"


# Structured answers

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def grammar_of(**body: Any) -> Any:
    return read(**body).params.get("grammar")


def test_forms_of_an_answer():
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    assert grammar_of(response_format=form) == grammar.json_schema(SCHEMA)
    assert grammar_of(response_format={"type": "json_object"}) == grammar.json_object()
    assert grammar_of(response_format={"type": "text"}) is None
    assert grammar_of(structured_outputs={"json": SCHEMA}) == grammar.json_schema(SCHEMA)
    assert grammar_of(structured_outputs={"json": json.dumps(SCHEMA)}) == grammar.json_schema(SCHEMA)
    assert grammar_of(structured_outputs={"regex": "a+", "json": None}) == grammar.regex("a+")
    assert grammar_of(structured_outputs={"choice": ["a", "b"], "disable_any_whitespace": True}) == grammar.choice(
        ["a", "b"]
    )
    assert grammar_of(structured_outputs={"json_object": True}) == grammar.json_object()
    assert grammar_of(structured_outputs={"regex": "a+"}).parameter == "structured_outputs"
    assert grammar_of(response_format={"type": "json_object"}).parameter == "response_format"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": []}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar"),
        ({"response_format": {"type": "json_object"}, "stop": ["a"]}, "stop"),
    ],
    ids=str,
)
def test_forms_that_are_refused(body: dict[str, Any], param: str):
    assert refused(**body)[0] == param


def test_a_schema_that_is_too_deep():
    schema: dict[str, Any] = {}
    for _ in range(200):
        schema = {"items": schema}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert refused(response_format=form) == ("response_format.json_schema.schema", "e_grammar")


# Refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": 5}, "model"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": []}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": "2"}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 131073}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_new_tokens": "5"}, "max_new_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"max_tokens": -1}}, "reasoning.max_tokens"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"exclude": "yes"}}, "reasoning.exclude"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"budget_tokens": "9"}}, "thinking.budget_tokens"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_token_budget": 0.5}, "thinking_token_budget"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"enable_thinking": 0}, "enable_thinking"),
        ({"include_reasoning": 0}, "include_reasoning"),
        ({"separate_reasoning": "no"}, "separate_reasoning"),
        ({"continue_final_message": 1}, "continue_final_message"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "1"}}, "logit_bias"),
        ({"logit_bias": {"1": None}}, "logit_bias"),
        ({"logit_bias": {"1" * 50: 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"media_io_kwargs": {"video": {"fps": 0}}}, "media_io_kwargs.video.fps"),
        ({"media_io_kwargs": {"video": {"fps": 61}}}, "media_io_kwargs.video.fps"),
        ({"media_io_kwargs": {"video": {"num_frames": -1}}}, "media_io_kwargs.video.num_frames"),
        ({"media_io_kwargs": {"video": {"num_frames": 513}}}, "media_io_kwargs.video.num_frames"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_their_path(body: dict[str, Any], param: str):
    assert refused(**body) == (param, "e_parameter")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 0.05}, "min_p"),
        ({"stop_token_ids": [1]}, "stop_token_ids"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": "audio"}, "modalities"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_its_name(body: dict[str, Any], param: str):
    assert refused(**body) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "body",
    [
        {"frequency_penalty": 0},
        {"presence_penalty": 0.0},
        {"repetition_penalty": 1.0},
        {"min_p": 0},
        {"stop_token_ids": []},
        {"echo": False},
        {"best_of": 1},
        {"use_beam_search": False},
        {"modalities": ["text"]},
        {"tools": []},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [{}], "function_call": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"logprobs": False, "top_logprobs": 0},
        {"logit_bias": {}},
    ],
    ids=str,
)
def test_values_that_ask_for_nothing_pass(body: dict[str, Any]):
    assert read(**body).params == read().params


def test_lenient_ignores_sampling_that_is_not_done_but_no_wrong_type():
    lenient = Rules(lenient=True)
    assert read(lenient, frequency_penalty=1, min_p=0.5).params == read().params
    assert refused(lenient, frequency_penalty="1") == ("frequency_penalty", "e_parameter")
    assert refused(lenient, echo=True)[0] == "echo"


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function"}], "tool_choice": "auto"},
        {"tools": [{"type": "function"}], "tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
    ],
    ids=str,
)
def test_tools_are_refused_unless_the_server_ignores_them(body: dict[str, Any]):
    param, code = refused(**body)
    assert param in ("tools", "functions") and code == "tools_unsupported"
    assert read(Rules(ignore_tools=True), **body).params == read().params


@pytest.mark.parametrize("body", [None, [], "x", 5, True])
def test_a_body_is_an_object(body: Any):
    with pytest.raises(ApiError) as caught:
        read_chat(body)
    assert caught.value.status == 400


def test_no_field_is_of_two_kinds():
    assert not (READ & IGNORED or READ & UNSUPPORTED or IGNORED & UNSUPPORTED)


def test_places_are_asked_for_in_a_field_of_our_own():
    assert read(kimi_vl={"grounding": True}).grounding
    assert not any(read(kimi_vl=value).grounding for value in (None, {}, {"grounding": False}, {"grounding": None}))
    assert refused(kimi_vl={"grounding": "yes"})[0] == "kimi_vl.grounding"
    assert refused(kimi_vl=[True])[0] == "kimi_vl"
