"""Pictures full of single glyphs and small shapes, for a vision tower to learn what each patch shows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image

from demo_world.pictures import (
    COLOURS,
    GLYPHS,
    SHAPES,
    Box,
    Item,
    Picture,
    Size,
    ground,
    photograph,
    picture_size,
    tint,
)
from demo_world.printing import INKS, TRUE_MINUS, Font, dark, glyph_of, has, lay_out, sum_text
from demo_world.scenes import Place, paint_shape


def _clear(box: Box, others: Sequence[Box]) -> bool:
    """Whether a box covers none of the others by more than a tenth of the smaller one."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    for other in others:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        if wide > 0 and high > 0:
            smaller = min(area, (other[2] - other[0]) * (other[3] - other[1]))
            if 10 * wide * high > smaller:
                return False
    return True


def draw_soup(rng: random.Random, fonts: Sequence[Font], size: Size | None = None, photo: bool = True) -> Picture:
    """A picture full of single glyphs and small shapes, all of order 0, to pre-train a vision tower."""
    width, height = size or picture_size(rng, 224, 336)
    image = Image.new("RGB", (width, height), tint(rng) if rng.random() < 0.5 else ground(rng))
    ink = dark(rng)
    wanted = rng.randint(10, 30)
    largest = min(110.0, 1.3 * math.sqrt(width * height / wanted))
    faces = [rng.choice(fonts) for _ in range(4)]
    items: list[Item] = []
    boxes: list[Box] = []
    for _ in range(6 * wanted):
        if len(items) == wanted:
            break
        if rng.random() < 0.25:
            diameter = rng.randint(24, max(26, round(0.6 * largest)))
            half = diameter // 2 + 3
            place = Place(rng.randint(half, width - half), rng.randint(half, height - half), diameter)
            if _clear((place.x - half, place.y - half, place.x + half, place.y + half), boxes):
                colour, shape = rng.choice(COLOURS[1:]), rng.choice(SHAPES)
                box = paint_shape(rng, image, colour, shape, place, rng.random() < 0.15)
                items.append(Item(shape, colour, box, 0))
                boxes.append(box)
            continue
        font, kind = rng.choice(faces), rng.choice(GLYPHS)
        drawn = TRUE_MINUS if kind == "-" and rng.random() < 0.5 and has(font, TRUE_MINUS) else kind
        glyph = glyph_of(font, 4 * rng.randint(6, max(7, round(largest / 4))), drawn)
        if glyph is None or glyph.mask.width + 4 > width or glyph.mask.height + 4 > height:
            continue
        x, y = rng.randint(2, width - 2 - glyph.mask.width), rng.randint(2, height - 2 - glyph.mask.height)
        box = (x, y, x + glyph.mask.width, y + glyph.mask.height)
        if _clear(box, boxes):
            image.paste(ink if rng.random() < 0.7 else rng.choice(INKS), box, glyph.mask)
            items.append(Item(kind, None, box, 0))
            boxes.append(box)
    return Picture(photograph(rng, image) if photo else image, tuple(items))


def draw_lines(rng: random.Random, fonts: Sequence[Font], size: Size) -> Picture:
    """A picture full of sums in small print, all of order 0: small glyphs fill few patches of other pictures."""
    zoom = rng.uniform(1.0, 1.6) if rng.random() < 0.3 else 1.0
    width, height = round(size[0] * zoom), round(size[1] * zoom)
    image = Image.new("RGB", (width, height), tint(rng))
    font, ink = fonts[0] if rng.random() < 0.5 else rng.choice(fonts), dark(rng)
    items: list[Item] = []
    top = rng.randint(0, 6)
    while True:
        points, left, lowest = rng.randint(20, 44), rng.randint(0, 12), 0
        while True:
            text = sum_text(rng, rng.randrange(100), rng.choice("+-"), rng.randrange(100))
            laid, around = lay_out(font, points, text)
            if left + around[2] - around[0] > width or top + around[3] - around[1] > height:
                break
            for character, glyph, (x0, y0, x1, y1) in laid:
                box = x0 + left - around[0], y0 + top - around[1], x1 + left - around[0], y1 + top - around[1]
                image.paste(ink, box, glyph.mask)
                corners = [round(corner / zoom) for corner in box]
                items.append(Item(character, None, (corners[0], corners[1], corners[2], corners[3]), 0))
            left += around[2] - around[0] + rng.randint(8, 30)
            lowest = max(lowest, around[3] - around[1])
        if not lowest:
            break
        top += lowest + rng.randint(2, 16)
    if zoom > 1:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Picture(photograph(rng, image) if rng.random() < 0.4 else image, tuple(items))
