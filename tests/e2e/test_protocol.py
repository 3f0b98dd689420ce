"""Webhooks, PUT, cancelling in every phase, the end of a server, refusals, and files from everywhere."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cog_local.client import Client, ServerGone
from cog_local.server import Server

from .conftest import DEMO, data_url, picture, worker_of
from .scripted import Loopback, make_thinker, spoken
from .test_server import ASK, METRICS, fail, succeed, text, user

LONG = {"prompt": "Think about it.", "temperature": 0, "max_length_tokens": 100_000, "output_format": "json"}
SHORT = {"prompt": "Think about it.", "temperature": 0, "max_length_tokens": 20, "output_format": "json"}


@pytest.fixture(scope="module")
def thinker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks for ever, and then answers for ever."""
    return make_thinker(tmp_path_factory.mktemp("thinker"))


@pytest.fixture(scope="module")
def thinking_server(thinker_folder: Path) -> Iterator[Server]:
    with Server(environment={**os.environ, **DEMO, "KIMI_VL_MODEL": str(thinker_folder)}) as running:
        yield running


@pytest.fixture
def thinker(thinking_server: Server) -> Client:
    return thinking_server.client


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    with Loopback().running() as running:
        yield running


def call(
    client: Client, method: str, path: str, body: Any = None, patience: float = 300, **headers: str
) -> tuple[int, Any]:
    """Status and body of one call; a body that is not bytes becomes JSON. 409 is tried again."""
    payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    deadline = time.monotonic() + patience
    while True:
        connection = http.client.HTTPConnection(client.host, client.port, timeout=300)
        with contextlib.closing(connection):
            connection.request(method, path, payload, sent)
            response = connection.getresponse()
            content = response.read()
        if response.status != 409 or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    try:
        return response.status, json.loads(content)
    except ValueError:
        return response.status, content.decode()


def post(client: Client, inputs: Any, **headers: str) -> tuple[int, Any]:
    return call(client, "POST", "/predictions", {"input": inputs}, 120, **headers)


def answer_of(client: Client, **inputs: Any) -> str:
    return "".join(succeed(client, **inputs, output_format="answer")["output"])


# Streamed


@pytest.mark.parametrize("form", ["text", "think_tags", "answer", "json"])
def test_a_form_is_the_same_streamed_and_whole(thinker: Client, form: str) -> None:
    inputs = {**SHORT, "max_length_tokens": 40, "thinking_budget": 10, "output_format": form, "seed": 3}
    events = list(thinker.stream(inputs))
    assert events[-1].name == "completed" and events[-1].data["status"] == "succeeded"
    streamed = "".join(event.data["chunk"] for event in events if event.name == "output")
    whole = "".join(succeed(thinker, **inputs)["output"])
    if form == "json":  # where the lines before the last are cut depends on time
        streamed, whole = streamed.splitlines()[-1], whole.splitlines()[-1]
    assert streamed == whole


# Webhooks


def test_hooks_tell_of_the_start_the_output_and_the_end(client: Client, loopback: Loopback) -> None:
    body = {"id": uuid.uuid4().hex, "input": ASK, "webhook": loopback.url + "/hook"}
    status, accepted = call(client, "POST", "/predictions", body, Prefer="respond-async")
    assert (status, accepted["id"], accepted["status"]) == (202, body["id"], "starting")
    hooks = loopback.until_terminal()
    assert [hook["id"] for hook in hooks] == [body["id"]] * len(hooks)
    assert hooks[0]["status"] == "processing" and not hooks[0].get("output")
    outputs = [hook["output"] for hook in hooks if hook.get("output")]
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(outputs))
    final = hooks[-1]
    assert final["status"] == "succeeded" and final["output"] == outputs[-1]
    assert METRICS.keys() <= final["metrics"].keys()
    assert "".join(final["output"]) == "".join(succeed(client, **ASK)["output"])


def test_only_the_hooks_that_were_asked_for_come(client: Client, loopback: Loopback) -> None:
    body = {"input": ASK, "webhook": loopback.url, "webhook_events_filter": ["completed"]}
    assert call(client, "POST", "/predictions", body, Prefer="respond-async")[0] == 202
    assert [hook["status"] for hook in loopback.until_terminal()] == ["succeeded"]


