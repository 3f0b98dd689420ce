"""Output that is cut at any length, by any budget, in any form: half a marker, or half a character, is no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import predict
from kimi_vl.events import Done, Event
from kimi_vl.media.images import ImageOptions
from kimi_vl.pipeline import Pipeline
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
TOKENIZER = Tokenizer.from_directory(CHECKPOINT)
BYTES = {TOKENIZER.token_bytes(index): index for index in range(TOKENIZER.num_ranks)}
ASK = [{"role": "user", "content": "Why?"}]
BUDGETS = [None, 0, 1, 2, 5, 20]


def in_tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def in_bytes(text: str) -> list[int]:
    """A token for each byte: cuts go through characters, and through the markers' characters."""
    return [BYTES[bytes([byte])] for byte in text.encode()]


@pytest.fixture(scope="module")
def whole() -> Pipeline:
    """A pipeline whose requests are not run: what is sent to the engine is handed back."""
    pipeline = Pipeline(
        loader.load(CHECKPOINT, dtype=torch.float32), TOKENIZER, ImageOptions.from_directory(CHECKPOINT)
    )
    pipeline.close()
    pipeline.engine = SimpleNamespace(model=pipeline.model, submit=lambda *request: request[3])  # pyright: ignore[reportAttributeAccessIssue]
    return pipeline


def drive(
    pipeline: Pipeline, before: list[int], after: list[int], messages: list[dict[str, Any]] = ASK, **params: Any
) -> tuple[list[Event], list[str]]:
    """Events of a model that says ``before``, and ``after`` once the closing marker stands there; and the text of its
    tokens, in two pieces where markers were put there, or began to be."""
    events: list[Any] = []
    tokens: list[int] = []
    processor: Any = pipeline.submit(messages, (), events.append, temperature=0, **params)
    closed_at = put_at = None
    token: int | None = 0
    while token is not None:
        drawn = processor.forced()
        if drawn is not None and put_at is None:
            put_at = len(tokens)
        if drawn is None:
            script, at = (before, len(tokens)) if closed_at is None else (after, len(tokens) - closed_at)
            drawn = script[at] if at < len(script) else TOKENIZER.im_end_id
        token = processor.take(drawn)
        if drawn == TOKENIZER.im_end_id and processor._thinking.closing and put_at is None:
            drawn, put_at = (
                TOKENIZER.encode(THINK_CLOSE)[0],
                len(tokens),
            )  # what the output processor put in place of the end
        tokens.append(drawn)
        if closed_at is None and THINK_CLOSE in said(tokens):
            closed_at = len(tokens)
    return events, [said(tokens)] if put_at is None else [said(tokens[:put_at]), said(tokens[put_at:])]


def said(tokens: list[int]) -> str:
    """The text of tokens without half a character at its end."""
    return b"".join(TOKENIZER.token_bytes(t) for t in tokens if not TOKENIZER.is_special(t)).decode(errors="ignore")


def trimmed(text: str) -> str:
    """A text that was interrupted, without half of the marker that may have come next."""
    stripped = text.lstrip()
    if stripped and not stripped.startswith(THINK_OPEN):
        return "" if THINK_OPEN.startswith(stripped) else text
    if THINK_CLOSE in text:
        return text
    halves = [THINK_CLOSE[:count] for count in range(len(THINK_CLOSE) - 1, 0, -1)]
    return next((text.removesuffix(half) for half in halves if stripped[len(THINK_OPEN) :].endswith(half)), text)


def expected(pieces: list[str], cut: bool) -> tuple[str, str]:
    """The rule on the whole text: thinking and answer, without half a marker where something was interrupted."""
    text = "".join([*map(trimmed, pieces[:-1]), pieces[-1]])
    text = trimmed(text) if cut else text
    stripped = text.lstrip()
    if not stripped.startswith(THINK_OPEN):
        return "", text
    thinking, _, answer = stripped[len(THINK_OPEN) :].partition(THINK_CLOSE)
    return thinking, answer


def check_forms(events: list[Any]) -> None:
    """The four forms say the same, and no marker stands but around the thinking."""
    done = events[-1]
    assert isinstance(done, Done)
    form = {name: "".join(predict.format_events(iter(events), name)) for name in ("text", "think_tags", "answer")}
    around = THINK_OPEN + done.reasoning + THINK_CLOSE if done.reasoning else ""
    assert form["text"] == around + done.answer
    assert form["think_tags"] == form["text"].replace(THINK_OPEN, "<think>").replace(THINK_CLOSE, "</think>")
    assert form["answer"] == done.answer
    lines = [json.loads(line) for line in "".join(predict.format_events(iter(events), "json")).splitlines()]
    for kind, whole_text in (("reasoning", done.reasoning), ("answer", done.answer)):
        assert "".join(line["text"] for line in lines if line["type"] == kind) == whole_text == lines[-1][kind]


