"""The thinking budget, stop sequences and figures of a request, with a scripted model in place of the network."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import io
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kimi_vl.engine.engine import Engine, EngineOptions, Overloaded
from kimi_vl.engine.scheduler import ScheduledChunk
from kimi_vl.errors import UserError
from kimi_vl.events import Answer, Done, Event, Reasoning
from kimi_vl.media.images import ImageOptions
from kimi_vl.pipeline import Pipeline
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
ASK = [{"role": "user", "content": "Why?"}]
SHOW = [{"role": "user", "content": [{"type": "image"}]}]
ENDLESS = " ".join(f"and {number}" for number in range(400))


def wait_until(holds: Callable[[], bool], seconds: float = 300) -> bool:
    """Whether something comes true before long."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.fixture(scope="module")
def whole():
    return Pipeline(
        loader.load(CHECKPOINT, dtype=torch.float32),
        Tokenizer.from_directory(CHECKPOINT),
        ImageOptions.from_directory(CHECKPOINT),
    )


@pytest.fixture
def say(whole, monkeypatch):
    """Makes the model say a text (and then end its turn) whatever was put into it before."""

    def scripted(text: str, after_close: str | None = None) -> None:
        tokenizer = whole.tokenizer
        ids = [*tokenizer.encode(text), tokenizer.im_end_id]
        later = [*tokenizer.encode(after_close or ""), tokenizer.im_end_id]
        closer = tokenizer.encode(THINK_CLOSE)

        def script(tokens: list[int]) -> int:
            if after_close is not None:
                for at in range(len(tokens) - len(closer), -1, -1):
                    if tokens[at : at + len(closer)] == closer:
                        return later[min(len(tokens) - at - len(closer), len(later) - 1)]
            return ids[min(len(tokens), len(ids) - 1)]

        def forward(chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
            rows = [script(chunk.request.ids[chunk.request.prompt_length :]) for chunk in chunks if chunk.complete]
            likely = torch.arange(1280).float() / 1280
            scores = [likely.index_fill(0, torch.tensor([row]), 100.0) for row in rows]
            return torch.stack(scores) if scores else torch.empty(0, 1280)

        monkeypatch.setattr(Engine, "_forward", staticmethod(forward))

    return scripted


def test_events_join_to_the_summary(whole, say):
    say("◁think▷It is so.◁/think▷Because.")
    events = list(whole.stream(ASK, temperature=0))
    done = events[-1]
    assert isinstance(done, Done)
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == done.reasoning == "It is so."
    assert "".join(e.text for e in events if isinstance(e, Answer)) == done.answer == "Because."
    assert (done.finish_reason, done.thinking_closed_by) == ("stop", "model")
    encode = whole.tokenizer.encode
    assert done.usage.output_tokens == len(encode("◁think▷It is so.◁/think▷Because.")) + 1
    assert done.usage.reasoning_tokens + len(encode("Because.")) + 1 == done.usage.output_tokens


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 17])
def test_a_budget_closes_the_thinking_and_the_answer_follows(whole, say, budget):
    say("◁think▷" + ENDLESS, after_close="Enough.")
    done = whole.complete(ASK, temperature=0, thinking_budget=budget)
    assert (done.answer, done.finish_reason, done.thinking_closed_by) == ("Enough.", "stop", "budget")
    assert len(whole.tokenizer.encode(done.reasoning)) <= budget + 1
    assert THINK_CLOSE not in done.reasoning


@pytest.mark.parametrize("length", [16, 40, 200])
def test_without_a_budget_a_quarter_is_kept_for_the_answer(whole, say, length):
    say("◁think▷" + ENDLESS, after_close="Enough. " * 200)
    done = whole.complete(ASK, temperature=0, max_length_tokens=length)
    assert (done.finish_reason, done.thinking_closed_by) == ("length", "budget")
    assert done.usage.output_tokens == length
    assert length // 4 - 3 <= length - done.usage.reasoning_tokens <= length // 4 + 3


def prefilled(*contents: str) -> list[dict[str, str]]:
    return [*ASK, *({"role": "assistant", "content": content} for content in contents)]


