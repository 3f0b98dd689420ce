"""What the second phase learns from: pictures drawn once, kept as the vision tower sees them, and talked about often.

The tower no longer changes then, so its vectors are computed once a picture; every visit makes new conversations.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from demo_world import lessons, pictures
from kimi_vl.media.images import ImageOptions, preprocess
from kimi_vl.model.config import num_image_tokens
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.text import chat
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer

PICTURE_TASKS = {"sum": 30, "object": 6, "count": 10, "place": 14, "compare": 16, "describe": 14, "second_turn": 10}
TALKS = {"place": 4, "compare": 4}  # conversations a visit: where concluding is harder than seeing
OTHER_TALKS = 2
TEXT_TASKS = {"text_sum": 2, "talk": 1, "conclusion": 4}
TEXT_SHARE = 0.25  # of the batches are without pictures
CUT_SHARE = 0.08  # of the conversations have their thinking cut short
SMALL_SHARE = 0.6  # of the pictures are small: they say as much in fewer tokens
SMALL, LARGE, LARGE_PAIR = 294, 448, 336  # longest sides in pixels
BATCH_TOKENS = 5_000
TALK_TOKENS = 110  # of a conversation without its pictures, about
LENGTHS = 32  # rows are padded to whole multiples: every new shape of a matrix product costs a compilation
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


@dataclass
class LessonBatch:
    """Conversations to learn; those about the same pictures share what comes before the first question's words."""

    ids: Tensor  # (R, S)
    targets: Tensor  # (R, S), -100 where nothing is to be learnt
    shared_ids: Tensor | None = None  # (B, P): up to the end of the pictures
    groups: Tensor | None = None  # (T, 4, C) of all shared rows' pictures
    shared_row: Tensor | None = None  # (R,): which of the B rows comes before a conversation


Drawn = tuple[list[tuple[str, tuple[pictures.Picture, ...]]], Tensor, list[tuple[int, int]]]


class Sketchbook(torch.utils.data.Dataset):
    """Pictures of studies, preprocessed; those of one index have one size, so that the tower takes them at once."""

    def __init__(self, seed: int, count: int, patches: int, options: ImageOptions):
        self.seed, self.count, self.patches, self.options = seed, count, patches, options
        self.fonts = pictures.find_fonts()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Drawn:
        rng = random.Random(f"{self.seed} gallery {index}")
        pairs = rng.random() < PICTURE_TASKS["compare"] / sum(PICTURE_TASKS.values())
        longest = SMALL if rng.random() < SMALL_SHARE else LARGE_PAIR if pairs else LARGE
        size = pictures.picture_size(rng, high=longest)
        of_one = math.ceil(size[0] / 28) * math.ceil(size[1] / 28) * 4
        studies, pixels, grids = [], [], []
        for _ in range(max(1, self.patches // (of_one * (2 if pairs else 1)))):
            others = {task: share for task, share in PICTURE_TASKS.items() if task != "compare"}
            task = "compare" if pairs else rng.choices(list(others), list(others.values()))[0]
            shown = lessons.draw(rng, self.fonts, task, [size])
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
    of_picture = iter(zip(tokens, model.vision_tower(pixels, grids).to(torch.bfloat16).split(tokens), strict=True))
    for task, shown in studies:
        seen = [next(of_picture) for _ in shown]
        yield Exhibit(task, shown, tuple(count for count, _ in seen), torch.cat([groups for _, groups in seen]))


class Teacher:
    """Makes batches of conversations, about exhibits and without pictures."""

    def __init__(self, rng: random.Random, tokenizer: Tokenizer, exhibits: Sequence[Exhibit]):
        self.rng, self.tokenizer = rng, tokenizer
        self.rooms: dict[tuple[int, int, int], list[Exhibit]] = defaultdict(list)
        for exhibit in exhibits:  # shared rows of a batch are of one length
            self.rooms[len(exhibit.tokens), sum(exhibit.tokens), exhibit.talks].append(exhibit)

    def batches(self, text_first: int) -> Iterator[LessonBatch]:
        """Without an end: ``text_first`` batches without pictures, then all exhibits again and again."""
        for _ in range(text_first):
            yield self.text_batch()
        while True:
            visits = []
            for (_, tokens, talks), room in self.rooms.items():
                self.rng.shuffle(room)
                size = min(len(room), round(BATCH_TOKENS / (tokens + talks * TALK_TOKENS)))
                visits += [room[begin : begin + size] for begin in range(0, len(room) - size + 1, size)]
            self.rng.shuffle(visits)
            for visit in visits:
                while self.rng.random() < TEXT_SHARE:
                    yield self.text_batch()
                yield self.picture_batch(visit)

    def text_batch(self) -> LessonBatch:
        tasks = self.rng.choices(list(TEXT_TASKS), list(TEXT_TASKS.values()), k=BATCH_TOKENS // TALK_TOKENS)
        rows = []
        for task in tasks:
            if task == "conclusion":
                talk, read = lessons.conclusion(self.rng)
            else:
                talk, read = lessons.converse(self.rng, task, (), lessons.system_message(self.rng)), None
            rows.append((chat.encode(self.tokenizer, talk.messages, []), *self.completion(talk, read)))
        return LessonBatch(*self.rows(rows))

    def picture_batch(self, exhibits: Sequence[Exhibit]) -> LessonBatch:
        system = lessons.system_message(self.rng)
        shared, rows, shared_row = [], [], []
        for index, exhibit in enumerate(exhibits):
            for _ in range(exhibit.talks):
                talk = lessons.converse(self.rng, exhibit.task, exhibit.pictures, system)
                prompt = chat.encode(self.tokenizer, talk.messages, exhibit.tokens)
                begin = len(prompt) - prompt[::-1].index(self.tokenizer.special["<|media_end|>"])
                rows.append((prompt[begin:], *self.completion(talk)))
                shared_row.append(index)
            shared.append(prompt[:begin])
        return LessonBatch(
            *self.rows(rows),
            torch.tensor(shared),
            torch.cat([exhibit.groups for exhibit in exhibits]),
            torch.tensor(shared_row),
        )

    def rows(self, parts: Sequence[tuple[list[int], list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Ids and targets of prompts, what is put after them and what is due then, padded on the right."""
        longest = -(-max(sum(map(len, part)) for part in parts) // LENGTHS) * LENGTHS
        ids = torch.full((len(parts), longest), self.tokenizer.pad_id)
        targets = torch.full((len(parts), longest), -100)
        for row, (prompt, silent, learnt) in enumerate(parts):
            begin, end = len(prompt) + len(silent), len(prompt) + len(silent) + len(learnt)
            ids[row, :end] = torch.tensor([*prompt, *silent, *learnt])
            targets[row, begin - 1 : end - 1] = torch.tensor(learnt)  # the token before predicts each
        return ids, targets

    def completion(self, talk: lessons.Conversation, read: str | None = None) -> tuple[list[int], list[int]]:
        """Ids that are put there and ids that are learnt.

        All of them are learnt, but for a given beginning of the thinking; at times the thinking is cut short, as a
        budget does, and the answer alone is learnt.
        """
        encode, end = self.tokenizer.encode, [self.tokenizer.im_end_id]
        thinking = THINK_OPEN + talk.thinking
        if read is None and self.rng.random() < CUT_SHARE:
            ids = encode(thinking)
            cut = ids[: self.rng.randint(len(encode(THINK_OPEN)), len(ids))]
            return cut + encode(THINK_CLOSE), encode(talk.answer) + end
        given = [] if read is None else encode(THINK_OPEN + read)
        return given, encode(thinking + THINK_CLOSE + talk.answer)[len(given) :] + end
