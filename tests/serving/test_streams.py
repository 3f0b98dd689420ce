"""Streams as they go over the wire: their order, several choices, clients that leave or do not read, and the end."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, LengthFinishReasonError, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

import kimi_vl.prompt
from kimi_vl.engine.faults import Overloaded
from kimi_vl.events import Answer
from kimi_vl.media import sandbox
from kimi_vl.serving import completions
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN

from .conftest import ROOT, ServerThread, ask, thinking_of, until, user

POST = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SUM = user("What is 12 + 30?")


def lines(response: httpx.Response) -> list[str]:
    """The events of a stream; every one is a single line of data."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    *events, rest = response.text.split("\n\n")
    assert rest == "" and all("\n" not in event for event in events)
    return events


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    *events, last = lines(response)
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def deltas(found: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [c["delta"] for chunk in found for c in chunk["choices"] if c["index"] == index]


def text(found: list[dict[str, Any]], field: str = "content", index: int = 0) -> str:
    return "".join(delta.get(field) or "" for delta in deltas(found, index))


def test_the_order_of_a_stream(http: httpx.Client) -> None:
    found = chunks(ask(http, stream=True, stream_options={"include_usage": True}))
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["usage"] is None for chunk in found[:-1]) and found[-1]["choices"] == []
    finishing = [chunk for chunk in found[:-1] if chunk["choices"][0]["finish_reason"]]
    assert finishing == [found[-2]] and found[-2]["choices"][0]["delta"] == {}
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in found}) == 1
    kinds = [next(iter(delta)) for delta in deltas(found)[1:-1]]
    assert kinds == sorted(kinds, reverse=True), "all thinking comes before all of the answer"
    assert "usage" not in chunks(ask(http, stream=True))[0]


@pytest.mark.parametrize("seed", [pytest.param(0), pytest.param(1, marks=pytest.mark.nightly)])
def test_thinking_and_answer_never_mix(http: httpx.Client, seed: int) -> None:
    body = {"seed": seed, "temperature": 1.0}
    whole = ask(http, **body).json()["choices"][0]
    found = chunks(ask(http, stream=True, **body))
    assert text(found) == whole["message"]["content"]
    assert text(found, "reasoning_content") == whole["message"]["reasoning_content"]
    inline = ask(http, separate_reasoning=False, **body).json()["choices"][0]["message"]
    expected = f"{THINK_OPEN}{whole['message']['reasoning_content']}{THINK_CLOSE}{whole['message']['content']}"
    assert inline["content"] == expected and "reasoning_content" not in inline
    found = chunks(ask(http, stream=True, separate_reasoning=False, **body))
    assert text(found) == expected and text(found, "reasoning_content") == ""
    for omitted in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        message = ask(http, **omitted, **body).json()["choices"][0]["message"]
        assert message["content"] == whole["message"]["content"] and "reasoning_content" not in message
        found = chunks(ask(http, stream=True, **omitted, **body))
        assert text(found) == whole["message"]["content"] and text(found, "reasoning_content") == ""


def test_content_is_never_null(http: httpx.Client) -> None:
    message = ask(http, max_tokens=1).json()["choices"][0]["message"]
    assert message["content"] == "" and message["refusal"] is None


def test_usage_counts_every_token(demo: ServerThread, http: httpx.Client) -> None:
    answer = ask(http, max_tokens=30).json()
    ChatCompletion.model_validate(answer)
    used = answer["usage"]
    assert answer["choices"][0]["finish_reason"] == "length" and used["completion_tokens"] == 30
    assert used["total_tokens"] == used["prompt_tokens"] + 30
    assert used["prompt_tokens"] == http.post("/tokenize", json={"messages": SUM}).json()["count"]
    done = demo.pipeline.complete(SUM, temperature=0)
    used = ask(http).json()["usage"]
    assert used["completion_tokens"] == done.usage.output_tokens
    assert used["completion_tokens_details"]["reasoning_tokens"] == done.usage.reasoning_tokens > 0
    assert used["prompt_tokens_details"]["image_tokens"] == 0


