"""predict.py around a stub pipeline: inputs to a chat, events to text, metrics, errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cog import CancelationException, Path
from PIL import Image

import predict
from cog_local import schema
from kimi_vl.errors import UserError
from kimi_vl.events import Answer, Done, Reasoning, Usage
from kimi_vl.media import data_url
from kimi_vl.text import grammar

PNG = b"\x89PNG not really"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
DEFAULTS: dict[str, Any] = {
    "prompt": "",
    "image": None,
    "top_p": 1.0,
    "temperature": 0.6,
    "max_length_tokens": 8192,
    "images": [],
    "system_prompt": "",
    "messages": [],
    "thinking_budget": None,
    "top_k": 0,
    "stop_sequences": "",
    "seed": None,
    "output_format": "text",
    "video": None,
    "document": None,
    "fps": 1.0,
    "max_frames": 64,
    "start": 0.0,
    "end": None,
    "pages": "",
    "json_schema": "",
    "max_tokens": None,
    "max_new_tokens": None,
}
THOUGHT = [Reasoning("two "), Reasoning("and two"), Answer("fo"), Answer("ur")]


def done(**changes: Any) -> Done:
    values: dict[str, Any] = {
        "reasoning": "two and two",
        "answer": "four",
        "finish_reason": "stop",
        "thinking_closed_by": "model",
        "usage": Usage(input_tokens=11, image_tokens=4, output_tokens=7, reasoning_tokens=5, cached_tokens=2),
        "seed": 3,
        "time_to_first_token": 0.5,
        "tokens_per_second": 20.0,
    }
    return Done(**{**values, **changes})


class StubPipeline:
    """Yields what it was given; an exception among it is raised in its turn."""

    def __init__(self, *events: Any) -> None:
        self.events = events or (*THOUGHT, done())
        self.messages: Any = None
        self.images: Any = None
        self.params: dict[str, Any] = {}
        self.closed = False
        self.health = True

    def healthy(self) -> bool:
        return self.health

    def stream(self, messages: Any, images: Any = (), **params: Any) -> StubStream:
        self.messages, self.images, self.params = messages, images, params
        self.streamed = StubStream(self)
        return self.streamed


class StubStream(Iterator[Any]):
    def __init__(self, pipeline: StubPipeline) -> None:
        self.pipeline = pipeline
        self.coming = iter(pipeline.events)
        self.error: BaseException | None = None

    def __next__(self) -> Any:
        event = self.error or next(self.coming)
        if isinstance(event, BaseException):
            raise event
        return event

    def interrupt(self, error: BaseException) -> None:
        self.error = error

    def close(self) -> None:
        self.pipeline.closed = True


class Recorder(predict.Predictor):
    """A predictor as Cog makes one, with its metrics kept."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.metrics: dict[str, Any] = {}

    def record_metric(self, key: str, value: Any, mode: str = "replace") -> None:
        assert value is not None, "Cog refuses None"
        self.metrics[key] = value


def run(*events: Any, **inputs: Any) -> list[str]:
    return list(Recorder(StubPipeline(*events)).predict(**{**DEFAULTS, "prompt": "2+2?", **inputs}))


def chat(**inputs: Any) -> tuple[Any, Any]:
    """The messages and images that reach the pipeline."""
    pipeline = StubPipeline()
    list(Recorder(pipeline).predict(**{**DEFAULTS, **inputs}))
    return pipeline.messages, pipeline.images


def parameters(**inputs: Any) -> dict[str, Any]:
    pipeline = StubPipeline()
    list(Recorder(pipeline).predict(**{**DEFAULTS, "prompt": "2+2?", **inputs}))
    return pipeline.params


def refusal(**inputs: Any) -> str:
    pipeline = StubPipeline()
    with pytest.raises(UserError) as caught:
        list(Recorder(pipeline).predict(**{**DEFAULTS, **inputs}))
    assert pipeline.messages is None, "refused before the pipeline is asked"
    return str(caught.value)


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


# Output


def test_text_has_the_markers_of_the_model() -> None:
    assert run() == ["◁think▷two ", "and two", "◁/think▷fo", "ur"]


def test_think_tags() -> None:
    assert run(output_format="think_tags") == ["<think>two ", "and two", "</think>fo", "ur"]


def test_answer_alone() -> None:
    assert run(output_format="answer") == ["fo", "ur"]


