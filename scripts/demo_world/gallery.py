"""What the second phase learns from: pictures drawn once, kept as the vision tower sees them, and talked about often.

The tower no longer changes then, so its vectors are computed once a picture; every visit makes new conversations.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from demo_world import alignment, artists, labels, lessons, patches, pictures, printing, training
from kimi_vl.media.images import ImageOptions, preprocess
from kimi_vl.model.config import num_image_tokens
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.text import chat
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer

PICTURE_TASKS = {
    "sum": 24,
    "typed_sum": 22,
    "object": 6,
    "count": 10,
    "place": 12,
    "describe": 12,
    "second_turn": 8,
    "box": 10,
    "boxes": 22,
    "json": 8,
}
GROUP_TASKS = {"compare": 16, "film": 30, "pages": 30, "click": 16}
"""Tasks of several pictures, or with a system message of their own: a page of the sketchbook has one of these alone."""
NARROW_TASKS = ("sum", "typed_sum", "object", "box")
"""Whose pictures may be banners or as small as frames."""
TALKS = {
    "place": 4,
    "compare": 4,
    "box": 3,
    "boxes": 4,
    "click": 3,
    "film": 3,
    "pages": 3,
}  # conversations a visit: where there is more to ask
OTHER_TALKS = 2
VISITS = {"film": 3, "pages": 3, "compare": 2, "second_turn": 2}
"""How often exhibits of some tasks are visited while the others are once."""
TEXT_TASKS = {"text_sum": 2, "talk": 1, "conclusion": 4}
TEXT_SHARE = 0.25  # of the batches are without pictures
CUT_SHARE = 0.08  # of the conversations have their thinking cut short
SMALL_SHARE = 0.6  # of the pictures are small: they say as much in fewer tokens
NARROW_SHARE = 0.2  # of the pages of the sketchbook are of NARROW_TASKS alone
WIDE_SHARE = 0.4  # of the pictures of every task are drawn as by any program
SMALL, LARGE = 294, 448  # longest sides in pixels
TALK_TOKENS = 130  # of a conversation without its pictures, about
BLANK = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class Exhibit:
    """The pictures of one study as the tower sees them, one after another."""

    task: str
    pictures: tuple[pictures.Picture, ...]  # without their pixels
    tokens: tuple[int, ...]  # of each picture
    groups: Tensor  # (T, 4, C) bfloat16

    @property
    def talks(self) -> int:
        """Conversations about it in a batch."""
        return TALKS.get(self.task, OTHER_TALKS)

    @property
    def room(self) -> tuple[object, ...]:
        """Exhibits of one room can be visited together: what comes before the questions takes equally many tokens."""
        return self.tokens, self.talks, self.task == "click", self.task in lessons.SEQUENCES and self.task


@dataclass
class LessonBatch:
    """Conversations to learn; those about the same pictures share what comes before the first question's words."""

    ids: Tensor  # (R, S)
    targets: Tensor  # (R, S), IGNORED where nothing is to be learnt
    shared_ids: Tensor | None = None  # (B, P): up to the end of the pictures
    groups: Tensor | None = None  # (T, 4, C) of all shared rows' pictures
    shared_row: Tensor | None = None  # (R,): which of the B rows comes before a conversation
    places: Tensor | None = None  # (T, PLACES): where the object is that a token of the pictures shows, or NOWHERE
    labels: Tensor | None = None  # (T, LABEL_DIGITS): of the label before a token's picture, or NOTHING
    shown: Tensor | None = None  # (B, P, 4): the objects that a token of a picture shows, their ground, or a label
    aligned: alignment.Alignment | None = None  # (R, S): of the token after each

    @property
    def kind(self) -> str:
        return "text" if self.shared_ids is None else "picture"

    def to(self, device: torch.device) -> LessonBatch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in values.items()}
        return LessonBatch(**moved)


def token_places(picture: pictures.Picture) -> Tensor:
    """Where the object is that each token of a picture shows, by the first of its four patches that shows one."""
    shown = patches.merged_labels(picture)[..., -labels.PLACES :]  # (T, 4, PLACES)
    first = (shown[..., 0] != labels.NOWHERE).int().argmax(1)  # (T,)
    return shown[torch.arange(len(shown)), first]