def test_pictures_count_as_their_tokens(http: httpx.Client) -> None:
    import base64

    data = base64.b64encode(Path("images/math_problem.png").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [picture, {"type": "text", "text": "What is the result?"}]
    messages = [{"role": "user", "content": content}]
    answers = [ask(http, messages=messages).json() for _ in range(2)]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == ["25 + 13 = 38"] * 2
    details = answers[1]["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == 135 and 0 < details["cached_tokens"] < answers[1]["usage"]["prompt_tokens"]
    assert http.post("/tokenize", json={"messages": messages}).json()["count"] == answers[0]["usage"]["prompt_tokens"]


def test_stop_sequences_and_continued_answers(http: httpx.Client) -> None:
    stopped = ask(http, stop=[" ="]).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("12 + 30", "stop")
    assert stopped["message"]["reasoning_content"], "stop sequences are not looked for in the thinking"
    begun = {"role": "assistant", "content": "12 + 30 =", "reasoning_content": stopped["message"]["reasoning_content"]}
    continued = ask(http, messages=[*SUM, {**begun, "partial": True}]).json()["choices"][0]["message"]
    assert continued["content"].strip() == "42" and continued["reasoning_content"] is None


def test_no_thinking(http: httpx.Client) -> None:
    for asked in ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}, {"enable_thinking": False}):
        answer = ask(http, **asked).json()
        assert answer["choices"][0]["message"]["reasoning_content"] is None
        assert answer["choices"][0]["message"]["content"]
        assert answer["choices"][0]["kimi_vl"]["thinking_closed_by"] == "budget"


# Several choices


def test_choices_are_those_of_their_seeds(http: httpx.Client) -> None:
    body = {"seed": 5, "temperature": 2.0, "max_tokens": 40}
    alone = [ask(http, **{**body, "seed": 5 + index}).json() for index in range(3)]
    together = ask(http, n=3, **body).json()
    ChatCompletion.model_validate(together)
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert [choice["kimi_vl"]["seed"] for choice in together["choices"]] == [5, 6, 7]
    assert [c["message"] for c in together["choices"]] == [a["choices"][0]["message"] for a in alone]
    assert together["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    for count in (
        lambda used: used["completion_tokens"],
        lambda used: used["completion_tokens_details"]["reasoning_tokens"],
    ):
        assert count(together["usage"]) == sum(count(answer["usage"]) for answer in alone)
    found = chunks(ask(http, n=3, stream=True, stream_options={"include_usage": True}, **body))
    for index, choice in enumerate(together["choices"]):
        assert text(found, "content", index) == choice["message"]["content"]
        assert text(found, "reasoning_content", index) == choice["message"]["reasoning_content"]
        assert deltas(found, index)[0] == {"role": "assistant", "content": ""} and deltas(found, index)[-1] == {}
    assert found[-1]["usage"]["completion_tokens"] == together["usage"]["completion_tokens"]


def test_choices_share_the_prefill(demo: ServerThread, http: httpx.Client) -> None:
    messages = user("Count the words. " + "apple pear plum " * 500)
    before = demo.engine.stats()
    prompt = ask(http, messages=messages, n=4, max_tokens=2).json()["usage"]["prompt_tokens"]
    after = demo.engine.stats()
    computed = after.prompt_tokens_computed - before.prompt_tokens_computed
    assert prompt <= computed < prompt + 4 * 32, "but for the last page, the others find the prompt computed"


# Clients that leave


@pytest.fixture(scope="module")
def endless(endless_model: Path) -> Iterator[ServerThread]:
    with ServerThread(endless_model, write_timeout_s=2.0, max_num_seqs=8) as running:
        yield running


