"""What a caller of the HTTP API sees: Cog's own server, predict.py, the demo model."""

from __future__ import annotations

import contextlib
import json
import uuid
from typing import Any

import pytest

from cog_local import schema
from cog_local.client import Client, Event, RequestRefused
from cog_local.server import ROOT, Server
from tests.media import films, papers

from .conftest import data_url, file_url, picture

ASK = {"prompt": "Hello, who are you?", "temperature": 0, "max_length_tokens": 200}

# For the model that never ends its turn.
LONG = {"prompt": "Tell me a long story.", "temperature": 0, "max_length_tokens": 100_000}

METRICS: dict[str, type | tuple[type, ...]] = {
    "input_token_count": int,
    "image_token_count": int,
    "output_token_count": int,
    "reasoning_token_count": int,
    "finish_reason": str,
    "thinking_closed_by": str,
    "time_to_first_token": (int, float),
    "tokens_per_second": (int, float),
    "seed": int,
}

MATH_PROBLEM = ROOT / "images" / "math_problem.png"


def succeed(client: Client, **inputs: Any) -> dict[str, Any]:
    response = client.predict(inputs)
    assert response["status"] == "succeeded", response
    return response


def fail(client: Client, **inputs: Any) -> str:
    """Cog's whole error for a request that has to fail."""
    response = client.predict(inputs)
    assert response["status"] == "failed", response
    assert "output" not in response
    return response["error"]


def answer(client: Client, **inputs: Any) -> str:
    return "".join(succeed(client, output_format="answer", temperature=0, **inputs)["output"])


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


# Ready


def test_ready(client: Client) -> None:
    health = client.health()
    assert health["status"] == "READY"
    assert health["setup"]["status"] == "succeeded"
    assert "user_healthcheck_error" not in health


def test_schema_is_served(client: Client) -> None:
    document = schema.generate((ROOT / "predict.py").read_text(encoding="utf-8"))
    assert client.schema()["components"]["schemas"]["Input"] == document["components"]["schemas"]["Input"]


# Plain and streamed


def test_json_response(client: Client) -> None:
    response = succeed(client, **ASK)
    assert response["output"] and all(isinstance(chunk, str) for chunk in response["output"])
    metrics = response["metrics"]
    for name, kind in METRICS.items():
        assert isinstance(metrics[name], kind), name
    assert metrics["input_token_count"] > 0 and metrics["image_token_count"] == 0
    assert 0 < metrics["output_token_count"] <= 200
    assert metrics["finish_reason"] in ("stop", "length", "stop_sequence")
    assert metrics["thinking_closed_by"] in ("model", "budget", "none")


def test_events(client: Client) -> None:
    events = list(client.stream(ASK))
    names = [event.name for event in events]
    assert names[0] == "start" and names[-1] == "completed"
    outputs = [event.data for event in events if event.name == "output"]
    final = events[-1].data
    assert final["status"] == "succeeded"
    assert [output["index"] for output in outputs] == list(range(len(outputs)))
    assert [output["chunk"] for output in outputs] == final["output"]
    assert {event.data["name"] for event in events if event.name == "metric"} == set(METRICS)
    assert set(METRICS) <= set(final["metrics"])


def test_text_arrives_while_it_is_made(endless: Client) -> None:
    events = endless.stream(LONG)
    with contextlib.closing(events):
        outputs = (event for event in events if event.name == "output")
        first, *later = [next(outputs).data["index"] for _ in range(4)]
        assert endless.health()["status"] == "BUSY", "the rest is still being made"
    assert [first, *later] == [0, 1, 2, 3]


def test_output_forms_agree(client: Client) -> None:
    output = {
        form: "".join(succeed(client, **ASK, output_format=form)["output"])
        for form in ("text", "think_tags", "answer", "json")
    }
    lines = [json.loads(line) for line in output["json"].splitlines()]
    last = lines[-1]
    assert last["type"] == "done" and {line["type"] for line in lines[:-1]} <= {"reasoning", "answer"}
    for kind in ("reasoning", "answer"):
        assert "".join(line["text"] for line in lines if line["type"] == kind) == last[kind]
    assert output["answer"] == last["answer"]
    if last["reasoning"]:
        assert output["text"] == f"◁think▷{last['reasoning']}◁/think▷{last['answer']}"
        assert output["think_tags"] == f"<think>{last['reasoning']}</think>{last['answer']}"
    else:
        assert output["text"] == output["think_tags"] == last["answer"]


def test_same_seed_same_text(client: Client) -> None:
    inputs = {**ASK, "temperature": 1.0, "seed": 7, "max_length_tokens": 60}
    first, second = succeed(client, **inputs), succeed(client, **inputs)
    assert "".join(first["output"]) == "".join(second["output"])
    assert first["metrics"]["seed"] == second["metrics"]["seed"] == 7