def test_a_mistake_reaches_the_hook(client: Client, loopback: Loopback) -> None:
    body = {"input": {"prompt": " "}, "webhook": loopback.url}
    assert call(client, "POST", "/predictions", body, Prefer="respond-async")[0] == 202
    final = loopback.until_terminal()[-1]
    assert final["status"] == "failed" and "E_PROMPT_EMPTY: " in final["error"] and not final.get("output")


def test_a_cancelled_prediction_says_so_to_the_hook(thinker: Client, loopback: Loopback) -> None:
    name = uuid.uuid4().hex
    body = {"id": name, "input": LONG, "webhook": loopback.url}
    assert call(thinker, "POST", "/predictions", body, Prefer="respond-async")[0] == 202
    while not loopback.hooks.get(timeout=300).get("output"):
        pass
    assert thinker.cancel(name)
    assert loopback.until_terminal()[-1]["status"] == "canceled"


# PUT


def test_a_second_put_joins_the_prediction_that_runs(thinker: Client, loopback: Loopback) -> None:
    name = uuid.uuid4().hex
    body = {"input": LONG, "webhook": loopback.url}
    assert call(thinker, "PUT", f"/predictions/{name}", body, Prefer="respond-async")[0] == 202
    while not loopback.hooks.get(timeout=300).get("output"):
        pass
    for again in (body, {"input": {"prompt": "Something else."}}):
        status, state = call(thinker, "PUT", f"/predictions/{name}", again, Prefer="respond-async")
        assert (status, state["id"], state["status"]) == (202, name, "processing")
        assert state["output"] and state["input"]["prompt"] == LONG["prompt"]
    assert thinker.cancel(name)
    assert loopback.until_terminal()[-1]["status"] == "canceled"
    assert not thinker.cancel(name), "there was one prediction alone"


def test_the_name_of_a_finished_prediction_is_free_again(client: Client) -> None:
    name = uuid.uuid4().hex
    results = [call(client, "PUT", f"/predictions/{name}", {"input": ASK}) for _ in range(2)]
    assert [(status, body["id"], body["status"]) for status, body in results] == [(200, name, "succeeded")] * 2
    assert results[0][1]["output"] and "".join(results[0][1]["output"]) == "".join(results[1][1]["output"])


def test_two_names_for_one_prediction_are_refused(client: Client) -> None:
    status, _ = call(client, "PUT", "/predictions/one", {"id": "two", "input": ASK})
    assert status == 422


# Cancelling


def still_right(client: Client) -> None:
    """The next request is answered as if nothing had been."""
    lines = [json.loads(line) for line in "".join(succeed(client, **SHORT)["output"]).splitlines()]
    assert spoken(20).startswith(lines[-1]["reasoning"]) and lines[-1]["reasoning"]
    assert spoken(20).startswith(lines[-1]["answer"]) and lines[-1]["answer"]


def ticks(server: Server) -> int:
    """Processor time that the server's worker has used."""
    stats = [Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split() for worker in worker_of(server)]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats)