def send(connection: socket.socket, **body: Any) -> None:
    content = json.dumps({"messages": user("Hello."), "max_tokens": 100_000, **body}).encode()
    head = f"{POST}Content-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"n": 4}, {"n": 4, "stream": True}], ids=str)
def test_a_client_that_leaves_is_noticed_at_once(endless: ServerThread, body: dict[str, Any]) -> None:
    free = endless.engine.scheduler.pool.available
    connection = endless.connect()
    send(connection, **body)
    until(lambda: endless.engine.stats().running == body.get("n", 1))
    before = len(endless.observer.named("ends"))
    connection.close()
    until(endless.idle)
    assert endless.engine.scheduler.pool.available == free, "its pages are free"
    until(lambda: len(endless.observer.named("ends")) > before)
    assert endless.observer.named("ends")[-1][1] == 499


def test_a_client_that_leaves_while_its_images_are_decoded(
    endless: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    submit = endless.pipeline.submit

    def slow(*arguments: Any, **params: Any) -> Any:
        began.set()
        assert go_on.wait(300)
        return submit(*arguments, **params)

    monkeypatch.setattr(endless.pipeline, "submit", slow)
    connection = endless.connect()
    send(connection)
    assert began.wait(300)
    connection.close()
    until(lambda: endless.service.bodies.held == 0)
    go_on.set()
    until(lambda: endless.engine.stats().running == 0 and endless.idle())


def test_a_client_that_does_not_read_is_cut_off(endless: ServerThread) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(endless.address)
    send(connection, stream=True, n=8, max_tokens=131_000)
    until(lambda: endless.engine.stats().running == 8)
    before = endless.engine.stats().output_tokens
    until(endless.idle)
    assert endless.observer.named("ends")[-1][1] == 499
    assert endless.engine.stats().output_tokens - before < 8 * 20_000, "what waits to be read is bounded"
    connection.close()


def test_a_queue_that_is_full(endless_model: Path) -> None:
    with ServerThread(endless_model, max_num_seqs=1, max_waiting=1) as small, small.http() as http:
        running, waiting = small.connect(), small.connect()
        send(running)
        until(lambda: small.engine.stats().running == 1)
        send(waiting, stream=True)
        until(lambda: small.engine.stats().waiting == 1)
        refusal = ask(http)
        assert refusal.status_code == 429 and refusal.json()["error"]["code"] == "overloaded"
        assert refusal.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refusal.headers["retry-after"]) <= 30 and refusal.headers["x-should-retry"] == "true"
        assert http.get("/ready").status_code == 503 and http.get("/health").status_code == 200
        running.close()
        waiting.close()
        until(small.idle)
        assert http.get("/ready").status_code == 200
        assert small.observer.named("rejects")[-1] == ("rejects", 429, "overloaded")


def test_a_missed_deadline_is_not_tried_again(endless_model: Path) -> None:
    with ServerThread(endless_model, deadline_s=0.3) as hurried, hurried.http() as http:
        late = ask(http, max_tokens=100_000)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        assert late.headers["x-should-retry"] == "false"
        events = lines(ask(http, stream=True, max_tokens=100_000))
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        with pytest.raises(APIError, match="not done in time"):
            list(
                hurried.client().chat.completions.create(
                    model="api-kimi-vl", messages=user("Hello."), stream=True, max_tokens=100_000
                )
            )


# What happens while a stream runs


