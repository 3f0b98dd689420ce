"""What an answer comes with, and what steers it, on the demo model from message to event."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kimi_vl
from kimi_vl.events import Answer, Done, Event, Reasoning
from kimi_vl.model.generation import Prompt, Session
from kimi_vl.pipeline import Pipeline

ASK = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def demo() -> Iterator[Pipeline]:
    pipeline = kimi_vl.load("demo", device="cpu")
    yield pipeline
    pipeline.close()


def events_and_ids(pipeline: Pipeline, **params: Any) -> tuple[list[Event], list[int], int]:
    """The events of a request, its ids (but for the last token), and how many of these are the prompt's."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handle = pipeline.submit(ASK, (), events.put, **params)
    found = [events.get(timeout=300)]
    while not isinstance(found[-1], Done):
        assert not isinstance(found[-1], Exception), found[-1]
        found.append(events.get(timeout=300))
    return found, handle.request.ids, handle.request.prompt_length


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 3}])
def test_logprobs_of_an_answer_are_those_of_the_model(demo: Pipeline, settings: dict[str, Any]) -> None:
    events, ids, prompt_length = events_and_ids(demo, logprobs=4, **settings)
    done = events[-1]
    assert isinstance(done, Done) and done.answer and done.reasoning
    found = [each for event in events if isinstance(event, Answer) for each in event.logprobs]
    assert b"".join(each.token_bytes for each in found) == done.answer.encode()
    assert done.logprobs == tuple(found)
    assert [each.token_id for each in found] == ids[-len(found) :]
    session = Session(demo.model, [Prompt(ids[:prompt_length])], len(ids) - prompt_length + 1)
    for token in ids[prompt_length : -len(found)]:
        session.step([token])
    for each in found:
        right = session.logits[0].double().log_softmax(-1)
        assert each.logprob == pytest.approx(float(right[each.token_id]), abs=1e-5)
        assert [top.logprob for top in each.top] == pytest.approx(right.topk(4).values.tolist(), abs=1e-5)
        assert [top.token_bytes for top in each.top] == [demo.tokenizer.token_bytes(top.token_id) for top in each.top]
        session.step([each.token_id])
    bare = demo.complete(ASK, (), **settings | {"seed": done.seed})
    assert (bare.reasoning, bare.answer, bare.logprobs) == (done.reasoning, done.answer, ())


def test_joined_pieces_keep_their_logprobs(demo: Pipeline) -> None:
    pieces = list(demo.stream(ASK, temperature=0, logprobs=0, interval=3600))
    done = pieces[-1]
    found = [each for event in pieces if isinstance(event, Answer) for each in event.logprobs]
    assert isinstance(done, Done) and tuple(found) == done.logprobs
    assert len(pieces) < len(found)
    assert all(each.top == () for each in found)


def test_a_bias_holds_for_the_answer_alone(demo: Pipeline) -> None:
    """The thinking stays as it is; what is ruled out does not come, and what is preferred does."""
    plain = demo.complete(ASK, temperature=0)
    used = {*demo.tokenizer.encode(plain.answer)}
    banned = demo.complete(ASK, temperature=0, logit_bias=dict.fromkeys(used, -100), max_length_tokens=200)
    assert banned.reasoning == plain.reasoning
    assert banned.answer and not used & {*demo.tokenizer.encode(banned.answer)}
    (digit,) = demo.tokenizer.encode("7")
    wanted = demo.complete(ASK, temperature=0, logit_bias={digit: 100}, max_length_tokens=200)
    assert wanted.reasoning == plain.reasoning
    assert set(wanted.answer) == {"7"} and wanted.finish_reason == "length"
    assert demo.complete(ASK, temperature=0, logit_bias={}).answer == plain.answer


def test_a_bias_begins_with_the_first_token_where_there_is_no_thinking(demo: Pipeline) -> None:
    (digit,) = demo.tokenizer.encode("7")
    demo.thinks = False
    try:
        found = demo.complete(ASK, temperature=0, logit_bias={digit: 100}, max_length_tokens=5)
    finally:
        demo.thinks = True
    assert (found.reasoning, found.answer) == ("", "77777")


def test_requests_that_are_steered_leave_their_neighbours_alone(demo: Pipeline) -> None:
    settings = [{"temperature": 1, "seed": seed} for seed in range(4)]
    alone = [demo.complete(ASK, (), **each).answer for each in settings]
    streams = [
        demo.stream(ASK, (), **each, **steered)
        for each in settings
        for steered in ({}, {"logprobs": 3}, {"logit_bias": {5: 2.5}})
    ]
    answers = ["".join(event.text for event in stream if isinstance(event, Answer)) for stream in streams]
    assert answers[0::3] == alone
    assert answers[1::3] == alone
    assert not any(isinstance(event, Reasoning) and not event.text for event in demo.stream(ASK, logprobs=1))
    assert torch.is_grad_enabled()