def test_json_lines() -> None:
    chunks = run(output_format="json")
    lines = [json.loads(line) for line in "".join(chunks).splitlines()]
    assert all(chunk.endswith("\n") and chunk.count("\n") == 1 for chunk in chunks)
    assert [line["type"] for line in lines] == ["reasoning", "reasoning", "answer", "answer", "done"]
    assert "".join(line["text"] for line in lines if line["type"] == "answer") == "four"
    assert lines[-1] == {
        "type": "done",
        "reasoning": "two and two",
        "answer": "four",
        "finish_reason": "stop",
        "usage": {"input_tokens": 11, "image_tokens": 4, "output_tokens": 7, "reasoning_tokens": 5, "cached_tokens": 2},
        "seed": 3,
    }


BOX = '{"bbox_2d": [0.1, 0.2, 0.5, 0.5], "label": "a dog"}'


def test_grounding_is_one_line_with_pixels_of_the_picture() -> None:
    """Guesses of the thinking do not count."""
    ended = done(reasoning='{"bbox_2d": [0, 0, 1, 1]}', answer=BOX, image_sizes=((100, 50),))
    (line,) = run(Reasoning("…"), Answer(BOX), ended, output_format="grounding", image=Path("dog.png"))
    found = json.loads(line)
    assert line.endswith("\n") and found["answer"] == BOX and found["unit"] == "relative"
    assert [(each["label"], each["box"], each["image"]) for each in found["findings"]] == [
        ("a dog", [10.0, 10.0, 50.0, 25.0], 0)
    ]
    assert "images" not in found


def test_grounding_of_a_later_message_is_of_its_picture() -> None:
    ended = done(answer=BOX, image_sizes=((100, 50), (200, 100)), asked_image=1)
    (line,) = run(ended, output_format="grounding", image=Path("dog.png"))
    [finding] = json.loads(line)["findings"]
    assert (finding["image"], finding["box"]) == (1, [20.0, 20.0, 100.0, 50.0])


def test_json_ends_with_the_places_in_the_pictures() -> None:
    *_, last = run(Answer(BOX), done(answer=BOX, image_sizes=((100, 50),)), output_format="json")
    line = json.loads(last)
    assert line["grounding"]["unit"] == "relative"
    assert [each["box"] for each in line["grounding"]["findings"]] == [[10.0, 10.0, 50.0, 25.0]]


def test_grounding_without_a_picture_finds_nothing() -> None:
    (line,) = run(Answer(BOX), done(answer=BOX), output_format="grounding")
    assert json.loads(line) == {"answer": BOX, "finish_reason": "stop", "unit": None, "findings": []}


def test_grounding_with_the_picture_drawn_on() -> None:
    class WithPictures(StubPipeline):
        def pictures(self, messages: Any, images: Any) -> list[Image.Image]:
            assert messages[0]["content"][0] == {"type": "image"} and images == [Path("dog.png")]
            return [Image.new("RGB", (100, 50), "white")]

    pipeline = WithPictures(Answer(BOX), done(answer=BOX, image_sizes=((100, 50),)))
    inputs = {**DEFAULTS, "prompt": "Where?", "image": Path("dog.png"), "output_format": "grounding_image"}
    (line,) = Recorder(pipeline).predict(**inputs)
    (drawn,) = json.loads(line)["images"]
    picture = Image.open(io.BytesIO(data_url.decode(drawn)))
    assert picture.size == (100, 50) and any(picture.convert("L").histogram()[:150])


def test_json_keeps_line_breaks_inside_one_line() -> None:
    said = "a\nb\r\v\f\x1c\x1d\x1e\x85\u2028\u2029c"
    chunks = run(Answer(said), done(), output_format="json")
    assert json.loads(chunks[0])["text"] == said
    assert chunks[0].splitlines(keepends=True) == [chunks[0]] and chunks[0].endswith("}\n")


@pytest.mark.parametrize("output_format", ["text", "think_tags", "answer"])
def test_no_markers_without_thinking(output_format: str) -> None:
    assert "".join(run(Answer("four"), done(), output_format=output_format)) == "four"


def test_thinking_is_closed_even_when_no_answer_follows() -> None:
    assert "".join(run(Reasoning("hm"), done())) == "◁think▷hm◁/think▷"
    assert "".join(run(Reasoning("hm"), done(), output_format="answer")) == ""