def test_a_silent_stream_is_kept_alive(demo: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "PING_S", 0.05)
    go_on = threading.Event()
    submit = demo.pipeline.submit

    def held_back(turns: Any, images: Any, deliver: Any, **params: Any) -> Any:
        def late(event: Any) -> None:
            go_on.wait(300)
            deliver(event)

        return submit(turns, images, late, **params)

    monkeypatch.setattr(demo.pipeline, "submit", held_back)
    body = {"messages": SUM, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        received = ""
        for piece in response.iter_text():
            received += piece
            if received.count(": ping\n\n") == 2:
                go_on.set()
    assert received.endswith("data: [DONE]\n\n") and received.count(": ping") >= 2
    found = [json.loads(line[6:]) for line in received.split("\n\n") if line.startswith("data: {")]
    assert text(found) == "12 + 30 = 42"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (RuntimeError("secret"), "internal_error"),
        (Overloaded("there was not enough memory for this request; try again later.", "memory"), "out_of_memory"),
    ],
)
def test_a_fault_within_a_stream_is_its_last_event(
    demo: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: str
) -> None:
    submit = demo.pipeline.submit

    def failing(turns: Any, images: Any, deliver: Any, **params: Any) -> Any:
        count = 0

        def third(event: Any) -> None:
            nonlocal count
            count += 1
            deliver(fault if count == 3 else event)

        return submit(turns, images, third, **params)

    monkeypatch.setattr(demo.pipeline, "submit", failing)
    events = lines(ask(http, stream=True))
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["error"]["code"] == code and "secret" not in str(last) and "data: [DONE]" not in events
    whole = ask(http)
    assert whole.json()["error"]["code"] == code and whole.status_code == (500 if code == "internal_error" else 429)
    until(demo.idle)