@pytest.mark.parametrize("budget", [0, 3, None])
def test_an_answer_that_was_prefilled_is_continued_without_thinking(whole, say, budget):
    say("because. It ◁/think▷ is.")
    done = whole.complete(prefilled("◁think▷Hm.◁/think▷So it is, "), temperature=0, thinking_budget=budget)
    assert (done.reasoning, done.answer) == ("", "because. It ◁/think▷ is.")
    assert (done.usage.reasoning_tokens, done.thinking_closed_by) == (0, "none")


@pytest.mark.parametrize(("said", "budget"), [("◁think▷It is", 0), ("◁think▷It is", 4), ("  ◁think▷", 1)])
def test_thinking_that_was_prefilled_is_continued_within_the_budget(whole, say, said, budget):
    say(ENDLESS, after_close="Enough.")
    done = whole.complete(prefilled(said), temperature=0, thinking_budget=budget)
    assert (done.answer, done.thinking_closed_by) == ("Enough.", "budget")
    assert done.reasoning == whole.tokenizer.decode(whole.tokenizer.encode(ENDLESS)[:budget])


def test_an_empty_turn_of_the_assistant_begins_as_any(whole, say):
    say("◁think▷Hm.◁/think▷So.")
    assert whole.complete(prefilled(""), temperature=0).answer == "So."
    assert whole.complete(prefilled(""), temperature=0).reasoning == "Hm."


def test_thinking_in_circles_is_closed(whole, say):
    say("◁think▷" + "and so on, and so on, " * 400, after_close="Enough.")
    done = whole.complete(ASK, temperature=0)
    assert (done.answer, done.thinking_closed_by) == ("Enough.", "budget")
    assert 128 <= done.usage.reasoning_tokens < 200


def test_a_turn_that_ends_inside_the_thinking_still_gets_an_answer(whole, say):
    say("◁think▷I stop here", after_close="Answer.")
    done = whole.complete(ASK, temperature=0)
    assert (done.reasoning, done.answer, done.thinking_closed_by) == ("I stop here", "Answer.", "budget")


def test_an_empty_answer_is_not_accepted(whole, say):
    say("◁think▷hm◁/think▷")
    assert whole.complete(ASK, temperature=0, max_length_tokens=30).answer.strip()


def test_models_that_do_not_think(whole, say):
    say("Plain answer.")
    done = whole.complete(ASK, temperature=0)
    assert (done.reasoning, done.answer, done.thinking_closed_by) == ("", "Plain answer.", "none")
    assert done.usage.reasoning_tokens == 0
    plain = Pipeline(whole.model, whole.tokenizer, whole.image_options, thinks=False)
    assert plain.complete(ASK, temperature=0, thinking_budget=0).answer == "Plain answer."


@pytest.mark.parametrize("stops", [("END",), ("x", "END"), (" EN",), ("", "END")])
def test_stop_sequences_end_the_answer_only(whole, say, stops):
    say("◁think▷END of thought x◁/think▷one two END three")
    done = whole.complete(ASK, temperature=0, stop_sequences=stops)
    assert done.reasoning == "END of thought x"
    assert done.answer == "one two" + ("" if stops == (" EN",) else " ")
    assert done.finish_reason == "stop_sequence"


def test_what_only_begins_a_stop_sequence_is_kept(whole, say):
    say("one two EN")
    assert whole.complete(ASK, temperature=0, stop_sequences=["ENDE"]).answer == "one two EN"


def test_seeds(whole):
    options = {"max_length_tokens": 12, "temperature": 1.0}
    first = whole.complete(ASK, seed=3, **options)
    assert first == whole.complete(ASK, seed=3, **options).__class__(
        **{**vars(whole.complete(ASK, seed=3, **options)), **_times(first)}
    )
    assert first.answer != whole.complete(ASK, seed=4, **options).answer
    drawn = whole.complete(ASK, **options)
    assert whole.complete(ASK, seed=drawn.seed, **options).answer == drawn.answer


