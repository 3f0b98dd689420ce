"""Sums of two numbers from 0 to 99: read from a picture's items, and worked out in words."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from demo_world.pictures import Item


def result_of(a: int, op: str, b: int) -> int:
    """The value of a sum or difference."""
    return a + b if op == "+" else a - b


def _add_steps(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10
    text = f"Ones: {a % 10} + {b % 10} = {ones}"
    if ones >= 10:
        return f"{text}, write {ones - 10}, carry 1. Tens: {a // 10} + {b // 10} + 1 = {tens + 1}."
    return f"{text}. Tens: {a // 10} + {b // 10} = {tens}."


def _subtract_steps(a: int, b: int) -> str:
    """Steps of `a - b` for `a >= b`."""
    ones = a % 10 - b % 10
    tens = a // 10 - b // 10
    if ones < 0:
        borrowed = f"borrow, {a % 10 + 10} - {b % 10} = {ones + 10}"
        return f"Ones: {a % 10} - {b % 10}, {borrowed}. Tens: {a // 10} - 1 - {b // 10} = {tens - 1}."
    return f"Ones: {a % 10} - {b % 10} = {ones}. Tens: {a // 10} - {b // 10} = {tens}."


def work_out(a: int, op: str, b: int) -> str:
    """The written steps of a sum of two numbers from 0 to 99, ones first, up to its result."""
    if op == "+":
        steps = _add_steps(a, b)
    elif a >= b:
        steps = _subtract_steps(a, b)
    else:
        steps = f"{b} is larger, so {b} - {a} with a minus. {_subtract_steps(b, a)}"
    return f"{steps} So {result_of(a, op, b)}."


def read_sum(items: Sequence[Item]) -> tuple[int, str, int]:
    """The numbers and the sign of a sum picture, from its items."""
    text = "".join(item.kind for item in items)
    found = re.match(r"(\d+)([+-])(\d+)=?\??$", text)
    if found is None:
        raise ValueError(f"no sum: {text!r}")
    return int(found[1]), found[2], int(found[3])


def numbers(rng: random.Random) -> tuple[int, str, int]:
    """Two numbers and a sign; differences are negative at times."""
    a, b = (rng.randint(0, 9) if rng.random() < 0.3 else rng.randint(10, 99) for _ in range(2))
    op = rng.choice("+-")
    if op == "-" and a != b and (a < b) != (rng.random() < 1 / 3):
        a, b = b, a
    return a, op, b