@pytest.fixture
def at_rest(thinking_server: Server) -> Iterator[None]:
    """After the test the worker soon has nothing to do, though what was asked of it would take many minutes."""
    yield
    deadline = time.monotonic() + 300
    used = -1
    while (before := used) != (used := ticks(thinking_server)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert used == before


def until_at_work(server: Server, used: int) -> None:
    """Until the worker has worked for a fifth of a second more than ``used``, so that it must be within ``predict``.

    Cog loses what cancels a prediction in the milliseconds before.
    """
    deadline = time.monotonic() + 300
    while ticks(server) < used + 20 and time.monotonic() < deadline:
        time.sleep(0.01)


def cancelled(server: Server, until: str, **inputs: Any) -> list[dict[str, Any]]:
    """The lines of a prediction that was cancelled at an event: ``start``, or such an output."""
    name = uuid.uuid4().hex
    lines: list[dict[str, Any]] = []
    sent = False
    used = ticks(server)
    with contextlib.closing(server.client.stream({**LONG, **inputs}, name)) as events:
        for event in events:
            if event.name == "output":
                lines += [json.loads(line) for line in event.data["chunk"].splitlines()]
            if not sent and (event.name == until or (lines and lines[-1]["type"] == until)):
                sent = True
                until_at_work(server, used)
                assert server.client.cancel(name)
            if event.name == "completed":
                assert event.data["status"] == "canceled"
    assert sent
    return lines


@pytest.mark.usefixtures("at_rest")
def test_cancelling_while_the_prompt_is_read(thinking_server: Server) -> None:
    assert cancelled(thinking_server, "start", prompt="word " * 40_000) == []
    still_right(thinking_server.client)


@pytest.mark.usefixtures("at_rest")
def test_cancelling_in_the_thinking(thinking_server: Server) -> None:
    lines = cancelled(thinking_server, "reasoning")
    assert {line["type"] for line in lines} == {"reasoning"}
    thought = "".join(line["text"] for line in lines)
    assert spoken(100_000).startswith(thought)
    still_right(thinking_server.client)


@pytest.mark.usefixtures("at_rest")
def test_cancelling_in_the_answer(thinking_server: Server) -> None:
    lines = cancelled(thinking_server, "answer", thinking_budget=30)
    assert [kind for kind, _ in itertools.groupby(line["type"] for line in lines)] == ["reasoning", "answer"]
    still_right(thinking_server.client)


def test_cancelling_what_does_not_run(client: Client) -> None:
    assert not client.cancel(uuid.uuid4().hex)


@pytest.mark.usefixtures("at_rest")
def test_a_caller_who_hangs_up_cancels(thinking_server: Server, thinker: Client) -> None:
    """Without a stream too; the request would take many minutes, and the next one is not refused for half of one."""
    used = ticks(thinking_server)
    connection = http.client.HTTPConnection(thinker.host, thinker.port, timeout=300)
    body = json.dumps({"input": {**LONG, "prompt": "Think long."}})
    connection.request("POST", "/predictions", body, {"Content-Type": "application/json"})
    until_at_work(thinking_server, used)
    assert thinker.health()["status"] == "BUSY"
    connection.close()
    still_right(thinker)


# The end of a server


def test_a_server_that_is_told_to_end_finishes_what_it_does(thinker_folder: Path) -> None:
    """SIGTERM: the stream goes on to its end, nobody else is let in, and the process ends without an error."""
    with Server(environment={**os.environ, **DEMO, "KIMI_VL_MODEL": str(thinker_folder)}) as server:
        events = server.client.stream({**SHORT, "max_length_tokens": 150})
        assert server.process is not None
        first = next(event for event in events if event.name == "output")
        server.process.terminate()
        deadline = time.monotonic() + 300
        with pytest.raises(ServerGone):
            while time.monotonic() < deadline:
                server.client.health()
        rest = list(events)
        assert rest[-1].data["status"] == "succeeded"
        assert rest[-1].data["output"][0] == first.data["chunk"] and len(rest[-1].data["output"]) > 2
        assert rest[-1].data["metrics"]["output_token_count"] == 150
        assert server.process.wait(timeout=300) == 0


# There is always an answer


@pytest.mark.parametrize("length", [16, 61])
@pytest.mark.parametrize("budget", [None, 0, 1, 7, 1_000_000])
def test_there_is_an_answer_for_every_length_and_budget(thinker: Client, length: int, budget: int | None) -> None:
    inputs: dict[str, Any] = {**SHORT, "max_length_tokens": length}
    if budget is not None:
        inputs["thinking_budget"] = budget
    response = succeed(thinker, **inputs)
    done = json.loads("".join(response["output"]).splitlines()[-1])
    assert done["answer"] and spoken(length).startswith(done["answer"])
    assert spoken(length).startswith(done["reasoning"])
    assert (response["metrics"]["output_token_count"], response["metrics"]["finish_reason"]) == (length, "length")
    assert response["metrics"]["thinking_closed_by"] == "budget"
    if budget is not None:
        assert response["metrics"]["reasoning_token_count"] <= budget + 8, "the markers count as well"


# Busy


def test_a_busy_server_says_so_and_goes_on(thinker: Client) -> None:
    name = uuid.uuid4().hex
    with contextlib.closing(thinker.stream(LONG, name)) as events:
        outputs = (event for event in events if event.name == "output")
        next(outputs)
        choices: list[dict[str, str]] = [{}, {"Accept": "text/event-stream"}, {"Prefer": "respond-async"}]
        for headers in choices:
            status, body = call(thinker, "POST", "/predictions", {"input": SHORT}, 0, **headers)
            assert (status, body["status"]) == (409, "failed") and body["error"]
        assert thinker.health()["status"] == "BUSY"
        next(outputs)
    still_right(thinker)


# Refused before it runs


@pytest.mark.parametrize(
    ("inputs", "places"),
    [
        ({"prompt": "hi", "seed": None}, ["seed"]),
        ({"prompt": ["hi"]}, ["prompt"]),
        ({"images": [3]}, ["images"]),
        ({"top_k": -1, "temperature": 9, "output_format": []}, ["output_format", "temperature", "top_k"]),
    ],
)
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_every_value_out_of_bounds_is_named(
    client: Client, inputs: dict[str, Any], places: list[str], accept: str
) -> None:
    status, body = post(client, inputs, Accept=accept)
    assert status == 422 and body.keys() == {"detail"}
    assert sorted({str(detail["loc"][2]).partition("/")[0] for detail in body["detail"]}) == places
    for detail in body["detail"]:
        assert detail["loc"][:2] == ["body", "input"]
        assert detail["type"].startswith("value_error") and detail["msg"]


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b'{"input": {', "application/json", 400),
        (b"[]", "application/json", 422),
        (b'"hi"', "application/json", 422),
        (b'{"input": "hi"}', "application/json", 422),
        (b'{"input": {"prompt": "hi"}}', "text/plain", 415),
        (b'{"input": {"prompt": "\xff"}}', "application/json", 400),
        (b'{"input": {"prompt": "\\ud83d"}}', "application/json", 400),
    ],
)
def test_bodies_that_are_no_request(client: Client, body: bytes, content_type: str, status: int) -> None:
    assert call(client, "POST", "/predictions", body, Content_Type=content_type)[0] == status
    assert client.health()["status"] in ("READY", "BUSY")


