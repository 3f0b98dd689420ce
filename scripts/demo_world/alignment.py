"""Which object of its pictures each token of a completion is about, as the vision tower's labels number them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demo_world import labels, patches, places, turns
from demo_world.grading import BOXES
from demo_world.lessons import Conversation
from demo_world.pictures import MAX_ORDER, Item, Picture, hundredths
from kimi_vl.text.tokenizer import Tokenizer

NOTHING = -1
NUMBER = re.compile(r"[01]\.(\d)(\d)")
UNREAD = "=?"
"""Glyphs of a sum that no reading repeats."""

Span = tuple[int, int, int, Item]
"""First character, end, number of the picture, and what is said of it there."""


def number_of(picture: int, order: int | Tensor) -> int | Tensor:
    """Of an object among all those of a conversation's pictures, by its place in the reading order."""
    return picture * (MAX_ORDER + 1) + order


def shown_in(pictures: Sequence[Picture]) -> Tensor:
    """The objects that each token of the pictures shows, by its four patches: (T, 4), NOTHING for ground."""
    made = []
    for number, picture in enumerate(pictures):
        order = patches.merged_labels(picture)[..., 2]
        made.append(torch.where(order > 0, number_of(number, order), NOTHING))
    return torch.cat(made)


def read_spans(thinking: str, pictures: Sequence[Picture]) -> Iterator[Span]:
    """Where a thinking reads the objects of its pictures, one after another."""
    begins, cursor = [], 0
    for picture in pictures:
        at = cursor if picture.label is None else thinking.find(f"{picture.label}: ", cursor)
        if at < 0:
            return
        cursor = at if picture.label is None else at + len(picture.label) + 2
        begins.append(cursor)
    ends = [*begins[1:], len(thinking)]
    cursor = 0
    for number, (picture, begin, end) in enumerate(zip(pictures, begins, ends, strict=True)):
        labelled = picture.label is not None
        cursor = begin if labelled else cursor
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
            yield at - 2 if ordered else at, last, number, item
            cursor = last


def place_spans(talk: Conversation, picture: Picture) -> Iterator[Span]:
    """Where an answer says the places of objects."""
    for item in talk.wanted:
        text = next(text for text in places.texts(item, picture) if text in talk.answer)
        at = talk.answer.index(text)
        yield at, at + len(text), 0, item


@dataclass(frozen=True)
class Alignment:
    """Of the tokens of a completion: what each is about (N,), NOTHING of most; the place that it helps to say
    (N, PLACES), NOWHERE of most; and which digit of this place it is (N,), NOTHING of most: 2n the tens of number n,
    2n + 1 its ones."""

    about: Tensor
    said: Tensor
    writing: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.about, self.said, self.writing

    def to(self, device: torch.device) -> Alignment:
        return Alignment(*(each.to(device) for each in self.tensors))

    def of(self, rows: Tensor, length: int) -> Alignment:
        """Of some rows of a batch, (R, S), up to a length."""
        return Alignment(*(each[rows, :length] for each in self.tensors))

    @classmethod
    def empty(cls, *shape: int) -> Alignment:
        said = torch.full((*shape, labels.PLACES), labels.NOWHERE)
        return cls(torch.full(shape, NOTHING), said, torch.full(shape, NOTHING))


def align(tokenizer: Tokenizer, talk: Conversation, pictures: Sequence[Picture], learnt: Sequence[int]) -> Alignment:
    """The alignment of a completion, whose last token ends the turn."""
    made = Alignment.empty(len(learnt))
    pieces = [tokenizer.decode([token]) for token in learnt[:-1]]
    text, ends = "".join(pieces), [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    answer = len(text) - len(talk.answer)
    spans = [(answer, True, span) for span in place_spans(talk, pictures[0])]
    thinking = text.find(talk.thinking, 0, answer)
    if thinking >= 0:
        spans += [(thinking, False, span) for span in read_spans(talk.thinking, pictures)]
    borders = torch.tensor(ends)

    def within(first: int, last: int) -> Tensor:
        """Which tokens have characters from ``first`` to before ``last``; the end of the turn has none."""
        return F.pad((borders[:-1] < last) & (borders[1:] > first), (0, 1))

    for offset, placed, (first, last, number, item) in spans:
        tokens = within(offset + first, offset + last)
        made.about[tokens] = int(number_of(number, item.order))
        if placed:
            place = hundredths(item, pictures[number].size)
            made.said[tokens] = torch.tensor([*place.box, *place.centre])
            begin = 0 if talk.task in BOXES else 4
            for index, digits in enumerate(NUMBER.finditer(text, offset + first, offset + last), start=begin):
                for digit in (1, 2):
                    made.writing[within(*digits.span(digit))] = 2 * index + digit - 1
    return made
