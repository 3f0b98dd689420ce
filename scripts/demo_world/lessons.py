"""What is asked about the demo world's pictures, how it is thought through, and the one right answer.

Thinking first reads the picture in a fixed form, then works on what it read, then concludes; it is
derived from the items of a picture alone, so pictures and texts cannot disagree.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from demo_world import phrases
from demo_world.pictures import (
    COLOURS,
    NEAR,
    SHAPES,
    Font,
    Item,
    Picture,
    Place,
    Size,
    draw_scene,
    draw_sum,
    lay_out_scene,
    picture_size,
)

TASKS: dict[str, float] = {
    "sum": 24.0,
    "object": 8.0,
    "count": 12.0,
    "place": 11.0,
    "compare": 11.0,
    "describe": 14.0,
    "second_turn": 8.0,
    "text_sum": 5.0,
    "talk": 7.0,
}
"""Names of the tasks and how often each is drawn, relative to the others."""

ASK_GAP = 30
"""Along an axis, two centres differ by this much before a question asks about that axis."""

SYSTEM_SHARE = 0.08

Look = tuple[str, str]
Message = dict[str, object]


@dataclass(frozen=True)
class Conversation:
    """A chat that ends with the user's message, and the thinking and the answer that are due."""

    task: str
    messages: list[Message]
    thinking: str
    answer: str


@dataclass(frozen=True)
class Study:
    """Pictures and several separate conversations, each about all of them."""

    pictures: tuple[Picture, ...]
    conversations: tuple[Conversation, ...]


@dataclass(frozen=True)
class Turn:
    """One question with its thinking and its answer."""

    question: str
    thinking: str
    answer: str


def is_right(conversation: Conversation, answer: str) -> bool:
    """Whether an answer is the expected one, white space around it aside."""
    return answer.strip() == conversation.answer


# ---------------------------------------------------------------------------------------------
# Arithmetic


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


def _numbers(rng: random.Random) -> tuple[int, str, int]:
    a, b = (rng.randint(0, 9) if rng.random() < 0.3 else rng.randint(10, 99) for _ in range(2))
    op = rng.choice("+-")
    if op == "-" and a != b and (a < b) != (rng.random() < 1 / 3):
        a, b = b, a
    return a, op, b


# ---------------------------------------------------------------------------------------------
# Reading scenes


def _name(item: Item) -> str:
    return f"{item.colour} {item.kind}"


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _centre(item: Item) -> tuple[float, float]:
    x0, y0, x1, y1 = item.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def _gaps(items: Sequence[Item]) -> tuple[float, float]:
    """How far the second of two objects lies to the right of, and below, the first."""
    (x0, y0), (x1, y1) = _centre(items[0]), _centre(items[1])
    return x1 - x0, y1 - y0


def _listed(items: Sequence[Item]) -> str:
    return ", ".join(f"{item.order} {_name(item)}" for item in items)


def _direction(items: Sequence[Item]) -> str:
    stacked = len(items) == 2 and abs(_gaps(items)[0]) < NEAR
    return "From top to bottom" if stacked else "From left to right"


def _reading(items: Sequence[Item]) -> str:
    return f"{_direction(items)}: {_listed(items)}."


def _many(count: int) -> str:
    return "there is 1 object" if count == 1 else f"there are {count} objects"


def _sum_reading(items: Sequence[Item]) -> str:
    a, op, b = read_sum(items)
    return f"The picture shows {a} {op} {b}."


# ---------------------------------------------------------------------------------------------
# Turns: each takes the pictures and asks one kind of question


def _vary(rng: random.Random, question: str) -> str:
    """A question as different people type it: color for colour, no capitals, no mark at the end."""
    if rng.random() < 0.4:
        question = question.replace("colour", "color").replace("Colour", "Color")
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def _ask(rng: random.Random, kind: str, **words: str) -> str:
    return _vary(rng, rng.choice(phrases.QUESTIONS[kind]).format(**words))