@pytest.mark.parametrize("body", [{}, {"input": {}}, {"input": None}])
def test_a_request_without_inputs_lacks_a_prompt(client: Client, body: dict[str, Any]) -> None:
    status, response = call(client, "POST", "/predictions", body)
    assert (status, response["status"]) == (200, "failed") and "E_PROMPT_EMPTY: " in response["error"]


def test_unknown_inputs_are_left_out(client: Client) -> None:
    assert answer_of(client, **ASK, stream=True, min_tokens=3) == answer_of(client, **ASK)


def test_a_body_of_more_than_it_may_have_is_refused(client: Client) -> None:
    try:
        status, _ = call(client, "POST", "/predictions", b'{"input": {"prompt": "' + b"a" * 105_000_000 + b'"}}')
    except OSError:
        status = 413  # it may close the connection while we still write
    assert status == 413
    assert client.health()["status"] in ("READY", "BUSY")


def test_a_prompt_of_ten_megabytes_is_refused(client: Client) -> None:
    assert "E_PROMPT_TOO_LONG: " in fail(client, prompt="word " * 2_000_000)


# Files


def test_urls(client: Client, loopback: Loopback) -> None:
    red = loopback.put("/red.png", picture())
    moved = loopback.put("/moved", b"", 302, Location="/red.png")
    same = loopback.put("/a%20picture?size=1&x=%20", picture()).replace("a%20", "a ")
    by_data = succeed(client, **ASK, images=[data_url(picture())] * 3)
    by_url = succeed(client, **ASK, images=[red, moved, same])
    assert "".join(by_url["output"]) == "".join(by_data["output"])
    assert by_url["metrics"]["image_token_count"] == by_data["metrics"]["image_token_count"] > 0
    one = succeed(client, **ASK, image=red)
    assert one["metrics"]["image_token_count"] * 3 == by_data["metrics"]["image_token_count"]


@pytest.mark.parametrize(
    ("page", "code"),
    [
        ((b"<html>404</html>", 200), "E_IMAGE_FORMAT"),
        ((b"", 200), "E_IMAGE_UNREADABLE"),
        ((picture()[:70], 200), "E_IMAGE_UNREADABLE"),
        ((bytes(33 * 2**20), 200), "E_IMAGE_TOO_LARGE"),
        ((picture(), 404), "404"),
        ((picture(), 500), "500"),
    ],
)
def test_urls_without_a_picture(client: Client, loopback: Loopback, page: tuple[bytes, int], code: str) -> None:
    url = loopback.put("/x.png", *page)
    assert code in fail(client, **ASK, image=url)
    assert code in fail(client, **ASK, images=[data_url(picture()), url])