def _times(done: Done) -> dict[str, float]:
    return {"time_to_first_token": done.time_to_first_token, "tokens_per_second": done.tokens_per_second}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"temperature": 3}, "E_PARAMETER"),
        ({"max_length_tokens": 0}, "E_PARAMETER"),
        ({"thinking_budget": -1}, "E_PARAMETER"),
        ({"interval": -1}, "E_PARAMETER"),
        ({"logprobs": 21}, "E_PARAMETER: logprobs must be from 0 to 20"),
        ({"logit_bias": {1023: 1, 1026: 1}}, "E_PARAMETER: a token id in logit_bias must be below 1024"),
        ({"logit_bias": {5: 101}}, "E_PARAMETER: a value in logit_bias"),
        ({"logit_bias": [5]}, "E_PARAMETER: logit_bias must map"),
        ({"interval": float("inf")}, "E_PARAMETER"),
        ({"images": [b"x"] * 65}, "E_TOO_MANY_IMAGES"),
        ({"messages": SHOW, "images": [b"not an image"]}, "E_IMAGE_FORMAT"),
        ({"messages": []}, "E_PROMPT_EMPTY"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "E_PROMPT_TOO_LONG"),
        ({"messages": SHOW}, "E_MESSAGES_INVALID"),
        ({"images": [b"not an image"]}, "E_MESSAGES_INVALID"),
        ({"messages": [{"role": "User", "content": "Why?"}], "images": [b"not an image"]}, "E_MESSAGES_INVALID"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(whole, monkeypatch, options, code):
    monkeypatch.setattr(whole, "engine", SimpleNamespace(model=whole.model))
    with pytest.raises(UserError, match=code):
        whole.stream(**{"messages": ASK, **options})


def test_a_value_that_is_not_finite_fails_the_request(whole, monkeypatch):
    monkeypatch.setattr(Engine, "_forward", lambda self, chunks: torch.full((1, 1280), float("nan")))
    with pytest.raises(RuntimeError, match="not finite"):
        list(whole.stream(ASK))


@pytest.mark.parametrize(
    ("counts", "asked"),
    [
        ((0,), None),
        ((1,), 0),
        ((3,), 0),
        ((1, 1), 1),
        ((2, 1), 2),
        ((1, 2, 0), 1),
        ((0, 2, 0, 0), 0),
        ((2, 0, 3, 1), 5),
    ],
)
def test_the_image_that_is_asked_about_is_the_first_of_the_last_message_with_one(whole, counts, asked):
    messages = []
    for count in counts:
        content = [{"type": "image"}] * count + [{"type": "text", "text": "Which?"}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "That."}]
    images = [Image.new("RGB", (30, 20 + number)) for number in range(sum(counts))]
    done = whole.complete(messages[:-1], images, max_length_tokens=1)
    assert done.asked_image == asked
    assert done.image_sizes == tuple(image.size for image in images)


