"""Questions about pictures, how each is thought through, and the one right answer.

Thinking first reads the picture in a fixed form, then works on what it read, then concludes; it is
derived from the items of a picture alone, so pictures and texts cannot disagree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from demo_world import phrases, talk
from demo_world.arithmetic import numbers, read_sum, result_of, work_out
from demo_world.pictures import NEAR, Item, Picture

ASK_GAP = 30
"""Along an axis, two centres differ by this much before a question asks about that axis."""


@dataclass(frozen=True)
class Turn:
    """One question with its thinking and its answer."""

    question: str
    thinking: str
    answer: str
    read: tuple[str, ...] = ()
    """The parts of the thinking that say what is seen, in order; the others are concluded from them."""
    wanted: tuple[Item, ...] = ()
    """The objects whose places the answer says."""


def name_of(item: Item) -> str:
    return f"{item.colour} {item.kind}"


def a_or_an(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def centre(item: Item) -> tuple[float, float]:
    x0, y0, x1, y1 = item.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def gaps(items: Sequence[Item]) -> tuple[float, float]:
    """How far the second of two objects lies to the right of, and below, the first."""
    (x0, y0), (x1, y1) = centre(items[0]), centre(items[1])
    return x1 - x0, y1 - y0


def listed(items: Sequence[Item]) -> str:
    return ", ".join(f"{item.order} {name_of(item)}" for item in items)


def direction(items: Sequence[Item]) -> str:
    stacked = len(items) == 2 and abs(gaps(items)[0]) < NEAR
    return "From top to bottom" if stacked else "From left to right"


def reading(items: Sequence[Item]) -> str:
    return f"{direction(items)}: {listed(items)}."


def many(count: int) -> str:
    return "there is 1 object" if count == 1 else f"there are {count} objects"


def sum_reading(items: Sequence[Item]) -> str:
    a, op, b = read_sum(items)
    return f"The picture shows {a} {op} {b}."


def vary(rng: random.Random, question: str) -> str:
    """A question as different people type it: color for colour, no capitals, no mark at the end."""
    if rng.random() < 0.4:
        question = question.replace("colour", "color").replace("Colour", "Color")
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def ask(rng: random.Random, kind: str, **words: str) -> str:
    return vary(rng, rng.choice(phrases.QUESTIONS[kind]).format(**words))


def turn_sum(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    a, op, b = read_sum(pictures[0].items)
    thinking = f"{sum_reading(pictures[0].items)} {work_out(a, op, b)}"
    return Turn(ask(rng, "sum"), thinking, f"{a} {op} {b} = {result_of(a, op, b)}")


def turn_number(which: str) -> Callable[[random.Random, Sequence[Picture]], Turn]:
    def turn(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
        a, _, b = read_sum(pictures[0].items)
        value = a if which == "first" else b
        thinking = f"{sum_reading(pictures[0].items)} So the {which} number is {value}."
        return Turn(ask(rng, f"{which}_number"), thinking, f"The {which} number is {value}.")

    return turn


def turn_operation(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    _, op, _ = read_sum(pictures[0].items)
    name = "an addition" if op == "+" else "a subtraction"
    thinking = f"{sum_reading(pictures[0].items)} The sign is {op}. So it is {name}."
    return Turn(ask(rng, "operation"), thinking, f"It is {name}.")


def turn_what(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = f"t is {a_or_an(name_of(items[0]))}."
    return Turn(ask(rng, "what"), f"{reading(items)} So i{said}", f"I{said}")


def turn_colour(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = f"he object is {items[0].colour}."
    return Turn(ask(rng, "colour"), f"{reading(items)} So t{said}", f"T{said}")


def turn_shape(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = f"he object is {a_or_an(items[0].kind)}."
    return Turn(ask(rng, "shape"), f"{reading(items)} So t{said}", f"T{said}")


def turn_count(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = many(len(items))
    return Turn(ask(rng, "count"), f"{reading(items)} So {said}.", f"{said[0].upper()}{said[1:]}.")


def turn_end(side: str) -> Callable[[random.Random, Sequence[Picture]], Turn]:
    def turn(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
        items = pictures[0].items
        item = items[0] if side == "leftmost" else items[-1]
        said = f"he {side} object is {a_or_an(name_of(item))}."
        return Turn(ask(rng, side), f"{reading(items)} So t{said}", f"T{said}")

    return turn


def turn_place(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    """One of the questions about where two objects are, along an axis that tells them apart."""
    items = pictures[0].items
    right, down = gaps(items)
    across = abs(right) >= ASK_GAP
    upright = abs(down) >= ASK_GAP
    horizontal = across and (not upright or rng.random() < 0.6)
    lower_first = down < 0
    top, bottom = (items[1], items[0]) if lower_first else (items[0], items[1])
    read = reading(items)
    if not horizontal:
        read += f" The {name_of(top)} is higher."
    seen = read
    first, second = (items[0], items[1]) if horizontal else (top, bottom)
    words = ("on the left", "on the right") if horizontal else ("above", "below")
    form = rng.random()
    index = rng.randrange(2)
    item, other = (first, second) if index == 0 else (second, first)
    if form < 0.5:
        kind = ("left", "right", "above", "below")[index + (0 if horizontal else 2)]
        question, said = ask(rng, kind), f"the {name_of(item)} is {words[index]}."
    elif form < 0.8 or (not horizontal and across):
        relation = ("left of", "right of", "above", "below")[index + (0 if horizontal else 2)]
        kind = "left_or_right" if horizontal else "above_or_below"
        question = ask(rng, kind, one=name_of(item), other=name_of(other))
        said = f"the {name_of(item)} is {relation} the {name_of(other)}."
    else:
        question = ask(rng, "where", one=name_of(item))
        said = f"the {name_of(item)} is {words[index]}."
    if form >= 0.5:  # whoever is asked about is looked up first
        read += f" Asked: {name_of(item)}, " + (f"number {item.order}." if horizontal else ("higher.", "lower.")[index])
    return Turn(question, f"{read} So {said}", f"T{said[1:]}", (seen,))


def turn_describe(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    question = ask(rng, "describe")
    if items[0].colour is None:
        a, op, b = read_sum(items)
        name = "sum" if op == "+" else "difference"
        thinking = f"{sum_reading(items)} {work_out(a, op, b)}"
        answer = f"The picture shows the {name} {a} {op} {b} on a light ground. "
        answer += f"The result is {result_of(a, op, b)}."
        return Turn(question, thinking, answer)
    names = [a_or_an(name_of(item)) for item in items]
    if len(names) == 1:
        answer = f"The picture shows 1 object on a light ground: {names[0]}."
    else:
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        answer = f"The picture shows {len(names)} objects on a light ground. {direction(items)}: {listed}."
    return Turn(question, f"{reading(items)} So {many(len(items))}.", answer)


def both(pictures: Sequence[Picture]) -> str:
    one, two = (listed(picture.items) for picture in pictures)
    return f"First picture: {one}. Second picture: {two}."


def turn_more(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    one, two = (len(picture.items) for picture in pictures)
    if one == two:
        step, said = f"{one} is equal to {two}", "both pictures have the same number of objects."
    else:
        larger = "first" if one > two else "second"
        step = f"{max(one, two)} is more than {min(one, two)}"
        said = f"the {larger} picture has more objects."
    seen = both(pictures)
    return Turn(ask(rng, "more"), f"{seen} {step}. So {said}", said[0].upper() + said[1:], (seen,))


def turn_same(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    """Same or different: first the counts, then the objects in order, pair by pair, up to the first that differ."""
    one, two = ([name_of(item) for item in picture.items] for picture in pictures)
    if len(one) != len(two):
        check, same = f"{len(one)} and {len(two)} objects", False
    else:
        checks, same = [], True
        for number, (first, second) in enumerate(zip(one, two, strict=True), start=1):
            same = first == second
            checks.append(f"{number} {first} and {second}, {'same' if same else 'different'}")
            if not same:
                break
        check = "; ".join(checks)
    said = f"he pictures show {'the same' if same else 'different'} objects."
    seen = both(pictures)
    return Turn(ask(rng, "same"), f"{seen} Check: {check}. So t{said}", f"T{said}", (seen,))


def turn_text_sum(rng: random.Random) -> Turn:
    a, op, b = numbers(rng)
    forms = phrases.TEXT_SUMS["both"] + phrases.TEXT_SUMS[op]
    question = rng.choice(forms).format(a=a, op=op, b=b, word="plus" if op == "+" else "minus")
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return Turn(
        question,
        f"The question is {a} {op} {b}. {work_out(a, op, b)}",
        f"{a} {op} {b} = {result_of(a, op, b)}",
    )


def turn_talk(rng: random.Random) -> Turn:
    if rng.random() < 0.4:
        return Turn(vary(rng, talk.unknown_question(rng)), talk.UNKNOWN_THINKING, talk.UNKNOWN_ANSWER)
    topic = rng.choice(talk.TOPICS)
    return Turn(vary(rng, rng.choice(topic.questions)), topic.thinking, topic.answer)