def label_digits(exhibit: Exhibit) -> Tensor:
    """The last digits of the label before the picture that each token shows: (T, LABEL_DIGITS), NOTHING where it has
    none."""
    digits = torch.tensor([alignment.digits_of(picture.label) for picture in exhibit.pictures])
    return digits.repeat_interleave(torch.tensor(exhibit.tokens), 0)


def rearranged(rng: random.Random, exhibit: Exhibit) -> Exhibit:
    """The frames of a film as they are or backwards, the pages of a document in any order, under new labels; other
    exhibits as they are."""
    number = len(exhibit.pictures)
    if exhibit.task not in lessons.SEQUENCES or len(set(exhibit.tokens)) > 1:
        return exhibit
    order = list(range(number))
    if exhibit.task == "pages":
        rng.shuffle(order)
    elif rng.random() < 0.5:
        order.reverse()
    shown = artists.LABELLED[exhibit.task](rng, [exhibit.pictures[each] for each in order])
    groups = exhibit.groups.unflatten(0, (number, -1))[order].flatten(0, 1)
    return dataclasses.replace(exhibit, pictures=shown, groups=groups)


Part = tuple[list[int], list[int], list[int], list[int]]
"""Ids of a prompt, ids that are put after it, ids that are written then, and what is due of these, or IGNORED."""
IGNORED = -100

Drawn = tuple[list[tuple[str, tuple[pictures.Picture, ...]]], Tensor, list[tuple[int, int]]]


