"""Videos and documents through every entry, with the real readers: Cog's inputs, Python, `kimi-vl ask`, the server."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kimi_vl
import predict
from kimi_vl.cli.main import main
from kimi_vl.errors import UserError
from kimi_vl.media import data_url
from kimi_vl.pipeline import Pipeline

from . import films, papers

ASK = {"type": "text", "text": "What?"}


@pytest.fixture(scope="module")
def demo() -> Iterator[Pipeline]:
    loaded = kimi_vl.load("demo")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def clip() -> bytes:
    return films.GOOD["h264 mp4"].made()


@pytest.fixture(scope="module")
def report() -> bytes:
    return papers.GOOD["one page"][0]()


def url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def taken(done: Any) -> list[Any]:
    return [(use.kind, list(use.taken)) for use in done.media]


BOTH = [("video", [0, 1, 2]), ("document", [1])]


class Predictor(predict.Predictor):
    """Cog's predictor around a pipeline that is there already."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.metrics: dict[str, Any] = {}

    def record_metric(self, key: str, value: Any, mode: str = "replace") -> None:
        self.metrics[key] = json.loads(json.dumps(value))


def by_cog(pipeline: Pipeline, **inputs: Any) -> dict[str, Any]:
    """The metrics of a prediction."""
    from tests.unit.test_predict import DEFAULTS

    predictor = Predictor(pipeline)
    lines = list(predictor.predict(**{**DEFAULTS, "output_format": "json", "max_length_tokens": 1, **inputs}))
    done = json.loads("".join(lines).splitlines()[-1])
    assert done.get("media", []) == predictor.metrics.get("media", [])
    return predictor.metrics


def test_cog(demo: Pipeline, clip: bytes, report: bytes, tmp_path: Path) -> None:
    film, paper = predict.Path(tmp_path / "a"), predict.Path(tmp_path / "b.png")  # the name says nothing
    film.write_bytes(clip)
    paper.write_bytes(report)
    metrics = by_cog(demo, prompt="What?", video=film, document=paper)
    assert [(use["kind"], use["taken"]) for use in metrics["media"]] == BOTH
    tokens = sum(use["tokens"] for use in metrics["media"])
    assert 0 < metrics["image_token_count"] < tokens < metrics["input_token_count"]
    assert metrics["media"][0]["width"] == 160 and metrics["media"][0]["wanted"] == 3
    few = by_cog(demo, video=film, fps=10, start=1, end=2, max_frames=4)
    assert few["media"][0]["taken"] == [1.125, 1.375, 1.625, 1.875]
    assert "media" not in by_cog(demo, prompt="What?")
    bare = [{"role": "user", "content": [{"type": "document"}, {"type": "video"}, ASK]}]
    assert [use["kind"] for use in by_cog(demo, messages=bare, video=film, document=paper)["media"]] == [
        "document",
        "video",
    ]
    with pytest.raises(UserError, match=r"^E_VIDEO_FORMAT"):
        by_cog(demo, prompt="What?", video=paper)
    with pytest.raises(UserError, match=r"^E_IMAGE_FORMAT"):
        by_cog(demo, prompt="What?", image=film)
    with pytest.raises(UserError, match=r"^E_MESSAGES_INVALID"):
        by_cog(demo, messages=[{"role": "user", "content": [ASK]}], video=film)


