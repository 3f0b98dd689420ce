"""Batches with a scripted model: every line is answered once, whatever stops a run and wherever."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kimi_vl.batch.files import Files
from kimi_vl.batch.lines import MAX_CUSTOM_ID, FileLines, FolderLines
from kimi_vl.batch.progress import Progress, duration
from kimi_vl.batch.results import Earlier, Results
from kimi_vl.batch.run import BESIDE, WINDOW, Batch
from kimi_vl.errors import UserError
from kimi_vl.events import Answer, Done, Event, Usage
from kimi_vl.serving.options import ServerOptions
from kimi_vl.text.messages import Turn

AT_ONCE = 3


class Scripted:
    """A pipeline that answers with what it was asked. ``delay`` gives how often it lets others go first."""

    def __init__(self, delay: Callable[[str], int] = lambda text: 0):
        self.engine = SimpleNamespace(options=SimpleNamespace(max_num_seqs=AT_ONCE, max_waiting=0))
        self.model = torch.nn.ParameterList([torch.ones(2)])
        self.delay = delay
        self.asked: list[str] = []
        self.sources: list[Any] = []
        self.running = self.most = self.prepared = 0
        self.is_healthy = True
        self.on_ask: Callable[[str], None] = lambda text: None

    def healthy(self) -> bool:
        return self.is_healthy

    def prepare(self, turns: Sequence[Turn], **params: Any) -> Sequence[Turn]:
        self.prepared += 1
        return turns

    async def astream(self, turns: Sequence[Turn], **params: Any) -> AsyncIterator[Event]:
        text = turns[-1].text
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            self.asked.append(text)
            self.sources += [part.source for part in turns[-1].images]
            for _ in range(self.delay(text)):
                await asyncio.sleep(0)
            self.on_ask(text)
            if text == "refuse":
                raise UserError("E_PROMPT_TOO_LONG", "the prompt is too long; shorten it.")
            if text == "fail":
                raise RuntimeError("secret internals")
            yield Answer(text)
            usage = Usage(10, 0, 5, 2)
            said = f"{text} {params['seed']} {params.get('temperature')}"
            yield Done("because", said, "stop", "model", usage, params["seed"], 0.1, 10.0)
        finally:
            self.running -= 1


class Placed(Scripted):
    """Answers to a picture."""

    async def astream(self, turns: Sequence[Turn], **params: Any) -> AsyncIterator[Event]:
        async for event in super().astream(turns, **params):
            yield dataclasses.replace(event, image_sizes=((100, 100),)) if isinstance(event, Done) else event


def line(custom_id: Any, text: Any = "hi", **body: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": text}], **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()


def run(
    out: Path,
    lines: Iterable[bytes],
    pipeline: Scripted | None = None,
    folder: Path | None = None,
    ordered: bool = False,
    anywhere: bool = False,
) -> list[dict[str, Any]]:
    """The answers in the file after a run."""
    source = FileLines(io.BytesIO(b"\n".join(lines) + b"\n"), None)
    results = Results(str(out))
    try:
        progress = Progress(io.StringIO(), source.total, results.earlier)
        files = Files(folder or out.parent, anywhere)
        model: Any = pipeline or Scripted()
        Batch(model, ServerOptions(model="demo"), iter(source), files, results, progress, ordered).run()
    finally:
        results.close()
    return answers(out)


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in out.read_text().splitlines()]


def texts(found: Iterable[dict[str, Any]]) -> dict[str, str]:
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in found}


# Answers


def test_an_answer_is_a_completion_with_its_line(tmp_path: Path) -> None:
    (found,) = run(tmp_path / "out", [line("a", "why", seed=7, temperature=0.5)])
    assert found.keys() == {"id", "custom_id", "response", "error"}
    assert found["custom_id"] == "a" and found["error"] is None and found["id"].startswith("batch_req_")
    response = found["response"]
    assert response.keys() == {"status_code", "request_id", "body"} and response["status_code"] == 200
    body = response["body"]
    assert body["object"] == "chat.completion" and body["model"] == "kimi-vl-demo"
    message = body["choices"][0]["message"]
    assert message["content"] == "why 7 0.5" and message["reasoning_content"] == "because"
    assert body["usage"]["total_tokens"] == 15


def test_an_answer_has_the_places_that_were_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(output, [line("a", "<box>[1, 2, 3, 4]</box>", kimi_vl={"grounding": True}), line("b")], Placed())
    found = {each["custom_id"]: each["response"]["body"]["choices"][0]["kimi_vl"] for each in answers(output)}
    assert len(found["a"]["grounding"]["findings"]) == 1 and "grounding" not in found["b"]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_byte_order_mark_before_the_first_line_is_passed_over(ending: bytes) -> None:
    plain, marked = (
        list(FileLines(io.BytesIO(mark + ending.join([line("a"), b"", line("b")])), None))
        for mark in (b"", b"\xef\xbb\xbf")
    )
    assert [each.custom_id for each in marked] == ["a", "b"] and plain == marked
    later = list(FileLines(io.BytesIO(line("a") + b"\n\xef\xbb\xbf" + line("b")), None))
    assert later[1].error is not None


def test_several_answers_have_following_seeds(tmp_path: Path) -> None:
    pipeline = Scripted()
    (found,) = run(tmp_path / "out", [line("a", "why", seed=7, n=3)], pipeline)
    assert pipeline.prepared == 1
    choices = found["response"]["body"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["why 7 None", "why 8 None", "why 9 None"]
    assert found["response"]["body"]["usage"]["completion_tokens"] == 15


def test_a_line_without_a_seed_has_one_of_its_own(tmp_path: Path) -> None:
    lines = [line("a"), line("b"), line("c", seed=None)]
    once, again = run(tmp_path / "1", lines), run(tmp_path / "2", lines[::-1])
    assert texts(once) == texts(again)
    assert len(set(texts(once).values())) == 3


BAD = [
    (b"{", None, "invalid_json"),
    (b"[1]", None, "invalid_json"),
    (b"\xff", None, "invalid_json"),
    (b'{"a": NaN}', None, "invalid_json"),
    (b"[" * 100_000, None, "invalid_json"),
    (line(None), None, "invalid_custom_id"),
    (line(""), None, "invalid_custom_id"),
    (line(7), None, "invalid_custom_id"),
    (line("x" * (MAX_CUSTOM_ID + 1)), None, "invalid_custom_id"),
    (line("m").replace(b"POST", b"GET"), "m", "invalid_method"),
    (line("u").replace(b"chat/completions", b"embeddings"), "u", "invalid_url"),
    (b'{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": 1}', "b", "invalid_body"),
]


@pytest.mark.parametrize(("bad", "custom_id", "code"), BAD, ids=[code for *_, code in BAD])
def test_a_line_that_is_no_request_is_an_error_of_its_own(
    tmp_path: Path, bad: bytes, custom_id: str | None, code: str
) -> None:
    found = run(tmp_path / "out", [line("a"), b"", bad, line("z")])
    (error,) = [each for each in found if each["error"]]
    assert {each["custom_id"] for each in found if not each["error"]} == {"a", "z"}
    assert error["custom_id"] == custom_id and error["response"] is None
    assert error["error"]["code"] == code and error["error"]["line"] == 3
    assert error["error"]["message"].startswith("line 3: ")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": []}, 400, "e_messages_invalid"),
        ({"temperature": 9}, 400, "e_parameter"),
        ({"tools": [{}]}, 400, "tools_unsupported"),
        ({"model": "gpt-4"}, 404, "model_not_found"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, 400, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "fail"}]}, 500, "internal_error"),
    ],
)
def test_a_request_that_fails_has_the_servers_error(tmp_path: Path, body: Any, status: int, code: str) -> None:
    found = {each["custom_id"]: each for each in run(tmp_path / "out", [line("a"), line("b", **body), line("c")])}
    response = found["b"]["response"]
    assert found["b"]["error"] is None and response["status_code"] == status
    error = response["body"]["error"]
    assert error["code"] == code and error.keys() == {"message", "type", "param", "code"}
    assert "secret" not in json.dumps(found)
    assert found["a"]["response"]["status_code"] == found["c"]["response"]["status_code"] == 200


def test_a_custom_id_that_is_there_twice_is_refused_by_its_number(tmp_path: Path) -> None:
    lines = [line("a", "one"), line("b"), line("a", "two"), line("a", "one")]
    found = run(tmp_path / "out", lines)
    assert [each["error"]["line"] for each in found if each["error"]] == [3, 4]
    assert {each["error"]["code"] for each in found if each["error"]} == {"duplicate_custom_id"}
    assert texts(each for each in found if not each["error"])["a"].startswith("one")
    before = (tmp_path / "out").read_bytes()
    assert run(tmp_path / "out", lines) == found and (tmp_path / "out").read_bytes() == before


# Order and number


def test_answers_are_written_as_they_come_or_in_order(tmp_path: Path) -> None:
    lines = [line(str(number), str(number)) for number in range(60)]
    slow_ones = Scripted(lambda text: 40 if int(text) % 7 == 0 else 1)
    as_they_come = [each["custom_id"] for each in run(tmp_path / "1", lines, slow_ones)]
    assert sorted(as_they_come, key=int) == [str(number) for number in range(60)] != as_they_come
    slow_ones = Scripted(lambda text: 40 if int(text) % 7 == 0 else 1)
    in_order = [each["custom_id"] for each in run(tmp_path / "2", lines, slow_ones, ordered=True)]
    assert in_order == [str(number) for number in range(60)]


def test_as_many_at_once_as_the_engine_takes(tmp_path: Path) -> None:
    assert BESIDE > 0
    pipeline = Scripted(lambda text: 20)
    run(tmp_path / "out", [line(str(number), n=4) for number in range(20)], pipeline)
    assert pipeline.most == AT_ONCE and len(pipeline.asked) == 80


@pytest.mark.parametrize(("ordered", "most"), [(False, AT_ONCE), (True, AT_ONCE * WINDOW)])
def test_lines_are_not_read_far_ahead_of_their_answers(tmp_path: Path, ordered: bool, most: int) -> None:
    ahead: list[int] = []
    out = tmp_path / "out"

    class Counted(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
            ahead.append(self.tell() // len(one) - out.read_bytes().count(b"\n"))
            return super().readline(size)

    one = line("000") + b"\n"
    results = Results(str(out))
    source = FileLines(Counted(b"".join(line(f"{number:03}") + b"\n" for number in range(100))), None)
    progress = Progress(io.StringIO(), source.total, results.earlier)
    model: Any = Scripted(lambda text: 30)
    Batch(model, ServerOptions(model="demo"), iter(source), Files(tmp_path), results, progress, ordered).run()
    results.close()
    assert len(answers(out)) == 100 and AT_ONCE - 1 <= max(ahead) <= most


# Going on


LINES = [line("a", "one"), line("b", "two", n=2), b"{", line("c", "refuse"), line("a", "again"), line("d", "three ü")]


def same(found: list[dict[str, Any]]) -> list[str]:
    """What does not depend on the moment, in one order."""
    for each in found:
        if each["response"] and "created" in each["response"]["body"]:
            each["response"]["body"]["created"] = 0
    return sorted(json.dumps(each) for each in found)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_file_that_ends_at_any_byte_is_completed(tmp_path: Path, ordered: bool) -> None:
    whole = run(tmp_path / "whole", LINES, ordered=ordered)
    data = (tmp_path / "whole").read_bytes()
    ends = [0, *(at + 1 for at, byte in enumerate(data) if byte == 10)]
    cuts = {*range(40), *range(len(data) - 60, len(data) + 1), *(end + step for end in ends for step in (-1, 0, 1, 19))}
    for cut in sorted(cut for cut in cuts if 0 <= cut <= len(data)):
        for tail in (b"", b"\0" * 5):
            (tmp_path / "out").write_bytes(data[:cut] + tail)
            pipeline = Scripted()
            assert same(run(tmp_path / "out", LINES, pipeline, ordered=ordered)) == same(whole), cut
            kept = data[: max(end for end in ends if end <= cut)]
            assert (tmp_path / "out").read_bytes().startswith(kept)
            answered = {each["custom_id"] for each in map(json.loads, kept.splitlines()) if not each["error"]}
            again = {"one": "a", "two": "b", "refuse": "c", "three ü": "d"}
            assert {again[text] for text in pipeline.asked} == {*"abcd"} - answered


@pytest.mark.parametrize("lines", [[line("a", "one"), line("a", "one")], [b"{", b"{"], [b"{", line("a", "one"), b"{"]])
def test_equal_lines_each_have_an_answer_whichever_came_first(tmp_path: Path, lines: list[bytes]) -> None:
    whole = run(tmp_path / "whole", lines)
    for kept in whole:
        (tmp_path / "out").write_text(json.dumps(kept) + "\n")
        assert same(run(tmp_path / "out", lines)) == same(whole)


def test_failures_of_earlier_runs_count(tmp_path: Path) -> None:
    run(tmp_path / "out", LINES)
    results = Results(str(tmp_path / "out"))
    source = FileLines(io.BytesIO(b"\n".join([*LINES, b"}"])), None)
    progress = Progress(io.StringIO(), source.total, results.earlier)
    model: Any = Scripted()
    Batch(model, ServerOptions(model="demo"), iter(source), Files(tmp_path), results, progress).run()
    results.close()
    assert (results.earlier.answered, results.earlier.failed, progress.failed) == (6, 3, 4)


def test_what_is_done_is_not_asked_again(tmp_path: Path) -> None:
    run(tmp_path / "out", LINES)
    before = (tmp_path / "out").read_bytes()
    pipeline = Scripted()
    run(tmp_path / "out", LINES, pipeline)
    assert pipeline.asked == [] and (tmp_path / "out").read_bytes() == before
    run(tmp_path / "out", [*LINES, line("new", "new")], pipeline)
    assert pipeline.asked == ["new"]


def test_more_lines_are_added_and_an_order_does_not_matter(tmp_path: Path) -> None:
    run(tmp_path / "out", [line("a"), line("b")])
    pipeline = Scripted()
    found = run(tmp_path / "out", [line("z", "z"), line("b"), line("a")], pipeline)
    assert pipeline.asked == ["z"] and [each["custom_id"] for each in found] == ["a", "b", "z"]


def test_a_line_that_was_answered_and_has_changed_ends_the_run(tmp_path: Path) -> None:
    run(tmp_path / "out", [line("a", "one"), line("b", "refuse")])
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(UserError, match="line 1 has changed"):
        run(tmp_path / "out", [line("a", "two")])
    assert (tmp_path / "out").read_bytes() == before
    found = run(tmp_path / "out", [line("a", "one"), line("b", "mended")])
    assert [each["custom_id"] for each in found] == ["a", "b", "b"] and found[-1]["response"]["status_code"] == 200


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"hello\n",
        b'{"id": 1}\n',
        b'{"id": "batch_req_xyz"}\n',
        b'{"id": "chatcmpl-1"',
        b"\n",
        b"[]\n",
        b"x\0",
    ],
)
def test_a_file_with_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(UserError, match="line 1 is no answer of a batch"):
        run(tmp_path / "out", LINES)
    assert (tmp_path / "out").read_bytes() == content


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = Results(str(tmp_path / "out"))
    with pytest.raises(UserError, match="another run writes to it"):
        Results(str(tmp_path / "out"))
    first.close()
    Results(str(tmp_path / "out")).close()


def test_a_disk_without_room_is_one_sentence_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, write = 1500, os.write

    def full(number: int, data: Any) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(28, "No space left on device")
        written = write(number, bytes(data)[:room])
        room -= written
        return written

    monkeypatch.setattr("kimi_vl.batch.results.os.write", full)
    with pytest.raises(UserError, match="No space left on device; make room and run the same command again"):
        run(tmp_path / "out", LINES)
    monkeypatch.undo()
    data = (tmp_path / "out").read_bytes()
    assert data.endswith(b"\n") and 0 < len(data) < 1500
    assert same(run(tmp_path / "out", LINES)) == same(run(tmp_path / "whole", LINES))


def test_a_signal_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    lines = [line(str(number), str(number)) for number in range(40)]
    pipeline = Scripted(lambda text: 3)
    pipeline.on_ask = lambda text: text == "20" and os.kill(os.getpid(), signal.SIGINT)  # pyright: ignore
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", lines, pipeline)
    assert pipeline.running == 0
    done = {each["custom_id"] for each in answers(tmp_path / "out")}
    assert 0 < len(done) < 40
    later = Scripted()
    assert texts(run(tmp_path / "out", lines, later)) == texts(run(tmp_path / "whole", lines))
    assert sorted(later.asked, key=int) == sorted({str(number) for number in range(40)} - done, key=int)


def test_standard_input_that_stays_silent_does_not_hold_up_an_interrupt(tmp_path: Path) -> None:
    never = threading.Event()

    class Silent(io.RawIOBase):
        def readline(self, size: int | None = -1) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
            os.kill(os.getpid(), signal.SIGINT)
            never.wait()
            return b""

    results = Results(str(tmp_path / "out"))
    source = FileLines(Silent(), None)  # pyright: ignore[reportArgumentType]
    progress = Progress(io.StringIO(), source.total, results.earlier)
    model: Any = Scripted()
    with pytest.raises(KeyboardInterrupt):
        Batch(model, ServerOptions(model="demo"), iter(source), Files(tmp_path), results, progress).run()
    never.set()
    results.close()


def test_a_model_that_is_lost_ends_the_run_and_answers_nothing_more(tmp_path: Path) -> None:
    pipeline = Scripted()

    def lose(text: str) -> None:
        pipeline.is_healthy &= text != "fail"

    pipeline.on_ask = lose
    with pytest.raises(UserError, match="can no longer answer"):
        run(tmp_path / "out", [line("a"), line("b", "fail"), *(line(str(number)) for number in range(30))], pipeline)
    assert "b" not in {each["custom_id"] for each in answers(tmp_path / "out")}


# Files


def picture(name: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": "what"}]


def test_pictures_are_named_from_the_folder_of_the_lines(tmp_path: Path) -> None:
    folder = tmp_path / "lines"
    (folder / "in ner").mkdir(parents=True)
    inside, outside = folder / "in ner" / "a%20ü.png", tmp_path / "secret.png"
    beside = tmp_path / "lines beside"
    beside.mkdir()
    for path in (inside, outside, beside / "a.png"):
        path.write_bytes(b"picture")
    (folder / "link.png").symlink_to(inside)
    (folder / "out.png").symlink_to(outside)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    names = ["in ner/a%20ü.png", "./in ner/../link.png", "link.png", "data:image/png;base64,AAAA", "https://a.test/x"]
    names += ["../secret.png", str(outside), "out.png", "up/secret.png", str(inside), "../lines beside/a.png"]
    names += ["missing.png", "loop.png", "in ner", "pipe", "a\0b", "x" * 5000, "", "file:///etc/passwd"]
    lines = [line(f"{number}", picture(name)) for number, name in enumerate(names)]
    pipeline = Scripted()
    found = {int(each["custom_id"]): each["response"] for each in run(tmp_path / "out", lines, pipeline, folder)}
    status = {names[number]: response["status_code"] for number, response in found.items()}
    taken = {names[number] for number in found if status[names[number]] == 200}
    assert taken == {*names[:5], str(inside), "file:///etc/passwd"}  # the pipeline refuses URLs
    assert {source for source in pipeline.sources if isinstance(source, Path)} == {inside.resolve()}
    codes = {
        names[number]: response["body"]["error"]["code"]
        for number, response in found.items()
        if names[number] not in taken
    }
    assert {name for name, code in codes.items() if code == "e_image_source"} == {*names[5:9], names[10]}
    assert {name for name, code in codes.items() if code == "e_image_unreadable"} == {*names[11:18]}
    pipeline = Scripted()
    run(tmp_path / "other", lines, pipeline, folder, anywhere=True)
    assert outside.resolve() in pipeline.sources


def test_a_folder_of_pictures_is_a_line_for_each(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tiff", "notes.txt", "x.jsonl", "ü.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    lines = FolderLines(tmp_path, "Describe it", "Be brief", {"max_tokens": 9})
    assert lines.total() == 5
    found = list(lines)
    assert [each.custom_id for each in found] == ["a.JPG", "b.png", "ü.gif", "sub/c.webp", "sub/deep/d.tiff"]
    content = [{"type": "image_url", "image_url": {"url": "sub/c.webp"}}, {"type": "text", "text": "Describe it"}]
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": content}]
    assert found[3].body == {"max_tokens": 9, "messages": messages}
    assert [each.digest for each in found] == [each.digest for each in lines]
    assert len({each.digest for each in (*found, *FolderLines(tmp_path, "Other", None, {}))}) == 10


def test_a_line_that_is_too_long_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_vl.batch.lines.MAX_LINE", 300)
    found = run(tmp_path / "out", [line("a"), line("b", "x" * 3000), line("c"), line("d", "x" * 3000)])
    errors = {each["error"]["line"]: each["error"]["code"] for each in found if each["error"]}
    assert errors == {2: "line_too_long", 4: "line_too_long"}
    assert {each["custom_id"] for each in found if each["response"]} == {"a", "c"}


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_says_how_many_how_fast_and_how_long() -> None:
    now = [0.0]
    lines, bar = io.StringIO(), Terminal()
    shown = [Progress(stream, lambda: 400.0, Earlier(), lambda: now[0]) for stream in (lines, bar)]
    for number in range(200):
        now[0] += 0.5
        for progress in shown:
            progress.answered(failed=number == 3)
    assert lines.getvalue().splitlines() == [
        f"{done} of 400 answered, 1 failed, 120.0 a minute, {left} left"
        for done, left in ((60, "3 min"), (120, "2 min"), (180, "2 min"))
    ]
    last = bar.getvalue().rpartition("\r\x1b[K")[2]
    assert last == f"[{'#' * 12}{'.' * 12}] 200 of 400 answered, 1 failed, 120.0 a minute, 2 min left"
    for progress in shown:
        progress.end()
        assert progress.failed == 1
    assert lines.getvalue().endswith("\n200 answered, 1 failed, in 2 min\n")
    assert bar.getvalue().endswith("\r\x1b[K200 answered, 1 failed, in 2 min\n")


def test_progress_without_a_total_names_none() -> None:
    now = [0.0]
    lines = io.StringIO()
    progress = Progress(lines, lambda: None, Earlier(), lambda: now[0])
    now[0] = 30
    progress.answered(failed=False)
    assert lines.getvalue() == "1 answered, 2.0 a minute\n"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (99, "99 s"), (600, "10 min"), (36_000, "10.0 h")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_number_of_lines_is_judged_by_their_bytes() -> None:
    data = b"\n".join(line(f"{number:03}") for number in range(100))
    lines = FileLines(io.BytesIO(data), len(data))
    assert lines.total() is None
    read = iter(lines)
    next(read)
    assert lines.total() == pytest.approx(100, rel=0.02)
    assert len(list(read)) == 99 and lines.total() == 100
