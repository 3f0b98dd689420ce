"""Questions about the frames of a video and the pages of a document, each told by the label before it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from demo_world.arithmetic import read_sum
from demo_world.pictures import Item, Picture
from demo_world.requests import REQUESTS
from demo_world.turns import Turn, a_or_an, centre, name_of, vary

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


SIDES = ("left", "right")
NOTHING = "nothing"


def _seen(state: dict[str, str]) -> list[str]:
    """What is read of a frame, side by side."""
    return [f"{side} {state.get(side, NOTHING)}" for side in SIDES]


def _compared(before: dict[str, str], after: dict[str, str]) -> str:
    """What is read of a frame, each side with a word on whether it is as in the frame before."""
    words = ("same" if before.get(side) == after.get(side) else "different" for side in SIDES)
    return ", ".join(f"{seen} {word}" for seen, word in zip(_seen(after), words, strict=True))


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
    """What changes in a video and when, or what is shown at a time.

    Frames are read one after another until something changes, or the one that is asked for alone: to go back to a line
    by its time is hard for a small network.
    """
    states = [_sides(frame) for frame in frames]
    if rng.random() >= CHANGE_SHARE:
        number = rng.randrange(len(frames))
        time = str(frames[number].label)
        answer = f"At {time} the video shows {_joined(list(states[number].values()))}."
        read = f"{time}: {', '.join(_seen(states[number]))}"
        return Turn(_ask(rng, "shown_at", time=time), f"{read}.", answer, (read,))
    question = _ask(rng, "change")
    change = next((n for n in range(1, len(frames)) if states[n] != states[n - 1]), None)
    taken = len(frames) if change is None else change + 1
    lines = [f"{frames[0].label}: {', '.join(_seen(states[0]))}."]
    lines += [f"{frames[n].label}: {_compared(states[n - 1], states[n])}." for n in range(1, taken)]
    read = tuple(seen for n in range(taken) for seen in (f"{frames[n].label}: ", *_seen(states[n])))
    if change is None:
        return Turn(question, " ".join([*lines, "No change."]), "Nothing changes in the video.", (*read, "No change"))
    before, after = states[change - 1], states[change]
    changed = [side for side in SIDES if before.get(side) != after.get(side)]
    lines += [f"{side.title()}: {before.get(side, NOTHING)}, then {after.get(side, NOTHING)}." for side in changed]
    said = f"At {frames[change].label} {_change(before, after)}."
    return Turn(question, " ".join(lines), said, read)


# Documents


def _is_sum(page: Picture) -> bool:
    return page.items[0].colour is None


def _sum(page: Picture) -> str:
    a, op, b = read_sum(page.items)
    return f"{a} {op} {b}"


def _page_parts(page: Picture) -> list[str]:
    """What is read of a page, one thing after another."""
    return [_sum(page)] if _is_sum(page) else [f"{item.order} {name_of(item)}" for item in page.items]


def turn_pages(rng: random.Random, pages: Sequence[Picture]) -> Turn:
    """What a page says, which is read alone, or which page says something: they are read until it is found."""
    index = rng.randrange(len(pages))
    page = pages[index]
    label = str(page.label)
    number = label.split()[1]
    if rng.random() < 0.5:
        answer = f"{label} says {_sum(page)}." if _is_sum(page) else f"{label} shows {_joined(_names(page.items))}."
        line = f"{label}: {', '.join(_page_parts(page))}"
        return Turn(_ask(rng, "page_says", number=number), f"{line}.", answer, (line,))
    asked = _sum(page) if _is_sum(page) else name_of(rng.choice(page.items))
    if _is_sum(page):
        question, answer = _ask(rng, "page_of_sum", one=asked), f"{label} says {asked}."
    else:
        question, answer = _ask(rng, "page_of_object", one=asked), f"The {asked} is on page {number}."
    thinking, read = f"Asked: {asked}.", []
    for each in pages[: index + 1]:
        thinking += f" {each.label}: "
        read.append(f"{each.label}: ")
        parts = _page_parts(each)
        for part in parts:
            found = f" {part}".endswith(f" {asked}")
            thinking += f"{part} {'yes' if found else 'no'}" + (", " if not found and part != parts[-1] else ".")
            read.append(part)
            if found:
                break
    return Turn(question, thinking, answer, tuple(read))


def _names(items: Sequence[Item]) -> list[str]:
    return [name_of(item) for item in items]
