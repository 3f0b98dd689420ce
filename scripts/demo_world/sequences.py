"""Questions about the frames of a video and the pages of a document, each told by the label before it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from demo_world.arithmetic import read_sum
from demo_world.pictures import Item, Picture
from demo_world.requests import REQUESTS
from demo_world.turns import Turn, a_or_an, centre, listed, name_of, vary

CHANGE_SHARE = 0.7
"""Of the questions about a video are for what changes; the others are for what is shown at a time."""


def _ask(rng: random.Random, kind: str, **words: str) -> str:
    return vary(rng, rng.choice(REQUESTS[kind]).format(**words))


def _joined(names: Sequence[str]) -> str:
    return " and ".join(map(a_or_an, names)) or "nothing"


# Videos: an object is known by its side


def _sides(frame: Picture) -> dict[str, str]:
    """The names of a frame's objects by the side on which each is."""
    return {"left" if centre(item)[0] < frame.size[0] / 2 else "right": name_of(item) for item in frame.items}


def _frame_reading(frame: Picture) -> str:
    return ", ".join(f"{name} {side}" for side, name in _sides(frame).items()) or "nothing"


def _change(before: dict[str, str], after: dict[str, str]) -> str:
    """What happens between two frames that differ, without the time."""
    if len(before) < len(after):
        side = next(side for side in after if side not in before)
        return f"{a_or_an(after[side])} appears"
    if len(before) > len(after):
        side = next(side for side in before if side not in after)
        return f"the {before[side]} disappears"
    if before.keys() != after.keys():
        [(side, name)] = after.items()
        return f"the {name} moves to the {side}"
    side = next(side for side in after if before[side] != after[side])
    return f"the {before[side]} becomes {a_or_an(after[side])}"


def turn_film(rng: random.Random, frames: Sequence[Picture]) -> Turn:
    """What changes in a video and when, or what is shown at a time."""
    states = [_sides(frame) for frame in frames]
    read = " ".join(f"{frame.label}: {_frame_reading(frame)}." for frame in frames)
    if rng.random() >= CHANGE_SHARE:
        number = rng.randrange(len(frames))
        time = str(frames[number].label)
        answer = f"At {time} the video shows {_joined(list(states[number].values()))}."
        thinking = f"{read} Asked: {time}, {_frame_reading(frames[number])}."
        return Turn(_ask(rng, "shown_at", time=time), thinking, answer, read)
    question = _ask(rng, "change")
    number = next((n for n in range(1, len(frames)) if states[n] != states[n - 1]), None)
    if number is None:
        return Turn(question, f"{read} No change.", "Nothing changes in the video.", read)
    said = f"At {frames[number].label} {_change(states[number - 1], states[number])}."
    earlier, later = (_frame_reading(frames[n]) for n in (number - 1, number))
    thinking = f"{read} Change at {frames[number].label}: {earlier}, then {later}."
    return Turn(question, thinking, said, read)


# Documents


def _is_sum(page: Picture) -> bool:
    return page.items[0].colour is None


def _sum(page: Picture) -> str:
    a, op, b = read_sum(page.items)
    return f"{a} {op} {b}"


def _page_reading(page: Picture) -> str:
    return _sum(page) if _is_sum(page) else listed(page.items)


def turn_pages(rng: random.Random, pages: Sequence[Picture]) -> Turn:
    """What a page says, or which page says something."""
    read = " ".join(f"{page.label}: {_page_reading(page)}." for page in pages)
    page = rng.choice(pages)
    label = str(page.label)
    number = label.split()[1]
    if rng.random() < 0.5:
        question, asked = _ask(rng, "page_says", number=number), f"page {number}, {_page_reading(page)}"
        answer = f"{label} says {_sum(page)}." if _is_sum(page) else f"{label} shows {_joined(_names(page.items))}."
    elif _is_sum(page):
        question, asked = _ask(rng, "page_of_sum", one=_sum(page)), f"{_sum(page)}, page {number}"
        answer = f"{label} says {_sum(page)}."
    else:
        name = name_of(rng.choice(page.items))
        question, asked = _ask(rng, "page_of_object", one=name), f"{name}, page {number}"
        answer = f"The {name} is on page {number}."
    return Turn(question, f"{read} Asked: {asked}.", answer, read)


def _names(items: Sequence[Item]) -> list[str]:
    return [name_of(item) for item in items]