def test_zero_is_a_seed(client: Client) -> None:
    assert succeed(client, **ASK, seed=0)["metrics"]["seed"] == 0


@pytest.mark.parametrize("name", ["max_length_tokens", "max_tokens", "max_new_tokens"])
def test_token_limit(endless: Client, name: str) -> None:
    inputs = {"prompt": "Go on.", "temperature": 0, name: 12}
    metrics = succeed(endless, **inputs)["metrics"]
    assert (metrics["output_token_count"], metrics["finish_reason"]) == (12, "length")


def test_no_thinking_when_the_budget_is_zero(client: Client) -> None:
    output = "".join(succeed(client, **ASK, thinking_budget=0, output_format="json")["output"])
    lines = [json.loads(line) for line in output.splitlines()]
    assert {line["type"] for line in lines} == {"answer", "done"}
    assert lines[-1]["reasoning"] == ""


# Refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 1.5),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("max_length_tokens", 0),
        ("max_length_tokens", 131073),
        ("max_length_tokens", 1.5),
        ("top_k", -1),
        ("thinking_budget", -1),
        ("output_format", "xml"),
        ("images", "data:,"),
        ("messages", "hi"),
        ("messages", ["hi"]),
        ("prompt", 3),
        ("image", None),
    ],
)
def test_values_that_the_schema_refuses(client: Client, name: str, value: Any) -> None:
    with pytest.raises(RequestRefused) as caught:
        client.predict({**ASK, name: value})
    assert caught.value.status == 422
    places = [str(detail["loc"][-1]) for detail in caught.value.body["detail"]]
    assert [place.partition("/")[0] for place in places] == [name]


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({}, "E_PROMPT_EMPTY"),
        ({"prompt": " "}, "E_PROMPT_EMPTY"),
        ({"prompt": "word " * 300_000}, "E_PROMPT_TOO_LONG"),
        ({"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}, "E_PARAMETER"),
        ({"prompt": "hi", "max_tokens": 3, "max_new_tokens": 4}, "E_PARAMETER"),
        ({"prompt": "hi", "image": "/etc/hostname"}, "E_IMAGE_SOURCE"),
        ({"prompt": "hi", "image": "file:///etc/hostname"}, "E_IMAGE_SOURCE"),
        ({"prompt": "hi", "image": ""}, "E_IMAGE_SOURCE"),
        ({"prompt": "hi", "images": ["/etc/hostname"]}, "E_IMAGE_SOURCE"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "/etc/hostname"}})]},
            "E_IMAGE_SOURCE",
        ),
        ({"messages": [user({"type": "image", "image": "https://a.example/b.png"})]}, "E_IMAGE_SOURCE"),
        ({"messages": [user({"type": "image"})]}, "E_MESSAGES_INVALID"),
        ({"messages": [user(text("hi"))], "image": data_url(picture())}, "E_MESSAGES_INVALID"),
        ({"messages": [{"role": "user"}]}, "E_MESSAGES_INVALID"),
        ({"messages": [{"content": "hi"}]}, "E_MESSAGES_INVALID"),
        ({"prompt": "hi", "image": data_url(b"no image", "image/png")}, "E_IMAGE_"),
        ({"prompt": "hi", "image": "data:image/png;base64,@@@"}, "E_IMAGE_"),
        ({"prompt": "hi", "image": data_url(picture()[:60])}, "E_IMAGE_UNREADABLE"),
        ({"prompt": "hi", "images": [data_url(picture())] * 65}, "E_TOO_MANY_IMAGES"),
    ],
)
def test_mistakes_of_the_caller(client: Client, inputs: dict[str, Any], code: str) -> None:
    error = fail(client, **inputs)
    sentence = error[error.index(code) :]
    assert sentence.partition(": ")[2].strip(), "the code is followed by a sentence"
    assert "hostname" not in error and "/tmp" not in error and "Traceback" not in error
    assert client.health()["status"] in ("READY", "BUSY"), "Cog frees its slot a moment later"


def test_mistakes_end_a_stream_with_the_same_error(client: Client) -> None:
    events = list(client.stream({}))
    assert not [event for event in events if event.name == "output"]
    assert events[-1].data["status"] == "failed"
    assert "E_PROMPT_EMPTY: " in events[-1].data["error"]


def test_requests_leave_no_trace_in_the_log(server: Server, client: Client) -> None:
    secret = "quokka-" + uuid.uuid4().hex
    succeed(client, **{**ASK, "prompt": f"Say {secret}.", "max_length_tokens": 20})
    fail(client, prompt=secret, image="/tmp/" + secret)
    fail(client, messages=[{"role": secret}])
    assert not [line for line in server.lines if secret in line]


# Cancelling


def start_long(client: Client, prediction_id: str) -> tuple[Any, Event]:
    """A running prediction, which would take many minutes, and its first output."""
    events = client.stream(LONG, prediction_id)
    return events, next(event for event in events if event.name == "output")