def test_urls_that_lead_nowhere(client: Client, loopback: Loopback) -> None:
    loopback.server.server_close()
    for url in (loopback.url + "/x.png", "http://", "https://127.0.0.1:1/x.png", "http://[::bad/x"):
        assert fail(client, **ASK, image=url)
    assert answer_of(client, **ASK)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(picture()).decode(),
        "data:;base64," + base64.b64encode(picture()).decode(),
        "data:text/html;charset=utf-8;base64," + base64.b64encode(picture()).decode(),
        "data:image/png," + urllib.parse.quote_from_bytes(picture()),
        "data:image/png;BASE64," + base64.b64encode(picture()).decode(),
        "Data:image/png;base64," + base64.b64encode(picture()).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(picture()).decode().rstrip("="),
    ],
)
def test_data_urls_in_many_forms(client: Client, url: str) -> None:
    plain = answer_of(client, **ASK, image=data_url(picture()))
    part = {"type": "image_url", "image_url": {"url": url}}
    for inputs in ({**ASK, "image": url}, {**ASK, "images": [url]}):
        assert answer_of(client, **inputs) == plain
    asked = {"messages": [user(part, text(ASK["prompt"]))], **{k: v for k, v in ASK.items() if k != "prompt"}}
    assert answer_of(client, **asked) == plain


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:,", "E_IMAGE_UNREADABLE"),
        ("data:image/png;base64", "E_IMAGE_UNREADABLE"),
        ("data:image/png;base64,", "E_IMAGE_UNREADABLE"),
        ("data:image/png;base64,@@@@", "E_IMAGE_UNREADABLE"),
        ("data:image/png;base64,AAAA", "E_IMAGE_FORMAT"),
        ("data:text/plain,hi", "E_IMAGE_FORMAT"),
        ("data:image/png;base64," + "A" * 45_000_000, "E_IMAGE_TOO_LARGE"),
    ],
    ids=lambda value: value[:40],
)
def test_data_urls_without_a_picture(client: Client, url: str, code: str) -> None:
    assert f"{code}: " in fail(client, **ASK, image=url)
    part = {"type": "image_url", "image_url": {"url": url}}
    assert f"{code}: " in fail(client, messages=[user(part, text("hi"))])


HOSTILE = [
    "FILE:///etc/hostname",
    "file:/etc/hostname",
    "file://localhost/etc/hostname",
    "../../../../etc/hostname",
    "/proc/self/environ",
    "/dev/zero",
    "/etc/hostname\u0000.png",
    "ftp://127.0.0.1/x.png",
    "gopher://127.0.0.1:1/_x",
    "//127.0.0.1/x.png",
    "javascript:alert(1)",
    "\\\\server\\share\\x.png",
    "-",
    "~",
    "é",
    " ",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_files_of_the_machine_cannot_be_named(client: Client, source: str) -> None:
    part = {"type": "image_url", "image_url": {"url": source}}
    for inputs in ({**ASK, "image": source}, {**ASK, "images": [source]}, {"messages": [user(part, text("hi"))]}):
        error = fail(client, **inputs)
        assert "E_IMAGE_SOURCE: " in error
        assert "hostname" not in error and "/proc" not in error


def test_nothing_is_fetched_that_was_refused(client: Client, loopback: Loopback) -> None:
    loud = "HTTP" + loopback.put("/x.png", picture()).removeprefix("http")
    for part in ({"type": "image_url", "image_url": {"url": loopback.url + "/x.png"}}, {"image": loud}):
        assert "E_IMAGE_SOURCE: " in fail(client, messages=[user(part, text("hi"))])
    for inputs in ({"image": loud}, {"images": [loud]}):
        assert "E_IMAGE_SOURCE: " in fail(client, **ASK, **inputs)
    assert loopback.asked == []


def test_files_are_gone_after_the_request(thinker: Client, client: Client, loopback: Loopback) -> None:
    folder, mark = Path(tempfile.gettempdir()), uuid.uuid4().hex
    with contextlib.closing(thinker.stream({**LONG, "image": loopback.put(f"/{mark}.png", picture())})) as events:
        next(event for event in events if event.name == "output")
        assert list(folder.glob(f"*{mark}*")), "Cog keeps a file while the request runs"
    fail(client, **ASK, image=loopback.put(f"/{mark}-bad.png", b"no picture"))
    deadline = time.monotonic() + 300
    while list(folder.glob(f"*{mark}*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(folder.glob(f"*{mark}*"))