class Sketchbook(torch.utils.data.Dataset):
    """Pictures of studies, preprocessed; those of one index have one size, so that the tower takes them at once."""

    def __init__(self, seed: int, count: int, patches: int, options: ImageOptions):
        self.seed, self.count, self.patches, self.options = seed, count, patches, options
        self.fonts = printing.find_fonts()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Drawn:
        rng = training.seeded(self.seed, "gallery", index)
        singles = sum(PICTURE_TASKS.values())
        group = rng.choices([None, *GROUP_TASKS], [singles, *GROUP_TASKS.values()])[0]
        narrow = group is None and rng.random() < NARROW_SHARE
        longest = SMALL if rng.random() < SMALL_SHARE else LARGE
        size = pictures.wide_size(rng, longest) if narrow else artists.size_for(rng, group or "", longest)
        tasks = [group] if group else list(NARROW_TASKS if narrow else PICTURE_TASKS)
        shares = [1.0] if group else [float(PICTURE_TASKS[str(task)]) for task in tasks]
        count = {None: 1, "click": 1, "compare": 2, "film": rng.randint(2, 5), "pages": rng.randint(2, 4)}[group]
        of_one = math.ceil(size[0] / 28) * math.ceil(size[1] / 28) * 4 * count
        artist = artists.Artist(rng, self.fonts, [size], WIDE_SHARE)
        studies, pixels, grids = [], [], []
        for _ in range(max(1, self.patches // of_one)):
            task = str(rng.choices(tasks, shares)[0])
            shown = artists.pictures_for(artist, task, count)
            for picture in shown:
                patches, grid = preprocess(picture.image, self.options)
                pixels.append(torch.from_numpy(patches))
                grids.append(grid)
            studies.append((task, tuple(dataclasses.replace(picture, image=BLANK) for picture in shown)))
        return studies, torch.cat(pixels), grids


@torch.no_grad()
def hang(model: KimiVL, drawn: Drawn) -> Iterator[Exhibit]:
    """The exhibits of one page of the sketchbook."""
    studies, pixels, listed = drawn
    grids = [(rows, columns) for rows, columns in listed]  # another process gives lists back
    tokens = [num_image_tokens(grid) for grid in grids]
    vectors = model.vision_tower(pixels.to(model.device), grids).to("cpu", torch.bfloat16)
    of_picture = iter(zip(tokens, vectors.split(tokens), strict=True))
    for task, shown in studies:
        seen = [next(of_picture) for _ in shown]
        yield Exhibit(task, shown, tuple(count for count, _ in seen), torch.cat([groups for _, groups in seen]))


def opened(path: Path, model: KimiVL, options: ImageOptions, args: argparse.Namespace) -> list[Exhibit]:
    """All exhibits; they are kept at ``path``, and taken from there where a training is resumed."""
    if args.resume and path.exists():
        return torch.load(path, weights_only=False)
    sketchbook = Sketchbook(args.seed, args.gallery, args.patches, options)
    exhibits: list[Exhibit] = []
    with args.autocast:
        for index, drawn in enumerate(training.in_order(sketchbook, args.workers), start=1):
            exhibits += hang(model, drawn)
            if index % 50 == 0:
                print(f"gallery {index}/{args.gallery}: {len(exhibits)} exhibits", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(exhibits, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    return exhibits


class Lessons(torch.utils.data.IterableDataset):
    """The batches of a :class:`Teacher` from ``begin`` on, in order also where several workers make them."""

    def __init__(self, teacher: Teacher, text_first: int, begin: int):
        self.teacher, self.text_first, self.begin = teacher, text_first, begin

    def __iter__(self) -> Iterator[LessonBatch]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self.teacher.batches(self.text_first, self.begin + number, workers)  # one of each worker in turn


class Teacher:
    """Makes batches of conversations, about exhibits and without pictures. Batch k depends on the seed and k alone."""

    def __init__(self, seed: int, tokenizer: Tokenizer, exhibits: Sequence[Exhibit], batch_tokens: int = 5000):
        self.seed, self.tokenizer, self.exhibits, self.batch_tokens = seed, tokenizer, exhibits, batch_tokens

    def batches(self, text_first: int, begin: int = 0, step: int = 1) -> Iterator[LessonBatch]:
        """Without an end: ``text_first`` without pictures, then all exhibits again and again.

        Those before ``begin`` are left out, and after it all but every ``step``-th.
        """
        for index, visit in enumerate(self._visits(text_first)):
            if index >= begin and (index - begin) % step == 0:
                rng = training.seeded(self.seed, "lessons", index)
                yield self.text_batch(rng) if visit is None else self.picture_batch(rng, visit)

    def _visits(self, text_first: int) -> Iterator[list[Exhibit] | None]:
        """Which exhibits each batch is about; None for none."""
        rng = training.seeded(self.seed, "visits", 0)
        rooms: dict[tuple[object, ...], list[Exhibit]] = defaultdict(list)
        for exhibit in self.exhibits:
            rooms[exhibit.room].append(exhibit)
        for _ in range(text_first):
            yield None
        while True:
            visits = []
            for room in rooms.values():
                rng.shuffle(room)
                of_one = sum(room[0].tokens) + room[0].talks * TALK_TOKENS
                size = min(len(room), max(1, round(self.batch_tokens / of_one)))
                of_room = [room[begin : begin + size] for begin in range(0, len(room) - size + 1, size)]
                visits += of_room * VISITS.get(room[0].task, 1)
            rng.shuffle(visits)
            for visit in visits:
                while rng.random() < TEXT_SHARE:
                    yield None
                yield visit

    def text_batch(self, rng: random.Random) -> LessonBatch:
        tasks = rng.choices(list(TEXT_TASKS), list(TEXT_TASKS.values()), k=self.batch_tokens // TALK_TOKENS)
        rows = []
        for task in tasks:
            if task == "conclusion":
                talk = lessons.conclusion(rng)
                given = True
            else:
                talk, given = lessons.converse(rng, task, (), lessons.system_message(rng, task)), False
            rows.append((chat.encode(self.tokenizer, talk.messages, []), *self.completion(rng, talk, given)))
        aligned = [alignment.align_text(alignment.Spelt(self.tokenizer, written)) for _, _, written, _ in rows]
        ids, targets = self.rows(rows)
        return LessonBatch(ids, targets, aligned=self.beside(rows, aligned, ids.shape[1]))

    def picture_batch(self, rng: random.Random, exhibits: Sequence[Exhibit]) -> LessonBatch:
        system = lessons.system_message(rng, exhibits[0].task)
        shared, rows, shared_row, aligned, shown = [], [], [], [], []
        exhibits = [rearranged(rng, exhibit) for exhibit in exhibits]
        for index, exhibit in enumerate(exhibits):
            for _ in range(exhibit.talks):
                talk = lessons.converse(rng, exhibit.task, exhibit.pictures, system)
                prompt = chat.encode(self.tokenizer, talk.messages, exhibit.tokens)
                begin = len(prompt) - prompt[::-1].index(self.tokenizer.special["<|media_end|>"])
                rows.append((prompt[begin:], *self.completion(rng, talk)))
                shared_row.append(index)
                spelt = alignment.Spelt(self.tokenizer, rows[-1][2])
                aligned.append(alignment.align(spelt, talk, exhibit.pictures))
            shared.append(prompt[:begin])
            shown.append(self.shown(shared[-1], exhibit))
        ids, targets = self.rows(rows)
        return LessonBatch(
            ids,
            targets,
            torch.tensor(shared),
            torch.cat([exhibit.groups for exhibit in exhibits]),
            torch.tensor(shared_row),
            torch.cat([token_places(picture) for exhibit in exhibits for picture in exhibit.pictures]),
            torch.cat([label_digits(exhibit) for exhibit in exhibits]),
            torch.stack(shown),
            self.beside(rows, aligned, ids.shape[1]),
        )

    def shown(self, prompt: Sequence[int], exhibit: Exhibit) -> Tensor:
        """What each token before a conversation's words shows, by number: (P, 4), or NOTHING."""
        ids, starts = torch.tensor(prompt), self.tokenizer.special["<|media_start|>"]
        made = torch.full((len(prompt), 4), alignment.NOTHING)
        if exhibit.task in lessons.SEQUENCES:
            ends = (ids == starts).nonzero()[:, 0].tolist()
            sizes = [len(self.tokenizer.encode(str(picture.label))) for picture in exhibit.pictures]
            begins = [end - size for end, size in zip(ends, sizes, strict=True)]
            made[:] = alignment.marks_of(begins, ends, len(prompt))[:, None]
        pads = ids == self.tokenizer.special["<|media_pad|>"]
        made[pads] = alignment.shown_in(exhibit.pictures, grounds=True)
        return made

    def rows(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Ids and targets, padded on the right."""
        longest = max(len(prompt) + len(silent) + len(written) for prompt, silent, written, _ in parts)
        ids = torch.full((len(parts), longest), self.tokenizer.pad_id)
        targets = torch.full((len(parts), longest), IGNORED)
        for row, (prompt, silent, written, due) in enumerate(parts):
            begin, end = len(prompt) + len(silent), len(prompt) + len(silent) + len(written)
            ids[row, :end] = torch.tensor([*prompt, *silent, *written])
            targets[row, begin - 1 : end - 1] = torch.tensor(due)  # the token before predicts each
        return ids, targets

    def beside(self, parts: Sequence[Part], aligned: Sequence[alignment.Alignment], length: int) -> alignment.Alignment:
        """What is ``aligned`` with the tokens written, at the tokens that predict them."""
        made = alignment.Alignment.empty(len(parts), length)
        for row, ((prompt, silent, written, _), own) in enumerate(zip(parts, aligned, strict=True)):
            begin = len(prompt) + len(silent) - 1
            for whole, part in zip(made.tensors, own.tensors, strict=True):
                whole[row, begin : begin + len(written)] = part
        return made

    def completion(
        self, rng: random.Random, talk: lessons.Conversation, given: bool = False
    ) -> tuple[list[int], list[int], list[int]]:
        """Ids that are put there, ids that are written after them, and what is due of these: themselves, or IGNORED.

        All are due, but for what is read of pictures where that is ``given``; at times the thinking is cut short, as
        a budget does, and the answer alone is written.
        """
        encode, end = self.tokenizer.encode, [self.tokenizer.im_end_id]
        thinking = THINK_OPEN + talk.thinking
        if given:
            return [], *self.concluded(thinking, talk)
        if rng.random() < CUT_SHARE:
            ids = encode(thinking)
            cut = ids[: rng.randint(len(encode(THINK_OPEN)), len(ids))]
            written = encode(talk.answer) + end
            return cut + encode(THINK_CLOSE), written, written
        written = encode(thinking + THINK_CLOSE + talk.answer) + end
        return [], written, written

    def concluded(self, thinking: str, talk: lessons.Conversation) -> tuple[list[int], list[int]]:
        """A completion whose reading is given: what is written, and what is due of it.

        Places are seen and not concluded, so an answer that says them is left out."""
        placed = bool(talk.wanted)
        written = self.tokenizer.encode(thinking + THINK_CLOSE + ("" if placed else talk.answer))
        written += [] if placed else [self.tokenizer.im_end_id]
        spelt, cursor = alignment.Spelt(self.tokenizer, written), 0
        seen = spelt.within(0, len(THINK_OPEN))
        for read in talk.read:
            begin = spelt.text.index(read, cursor)
            cursor = begin + len(read)
            seen |= spelt.within(begin, cursor)
        return written, torch.where(seen, IGNORED, torch.tensor(written)).tolist()