def test_images_of_every_source_are_the_same_request(whole, tmp_path):
    image = Image.new("RGB", (60, 40), "teal")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    options = {"temperature": 0, "max_length_tokens": 6}
    sources = (image, stream.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png"))
    results = [whole.complete(messages, [source], **options) for source in sources]
    assert len({(done.answer, dataclasses.replace(done.usage, cached_tokens=0)) for done in results}) == 1
    assert [done.usage.cached_tokens for done in results] == [0, 32, 32, 32]
    assert results[0].usage.image_tokens == 6


@pytest.mark.parametrize("kind", [bytes, bytearray, str, Path, Image.Image])
def test_a_single_image_is_a_list_of_one(whole, tmp_path, kind):
    picture = Image.new("RGB", (60, 40), "red")
    path = tmp_path / "picture.png"
    picture.save(path)
    sources = {Image.Image: picture, str: str(path), Path: path}
    single = sources[kind] if kind in sources else kind(path.read_bytes())
    options = {"temperature": 0, "max_length_tokens": 4}
    expected = whole.complete(SHOW, [path], **options).answer
    assert whole.complete(SHOW, single, **options).answer == expected
    assert whole.complete(SHOW, (each for each in [single]), **options).answer == expected


def test_one_letter_is_one_path(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Image.new("RGB", (30, 30)).save(tmp_path / name, "PNG")
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    with pytest.raises(UserError, match=r"2 bare parts for an image and 1 came beside"):
        whole.complete(two, "ab")
    with pytest.raises(UserError, match="cannot be read"):
        whole.complete(SHOW, "ab")


@pytest.mark.parametrize("none", [None, (), [], iter(())])
def test_no_images(whole, none):
    assert whole.complete(ASK, none, max_length_tokens=1).usage.image_tokens == 0


@pytest.mark.parametrize("wrong", [5, True, 1.5, object(), {"a.png": 1}, [None], [["a.png"]], [{}], [1j]])
def test_what_is_no_image_is_refused(whole, wrong):
    with pytest.raises(UserError) as caught:
        whole.complete(SHOW, wrong)
    assert caught.value.code == "E_IMAGE_SOURCE"


def test_a_number_is_no_file(whole, tmp_path):
    """Files have numbers while they are open, and whoever opens one of these closes it."""
    Image.new("RGB", (30, 30)).save(tmp_path / "picture.png")
    with open(tmp_path / "picture.png", "rb") as held:
        for number in (held.fileno(), True):
            with pytest.raises(UserError) as caught:
                whole.complete(SHOW, [number])
            assert caught.value.code == "E_IMAGE_SOURCE"
        assert held.read(4) == b"\x89PNG"


def test_usage_says_what_prefix_caching_found():
    """Whole pages of the same beginning; the prompt's last token is always computed."""
    with contextlib.closing(
        Pipeline(
            loader.load(CHECKPOINT, dtype=torch.float32),
            Tokenizer.from_directory(CHECKPOINT),
            ImageOptions.from_directory(CHECKPOINT),
            options=EngineOptions(page_size=8, max_num_seqs=2, max_num_batched_tokens=16),
        )
    ) as pipeline:
        once, again = (pipeline.complete(ASK, temperature=0, max_length_tokens=3).usage for _ in range(2))
        assert once.cached_tokens == 0
        assert again.cached_tokens == (again.input_tokens - 1) // 8 * 8 > 0


def test_closing_the_stream_stops_the_work(whole):
    events = whole.stream(ASK, temperature=0, max_length_tokens=500)
    next(events)
    events.close()
    assert list(events) == []
    assert wait_until(lambda: not whole.engine.scheduler.busy)


@pytest.mark.parametrize("until", [None, Reasoning, Answer])
def test_closing_the_stream_gives_all_memory_back(whole, say, until):
    say(THINK_OPEN + ENDLESS, after_close=ENDLESS)
    engine = whole.engine
    long_prompt = [{"role": "user", "content": "word " * 1200}]
    events = whole.stream(long_prompt, temperature=0, thinking_budget=40, max_length_tokens=500)
    if until is not None:
        assert any(isinstance(event, until) for event in events)
    events.close()
    assert wait_until(engine.idle)
    assert engine.scheduler.pool.available == engine.scheduler.pool.count


PROGRAM = """
import sys
import kimi_vl

pipeline = kimi_vl.load(sys.argv[1], device="cpu")
events = pipeline.stream([{"role": "user", "content": "Why?"}], temperature=0, max_length_tokens=3000)
next(events)
"""


@pytest.mark.slow
def test_a_program_may_end_at_any_moment():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(CHECKPOINT)], cwd=CHECKPOINT.parents[3], capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (0, "")


FORKED = """
import os, signal, sys, threading
import kimi_vl
pipeline = kimi_vl.load("demo")
ask = [{"role": "user", "content": "What is 12 + 30?"}]
if sys.argv[1] == "locked":  # as another thread may have it at that moment
    taken = threading.Event()
    def hold():
        with pipeline.engine._lock:
            taken.set()
            threading.Event().wait(100)
    threading.Thread(target=hold, daemon=True).start()
    taken.wait()
child = os.fork()
if not child:
    signal.alarm(100)
    assert not pipeline.healthy()
    try:
        pipeline.complete(ask)
    except RuntimeError as error:
        assert "fork" in str(error), error
        pipeline.close()
        sys.exit(0)
    os._exit(9)
assert os.waitpid(child, 0)[1] == 0
if sys.argv[1] == "free":
    assert pipeline.complete(ask, temperature=0).answer == "12 + 30 = 42"
    assert pipeline.healthy()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["free", "locked"])
def test_a_forked_process_is_told_that_it_has_no_engine(lock):
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, lock], cwd=CHECKPOINT.parents[3], check=True, timeout=300
    )


def test_after_close_nothing_is_served():
    pipeline = Pipeline(
        loader.load(CHECKPOINT, dtype=torch.float32),
        Tokenizer.from_directory(CHECKPOINT),
        ImageOptions.from_directory(CHECKPOINT),
    )
    running = pipeline.stream(ASK, temperature=0, max_length_tokens=3)
    pipeline.close()
    assert isinstance(list(running)[-1], Done)
    assert not pipeline.healthy()
    with pytest.raises(RuntimeError, match="stopped"):
        pipeline.complete(ASK)


def test_a_stream_that_nobody_holds_stops_too(whole):
    before = whole.engine.steps
    whole.stream(ASK, temperature=0, max_length_tokens=5000)
    gc.collect()
    assert wait_until(lambda: not whole.engine.scheduler.busy)
    assert whole.engine.steps - before < 4900


def test_joined_pieces_are_fewer_and_the_same_text(whole, say):
    say(THINK_OPEN + ENDLESS, after_close=ENDLESS)
    options = {"temperature": 0, "thinking_budget": 40, "max_length_tokens": 100}
    *tokens, done = whole.stream(ASK, **options)
    *pieces, same = whole.stream(ASK, **options, interval=3600)
    assert (same.reasoning, same.answer) == (done.reasoning, done.answer)
    assert {type(token) for token in tokens} == {Reasoning, Answer} and len(tokens) > 20
    assert [type(piece) for piece in pieces] == [Reasoning, Reasoning, Answer]
    assert pieces[0] == tokens[0], "the first comes at once"
    assert "".join(piece.text for piece in pieces) == "".join(token.text for token in tokens)


def test_an_event_loop_gets_the_same_events(whole):
    async def together() -> list[list[Event]]:
        async def one(seed: int) -> list[Event]:
            return [event async for event in whole.astream(ASK, seed=seed, max_length_tokens=20)]

        return await asyncio.gather(*(one(seed) for seed in range(5)))

    for seed, events in enumerate(asyncio.run(together())):
        done = events[-1]
        assert isinstance(done, Done)
        assert done == dataclasses.replace(whole.complete(ASK, seed=seed, max_length_tokens=20), **_times(done))


def test_a_task_that_is_cancelled_stops_the_work(whole):
    async def impatient() -> None:
        async def read() -> None:
            async for _ in whole.astream(ASK, temperature=0, max_length_tokens=5000):
                pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(), 0.2)

    asyncio.run(impatient())
    assert wait_until(lambda: not whole.engine.scheduler.busy)


def test_a_deadline_ends_a_request(whole):
    with pytest.raises(Overloaded, match="E_OVERLOADED") as late:
        whole.complete(ASK, temperature=0, max_length_tokens=5000, deadline=0.1)
    assert late.value.cause == "deadline"
    assert whole.complete(ASK, temperature=0, max_length_tokens=3).usage.output_tokens == 3


def test_a_prepared_prompt_takes_no_more_files(whole):
    prompt = whole.prepare(SHOW, [Image.new("RGB", (28, 28))])
    for more in ({"images": [Image.new("RGB", (28, 28))]}, {"videos": ["film.mp4"]}, {"documents": [], "fps": 2.0}):
        with pytest.raises(UserError, match=f"leave out {', '.join(more)}") as raised:
            whole.complete(prompt, **more)
        assert raised.value.code == "E_PARAMETER"
    assert whole.complete(prompt, max_length_tokens=1).usage.output_tokens == 1