def test_files_that_cog_opens_may_be_as_large_as_their_kind_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cog opens data URLs before anybody knows which input they are for: what they say of themselves decides."""
    import urllib.request

    from kimi_vl.media import kinds

    data_url.install()
    sizes = {"video/mp4": 100, "application/pdf": 100, "application/octet-stream": 100, "": 100, "image/png": 32}
    codes = {"video/mp4": "E_VIDEO_TOO_LARGE", "application/pdf": "E_DOCUMENT_TOO_LARGE"}
    for kind, mebibytes in sizes.items():
        assert data_url.declared_kind(f"data:{kind};base64,").max_bytes == mebibytes << 20
    for name in ("VIDEO", "DOCUMENT"):
        small = predict.kinds.__dict__[name].__class__(**{**vars(getattr(kinds, name)), "max_bytes": 10})
        monkeypatch.setattr(data_url, name, small)
    for kind, code in codes.items():
        with urllib.request.urlopen(url(b"0123456789", kind)) as opened:
            assert opened.read() == b"0123456789"
        with pytest.raises(UserError, match=code):
            urllib.request.urlopen(url(b"0123456789x", kind))
        with pytest.raises(UserError, match=code.replace("TOO_LARGE", "UNREADABLE")):
            urllib.request.urlopen(f"data:{kind};base64,####")


def test_messages(demo: Pipeline, clip: bytes, report: bytes) -> None:
    film, paper = url(clip, "video/mp4"), url(report, "application/pdf")
    forms: list[list[dict[str, Any]]] = [
        [
            {"type": "video_url", "video_url": {"url": film}},
            {"type": "file", "file": {"filename": "x", "file_data": paper}},
        ],
        [{"type": "video", "video": film}, {"type": "input_file", "filename": "x", "file_data": paper}],
        [{"type": "video", "video": clip}, {"type": "file", "file": report}],
    ]
    answers = []
    for parts in forms:
        messages = [{"role": "user", "content": [*parts, ASK]}]
        done = demo.complete(messages, max_length_tokens=8, seed=1)
        assert taken(done) == BOTH
        answers.append((done.answer, done.usage.input_tokens))
    bare = [{"role": "user", "content": [{"type": "video"}, {"type": "document"}, ASK]}]
    done = demo.complete(bare, videos=[clip], documents=bytearray(report), max_length_tokens=8, seed=1)
    assert {*answers, (done.answer, done.usage.input_tokens)} == {answers[0]}


def test_an_event_loop(demo: Pipeline, clip: bytes) -> None:
    async def ask() -> Any:
        events = demo.astream([{"role": "user", "content": [{"type": "video"}]}], videos=clip, max_length_tokens=1)
        return [event async for event in events][-1]

    assert taken(asyncio.run(ask())) == BOTH[:1]


def test_the_service_outlives_every_bad_file(demo: Pipeline, clip: bytes, report: bytes) -> None:
    bad: list[tuple[str, bytes, str]] = [
        *(("videos", films.BAD[name][0](), films.BAD[name][1]) for name in ("text", "cut mp4", "ffv1", "sound alone")),
        *(("documents", papers.BAD[name][0](), papers.BAD[name][1]) for name in ("text", "locked by AES", "no pages")),
    ]
    for name, data, code in bad:
        with pytest.raises(UserError) as caught:
            demo.complete([{"role": "user", "content": [{"type": name[:-1]}, ASK]}], **{name: data})
        assert caught.value.code == code
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "document"}, ASK]}]
    assert taken(demo.complete(messages, videos=clip, documents=report, max_length_tokens=1)) == BOTH
    assert demo.healthy()


def keep(demo: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands ask the pipeline that is there, and leave it open."""
    kept = SimpleNamespace(prepare=demo.prepare, stream=demo.stream, estimate=demo.estimate, close=lambda: None)
    monkeypatch.setattr("kimi_vl.cli.ask._load", lambda model, status: kept)


