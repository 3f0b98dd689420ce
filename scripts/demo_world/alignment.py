"""What each token of a completion is about: an object of the pictures, as the vision tower's labels number them, or
something that was written before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from demo_world import labels, patches, places, turns
from demo_world.grading import BOXES
from demo_world.lessons import Conversation
from demo_world.pictures import MAX_ORDER, Item, Picture, hundredths
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer

NOTHING = -1
NUMBER = re.compile(r"[01]\.(\d)(\d)")
ASKED = re.compile(r"Asked: ([^,.]+), number (\d)")
FOUND = re.compile(r" (yes|no)[,.]")
SIDE = re.compile(r"[:,] (left|right) (nothing|[a-z]+ [a-z]+)(?: (same|different))?(?=[.,])")
EMPTY = re.compile(r"(?:left|right) (nothing)")
ELSE = "else"
LABELS = re.compile(r"\d\d:\d\d:\d\d|[Pp]age \d")
UNREAD = "=?"
"""Glyphs of a sum that no reading repeats."""
LABEL_DIGITS = 2
"""Last characters of a frame's or a page's label: they tell it from the others."""
GROUND = 0
"""In the place of an object's order: where a picture shows none."""
MARKS = (None, 2, 1)
"""Characters of a label that are looked up where it is repeated: its first, and those so far from its end."""
LABEL = MAX_ORDER + 1
"""In the place of an object's order: the first of MARKS; the others follow."""

Span = tuple[int, int, int, int]
"""First character, end, number of the picture, and the order of the object that is said there, or what is in its
place."""


def number_of(picture: int, order: int | Tensor) -> int | Tensor:
    """Of an object among all those of a conversation's pictures, by its place in the reading order."""
    return picture * (LABEL + len(MARKS)) + order


def shown_in(pictures: Sequence[Picture], grounds: bool = False) -> Tensor:
    """The objects that each token of the pictures shows, by its four patches: (T, 4), NOTHING for ground; with
    ``grounds`` a number of the picture's ground where a token shows nothing else."""
    made = []
    for number, picture in enumerate(pictures):
        order = patches.merged_labels(picture)[..., 2]  # (T, 4)
        shown = torch.where(order > 0, number_of(number, order), NOTHING)
        if grounds:
            shown[(order <= 0).all(-1)] = number_of(number, GROUND)
        made.append(shown)
    return torch.cat(made)


def marks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Each of MARKS in a label from ``begin`` to before ``end``: where it is, and what stands for an object's order."""
    for mark, back in enumerate(MARKS, start=LABEL):
        yield end - back if back else begin, mark


def marks_of(begins: Sequence[int], ends: Sequence[int], length: int) -> Tensor:
    """The numbers of the MARKS of labels that are written from ``begins`` to before ``ends``: (length,), NOTHING of the
    other tokens."""
    made = torch.full((length,), NOTHING)
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for at, mark in marks(begin, end):
            made[at] = number_of(number, mark)
    return made


def digits_of(label: str | None) -> list[int]:
    """The last characters of a label: LABEL_DIGITS of them, NOTHING for those that are no digits."""
    digits = [int(each) if each.isdigit() else NOTHING for each in (label or "")[-LABEL_DIGITS:]]
    return digits or [NOTHING] * LABEL_DIGITS


def read_spans(thinking: str, pictures: Sequence[Picture]) -> Iterator[Span]:
    """Where a thinking reads the objects of its pictures, one after another."""
    begins: list[int | None] = []
    cursor = 0
    for picture in pictures:
        at = cursor if picture.label is None else thinking.find(f"{picture.label}: ", cursor)
        cursor = max(at, cursor)
        begins.append(None if at < 0 else at if picture.label is None else at + len(picture.label) + 2)
    for number, (picture, begin) in enumerate(zip(pictures, begins, strict=True)):
        if begin is None:
            continue
        end = next((later for later in begins[number + 1 :] if later is not None), len(thinking))
        labelled = picture.label is not None
        cursor = begin if labelled else max(cursor, begin)
        for item in picture.items:
            if item.kind in UNREAD:
                continue
            word = item.kind if item.colour is None else turns.name_of(item)
            at = thinking.find(word, cursor, end if labelled else len(thinking))
            if at < 0:
                continue
            ordered = item.colour is not None and at >= 2 and thinking[at - 2 : at] == f"{item.order} "
            last = at + len(word)
            last += len(next((side for side in (" left", " right") if thinking.startswith(side, last)), ""))
            yield at - 2 if ordered else at, last, number, item.order
            cursor = last
        if picture.label is not None:
            for empty in EMPTY.finditer(thinking, begin, end):
                yield *empty.span(1), number, GROUND
            label_end = begin - len(": ")
            for at, mark in marks(label_end - len(picture.label), label_end):
                yield at, at + 1, number, mark


def place_spans(talk: Conversation, picture: Picture) -> Iterator[tuple[int, int, Item]]:
    """Where an answer says the places of objects: first character, end, and the object."""
    for item in talk.wanted:
        text = next(text for text in places.texts(item, picture) if text in talk.answer)
        at = talk.answer.index(text)
        yield at, at + len(text), item


Mention = tuple[int, int, str]
"""First character, end, and what is known there, or wanted."""


