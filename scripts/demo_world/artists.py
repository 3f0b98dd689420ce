"""The pictures that a conversation of each task looks at."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from demo_world.arithmetic import numbers, read_sum
from demo_world.pictures import (
    COLOURS,
    MOST_PATCHES,
    NEAR,
    PATCH,
    SHAPES,
    Item,
    Picture,
    Size,
    picture_size,
    wide_size,
)
from demo_world.printing import Font, draw_sum, draw_typed_sum
from demo_world.scenes import Actor, Place, draw_frames, draw_scene, lay_out_scene
from kimi_vl.media.video import clock

Look = tuple[str, str]
SKETCHED = (400, 400)


@dataclass(frozen=True)
class Artist:
    """Draws the pictures of a study."""

    rng: random.Random
    fonts: Sequence[Font]
    sizes: Sequence[Size] | None = None
    wide: float = 0.0
    """Share of the pictures whose ground, ink and place are those of any program."""

    def _wide(self) -> bool:
        return self.wide > 0 and self.rng.random() < self.wide

    def sum(self) -> Picture:
        a, op, b = numbers(self.rng)
        return draw_sum(self.rng, self.fonts, a, op, b, picture_size(self.rng, sizes=self.sizes), wide=self._wide())

    def typed_sum(self) -> Picture:
        a, op, b = numbers(self.rng)
        size = self.rng.choice(self.sizes) if self.sizes else wide_size(self.rng)
        return draw_typed_sum(self.rng, self.fonts, a, op, b, size)

    def scene(self, looks: Sequence[Look], size: Size | None = None, layout: Sequence[Place] | None = None) -> Picture:
        size = size or picture_size(self.rng, sizes=self.sizes)
        return draw_scene(self.rng, looks, size, layout, wide=self._wide())

    def frames(self, frames: Sequence[Sequence[Actor]], size: Size) -> list[Picture]:
        return draw_frames(self.rng, frames, size)


@dataclass(frozen=True)
class Sketcher(Artist):
    """Makes the items of pictures without drawing them."""

    blank: Image.Image = field(default_factory=lambda: Image.new("RGB", (1, 1)))

    def sum(self) -> Picture:
        a, op, b = numbers(self.rng)
        items = [Item(kind, None, (9 * n, 0, 9 * n + 8, 9), n) for n, kind in enumerate(f"{a}{op}{b}", start=1)]
        return Picture(self.blank, tuple(items), size=SKETCHED)

    typed_sum = sum

    def scene(self, looks: Sequence[Look], size: Size | None = None, layout: Sequence[Place] | None = None) -> Picture:
        step = 0 if len(looks) == 2 and self.rng.random() < 0.4 else 40
        items = []
        for order, (colour, shape) in enumerate(looks, start=1):
            x, y = step * order, 60 * order if step == 0 else self.rng.randint(0, 300)
            items.append(Item(shape, colour, (x, y, x + 30, y + 30), order))
        return Picture(self.blank, tuple(items), size=SKETCHED)

    def frames(self, frames: Sequence[Sequence[Actor]], size: Size) -> list[Picture]:
        pictures = []
        for actors in frames:
            items = []
            for order, actor in enumerate(sorted(actors, key=lambda actor: actor.place.x), start=1):
                x, y = actor.place.x, actor.place.y
                items.append(Item(actor.shape, actor.colour, (x - 9, y - 9, x + 9, y + 9), order))
            pictures.append(Picture(self.blank, tuple(items), size=size))
        return pictures


def looks_of(rng: random.Random, count: int) -> list[Look]:
    """Colours and shapes of some objects; at times one look appears twice."""
    looks = [(rng.choice(COLOURS[1:]), rng.choice(SHAPES)) for _ in range(count)]
    if count > 1 and rng.random() < 0.15:
        looks[1] = looks[0]
        rng.shuffle(looks)
    return looks


def other_look(rng: random.Random, taken: Sequence[Look]) -> Look:
    while True:
        look = (rng.choice(COLOURS[1:]), rng.choice(SHAPES))
        if look not in taken:
            return look


def different_looks(rng: random.Random, count: int) -> list[Look]:
    """Looks of which each names one object."""
    looks = [(rng.choice(COLOURS[1:]), rng.choice(SHAPES))]
    while len(looks) < count:
        looks.append(other_look(rng, looks))
    return looks


def in_order(layout: Sequence[Place]) -> list[Place]:
    """Places in the order in which they are read."""
    stacked = len(layout) == 2 and abs(layout[0].x - layout[1].x) < NEAR
    return sorted(layout, key=lambda place: place.y if stacked else place.x)


def pair(artist: Artist) -> tuple[Picture, Picture]:
    """Two pictures to compare: the same objects in the same order, in the same places or others; or others; or another
    number of them."""
    rng = artist.rng
    count = rng.randint(1, 4)
    looks = looks_of(rng, count)
    first_size = picture_size(rng, 224, 336, artist.sizes)
    second_size = picture_size(rng, 224, 336, artist.sizes)
    case = rng.random()
    if case < 0.4:
        first = in_order(lay_out_scene(rng, count, first_size))
        if rng.random() < 0.5:
            return artist.scene(looks, first_size, first), artist.scene(looks, first_size, first)
        second = in_order(lay_out_scene(rng, count, second_size))
        return artist.scene(looks, first_size, first), artist.scene(looks, second_size, second)
    elif case < 0.6:
        kept = rng.sample(looks, rng.randint(0, count // 2))
        if set(kept) == set(looks):
            kept = []
        others = kept + [other_look(rng, looks) for _ in range(count - len(kept))]
    else:
        count = rng.choice([number for number in range(1, 5) if number != count])
        others = [rng.choice(looks) if rng.random() < 0.3 else other_look(rng, looks) for _ in range(count)]
    return artist.scene(looks, first_size), artist.scene(others, second_size)


def pictures_for(artist: Artist, task: str, count: int | None = None) -> tuple[Picture, ...]:
    """What a conversation of this task looks at; ``count`` frames or pages, by chance where None."""
    rng = artist.rng
    if task in ("box", "boxes", "click", "json", "pages"):
        artist = dataclasses.replace(artist, wide=0.4)
    if task in ("talk", "text_sum"):
        return ()
    if task == "compare":
        return pair(artist)
    if task == "sum":
        return (artist.sum(),)
    if task == "object":
        return (artist.scene(looks_of(rng, 1)),)
    if task == "count":
        return (artist.scene(looks_of(rng, rng.randint(1, 6))),)
    if task == "place":
        return (artist.scene(different_looks(rng, 2)),)
    if task == "describe":
        return (artist.sum() if rng.random() < 0.2 else artist.scene(looks_of(rng, rng.randint(1, 4))),)
    if task == "second_turn":
        case = rng.random()
        if case < 0.4:
            return (artist.sum(),)
        if case < 0.6:
            return (artist.scene(looks_of(rng, 1)),)
        return (artist.scene(different_looks(rng, 2) if case < 0.8 else looks_of(rng, rng.randint(3, 5))),)
    if task == "typed_sum":
        return (artist.typed_sum(),)
    if task == "box":
        return (artist.scene(looks_of(rng, 1)),)
    if task == "boxes":
        return (artist.scene(different_looks(rng, rng.choice((2, 3, 3)))),)
    if task == "click":
        return (artist.scene(different_looks(rng, rng.randint(1, 4))),)
    if task == "json":
        return (artist.sum() if rng.random() < 0.4 else artist.scene(looks_of(rng, rng.randint(1, 4))),)
    if task == "film":
        return film(artist, count or rng.randint(2, 5))
    if task == "pages":
        return pages(artist, count or rng.randint(2, 4))
    raise ValueError(f"no such task: {task!r}")


def film(artist: Artist, count: int) -> tuple[Picture, ...]:
    """Frames of a film in which one thing changes at most; an object is on the left or on the right."""
    rng = artist.rng
    size = rng.choice(artist.sizes) if artist.sizes else frame_size(rng)
    case = rng.choices(("becomes", "appears", "disappears", "moves", "nothing"), (35, 20, 20, 15, 10))[0]
    looks = different_looks(rng, 3)
    side = rng.randrange(2)
    before = [_actor(rng, looks[0], side, size)]
    if case != "moves" and rng.random() < 0.4:
        before.append(_actor(rng, looks[1], 1 - side, size))
    after = list(before)
    if case == "becomes":
        colour, shape = looks[0]
        other = looks[2]
        if rng.random() < 0.6:  # only the colour, or only the shape
            other = (other[0], shape) if rng.random() < 0.5 else (colour, other[1])
        if other in (looks[0], looks[1]):
            other = looks[2]
        after[0] = Actor(*other, before[0].place)
    elif case == "moves":
        after = [_actor(rng, looks[0], 1 - side, size)]
    elif case != "nothing":
        after = before[1:]
    if case == "appears":
        before, after = after, before
    change = rng.randint(1, count - 1)
    frames = artist.frames([before if number < change else after for number in range(count)], size)
    return timed(rng, frames)


def timed(rng: random.Random, frames: Sequence[Picture]) -> tuple[Picture, ...]:
    """Frames with their times."""
    begin = 0 if rng.random() < 0.8 else rng.randrange(3600)
    step = rng.choice((1, 1, 1, 1, 2, 3, 5, 10))
    return tuple(dataclasses.replace(frame, label=clock(begin + step * number)) for number, frame in enumerate(frames))


def _actor(rng: random.Random, look: Look, side: int, size: Size) -> Actor:
    width, height = size
    diameter = round(rng.uniform(0.2, 0.3) * min(size))
    half = diameter // 2 + 4
    x = rng.randint(half, max(half, width // 3))
    return Actor(*look, Place(width - x if side else x, rng.randint(half, height - half), diameter))


def pages(artist: Artist, count: int) -> tuple[Picture, ...]:
    """Pages of a document with a sum or one or two objects on each; nothing is on two of them."""
    rng = artist.rng
    if artist.sizes is None:
        artist = dataclasses.replace(artist, sizes=[page_size(rng)])
    looks = different_looks(rng, 2 * count)
    drawn: list[Picture] = []
    sums = set()
    while len(drawn) < count:
        if rng.random() < 0.5:
            page = artist.typed_sum() if rng.random() < 0.5 else artist.sum()
            if (said := read_sum(page.items)) in sums:
                continue
            sums.add(said)
        else:
            page = artist.scene([looks.pop() for _ in range(rng.randint(1, 2))])
        drawn.append(page)
    return numbered(rng, drawn)


def numbered(rng: random.Random, pages: Sequence[Picture]) -> tuple[Picture, ...]:
    """Pages with their numbers, all of one digit: they take equally many tokens."""
    first = 1 if rng.random() < 0.75 else rng.randint(2, 10 - len(pages))
    return tuple(dataclasses.replace(page, label=f"Page {number}") for number, page in enumerate(pages, start=first))


LABELLED = {"film": timed, "pages": numbered}
"""What gives the pictures of a sequence their labels."""


def frame_size(rng: random.Random) -> Size:
    """Of a small film; its sides are even, as codecs want them."""
    return rng.randrange(140, 281, 2), rng.randrange(140, 253, 2)


def page_size(rng: random.Random) -> Size:
    """Of a page as the demo model sees it: A4 or Letter at what it takes, or smaller ones."""
    width = rng.choice((378, 388, *(rng.randint(200, 340) for _ in range(6))))
    height = min(round(width * rng.choice((0.7, 1.0, 1.294, 1.414))), MOST_PATCHES * PATCH**2 // width)
    return (width, height) if height >= 140 else (height, width)


def size_for(rng: random.Random, task: str, high: int = 448) -> Size:
    """A size that the pictures of this task may have."""
    if task == "film":
        return frame_size(rng)
    if task == "pages":
        return page_size(rng)
    if task == "typed_sum":
        return wide_size(rng, high)
    return picture_size(rng, high=min(high, 336) if task == "compare" else high)
