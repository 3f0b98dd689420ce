"""Pieces are joined before they are handed over: when each leaves, and that nothing is lost, by clocks of the test."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kimi_vl.coalescer import Coalescer
from kimi_vl.events import Answer, Reasoning

DONE: Any = "done"  # whatever is no piece of text
Left = list[tuple[float, Any]]


def coalesce(interval: float, timed: list[tuple[float, Any]]) -> Left:
    """What leaves of these events, each with its time."""
    now, left = 0.0, []
    coalescer = Coalescer(lambda event: left.append((now, event)), interval, lambda: now)
    for moment, event in timed:
        now = moment
        coalescer(event)
    return left


def texts(left: Left) -> Left:
    return [(moment, getattr(event, "text", event)) for moment, event in left]


def test_first_piece_leaves_at_once_and_the_next_after_the_interval() -> None:
    timed = [(n / 100, Answer(str(n))) for n in range(16)]
    assert texts(coalesce(0.07, [*timed, (0.16, DONE)])) == [
        (0.0, "0"),
        (0.07, "1234567"),
        (0.14, "891011121314"),
        (0.16, "15"),
        (0.16, DONE),
    ]


def test_slow_pieces_are_not_held() -> None:
    timed = [(float(n), Answer(str(n))) for n in range(3)]
    assert texts(coalesce(0.07, timed)) == [(0.0, "0"), (1.0, "1"), (2.0, "2")]


def test_a_change_of_kind_releases_what_is_held() -> None:
    timed = [(0.0, Reasoning("a")), (0.01, Reasoning("b")), (0.02, Answer("c")), (0.03, DONE)]
    assert coalesce(0.07, timed) == [(0.0, Reasoning("a")), (0.02, Reasoning("b")), (0.03, Answer("c")), (0.03, DONE)]


def test_what_is_held_leaves_before_an_error() -> None:
    error = RuntimeError()
    timed = [(0.0, Answer("a")), (0.01, Answer("b")), (0.02, error)]
    assert coalesce(0.07, timed) == [(0.0, Answer("a")), (0.02, Answer("b")), (0.02, error)]


def test_empty_pieces_are_not_handed_over() -> None:
    timed = [(0.0, Answer("")), (0.1, Answer("x")), (0.2, Answer("")), (0.3, Reasoning("")), (0.4, DONE)]
    assert texts(coalesce(0.0, timed)) == [(0.1, "x"), (0.4, DONE)]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_no_more_leave_than_intervals_and_changes(seed: int) -> None:
    dice = random.Random(seed)
    now, changes, kind, timed = 0.0, 0, Answer, []
    for number in range(500):
        now += dice.random() * 0.02
        if dice.random() < 0.02:
            kind, changes = (Reasoning if kind is Answer else Answer), changes + 1
        timed.append((now, kind(f"{number} ")))
    left = coalesce(0.07, [*timed, (now, DONE)])
    for which in (Reasoning, Answer):
        said = ["".join(e.text for _, e in part if isinstance(e, which)) for part in (timed, left)]
        assert said[0] == said[1]
    assert len(left) <= now / 0.07 + changes + 3