@dataclass(frozen=True)
class Recall:
    """What a completion takes from what it said before, and has to find by something else: where it is ``known``, and
    where it is ``wanted``."""

    known: list[Mention]
    wanted: list[Mention]

    @classmethod
    def of(cls, text: str) -> Recall:
        known, wanted = [], []
        thinking, _, _ = text.partition(THINK_CLOSE)
        for asked in ASKED.finditer(thinking):  # the number of an object, by its name
            name, number = asked.groups()
            at = thinking.find(f"{number} {name}")
            if 0 <= at < asked.start():
                end = at + len(f"{number} {name}")
                known.append((end - 1, end, f"number {number}"))
                wanted.append((asked.start(2), asked.end(2), f"number {number}"))
        labelled, said = list(LABELS.finditer(thinking)), LABELS.search(text, len(thinking))
        if labelled and said is not None:  # the label of the last frame or page that was read
            for back in range(1, 1 + min(len(said[0]), len(labelled[-1][0]))):
                if text[said.end() - back].isdigit():
                    known.append((labelled[-1].end() - back, labelled[-1].end() - back + 1, f"label {back}"))
                    wanted.append((said.end() - back, said.end() - back + 1, f"label {back}"))
        if said is None and not labelled:
            return cls(known, wanted)
        # whether what was just read is what was asked for, or as it was before; else nothing is to be found
        known.append((len(THINK_OPEN) - 1, len(THINK_OPEN), ELSE))
        if asked := re.match(rf"{THINK_OPEN}Asked: (.*?)\. ", thinking):
            known.append((asked.end(1) - 1, asked.end(1), "asked"))
            wanted += [(*found.span(1), ELSE if found[1] == "no" else "asked") for found in FOUND.finditer(thinking)]
        for side in SIDE.finditer(thinking):
            key = f"{side[1]} {side[2]}"
            known.append((side.end(2) - 1, side.end(2), key))
            if side[3]:
                wanted.append((*side.span(3), key if side[3] == "same" else ELSE))
        return cls(known, wanted)


class Spelt:
    """The text of some tokens, and which of its characters each has."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int]):
        pieces = [tokenizer.decode([token]) for token in tokens]
        self.text = "".join(pieces)
        self.borders = torch.tensor([0, *accumulate(map(len, pieces))])

    def within(self, first: int, last: int) -> Tensor:
        """Which tokens have characters from ``first`` to before ``last``: (N,) bool."""
        return (self.borders[:-1] < last) & (self.borders[1:] > first)


@dataclass(frozen=True)
class Alignment:
    """Of the tokens of a completion: what each is about (N,), NOTHING of most; the place that it helps to say
    (N, PLACES), NOWHERE of most; which digit of this place it is (N,), NOTHING of most: 2n the tens of number n, 2n + 1
    its ones; a number of what is known there (N,) and of what has to be found where it is known (N,), NOTHING of
    most; the last digits of the label of the picture that it is about (N, LABEL_DIGITS), NOTHING of most."""

    about: Tensor
    said: Tensor
    writing: Tensor
    known: Tensor
    wanted: Tensor
    labels: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.about, self.said, self.writing, self.known, self.wanted, self.labels

    def to(self, device: torch.device) -> Alignment:
        return Alignment(*(each.to(device) for each in self.tensors))

    def of(self, rows: Tensor, length: int) -> Alignment:
        """Of some rows of a batch, (R, S), up to a length."""
        return Alignment(*(each[rows, :length] for each in self.tensors))

    @classmethod
    def empty(cls, *shape: int) -> Alignment:
        said = torch.full((*shape, labels.PLACES), labels.NOWHERE)
        about, writing, known, wanted = (torch.full(shape, NOTHING) for _ in range(4))
        return cls(about, said, writing, known, wanted, torch.full((*shape, LABEL_DIGITS), NOTHING))


def align_text(spelt: Spelt) -> Alignment:
    """The alignment of a completion that is about no picture."""
    made, recall = Alignment.empty(len(spelt.borders) - 1), Recall.of(spelt.text)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(key for _, _, key in recall.known))}
    for whole, mentions in ((made.known, recall.known), (made.wanted, recall.wanted)):
        for first, last, key in mentions:
            whole[spelt.within(first, last)] = numbers[key]
    return made


def align(spelt: Spelt, talk: Conversation, pictures: Sequence[Picture]) -> Alignment:
    """The alignment of a completion about ``pictures``."""
    made, text = align_text(spelt), spelt.text
    answer = text.rindex(talk.answer)
    thinking = text.find(talk.thinking, 0, answer)
    if thinking >= 0:
        for first, last, number, order in read_spans(talk.thinking, pictures):
            tokens = spelt.within(thinking + first, thinking + last)
            made.about[tokens] = int(number_of(number, order))
            if order < LABEL:
                made.labels[tokens] = torch.tensor(digits_of(pictures[number].label))
    for first, last, item in place_spans(talk, pictures[0]):
        tokens = spelt.within(answer + first, answer + last)
        made.about[tokens] = int(number_of(0, item.order))
        place = hundredths(item, pictures[0].size)
        made.said[tokens] = torch.tensor([*place.box, *place.centre])
        begin = 0 if talk.task in BOXES else 4
        for index, digits in enumerate(NUMBER.finditer(text, answer + first, answer + last), start=begin):
            for digit in (1, 2):
                made.writing[spelt.within(*digits.span(digit))] = 2 * index + digit - 1
    return made