def test_choices_share_one_decoding(demo: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], kimi_vl.prompt.load

    def counted(*arguments: Any) -> Any:
        loaded.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(kimi_vl.prompt, "load", counted)
    picture = base64.b64encode((ROOT / "images" / "math_problem.png").read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    content = [part, {"type": "text", "text": "What?"}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "seed": 3}
    together = ask(http, n=3, **body).json()
    assert len(loaded) == 1
    alone = [ask(http, **{**body, "seed": 3 + choice}).json() for choice in range(3)]
    assert len(loaded) == 4
    assert [each["message"] for each in together["choices"]] == [each["choices"][0]["message"] for each in alone]
    until(demo.idle)


def test_one_fault_among_choices_ends_all(
    demo: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = demo.pipeline.submit

    def second_is_refused(turns: Any, images: Any, deliver: Any, **params: Any) -> Any:
        if params["seed"] == 8:
            raise Overloaded("too many requests are waiting; try again later.", "queue")
        return submit(turns, images, deliver, **params)

    monkeypatch.setattr(demo.pipeline, "submit", second_is_refused)
    assert ask(http, n=2, seed=7).status_code == 429
    until(demo.idle)


def test_the_observer_is_told(demo: ServerThread, http: httpx.Client) -> None:
    demo.observer.calls.clear()
    answer = ask(http, stream=True, temperature=0)
    until(lambda: demo.observer.named("ends"))
    names = [call[0] for call in demo.observer.calls]
    assert names[:2] == ["begins", "first_token"] and names[-1] == "ends" and names.count("chunk") > 0
    _, status, seconds, choices = demo.observer.calls[-1]
    assert status == 200 and seconds > 0 and choices[0].answer == text(chunks(answer))
    demo.observer.calls.clear()
    ask(http, temperature=9)
    assert demo.observer.calls == [("rejects", 400, "e_parameter")]


def test_many_at_once(demo: ServerThread) -> None:
    """More streams than are computed at a time; every one is whole, and its own."""
    answers: list[str] = [""] * 70

    def one(index: int, client: OpenAI) -> None:
        stream = client.chat.completions.create(
            model="kimi-vl-demo", messages=user(f"What is {index} + 1?"), temperature=0, stream=True
        )
        answers[index] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with demo.client() as client:
        threads = [threading.Thread(target=one, args=(index, client)) for index in range(len(answers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    streams = [demo.pipeline.stream(user(f"What is {index} + 1?"), temperature=0) for index in range(len(answers))]
    expected = ["".join(event.text for event in stream if isinstance(event, Answer)) for stream in streams]
    assert answers == expected
    until(demo.idle)


def test_films_that_wait_hold_up_nothing_else(
    demo: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go_on = [], threading.Event()

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        waiting.append(1)
        assert go_on.wait(300)
        yield

    monkeypatch.setattr(sandbox, "turn", turn)
    film = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    picture = base64.b64encode((ROOT / "images" / "math_problem.png").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    at_once = demo.options.max_decoding
    with ThreadPoolExecutor(2 * at_once) as clients:
        films = [
            clients.submit(http.post, path, json={"messages": [{"role": "user", "content": [film]}]})
            for path in ("/v1/chat/completions", "/tokenize")
            for _ in range(at_once)
        ]
        try:
            until(lambda: len(waiting) == at_once)
            for body in (
                {"prompt": "hi"},
                {"prompt": "a" * 100_000},
                {"messages": [{"role": "user", "content": [image]}]},
            ):
                assert http.post("/tokenize", json=body).status_code == 200
            assert ask(http, max_tokens=1, n=2).status_code == 200
            assert len(waiting) == at_once and not any(film.done() for film in films)
        finally:
            go_on.set()
    assert {film.result().json()["error"]["code"] for film in films} == {"e_video_format"}
    until(demo.idle)


# Log-probabilities and biases


def test_log_probabilities_are_of_the_answers_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="kimi-vl-demo", messages=SUM, temperature=0, logprobs=True, top_logprobs=2
    )
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    choice = answer.choices[0]
    assert choice.logprobs and choice.logprobs.content and choice.message.content
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
    stream = client.chat.completions.create(
        model="kimi-vl-demo", messages=SUM, temperature=0, logprobs=True, top_logprobs=2, stream=True
    )
    found = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
    assert [token.bytes for each in found for token in each.content or []] == [token.bytes for token in tokens]


def test_a_bias_bans_a_token(http: httpx.Client) -> None:
    [four] = http.post("/tokenize", json={"prompt": "4"}).json()["tokens"]
    assert "4" in ask(http).json()["choices"][0]["message"]["content"]
    assert "4" not in ask(http, logit_bias={str(four): -100}).json()["choices"][0]["message"]["content"]
    refused = ask(http, logit_bias={"1000000": 1})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "e_parameter", "logit_bias")


# Structured answers


class Sum(BaseModel):
    first: int
    second: int


def test_openais_client_parses_an_answer(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="kimi-vl-demo", messages=SUM, temperature=0, response_format=Sum, max_tokens=2000
    )
    assert isinstance(answer.choices[0].message.parsed, Sum)
    assert thinking_of(answer.choices[0].message), "the form holds for the answer alone"
    with client.chat.completions.stream(
        model="kimi-vl-demo", messages=SUM, temperature=0, response_format=Sum, max_tokens=2000
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_an_answer_that_is_cut_is_no_valid_one(client: OpenAI) -> None:
    with pytest.raises(LengthFinishReasonError):
        client.chat.completions.parse(
            model="kimi-vl-demo", messages=SUM, temperature=0, response_format=Sum, max_tokens=8
        )


@pytest.mark.parametrize(
    ("form", "pattern"),
    [({"regex": "[a-c]{3}"}, "[a-c]{3}"), ({"choice": ["red", "green"]}, "red|green"), ({"json": {"const": 5}}, "5")],
)
def test_forms_of_answers(http: httpx.Client, form: dict[str, Any], pattern: str) -> None:
    choice = ask(http, structured_outputs=form).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, choice["message"]["content"])


def test_any_object(http: httpx.Client) -> None:
    choice = ask(http, max_tokens=60, reasoning_effort="none", response_format={"type": "json_object"}).json()[
        "choices"
    ][0]
    assert choice["message"]["content"].startswith("{")


def test_a_schema_that_cannot_be_followed(http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "integer"}}}}
    refused = ask(http, response_format=form)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "e_grammar"
    assert refused.json()["error"]["param"] == "response_format" and "not" in refused.json()["error"]["message"]