def test_no_output_at_all() -> None:
    assert run(done()) == []


def test_unknown_output_format_is_refused() -> None:
    with pytest.raises(UserError, match=r"^E_PARAMETER: "):
        run(output_format="xml")


# Metrics


def test_metrics() -> None:
    recorder = Recorder(StubPipeline())
    list(recorder.predict(**{**DEFAULTS, "prompt": "2+2?"}))
    assert recorder.metrics == {
        "input_token_count": 11,
        "image_token_count": 4,
        "output_token_count": 7,
        "reasoning_token_count": 5,
        "finish_reason": "stop",
        "thinking_closed_by": "model",
        "time_to_first_token": 0.5,
        "tokens_per_second": 20.0,
        "seed": 3,
    }


def test_metrics_that_do_not_exist_are_left_out() -> None:
    assert "time_to_first_token" not in predict.metrics(done(time_to_first_token=None))
    assert predict.metrics(done(seed=0))["seed"] == 0


# Prompt to messages


def test_prompt() -> None:
    assert chat(prompt="hi") == ([user({"type": "text", "text": "hi"})], [])


def test_system_prompt_and_images_in_order() -> None:
    first, second = Path("/a b.png"), Path("/c.png")
    messages, images = chat(prompt="hi", system_prompt="be brief", image=first, images=[second])
    assert messages == [
        {"role": "system", "content": "be brief"},
        user({"type": "image"}, {"type": "image"}, {"type": "text", "text": "hi"}),
    ]
    assert images == [first, second]


@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", "HTTP://a.example/b.png", "", 3])
def test_what_cog_did_not_fetch_is_refused(source: Any) -> None:
    for inputs in ({"image": source}, {"images": [source]}, {"images": [Path("/a.png"), source]}):
        message = refusal(prompt="hi", **inputs)
        assert message.startswith("E_IMAGE_SOURCE: ")
        assert "hostname" not in message


def test_a_video_and_a_document_come_after_the_images_and_before_the_question() -> None:
    picture, film, paper = Path("/a.png"), Path("/b.mp4"), Path("/c.pdf")
    messages, images = chat(prompt="hi", image=picture, video=film, document=paper)
    assert messages == [
        user({"type": "image"}, {"type": "video"}, {"type": "document"}, {"type": "text", "text": "hi"})
    ]
    assert images == [picture]
    found = parameters(video=film, document=paper, fps=2, start=1, end=3.5, max_frames=9, pages="2-3")
    assert (found["videos"], found["documents"]) == ([film], [paper])
    assert [found[name] for name in ("fps", "start", "end", "max_frames", "pages")] == [2, 1, 3.5, 9, "2-3"]
    assert parameters(video="DATA:video/mp4;base64,eHk=")["videos"] == [b"xy"]
    said = [user({"type": "video"})]
    assert chat(messages=said, video=film) == (said, [])


@pytest.mark.parametrize("name", ["video", "document"])
@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", "", 3])
def test_a_video_or_document_that_cog_did_not_fetch_is_refused(name: str, source: Any) -> None:
    message = refusal(prompt="hi", **{name: source})
    assert message.startswith(f"E_{name.upper()}_SOURCE: ") and "hostname" not in message


def test_a_json_schema_is_a_grammar() -> None:
    schema = '{"type": "object", "properties": {"result": {"type": "integer"}}}'
    assert parameters(json_schema=schema)["grammar"] == grammar.json_schema(json.loads(schema))
    assert refusal(prompt="hi", json_schema='{"type": ').startswith("E_GRAMMAR: json_schema is not JSON")


# Messages


def test_messages_are_left_to_the_pipeline() -> None:
    first, second = Path("/1.png"), Path("/2.png")
    messages = [
        {"role": "system", "content": "be brief"},
        user({"type": "image"}, image_part(DATA_URL), {"type": "text", "text": "compare"}),
        {"role": "assistant", "content": None},
    ]
    assert chat(messages=messages, image=first, images=[second]) == (messages, [first, second])
    assert chat(messages=messages) == (messages, [])


