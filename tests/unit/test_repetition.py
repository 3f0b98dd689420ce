"""Loops are noticed as soon as the rule allows, and nothing else is taken for one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_vl.text.thinking import CHECK_EVERY, MAX_BLOCK_TOKENS, MIN_COPIES, MIN_LOOP_TOKENS, RepetitionDetector
from kimi_vl.text.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"


def first_alarm(tokens: Sequence[int]) -> int | None:
    """After how many tokens the rule says that they loop."""
    watch = RepetitionDetector()
    return next((count for count, token in enumerate(tokens, start=1) if watch.push(token)), None)


def loops(tokens: Sequence[int]) -> bool:
    """The rule, word by word."""
    for block in range(1, MAX_BLOCK_TOKENS + 1):
        length = max(MIN_COPIES * block, MIN_LOOP_TOKENS)
        tail = tokens[-length:]
        if len(tail) == length and all(tail[i] == tail[i - block] for i in range(block, length)):
            return True
    return False


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_says_what_the_rule_says(data: st.DataObject) -> None:
    letters = data.draw(st.integers(1, 3))
    pieces = data.draw(
        st.lists(st.tuples(st.lists(st.integers(0, letters), min_size=1, max_size=40), st.integers(1, 12)), max_size=5)
    )
    tokens = [token for piece, copies in pieces for token in piece * copies][:700]
    watch = RepetitionDetector()
    for count, token in enumerate(tokens, start=1):
        assert watch.push(token) == (count % CHECK_EVERY == 0 and loops(tokens[:count])), count


@settings(max_examples=100, deadline=None)
@given(
    before=st.integers(0, 3000),
    block=st.integers(1, MAX_BLOCK_TOKENS),
    letters=st.sampled_from([2, 5, 1000, 163_840]),
    seed=st.integers(0, 2**32),
)
def test_every_planted_loop_is_found_at_its_fourth_copy(before: int, block: int, letters: int, seed: int) -> None:
    rng = random.Random(seed)
    planted = [rng.randrange(letters) for _ in range(block)]
    prefix = [letters + count for count in range(before)]  # each once
    needed = max(MIN_COPIES * block, MIN_LOOP_TOKENS)
    alarm = first_alarm([*prefix, *itertools.islice(itertools.cycle(planted), needed + CHECK_EVERY)])
    assert alarm is not None and alarm < before + needed + CHECK_EVERY
    if len(set(planted)) == block:
        assert alarm >= before + needed


@pytest.mark.parametrize("block", [1, 2, 31, 32, 33, 255, 256])
def test_one_token_less_is_no_loop(block: int) -> None:
    length = max(MIN_COPIES * block, MIN_LOOP_TOKENS)
    other = [1000 + count for count in range(-length % CHECK_EVERY)]  # the loop ends where it is looked at
    tokens = [*other, *itertools.islice(itertools.cycle(range(block)), length)]
    assert first_alarm(tokens) == len(tokens)
    assert first_alarm([*other, 999, *tokens[len(other) + 1 :]]) is None


def test_longer_blocks_are_no_loop() -> None:
    assert first_alarm([*range(MAX_BLOCK_TOKENS + 1)] * 20) is None


@settings(max_examples=30, deadline=None)
@given(block=st.integers(8, 200), seed=st.integers(0, 2**32))
def test_copies_with_one_change_in_each_are_no_loop(block: int, seed: int) -> None:
    rng = random.Random(seed)
    line = [rng.randrange(1000) for _ in range(block)]
    tokens: list[int] = []
    for copy in range(30):
        tokens += line
        tokens[-rng.randint(1, block)] = 1000 + copy
    assert first_alarm(tokens) is None


NATURAL = {
    "counting": ", ".join(str(number) for number in range(3000)),
    "a numbered list": "\n".join(f"{number}. Look at object {number}: it is a circle." for number in range(300)),
    "even and odd": "".join(f"{number} is {('even', 'odd')[number % 2]}. " for number in range(400)),
    "a table": "\n".join(f"| {row} | {row * 7 % 13} | {row * row} |" for row in range(300)),
    "a multiplication table": "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 20) for b in range(1, 20)),
    "squares": "\n".join(f"The square of {number} is {number**2}." for number in range(300)),
    "a ruled table": "\n".join("+----+----+\n" + f"| {row:2} | {row + 1:2} |" for row in range(99)),
    "second thoughts": "Wait, let me check that again. " * 3 + "So it is 38. Wait, let me check that again. It is.",
    "indented code": "\n".join(f"        values[{number}] = {number * 3}" for number in range(200)),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(CHECKPOINT)


@pytest.mark.parametrize("name", NATURAL)
def test_lists_and_tables_are_no_loops(tokenizer: Tokenizer, name: str) -> None:
    assert first_alarm(tokenizer.encode(NATURAL[name])) is None


@pytest.mark.parametrize("line", ["Wait, let me check that again. ", "So 38. ", "1 + 1 = 2\n", "🧑‍🚀", "ha", " "])
def test_a_line_said_without_end_is_a_loop(tokenizer: Tokenizer, line: str) -> None:
    alarm = first_alarm(tokenizer.encode("Let me think. " + line * 2000))
    assert alarm is not None and alarm < 320


def test_requests_do_not_share_what_they_saw() -> None:
    first, second = RepetitionDetector(), RepetitionDetector()
    for _ in range(MIN_LOOP_TOKENS - 1):
        assert not first.push(7)
        assert not second.push(8)
    assert first.push(7)
    assert not second.push(7)


def test_a_loop_that_ends_is_over() -> None:
    watch = RepetitionDetector()
    assert any(watch.push(token) for token in [7] * MIN_LOOP_TOKENS)
    assert any(watch.push(token) for token in [7] * CHECK_EVERY)
    assert not any(watch.push(token) for token in [8] * CHECK_EVERY)