def test_cancel(endless: Client) -> None:
    prediction_id = uuid.uuid4().hex
    events, _ = start_long(endless, prediction_id)
    with contextlib.closing(events):
        assert endless.cancel(prediction_id)
        final = list(events)[-1]
    assert final.data["status"] == "canceled"
    succeed(endless, prompt="Go on.", max_length_tokens=4)
    assert not endless.cancel(prediction_id)


def test_a_reader_that_leaves_cancels(endless: Client) -> None:
    events, _ = start_long(endless, uuid.uuid4().hex)
    events.close()
    # the client gives up long before the first request could end by itself
    succeed(endless, prompt="Go on.", max_length_tokens=4)


# Images and conversations


def test_image_as_a_data_url(client: Client) -> None:
    response = succeed(client, **ASK, image=data_url(picture()))
    assert response["metrics"]["image_token_count"] > 0


def test_a_video_and_a_document_as_data_urls(client: Client) -> None:
    film = data_url(films.Film(times=films.every(10, 2)).made(), "video/mp4")
    paper = data_url(papers.Paper(papers.pages(2)).made(), "application/pdf")
    metrics = succeed(client, **ASK, video=film, document=paper, pages="2")["metrics"]
    assert [(use["kind"], use["taken"]) for use in metrics["media"]] == [("video", [0, 1]), ("document", [2])]
    assert "E_VIDEO_FORMAT" in fail(client, **ASK, video=paper)
    assert "E_DOCUMENT_PAGES" in fail(client, **ASK, document=paper, pages="3")
    assert "E_VIDEO_UNREADABLE" in fail(client, **ASK, video="data:video/mp4;base64,####")
    assert client.health()["status"] == "READY"


def test_two_images(client: Client) -> None:
    one = succeed(client, **ASK, image=data_url(picture()))["metrics"]
    both = succeed(client, **ASK, image=data_url(picture()), images=[data_url(picture("blue"))])["metrics"]
    only_list = succeed(client, **ASK, images=[data_url(picture()), data_url(picture("blue"))])["metrics"]
    assert both["image_token_count"] == only_list["image_token_count"] == 2 * one["image_token_count"]
    assert both["input_token_count"] == only_list["input_token_count"]


def test_messages_are_the_same_request_as_a_prompt(client: Client) -> None:
    image = data_url(picture())
    inputs = {key: value for key, value in ASK.items() if key != "prompt"}
    by_prompt = succeed(client, **ASK, image=image)
    part = {"type": "image_url", "image_url": {"url": image}}
    by_url = succeed(client, **inputs, messages=[user(part, text(str(ASK["prompt"])))])
    bare = user({"type": "image"}, text(str(ASK["prompt"])))
    by_bare_part = succeed(client, **inputs, messages=[bare], images=[image])
    assert "".join(by_prompt["output"]) == "".join(by_url["output"]) == "".join(by_bare_part["output"])
    assert by_prompt["metrics"]["input_token_count"] == by_url["metrics"]["input_token_count"]


def test_second_turn(client: Client) -> None:
    first = [{"role": "user", "content": "Hello."}]
    reply = "".join(succeed(client, messages=first, temperature=0, max_length_tokens=60)["output"])
    turns = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "And you?"}]
    response = succeed(client, messages=turns, temperature=0, max_length_tokens=60)
    assert response["output"]


# Right answers about real pictures


def test_sum_in_a_picture(client: Client) -> None:
    said = answer(client, prompt="What is the result?", image=file_url(MATH_PROBLEM))
    assert said == "25 + 13 = 38"


def test_the_thinking_comes_first_and_is_consistent(client: Client) -> None:
    response = succeed(client, prompt="What is the result?", image=file_url(MATH_PROBLEM), temperature=0)
    thinking, closer, said = "".join(response["output"]).partition("◁/think▷")
    assert thinking.startswith("◁think▷The picture shows 25 + 13.") and thinking.endswith("So 38.")
    assert (closer, said) == ("◁/think▷", "25 + 13 = 38")
    assert response["metrics"]["thinking_closed_by"] == "model"


def test_a_second_turn_about_the_first_turn_s_picture(client: Client) -> None:
    picture_part = {"type": "image_url", "image_url": {"url": file_url(MATH_PROBLEM)}}
    first = user(picture_part, text("What is the result?"))
    said = answer(client, messages=[first])
    turns = [first, {"role": "assistant", "content": said}, user(text("What is shown in the image?"))]
    assert "25 + 13" in answer(client, messages=turns)


def test_concurrent_requests_are_refused_and_may_retry(endless: Client) -> None:
    impatient = Client(f"http://{endless.host}:{endless.port}", patience=0)
    events, _ = start_long(endless, uuid.uuid4().hex)
    with contextlib.closing(events), pytest.raises(RequestRefused) as refusal:
        impatient.predict({"prompt": "Go on.", "max_length_tokens": 4})
    assert refusal.value.status == 409