def test_ask(
    demo: Pipeline, clip: bytes, report: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Files in any order, each by its content."""
    keep(demo, monkeypatch)
    names = {"a.png": report, "b.pdf": clip, "c.mp4": films.still()}
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in names]
    assert main(["ask", "--json", "--max-tokens", "1", "What?", *paths]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(use["kind"], use["taken"]) for use in shown["media"]] == BOTH[::-1]
    assert main(["ask", "--estimate", "--fps", "2", "--start", "1", "--end", "2", "--pages", "1", "What?", *paths]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert [use["kind"] for use in estimate["media"]] == ["document", "video", "image"]
    assert estimate["media"][1]["taken"] == [1.0, 1.5] and "ids" not in estimate
    assert main(["ask", "--json", "--max-tokens", "1", "--max-frames", "2", "What?", paths[1]]) == 0
    assert json.loads(capsys.readouterr().out)["media"][0]["taken"] == [0.75, 2.25]
    assert main(["ask", "--pages", "2", "What?", paths[0]]) == 1
    assert capsys.readouterr().err.startswith("error: the document has the pages 1 to 1; ")
    assert main(["ask", "--json", "--max-tokens", "1", "What?"]) == 0
    assert not {"media", "grounding"} & json.loads(capsys.readouterr().out).keys()
    for path in paths:  # a document, a video and an image
        assert main(["ask", "--json", "--max-tokens", "1", "What?", path]) == 0
        assert json.loads(capsys.readouterr().out)["grounding"] == {"unit": None, "findings": []}


@pytest.mark.parametrize("way", [[], ["--thinking", "only"], ["--json"]], ids=str)
def test_ask_says_that_frames_are_missing(
    demo: Pipeline, clip: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    way: list[str],
) -> None:  # fmt: skip
    keep(demo, monkeypatch)
    long = films.Film(times=films.every(1, 60), size=(448, 336)).made()
    for name, data in {"a.png": films.still(), "b.mp4": clip, "c\x1b.mp4": long}.items():
        (tmp_path / name).write_bytes(data)
    picture, short, film = (str(path) for path in sorted(tmp_path.iterdir()))
    assert main(["ask", *way, "--max-tokens", "1", "What?", picture, short]) == 0
    assert capsys.readouterr().err == ""
    assert main(["ask", *way, "--max-tokens", "1", "What?", picture, film]) == 0
    line = rf"{tmp_path}/c\ufffd\.mp4: \d\d of 60 frames, 448x336 pixels each; the others do not fit or are damaged\n"
    assert re.fullmatch("" if way == ["--json"] else line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "data", "given"),
    [
        ("text.mp4", b"no film", "videos"),
        ("empty.MKV", b"", "videos"),
        ("clip.ts", b"G" + bytes(187), "videos"),
        ("film.pdf", b"no pages", "documents"),
        ("empty.pdf", b"", "documents"),
        ("text.png", b"no picture", "images"),
        ("text", b"no name", "images"),
    ],
)
def test_ask_calls_a_bad_file_what_its_name_says(
    demo: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, data: bytes, given: str,
) -> None:  # fmt: skip
    keep(demo, monkeypatch)
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(UserError) as refused:
        demo.complete([{"role": "user", "content": [{"type": given[:-1]}, ASK]}], **{given: [file]})
    assert main(["ask", "What?", str(file)]) == 1
    assert capsys.readouterr() == ("", f"error: {refused.value.message}\n")


def test_the_server(clip: bytes, report: bytes) -> None:
    """What a body asks for reaches the pipeline: OpenAI's parts, and how many frames as clients of vLLM say it."""
    from kimi_vl.serving.protocol import read_chat

    parts = [
        {"type": "video_url", "video_url": {"url": url(clip, "video/mp4")}},
        {"type": "file", "file": {"filename": "x.pdf", "file_data": url(report, "application/pdf")}},
        {"type": "input_file", "filename": "x.pdf", "file_data": url(report, "application/pdf")},
    ]
    body = {
        "model": "kimi-vl-demo",
        "messages": [{"role": "user", "content": [*parts, ASK]}],
        "media_io_kwargs": {"video": {"num_frames": 2, "fps": 4}},
    }
    request = read_chat(body)
    assert (request.reading["max_frames"], request.reading["fps"]) == (2, 4)
    assert not request.unknown
    demo = kimi_vl.load("demo")
    done = demo.complete(demo.prepare(request.turns, **request.reading), max_length_tokens=1)
    demo.close()
    assert taken(done) == [("video", [0.75, 2.25]), ("document", [1]), ("document", [1])]