@pytest.mark.parametrize("inputs", [{"prompt": "hi"}, {"system_prompt": "be brief"}])
def test_messages_exclude_prompts(inputs: dict[str, str]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert refusal(messages=messages, **inputs).startswith("E_PARAMETER: ")


# Parameters


def test_the_deadline_is_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_VL_DEADLINE_S", "2.5")
    assert parameters()["deadline"] == 2.5
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("KIMI_VL_DEADLINE_S", wrong)
        with pytest.raises(ValueError, match="KIMI_VL_DEADLINE_S"):
            predict.load_model()


@pytest.mark.parametrize("predictor", [predict.Predictor, predict.ConcurrentPredictor])
def test_cog_has_no_annotations_to_compile_for_each_request(predictor: type) -> None:
    annotations = predictor.predict.__annotations__
    assert len(annotations) == len(DEFAULTS) + 1
    assert not [name for name, annotation in annotations.items() if isinstance(annotation, str)]


def test_parameters_reach_the_pipeline() -> None:
    assert parameters() == {
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": 0,
        "max_length_tokens": 8192,
        "thinking_budget": None,
        "stop_sequences": (),
        "seed": None,
        "deadline": 1800.0,
        "interval": 0.07,
        "videos": [],
        "documents": [],
        "fps": 1.0,
        "max_frames": 64,
        "start": 0.0,
        "end": None,
        "pages": "",
        "grammar": None,
    }
    given = parameters(temperature=1, top_p=0, top_k=5, thinking_budget=0, seed=0, stop_sequences="END")
    assert (given["temperature"], given["top_p"], given["top_k"]) == (1.0, 0.0, 5)
    assert (given["thinking_budget"], given["seed"], given["stop_sequences"]) == (0, 0, ("END",))


@pytest.mark.parametrize(
    ("inputs", "limit"),
    [
        ({"max_tokens": 100}, 100),
        ({"max_new_tokens": 100}, 100),
        ({"max_tokens": 100, "max_new_tokens": 100}, 100),
        ({"max_length_tokens": 100, "max_tokens": 100}, 100),
        ({"max_length_tokens": 100}, 100),
        ({"max_tokens": 8192}, 8192),
    ],
)
def test_names_of_the_token_limit(inputs: dict[str, int], limit: int) -> None:
    assert parameters(**inputs)["max_length_tokens"] == limit


@pytest.mark.parametrize("inputs", [{"max_tokens": 1, "max_new_tokens": 2}, {"max_length_tokens": 1, "max_tokens": 2}])
def test_token_limits_that_differ(inputs: dict[str, int]) -> None:
    assert refusal(prompt="hi", **inputs).startswith("E_PARAMETER: ")


@pytest.mark.parametrize(
    ("text", "sequences"),
    [("", ()), ("a", ("a",)), ("a, b", ("a", "b")), (",a,,", ("a",)), ("\n,\n\nUser:", ("\n", "\n\nUser:"))],
)
def test_stop_sequences(text: str, sequences: tuple[str, ...]) -> None:
    assert parameters(stop_sequences=text)["stop_sequences"] == sequences


# Errors and cancelling


def test_user_errors_of_the_pipeline_leave_as_they_are() -> None:
    with pytest.raises(UserError) as caught:
        run(UserError("E_PROMPT_TOO_LONG", "shorten the prompt."))
    assert str(caught.value) == "E_PROMPT_TOO_LONG: shorten the prompt."


def test_other_errors_leave_without_their_text(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "the caller's text"
    error = KeyError(secret)
    error.__cause__ = ValueError(secret)
    with pytest.raises(RuntimeError, match=r"^E_INTERNAL: ") as caught:
        run(Answer("a"), error)
    printed = capsys.readouterr()
    assert "error: KeyError" in printed.err and "error: ValueError" in printed.err
    assert "test_predict.py" in printed.err, "the place is logged"
    assert secret not in printed.out + printed.err + str(caught.value)


def test_cancelling_passes_through_and_stops_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = StubPipeline(Answer("a"), CancelationException())
    pieces = Recorder(pipeline).predict(**{**DEFAULTS, "prompt": "hi"})
    with pytest.raises(CancelationException):
        list(pieces)
    assert pipeline.closed
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_stops_the_pipeline() -> None:
    pipeline = StubPipeline()
    pieces = Recorder(pipeline).predict(**{**DEFAULTS, "prompt": "hi"})
    assert next(iter(pieces)) == "◁think▷two "
    pieces.close()  # type: ignore[attr-defined]
    assert pipeline.closed


def test_nothing_of_a_request_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run(prompt="a secret", image=Path("/secret.png"))
    assert capsys.readouterr() == ("", "")


def test_defaults_here_and_in_predict_are_those_of_the_schema() -> None:
    source = pathlib.Path(predict.__file__).read_text(encoding="utf-8")
    properties = schema.generate(source)["components"]["schemas"]["Input"]["properties"]
    assert {name: field["default"] for name, field in properties.items()} == DEFAULTS
    assert DEFAULTS["max_length_tokens"] == predict.DEFAULT_MAX_LENGTH_TOKENS


# Many at a time


@pytest.fixture
def concurrent() -> Iterator[predict.ConcurrentPredictor]:
    predictor = predict.ConcurrentPredictor()
    yield predictor
    predictor.streams.close()


def returned(predictor: predict.ConcurrentPredictor, **inputs: Any) -> tuple[Any, Any]:
    """What Cog gets from the coroutine that it submits, and the future that it keeps."""

    async def submitted() -> tuple[Any, Any]:
        loop = asyncio.get_running_loop()
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(predictor.streams.try_out(), loop))
        work: Any = predictor.predict(**{**DEFAULTS, "prompt": "2+2?", **inputs})
        future = asyncio.run_coroutine_threadsafe(work, loop)
        return await asyncio.wrap_future(future), future

    return asyncio.run(submitted())


def test_the_concurrent_predictor_streams_the_same(concurrent: predict.ConcurrentPredictor) -> None:
    for output_format in ("text", "answer", "json"):
        pipeline = StubPipeline()
        concurrent.pipeline = pipeline  # pyright: ignore[reportAttributeAccessIssue]
        pieces, _ = returned(concurrent, output_format=output_format, seed=5)
        assert pipeline.messages is None, "nothing begins in the event loop"
        assert list(pieces) == run(output_format=output_format)
        assert pipeline.params == parameters(seed=5) and pipeline.closed


def test_cancelling_the_concurrent_predictor(concurrent: predict.ConcurrentPredictor) -> None:
    pipeline = StubPipeline()
    concurrent.pipeline = pipeline  # pyright: ignore[reportAttributeAccessIssue]
    pieces, future = returned(concurrent)
    assert next(pieces) == "◁think▷two "
    future.cancel()
    assert isinstance(pipeline.streamed.error, CancelationException), "heard while it may wait for the next event"
    with pytest.raises(CancelationException):
        next(pieces)
    assert pipeline.closed


def test_a_cog_that_does_not_call_the_hook_is_told_in_the_log(
    concurrent: predict.ConcurrentPredictor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "load_model", StubPipeline)
    asyncio.run(concurrent.setup())
    assert capsys.readouterr().out.count("each answer is sent whole") == 1
    output: Any = asyncio.run(concurrent.predict(**{**DEFAULTS, "prompt": "2+2?"}))  # type: ignore[arg-type]
    assert isinstance(output, list) and "".join(output) == "".join(run())


# Set-up and health


@pytest.mark.parametrize(("value", "model"), [(None, "thinking"), ("", "thinking"), ("demo", "demo")])
def test_setup_loads_what_the_environment_names(monkeypatch: pytest.MonkeyPatch, value: str | None, model: str) -> None:
    loaded = []
    package = SimpleNamespace(load=lambda model: loaded.append(model) or StubPipeline())
    monkeypatch.setattr(predict, "kimi_vl", package)
    monkeypatch.delenv("KIMI_VL_MODEL", raising=False)
    if value is not None:
        monkeypatch.setenv("KIMI_VL_MODEL", value)
    predictor = predict.Predictor()
    predictor.setup()
    concurrent = predict.ConcurrentPredictor()
    asyncio.run(concurrent.setup())
    concurrent.streams.close()
    assert loaded == [model, model]
    assert predictor.healthcheck() and concurrent.healthcheck()


@pytest.mark.parametrize("kind", [predict.Predictor, predict.ConcurrentPredictor])
def test_healthcheck_asks_the_pipeline(kind: type[predict.Predictor | predict.ConcurrentPredictor]) -> None:
    predictor = kind.__new__(kind)
    predictor.pipeline = StubPipeline()  # pyright: ignore[reportAttributeAccessIssue]
    assert predictor.healthcheck()
    predictor.pipeline.health = False  # pyright: ignore[reportAttributeAccessIssue]
    assert not predictor.healthcheck()