def _turn_sum(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    a, op, b = read_sum(pictures[0].items)
    thinking = f"{_sum_reading(pictures[0].items)} {work_out(a, op, b)}"
    return Turn(_ask(rng, "sum"), thinking, f"{a} {op} {b} = {result_of(a, op, b)}")


def _turn_number(which: str) -> Callable[[random.Random, Sequence[Picture]], Turn]:
    def turn(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
        a, _, b = read_sum(pictures[0].items)
        value = a if which == "first" else b
        thinking = f"{_sum_reading(pictures[0].items)} So the {which} number is {value}."
        return Turn(_ask(rng, f"{which}_number"), thinking, f"The {which} number is {value}.")

    return turn


def _turn_operation(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    _, op, _ = read_sum(pictures[0].items)
    name = "an addition" if op == "+" else "a subtraction"
    thinking = f"{_sum_reading(pictures[0].items)} The sign is {op}. So it is {name}."
    return Turn(_ask(rng, "operation"), thinking, f"It is {name}.")


def _turn_what(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = f"t is {_a(_name(items[0]))}."
    return Turn(_ask(rng, "what"), f"{_reading(items)} So i{said}", f"I{said}")


def _turn_colour(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = f"he object is {items[0].colour}."
    return Turn(_ask(rng, "colour"), f"{_reading(items)} So t{said}", f"T{said}")


def _turn_shape(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = f"he object is {_a(items[0].kind)}."
    return Turn(_ask(rng, "shape"), f"{_reading(items)} So t{said}", f"T{said}")


def _turn_count(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    said = _many(len(items))
    return Turn(_ask(rng, "count"), f"{_reading(items)} So {said}.", f"{said[0].upper()}{said[1:]}.")


def _turn_end(side: str) -> Callable[[random.Random, Sequence[Picture]], Turn]:
    def turn(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
        items = pictures[0].items
        item = items[0] if side == "leftmost" else items[-1]
        said = f"he {side} object is {_a(_name(item))}."
        return Turn(_ask(rng, side), f"{_reading(items)} So t{said}", f"T{said}")

    return turn


def _turn_place(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    """One of the questions about where two objects are, along an axis that tells them apart."""
    items = pictures[0].items
    right, down = _gaps(items)
    across = abs(right) >= ASK_GAP
    upright = abs(down) >= ASK_GAP
    horizontal = across and (not upright or rng.random() < 0.6)
    lower_first = down < 0
    top, bottom = (items[1], items[0]) if lower_first else (items[0], items[1])
    read = _reading(items)
    if not horizontal:
        read += f" The {_name(top)} is higher."
    first, second = (items[0], items[1]) if horizontal else (top, bottom)
    words = ("on the left", "on the right") if horizontal else ("above", "below")
    form = rng.random()
    index = rng.randrange(2)
    item, other = (first, second) if index == 0 else (second, first)
    if form < 0.5:
        kind = ("left", "right", "above", "below")[index + (0 if horizontal else 2)]
        question, said = _ask(rng, kind), f"the {_name(item)} is {words[index]}."
    elif form < 0.8 or (not horizontal and across):
        relation = ("left of", "right of", "above", "below")[index + (0 if horizontal else 2)]
        kind = "left_or_right" if horizontal else "above_or_below"
        question = _ask(rng, kind, one=_name(item), other=_name(other))
        said = f"the {_name(item)} is {relation} the {_name(other)}."
    else:
        question = _ask(rng, "where", one=_name(item))
        said = f"the {_name(item)} is {words[index]}."
    if form >= 0.5:  # whoever is asked about is looked up first
        read += f" Asked: {_name(item)}, " + (f"number {item.order}." if horizontal else ("higher.", "lower.")[index])
    return Turn(question, f"{read} So {said}", f"T{said[1:]}")


def _turn_describe(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    items = pictures[0].items
    question = _ask(rng, "describe")
    if items[0].colour is None:
        a, op, b = read_sum(items)
        name = "sum" if op == "+" else "difference"
        thinking = f"{_sum_reading(items)} {work_out(a, op, b)}"
        answer = f"The picture shows the {name} {a} {op} {b} on a light ground. "
        answer += f"The result is {result_of(a, op, b)}."
        return Turn(question, thinking, answer)
    names = [_a(_name(item)) for item in items]
    if len(names) == 1:
        answer = f"The picture shows 1 object on a light ground: {names[0]}."
    else:
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        answer = f"The picture shows {len(names)} objects on a light ground. {_direction(items)}: {listed}."
    return Turn(question, f"{_reading(items)} So {_many(len(items))}.", answer)


def _both(pictures: Sequence[Picture]) -> str:
    one, two = (_listed(picture.items) for picture in pictures)
    return f"First picture: {one}. Second picture: {two}."


def _turn_more(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    one, two = (len(picture.items) for picture in pictures)
    if one == two:
        step, said = f"{one} is equal to {two}", "both pictures have the same number of objects."
    else:
        larger = "first" if one > two else "second"
        step = f"{max(one, two)} is more than {min(one, two)}"
        said = f"the {larger} picture has more objects."
    return Turn(_ask(rng, "more"), f"{_both(pictures)} {step}. So {said}", said[0].upper() + said[1:])


def _turn_same(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    """Same or different: first the counts, then the objects in order, pair by pair, up to the first that differ."""
    one, two = ([_name(item) for item in picture.items] for picture in pictures)
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
    return Turn(_ask(rng, "same"), f"{_both(pictures)} Check: {check}. So t{said}", f"T{said}")


def _turn_text_sum(rng: random.Random) -> Turn:
    a, op, b = _numbers(rng)
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


def _turn_talk(rng: random.Random) -> Turn:
    if rng.random() < 0.4:
        return Turn(_vary(rng, phrases.unknown_question(rng)), phrases.UNKNOWN_THINKING, phrases.UNKNOWN_ANSWER)
    topic = rng.choice(phrases.TOPICS)
    return Turn(_vary(rng, rng.choice(topic.questions)), topic.thinking, topic.answer)


# ---------------------------------------------------------------------------------------------
# Pictures for a task


@dataclass(frozen=True)
class _Artist:
    """Draws the pictures of a study."""

    rng: random.Random
    fonts: Sequence[Font]
    sizes: Sequence[Size] | None = None

    def sum(self) -> Picture:
        a, op, b = _numbers(self.rng)
        return draw_sum(self.rng, self.fonts, a, op, b, picture_size(self.rng, sizes=self.sizes))

    def scene(self, looks: Sequence[Look], size: Size | None = None, layout: Sequence[Place] | None = None) -> Picture:
        size = size or picture_size(self.rng, sizes=self.sizes)
        return draw_scene(self.rng, looks, size, layout)


@dataclass(frozen=True)
class _Sketcher(_Artist):
    """Makes the items of pictures without drawing them."""

    blank: Image.Image = field(default_factory=lambda: Image.new("RGB", (1, 1)))

    def sum(self) -> Picture:
        a, op, b = _numbers(self.rng)
        items = [Item(kind, None, (9 * n, 0, 9 * n + 8, 9), n) for n, kind in enumerate(f"{a}{op}{b}", start=1)]
        return Picture(self.blank, tuple(items))

    def scene(self, looks: Sequence[Look], size: Size | None = None, layout: Sequence[Place] | None = None) -> Picture:
        step = 0 if len(looks) == 2 and self.rng.random() < 0.4 else 40
        items = []
        for order, (colour, shape) in enumerate(looks, start=1):
            x, y = step * order, 60 * order if step == 0 else self.rng.randint(0, 300)
            items.append(Item(shape, colour, (x, y, x + 30, y + 30), order))
        return Picture(self.blank, tuple(items))


def _looks(rng: random.Random, count: int) -> list[Look]:
    """Colours and shapes of some objects; at times one look appears twice."""
    looks = [(rng.choice(COLOURS[1:]), rng.choice(SHAPES)) for _ in range(count)]
    if count > 1 and rng.random() < 0.15:
        looks[1] = looks[0]
        rng.shuffle(looks)
    return looks


def _other_look(rng: random.Random, taken: Sequence[Look]) -> Look:
    while True:
        look = (rng.choice(COLOURS[1:]), rng.choice(SHAPES))
        if look not in taken:
            return look


def _two_looks(rng: random.Random) -> list[Look]:
    first = (rng.choice(COLOURS[1:]), rng.choice(SHAPES))
    return [first, _other_look(rng, [first])]


def _in_order(layout: Sequence[Place]) -> list[Place]:
    """Places in the order in which they are read."""
    stacked = len(layout) == 2 and abs(layout[0].x - layout[1].x) < NEAR
    return sorted(layout, key=lambda place: place.y if stacked else place.x)


def _pair(artist: _Artist) -> tuple[Picture, Picture]:
    """Two pictures to compare: the same objects in the same order, in the same places or others; or others; or another
    number of them."""
    rng = artist.rng
    count = rng.randint(1, 4)
    looks = _looks(rng, count)
    first_size = picture_size(rng, 224, 336, artist.sizes)
    second_size = picture_size(rng, 224, 336, artist.sizes)
    case = rng.random()
    if case < 0.4:
        first = _in_order(lay_out_scene(rng, count, first_size))
        if rng.random() < 0.5:
            return artist.scene(looks, first_size, first), artist.scene(looks, first_size, first)
        second = _in_order(lay_out_scene(rng, count, second_size))
        return artist.scene(looks, first_size, first), artist.scene(looks, second_size, second)
    elif case < 0.6:
        kept = rng.sample(looks, rng.randint(0, count // 2))
        if set(kept) == set(looks):
            kept = []
        others = kept + [_other_look(rng, looks) for _ in range(count - len(kept))]
    else:
        count = rng.choice([number for number in range(1, 5) if number != count])
        others = [rng.choice(looks) if rng.random() < 0.3 else _other_look(rng, looks) for _ in range(count)]
    return artist.scene(looks, first_size), artist.scene(others, second_size)


Asker = Callable[[random.Random, Sequence[Picture]], Turn]
_OBJECT: tuple[Asker, ...] = (_turn_what, _turn_colour, _turn_shape)
_SUM_FOLLOWS: tuple[Asker, ...] = (
    _turn_sum,
    _turn_number("first"),
    _turn_number("second"),
    _turn_operation,
    _turn_describe,
)
_ENDS: tuple[Asker, ...] = (_turn_end("leftmost"), _turn_end("rightmost"))


def _askers(items: Sequence[Item]) -> tuple[Asker, ...]:
    """The kinds of question that can follow each other about a picture."""
    if items[0].colour is None:
        return _SUM_FOLLOWS
    if len(items) == 1:
        return (*_OBJECT, _turn_count, _turn_describe)
    if len(items) == 2:
        return (_turn_place, _turn_count, _turn_describe)
    return (*_ENDS, _turn_count, _turn_describe)


def _pictures(artist: _Artist, task: str) -> tuple[Picture, ...]:
    """What a conversation of this task looks at."""
    rng = artist.rng
    if task in ("talk", "text_sum"):
        return ()
    if task == "compare":
        return _pair(artist)
    if task == "sum":
        return (artist.sum(),)
    if task == "object":
        return (artist.scene(_looks(rng, 1)),)
    if task == "count":
        return (artist.scene(_looks(rng, rng.randint(1, 6))),)
    if task == "place":
        return (artist.scene(_two_looks(rng)),)
    if task == "describe":
        return (artist.sum() if rng.random() < 0.2 else artist.scene(_looks(rng, rng.randint(1, 4))),)
    if task == "second_turn":
        case = rng.random()
        if case < 0.4:
            return (artist.sum(),)
        if case < 0.6:
            return (artist.scene(_looks(rng, 1)),)
        return (artist.scene(_two_looks(rng) if case < 0.8 else _looks(rng, rng.randint(3, 5))),)
    raise ValueError(f"no such task: {task!r}")


# ---------------------------------------------------------------------------------------------
# Studies


def _user(question: str, images: int) -> Message:
    if not images:
        return {"role": "user", "content": question}
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def _turns(rng: random.Random, task: str, pictures: Sequence[Picture]) -> list[Turn]:
    """The turns of one conversation about pictures drawn for this task."""
    if task == "talk":
        return [_turn_talk(rng)]
    if task == "text_sum":
        return [_turn_text_sum(rng)]
    if task == "compare":
        equal = len(pictures[0].items) == len(pictures[1].items)
        return [(_turn_same if rng.random() < (0.65 if equal else 0.25) else _turn_more)(rng, pictures)]
    if task == "second_turn":
        return [asker(rng, pictures) for asker in rng.sample(_askers(pictures[0].items), 2)]
    if task == "sum":
        return [(_turn_sum if rng.random() < 0.85 else _turn_describe)(rng, pictures)]
    if task == "object":
        return [rng.choice(_OBJECT)(rng, pictures)]
    return [{"count": _turn_count, "place": _turn_place, "describe": _turn_describe}[task](rng, pictures)]


def system_message(rng: random.Random) -> str | None:
    """What a conversation begins with, if anything."""
    return rng.choice(phrases.SYSTEM_MESSAGES) if rng.random() < SYSTEM_SHARE else None


def converse(rng: random.Random, task: str, pictures: Sequence[Picture], system: str | None) -> Conversation:
    """A conversation about pictures drawn for this task; only its last turn's thinking is kept."""
    turns = _turns(rng, task, pictures)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        messages.append(_user(turn.question, len(pictures) if index == 0 else 0))
        if index < len(turns) - 1:
            messages.append({"role": "assistant", "content": turn.answer})
    return Conversation(task, messages, turns[-1].thinking, turns[-1].answer)


def conclusion(rng: random.Random) -> tuple[Conversation, str]:
    """A question about pictures that nobody draws, and the beginning of its thinking that reads them.

    With the reading given, what is left to learn is to conclude from it.
    """
    task = rng.choice(("place", "compare"))
    pictures = _pictures(_Sketcher(rng, ()), task)
    turn = _turns(rng, task, pictures)[0]
    read = _both(pictures) if task == "compare" else _reading(pictures[0].items)
    higher = re.match(r".* is higher\.", turn.thinking)  # as much as a picture, and no words, can tell
    read = higher[0] if higher else read
    return Conversation(task, [_user(turn.question, 0)], turn.thinking, turn.answer), read


def _study(artist: _Artist, task: str | None, conversations: int) -> Study:
    rng = artist.rng
    task = task or rng.choices(list(TASKS), list(TASKS.values()))[0]
    pictures = _pictures(artist, task)
    made: dict[tuple[str, ...], Conversation] = {}
    for _ in range(5 * conversations):  # conversations that ask something else each, where there is enough to ask
        talk = converse(rng, task, pictures, system_message(rng))
        made.setdefault(tuple(text_of(message) for message in talk.messages if message["role"] == "user"), talk)
        if len(made) == conversations:
            break
    return Study(pictures, tuple(made.values()))


def make_study(
    rng: random.Random,
    fonts: Sequence[Font],
    task: str | None = None,
    conversations: int = 3,
    sizes: Sequence[Size] | None = None,
) -> Study:
    """A study of one task (drawn by weight where None); pictures take one of `sizes` where given."""
    return _study(_Artist(rng, fonts, sizes), task, conversations)


def draw(rng: random.Random, fonts: Sequence[Font], task: str, sizes: Sequence[Size]) -> tuple[Picture, ...]:
    """The pictures of a study of this task, each of one of the `sizes`."""
    return _pictures(_Artist(rng, fonts, sizes), task)


def vocabulary_text(rng: random.Random, n: int) -> Iterator[str]:
    """Every role word, message, thinking and answer of `n` studies, without drawing their pictures."""
    sketcher = _Sketcher(rng, ())
    for _ in range(n):
        for conversation in _study(sketcher, None, 3).conversations:
            for message in conversation.messages:
                yield str(message["role"])
                yield text_of(message)
            yield conversation.thinking
            yield "assistant"
            yield conversation.answer


def text_of(message: Message) -> str:
    """The text of a message, without its images."""
    content = message["content"]
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return "".join(part["text"] for part in content if part["type"] == "text")
