"""Tokens to text, text to thinking and answer, answer up to a stop sequence: nothing depends on where the cuts are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kimi_vl.errors import UserError
from kimi_vl.text.stop_sequences import MAX_CHARACTERS, MAX_SEQUENCES, StopSequences
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN, Section, ThinkingSplitter
from kimi_vl.text.tokenizer import TextStream, Tokenizer

TOKENIZER = Tokenizer.from_directory(Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint")

BYTES = {TOKENIZER.token_bytes(index): index for index in range(TOKENIZER.num_ranks)}

EMOJI = ["😀", "👨‍👩‍👧‍👦", "🇩🇪", "e\u0301", "👍🏽", "日本", "ก็", "\u202e", "\0"]
PIECES = st.one_of(
    st.sampled_from([THINK_OPEN, THINK_CLOSE, THINK_OPEN[:4], THINK_CLOSE[:5], THINK_CLOSE[1:], "◁", "▷", " ", "\n"]),
    st.sampled_from(EMOJI),
    st.text(max_size=6),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
CUTS = st.lists(st.integers(0, 120), max_size=30)


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place for place in cuts if place <= len(text))})
    return [text[begin:end] for begin, end in pairwise(places)]


def split(pieces: list[str]) -> list[tuple[Section, str]]:
    splitter = ThinkingSplitter()
    return [found for piece in pieces for found in splitter.push(piece)] + splitter.finish()


def joined(found: list[tuple[Section, str]]) -> tuple[str, str]:
    return (
        "".join(text for section, text in found if section == "reasoning"),
        "".join(text for section, text in found if section == "answer"),
    )


def expected_split(text: str) -> tuple[str, str]:
    """The rule, on the whole text."""
    stripped = text.lstrip()
    if not stripped.startswith(THINK_OPEN):
        return "", text
    thinking, _, answer = stripped[len(THINK_OPEN) :].partition(THINK_CLOSE)
    return thinking, answer


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["", " \n", THINK_OPEN, "\n" + THINK_OPEN, THINK_OPEN[:3]]), TEXTS, CUTS)
@example("", THINK_OPEN + "a" + THINK_CLOSE + "b", list(range(40)))
@example("  ", "  ", list(range(9)))
def test_the_split_does_not_depend_on_the_cuts(beginning: str, rest: str, cuts: list[int]) -> None:
    text = beginning + rest
    found = split(cut(text, cuts))
    assert joined(found) == expected_split(text)
    assert all(piece for _, piece in found)
    assert [section for section, _ in found] == sorted((section for section, _ in found), reverse=True)


def expected_after(text: str, length: int) -> tuple[str, str]:
    """The rule, on the whole text, without its first ``length`` characters."""
    thinking, answer = expected_split(text)
    begin = text.find(THINK_OPEN) + len(THINK_OPEN)
    return thinking[max(0, length - begin) :], answer[max(0, length - (len(text) - len(answer))) :]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        ["", " ", " \n", THINK_OPEN, "\n" + THINK_OPEN, THINK_OPEN[:3], THINK_OPEN + "a" + THINK_CLOSE[:4]]
    ),
    TEXTS,
    CUTS,
    st.integers(0, 30),
)
@example(THINK_OPEN + "a", THINK_CLOSE[:5] + "b", [], 13)
@example(" ", "x", [], 1)
@example("", "◁x", [], 1)
@example("", THINK_OPEN + "a" + THINK_CLOSE + "◁/b", [], 11)
def test_a_prefill_is_not_said_again(beginning: str, rest: str, cuts: list[int], length: int) -> None:
    text = beginning + rest
    prefill, continuation = text[:length], text[length:]
    splitter = ThinkingSplitter()
    splitter.prefill(prefill)
    found = [piece for part in cut(continuation, cuts) for piece in splitter.push(part)] + splitter.finish()
    assert joined(found) == expected_after(text, len(prefill))
    assert all(piece for _, piece in found)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["", THINK_OPEN]), TEXTS)
def test_no_more_is_held_back_than_may_become_a_marker(beginning: str, rest: str) -> None:
    splitter = ThinkingSplitter()
    came, left = "", 0
    for character in beginning + rest:
        came += character
        left += sum(len(text) for _, text in splitter.push(character))
        if splitter.section == "answer":
            assert left == sum(map(len, expected_split(came)))
        elif splitter.section == "reasoning":
            held = len(expected_split(came)[0]) - left
            assert held < len(THINK_CLOSE)
            assert not held or THINK_CLOSE.startswith(came[-held:])
        else:
            assert not came.strip() or THINK_OPEN.startswith(came.lstrip())


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["", THINK_OPEN]), TEXTS)
def test_characters_leave_whole_however_they_are_cut_into_tokens(beginning: str, rest: str) -> None:
    text = beginning + rest
    for ids in (TOKENIZER.encode(text), [BYTES[bytes([byte])] for byte in text.encode()]):
        stream, splitter = TextStream(TOKENIZER), ThinkingSplitter()
        found = [piece for index in ids for piece in splitter.push(stream.push(index))]
        found += splitter.push(stream.finish()) + splitter.finish()
        assert joined(found) == expected_split(text)
        for _, piece in found:
            piece.encode("utf-8")
            assert "\ufffd" not in piece or "\ufffd" in text


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=60))
def test_any_ids_give_text_that_can_be_sent(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [*map(stream.push, ids), stream.finish()]
    for piece in pieces:
        piece.encode("utf-8")  # no half of a surrogate pair
    assert "".join(pieces) == TOKENIZER.decode(index for index in ids if not TOKENIZER.is_special(index))


def test_much_white_space_before_the_thinking_is_skipped() -> None:
    assert joined(split([" "] * 5000 + [THINK_OPEN, "x"])) == ("x", "")
    assert joined(split([" "] * 5000 + ["x"])) == ("", " " * 5000 + "x")
    assert joined(split(["\n"] * 10)) == ("", "\n" * 10)


# Stop sequences


def stopped(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    watch = StopSequences(stops)
    text = "".join([watch.push(piece) for piece in pieces] + [watch.finish()])
    return text, watch.stopped


def expected_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, character by character: the first stop sequence that is complete."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


LETTERS = st.text(alphabet="ab,\n😀", max_size=40)


@settings(max_examples=120, deadline=None)
@given(LETTERS, st.lists(st.text(alphabet="ab,\n😀", max_size=4), max_size=5), CUTS)
@example("abcd", ["abcd", "c"], [0, 1, 2, 3])
@example("abcd", ["abcd", "c"], [])
@example("aaab", ["aab"], [1, 2, 3])
@example("xyz", ["yz", "z"], [1, 2])
def test_the_end_does_not_depend_on_the_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    assert stopped(cut(text, cuts), stops) == expected_stop(text, stops)


@settings(max_examples=120, deadline=None)
@given(LETTERS, st.lists(st.text(alphabet="ab,\n😀", min_size=1, max_size=4), min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_sequence(text: str, stops: list[str]) -> None:
    watch = StopSequences(stops)
    came, left = "", 0
    for character in text:
        came += character
        left += len(watch.push(character))
        if watch.stopped:
            return
        held = came[left:]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_comes_after_a_stop_sequence() -> None:
    watch = StopSequences(["END"])
    assert [watch.push(piece) for piece in ("one EN", "D two", " three")] == ["one ", "", ""]
    assert (watch.stopped, watch.finish()) == (True, "")


@pytest.mark.parametrize("stops", [[str(n) for n in range(MAX_SEQUENCES + 1)], ["x" * (MAX_CHARACTERS + 1)]])
def test_there_are_limits(stops: list[str]) -> None:
    with pytest.raises(UserError, match=r"^E_PARAMETER: .*stop"):
        StopSequences(stops)
    StopSequences([stops[0][:MAX_CHARACTERS]] * (MAX_SEQUENCES + 5))