SAID = {
    "thinking": ("◁think▷It is so, and so it is.◁/think▷", "Because."),
    "white space first": (" \n ◁think▷Hm.◁/think▷", "\n\nBecause."),
    "long": ("◁think▷" + " ".join(map(str, range(90))), "Yes " * 60),
    "wide characters": ("◁think▷😀 日本 ก็◁/think▷", "👍🏽 é ◁."),
    "no thinking": ("A plain answer, 日本 😀", ""),
    "an empty thinking": ("◁think▷◁/think▷", "So."),
    "a turn that ends inside": ("◁think▷I stop here", "So."),
    "nothing but white space": (" \n" * 40, "So."),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("spelled", [in_tokens, in_bytes])
@pytest.mark.parametrize("kind", SAID)
def test_a_cut_at_any_length_leaves_no_half_marker(
    whole: Pipeline, kind: str, spelled: Callable[[str], list[int]]
) -> None:
    before, after = map(spelled, SAID[kind])
    for length in range(1, 41):
        for budget in BUDGETS:
            events, pieces = drive(whole, before, after, max_length_tokens=length, thinking_budget=budget)
            done = events[-1]
            assert isinstance(done, Done)
            assert (done.reasoning, done.answer) == expected(pieces, done.finish_reason == "length"), (length, budget)
            check_forms(events)
            for text in (done.reasoning, done.answer):
                assert not any(piece in text for piece in ("think", "▷", "\ufffd")), (length, budget)
                assert "◁" not in text.replace(" ◁", ""), (length, budget)


@pytest.mark.parametrize("spelled", [in_tokens, in_bytes])
@pytest.mark.parametrize("half", [THINK_CLOSE[:n] for n in range(1, len(THINK_CLOSE))])
def test_a_budget_that_ends_inside_the_model_s_own_marker_leaves_no_half_of_it(
    whole: Pipeline, half: str, spelled: Callable[[str], list[int]]
) -> None:
    opener, thinking = spelled(THINK_OPEN), spelled("It is")
    before = opener + thinking + spelled(half) + spelled(" and more" * 9)
    first = len(thinking) + 1  # the last token of the opening marker counts
    for cut in range(first, first + len(spelled(half)) + 1):
        events, pieces = drive(whole, before, spelled("So."), max_length_tokens=400, thinking_budget=cut)
        done = events[-1]
        assert isinstance(done, Done)
        assert (done.reasoning, done.answer, done.thinking_closed_by) == ("It is", "So.", "budget")
        check_forms(events)
        assert "".join(pieces).count(THINK_CLOSE) == 1


@pytest.mark.parametrize("half", [THINK_CLOSE[:n] for n in range(1, len(THINK_CLOSE))])
def test_a_turn_that_ends_inside_the_marker_is_closed_without_half_of_it(whole: Pipeline, half: str) -> None:
    events, _ = drive(whole, in_bytes(THINK_OPEN + "It is" + half), in_bytes("So."), max_length_tokens=400)
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.reasoning, done.answer, done.finish_reason) == ("It is", "So.", "stop")
    check_forms(events)


def test_what_only_looks_like_a_marker_stays_where_the_model_goes_on_or_ends(whole: Pipeline) -> None:
    before = "◁think▷a ◁/thi b ◁ c◁/think▷"
    events, _ = drive(whole, in_bytes(before), in_bytes("1 ◁/think▷ 2 ◁think▷ 3 ◁"), max_length_tokens=400)
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.reasoning, done.answer) == ("a ◁/thi b ◁ c", "1 ◁/think▷ 2 ◁think▷ 3 ◁")
    ended = drive(whole, in_tokens("◁thin"), [])[0][-1]
    assert isinstance(ended, Done)
    assert (ended.answer, ended.finish_reason) == ("◁thin", "stop")


@pytest.mark.parametrize("prefill", ["◁think▷It is ◁/th", "◁think▷It is", "  ◁thi", "◁", " ", "◁think▷"])
@pytest.mark.parametrize("length", range(1, 20))
def test_prefilled_thinking_that_is_closed_at_once_leaves_no_half_marker(
    whole: Pipeline, prefill: str, length: int
) -> None:
    messages = [*ASK, {"role": "assistant", "content": prefill}]
    events, _ = drive(whole, [], in_bytes("So."), messages, max_length_tokens=length, thinking_budget=0)
    done = events[-1]
    assert isinstance(done, Done)
    assert done.reasoning == "" and "So.".startswith(done.answer)
    check_forms(events)


def test_white_space_in_circles_is_led_to_an_answer_between_whole_markers(whole: Pipeline) -> None:
    events, pieces = drive(whole, in_bytes(" " * 900), in_bytes("So."), max_length_tokens=2000)
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.reasoning, done.answer) == ("", "So.")
    assert "".join(pieces).strip() == THINK_OPEN + THINK_CLOSE + "So."


def test_an_answer_that_is_cut_keeps_what_only_begins_a_stop_sequence(whole: Pipeline) -> None:
    events, _ = drive(whole, in_bytes("one two EN and"), [], max_length_tokens=10, stop_sequences=["END"])
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.answer, done.finish_reason) == ("one two EN", "length")
