"""Conversations of every task about the demo world's pictures, each with its one right thinking and answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from demo_world import phrases, turns
from demo_world.artists import Artist, Sketcher, pictures_for
from demo_world.pictures import Item, Picture, Size
from demo_world.places import GUI_SYSTEM, turn_box, turn_boxes, turn_click
from demo_world.printing import Font
from demo_world.sequences import turn_film, turn_pages
from demo_world.structured import turn_json
from demo_world.turns import Turn

TASKS: dict[str, float] = {
    "sum": 24.0,
    "typed_sum": 12.0,
    "object": 8.0,
    "count": 12.0,
    "place": 11.0,
    "compare": 11.0,
    "describe": 14.0,
    "second_turn": 8.0,
    "json": 8.0,
    "text_sum": 5.0,
    "talk": 7.0,
    "box": 8.0,
    "boxes": 20.0,
    "click": 9.0,
    "film": 14.0,
    "pages": 12.0,
}
"""Names of the tasks and how often each is drawn, relative to the others."""

SEQUENCES = ("film", "pages")
"""Tasks of several pictures, each with its label."""

CONCLUSIONS = {"place": 1, "compare": 1, "film": 2, "pages": 2, "boxes": 1, "click": 2}
"""Tasks in which more is concluded than a number, and how often each is."""

SYSTEM_SHARE = 0.08
GUI_SHARE = 0.5

Message = dict[str, object]


@dataclass(frozen=True)
class Conversation:
    """A chat that ends with the user's message, and the thinking and the answer that are due.

    ``read`` are the parts of the thinking that say what is seen; ``wanted`` are the objects whose places the answer
    says.
    """

    task: str
    messages: list[Message]
    thinking: str
    answer: str
    read: tuple[str, ...] = ()
    wanted: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Study:
    """Pictures and several separate conversations, each about all of them."""

    pictures: tuple[Picture, ...]
    conversations: tuple[Conversation, ...]


Asker = Callable[[random.Random, Sequence[Picture]], Turn]
_OBJECT: tuple[Asker, ...] = (turns.turn_what, turns.turn_colour, turns.turn_shape)
_SUM_FOLLOWS: tuple[Asker, ...] = (
    turns.turn_sum,
    turns.turn_number("first"),
    turns.turn_number("second"),
    turns.turn_operation,
    turns.turn_describe,
)
_ENDS: tuple[Asker, ...] = (turns.turn_end("leftmost"), turns.turn_end("rightmost"))
_ONE_TURN: dict[str, Asker] = {
    "count": turns.turn_count,
    "place": turns.turn_place,
    "describe": turns.turn_describe,
    "box": turn_box,
    "film": turn_film,
    "pages": turn_pages,
    "json": turn_json,
}


def _askers(items: Sequence[Item]) -> tuple[Asker, ...]:
    """The kinds of question that can follow each other about a picture."""
    if items[0].colour is None:
        return _SUM_FOLLOWS
    if len(items) == 1:
        return (*_OBJECT, turns.turn_count, turns.turn_describe)
    if len(items) == 2:
        return (turns.turn_place, turns.turn_count, turns.turn_describe)
    return (*_ENDS, turns.turn_count, turns.turn_describe)


def _user(question: str, pictures: Sequence[Picture]) -> Message:
    if not pictures:
        return {"role": "user", "content": question}
    parts: list[dict[str, str]] = []
    for picture in pictures:
        if picture.label is not None:
            parts.append({"type": "text", "text": picture.label})
        parts.append({"type": "image"})
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def _turns(rng: random.Random, task: str, pictures: Sequence[Picture], gui: bool) -> list[Turn]:
    """The turns of one conversation about pictures drawn for this task."""
    if task == "talk":
        return [turns.turn_talk(rng)]
    if task == "text_sum":
        return [turns.turn_text_sum(rng)]
    if task == "compare":
        equal = len(pictures[0].items) == len(pictures[1].items)
        return [(turns.turn_same if rng.random() < (0.65 if equal else 0.25) else turns.turn_more)(rng, pictures)]
    if task == "second_turn":
        return [asker(rng, pictures) for asker in rng.sample(_askers(pictures[0].items), 2)]
    if task in ("sum", "typed_sum"):
        return [(turns.turn_sum if rng.random() < 0.85 else turns.turn_describe)(rng, pictures)]
    if task == "object":
        return [rng.choice(_OBJECT)(rng, pictures)]
    if task == "boxes":
        return [(turn_box if rng.random() < 0.5 else turn_boxes)(rng, pictures)]
    if task == "click":
        return [turn_click(rng, pictures, gui)]
    return [_ONE_TURN[task](rng, pictures)]


def system_message(rng: random.Random, task: str) -> str | None:
    """What a conversation of this task begins with, if anything."""
    if task == "click" and rng.random() < GUI_SHARE:
        return GUI_SYSTEM
    return rng.choice(phrases.SYSTEM_MESSAGES) if rng.random() < SYSTEM_SHARE else None


def converse(rng: random.Random, task: str, pictures: Sequence[Picture], system: str | None) -> Conversation:
    """A conversation about pictures drawn for this task; only its last turn's thinking is kept."""
    made = _turns(rng, task, pictures, system == GUI_SYSTEM)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(made):
        messages.append(_user(turn.question, pictures if index == 0 else ()))
        if index < len(made) - 1:
            messages.append({"role": "assistant", "content": turn.answer})
    last = made[-1]
    return Conversation(task, messages, last.thinking, last.answer, last.read, last.wanted)


def conclusion(rng: random.Random) -> Conversation:
    """A question about pictures that nobody draws; its thinking says what is read of them.

    With the reading given, what is left to learn is to conclude from it.
    """
    task = rng.choices(list(CONCLUSIONS), list(CONCLUSIONS.values()))[0]
    turn = _turns(rng, task, pictures_for(Sketcher(rng, ()), task), gui=False)[0]
    return Conversation(task, [_user(turn.question, ())], turn.thinking, turn.answer, turn.read, turn.wanted)


def _study(artist: Artist, task: str | None, conversations: int) -> Study:
    rng = artist.rng
    task = task or rng.choices(list(TASKS), list(TASKS.values()))[0]
    pictures = pictures_for(artist, task)
    made: dict[tuple[str, ...], Conversation] = {}
    for _ in range(5 * conversations):  # conversations that ask something else each, where there is enough to ask
        talk = converse(rng, task, pictures, system_message(rng, task))
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
    return _study(Artist(rng, fonts, sizes), task, conversations)


def vocabulary_text(rng: random.Random, n: int) -> Iterator[str]:
    """Every role word, message, thinking and answer of `n` studies, without drawing their pictures."""
    sketcher = Sketcher(rng, ())
    for _ in range(n):
        for conversation in _study(sketcher, None, 3).conversations:
            for message in conversation.messages:
                yield str(message["role"])
                yield text_of(message)
            yield conversation.thinking
            yield "assistant"
            yield conversation.answer


def text_of(message: Message) -> str:
    """What is said in a message, without its images and their labels."""
    content = message["content"]
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return content[-1]["text"]
