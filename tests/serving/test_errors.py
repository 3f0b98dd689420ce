"""Whatever is wrong with a request, a client reads OpenAI's object of an error under the right status."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from .conftest import ServerThread, ask, user

JSON = {"Content-Type": "application/json"}


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error's object, which has the four fields that clients read, and nothing of a library."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    for word in ("Traceback", "/", "pydantic", "starlette", "Expecting", "E_"):
        assert word not in body["error"]["message"].replace("application/json", ""), body
    return body["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{]",
        b'{"a": 1} x',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"messages": "\xff"}',
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_json(http: httpx.Client, body: bytes) -> None:
    assert error(http.post("/v1/chat/completions", content=body, headers=JSON), 400)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null", b"true"])
def test_json_that_is_no_object(http: httpx.Client, body: bytes) -> None:
    error(http.post("/v1/chat/completions", content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonl"],
)
def test_what_is_not_sent_as_json(http: httpx.Client, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = http.post("/v1/chat/completions", content=b'{"messages": []}', headers=headers)
    assert error(response, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_how_json_may_be_named(http: httpx.Client, kind: str) -> None:
    body = json.dumps({"messages": user("Hello."), "max_tokens": 1}).encode()
    assert http.post("/v1/chat/completions", content=body, headers={"Content-Type": kind}).status_code == 200


def test_a_byte_order_mark_is_passed_over(http: httpx.Client) -> None:
    body = json.dumps({"messages": user("Hello."), "max_tokens": 1}).encode("utf-8-sig")
    assert http.post("/v1/chat/completions", content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("Identity", 200), ("", 200)])
def test_how_a_body_may_be_encoded(http: httpx.Client, encoding: str, status: int) -> None:
    body = json.dumps({"messages": user("Hello."), "max_tokens": 1}).encode()
    response = http.post("/v1/chat/completions", content=body, headers={**JSON, "Content-Encoding": encoding})
    assert response.status_code == status
    if status == 415:
        assert "Content-Encoding" in error(response, 415)["message"]


def test_a_wrong_method_is_told_the_right_one(http: httpx.Client) -> None:
    response = http.get("/v1/chat/completions")
    assert (error(response, 405)["message"], response.headers["allow"]) == (
        "this route takes POST; change the method.",
        "POST",
    )
    assert error(http.put("/health"), 405)["message"] == "this route takes GET or HEAD; change the method."


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/completions", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PUT", "/tokenize", 405, "method_not_allowed"),
        ("GET", "/%ff%00", 404, "not_found"),
        ("GET", "/../etc/passwd", 404, "not_found"),
    ],
)
def test_routes_and_methods(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    assert error(http.request(method, path), status)["code"] == code


def test_an_unknown_model(http: httpx.Client, client: OpenAI) -> None:
    found = error(ask(http, model="gpt-4"), 404)
    assert (found["param"], found["code"]) == ("model", "model_not_found") and "kimi-vl-demo" in found["message"]
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=user("Hello."))


@pytest.mark.parametrize(
    "name",
    [
        "kimi-vl-demo",
        "demo",
        "moonshotai/Kimi-VL-A3B-Thinking",
        "kimi-vl-a3b-thinking",
        "Kimi-VL-A3B-Thinking-2506",
        "api-kimi-vl-thinking",
        "api-kimi-vl-thinking-2506",
        "api-kimi-vl",
        None,
    ],
)
def test_names_of_the_model(http: httpx.Client, name: str | None) -> None:
    response = ask(http, model=name, max_tokens=1)
    assert response.status_code == 200 and response.json()["model"] == "kimi-vl-demo"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "e_parameter"),
        ({"messages": user("")}, "messages", "e_prompt_empty"),
        ({"messages": user("word " * 9000)}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "e_messages_invalid"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools_unsupported"),
        ({"echo": True}, "echo", "unsupported_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_keep_their_status_where_streams_are_asked_for(
    http: httpx.Client, client: OpenAI, body: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    found = error(ask(http, stream=stream, **body), 400)
    assert (found["param"], found["code"], found["type"]) == (param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.com/a.png", "e_image_source"),
        ("http://127.0.0.1/a.png", "e_image_source"),
        ("file:///etc/passwd", "e_image_source"),
        ("/etc/passwd", "e_image_source"),
        ("data:image/png;base64,AAAA", "e_image_format"),
        ("data:image/png;base64,!!!", "e_image_unreadable"),
        ("data:image/png;base64,", "e_image_unreadable"),
    ],
)
def test_pictures_that_cannot_be_read(http: httpx.Client, url: str, code: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    found = error(ask(http, messages=[{"role": "user", "content": [part]}]), 400)
    assert found["code"] == code and found["param"] == "messages"


def test_a_lone_surrogate_is_no_fault_of_the_server(http: httpx.Client) -> None:
    body = b'{"max_tokens": 1, "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert http.post("/v1/chat/completions", content=body, headers=JSON).status_code in (200, 400)
    stop = b'{"max_tokens": 1, "stop": "\\ud800", "messages": [{"role": "user", "content": "a"}]}'
    assert http.post("/v1/chat/completions", content=stop, headers=JSON).status_code in (200, 400)


def test_openais_client_reads_a_mistake(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="kimi-vl-demo", messages=user("Hello."), temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "e_parameter")
    assert caught.value.request_id is not None


def test_a_fault_of_the_server_tells_its_id_alone(
    demo: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret words of a client")

    monkeypatch.setattr(demo.pipeline, "submit", broken)
    response = http.post("/v1/chat/completions", json={"messages": user("Hello.")}, headers={"X-Request-Id": "mine-1"})
    found = error(response, 500)
    assert found["code"] == "internal_error" and "mine-1" in found["message"] and "secret" not in response.text
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text and "mine-1" in caplog.text


def test_a_fault_in_another_route(demo: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.pipeline, "estimate", lambda *_, **__: 1 / 0)
    found = error(http.post("/tokenize", json={"messages": user("Hello.")}), 500)
    assert found["type"] == "api_error"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123._:", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False), ("", False)],
)
def test_request_ids(http: httpx.Client, given: str, kept: bool) -> None:
    response = http.get("/health", headers=[(b"X-Request-Id", given.encode())])
    assert (response.headers["x-request-id"] == given) is kept


def test_tokens(http: httpx.Client) -> None:
    found = http.post("/tokenize", json={"prompt": "12 + 30?"}).json()
    assert found["count"] == len(found["tokens"]) > 0 and found["max_model_len"] == 8192
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "12 + 30?"}
    strings = http.post("/tokenize", json={"prompt": "12 + 30?", "return_token_strs": True}).json()["token_strs"]
    assert "".join(strings) == "12 + 30?"
    counted = http.post("/tokenize", json={"messages": user("What is 12 + 30?")}).json()["count"]
    assert counted == ask(http, max_tokens=1).json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": user("b")}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": 5}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
)
def test_mistakes_about_tokens(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert error(http.post(path, json=body), 400)["param"] == param


def test_nothing_is_left_behind(demo: ServerThread, http: httpx.Client) -> None:
    ask(http, temperature=5)
    assert demo.idle()
