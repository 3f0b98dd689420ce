"""The demo world's pictures: what is in one, how large it is, its ground, and what a camera does to it.

Every function takes a `random.Random`, so one seed fixes every pixel for a given set of fonts.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
Size = tuple[int, int]

GLYPHS = "0123456789+-=?"
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOUR_VALUES: dict[str, Colour] = {
    "red": (218, 28, 34),
    "orange": (246, 138, 18),
    "yellow": (248, 214, 34),
    "green": (38, 158, 66),
    "blue": (38, 84, 208),
    "purple": (122, 48, 168),
    "pink": (250, 146, 196),
    "black": (28, 28, 30),
}

KINDS: tuple[str, ...] = ("none", *GLYPHS, *SHAPES)
"""Label names of an item's kind; the index is the class id and 0 means no item."""
COLOURS: tuple[str, ...] = ("none", *COLOUR_VALUES)
"""Label names of an item's colour; 0 is no item or printed text."""
MAX_ORDER = 7
"""Largest reading order; order labels run from 0 to MAX_ORDER."""

PATCH = 14
MERGED = 28
NEAR = 14
"""Two objects are one above the other where their centres differ by less than this along x."""
MOST_PATCHES = 1024
"""Of a picture that the demo model takes without making it smaller."""

GROUNDS: tuple[tuple[Colour, int], ...] = (
    ((255, 255, 255), 10),
    ((253, 246, 227), 3),
    ((232, 232, 232), 3),
    ((228, 238, 250), 2),
    ((230, 245, 231), 2),
    ((238, 232, 248), 2),
)


@dataclass(frozen=True)
class Item:
    """One thing in a picture: its kind, colour (None for text), tight box and place in reading order."""

    kind: str
    colour: str | None
    box: Box
    order: int


@dataclass(frozen=True)
class Picture:
    """An RGB image and the items drawn on it, in reading order.

    `label` is what the model is told before the picture, as it is before frames and pages; `size` is the image's own,
    and stays where the pixels are no longer needed.
    """

    image: Image.Image
    items: tuple[Item, ...]
    label: str | None = None
    size: Size = (0, 0)

    def __post_init__(self) -> None:
        if self.size == (0, 0):
            object.__setattr__(self, "size", self.image.size)


@dataclass(frozen=True)
class Hundredths:
    """Where an item is, in hundredths of its picture's width and height: corners of its box, and its centre."""

    box: Box
    centre: tuple[int, int]


def hundredths(item: Item, size: Size) -> Hundredths:
    """Rounded as a model is to write them; the centre is that of the box itself."""
    (x0, y0, x1, y1), (width, height) = item.box, size
    box = (round(100 * x0 / width), round(100 * y0 / height), round(100 * x1 / width), round(100 * y1 / height))
    return Hundredths(box, (round(50 * (x0 + x1) / width), round(50 * (y0 + y1) / height)))


def picture_size(rng: random.Random, low: int = 224, high: int = 448, sizes: Sequence[Size] | None = None) -> Size:
    """A width and a height between the bounds, small ones a bit more often, or one of the given `sizes`."""
    if sizes:
        return rng.choice(sizes)
    span = high - low + 1
    return low + int(span * rng.random() ** 1.4), low + int(span * rng.random() ** 1.4)


def wide_size(rng: random.Random, high: int = 448) -> Size:
    """Sizes that people's own pictures have: banners, pages and small frames beside those of `picture_size`."""
    form = rng.random()
    if form < 0.4:
        return picture_size(rng, 224, high)
    if form < 0.7:  # a banner
        width = rng.randint(180, min(640, high * 3 // 2))
        return width, rng.randint(64, max(64, min(200, MOST_PATCHES * PATCH * PATCH // width)))
    if form < 0.85:
        return rng.randint(112, 224), rng.randint(112, 224)
    width = rng.randint(high // 2, high * 6 // 7)  # a page
    height = min(round(width * rng.choice((1.294, 1.414))), MOST_PATCHES * PATCH * PATCH // width)
    return (width, height) if rng.random() < 0.7 else (height, width)


def ground(rng: random.Random) -> Colour:
    """One of this world's own grounds."""
    colours, weights = zip(*GROUNDS, strict=True)
    return rng.choices(colours, weights)[0]


def tint(rng: random.Random) -> Colour:
    """Any light ground that another program might draw on."""
    if rng.random() < 0.25:
        return 255, 255, 255
    light, depth = rng.randint(215, 255), rng.choice((6, 16, 40))
    red, green, blue = (max(195, light - rng.randint(0, depth)) for _ in range(3))
    return red, green, blue


# ---------------------------------------------------------------------------------------------
# Degradations


@lru_cache(maxsize=8)
def _noise(sigma: int) -> Image.Image:
    """A fixed noise tile around grey 128."""
    values = np.random.default_rng(sigma).normal(128, sigma, (576, 576, 3))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _add_noise(rng: random.Random, image: Image.Image) -> Image.Image:
    tile = _noise(rng.choice((2, 4, 6, 9)))
    width, height = image.size
    if width > tile.width or height > tile.height:
        tile = tile.resize((max(width, tile.width), max(height, tile.height)), Image.Resampling.NEAREST)
    left, top = rng.randint(0, tile.width - width), rng.randint(0, tile.height - height)
    return ImageChops.add(image, tile.crop((left, top, left + width, top + height)), 1, -128)


def _jpeg(rng: random.Random, image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(35, 95))
    return Image.open(buffer).convert("RGB")


def _blur(rng: random.Random, image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))


def _tone(rng: random.Random, image: Image.Image) -> Image.Image:
    contrast, brightness = rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1)
    table = [min(255, max(0, round(((v - 128) * contrast + 128) * brightness))) for v in range(256)]
    return image.point(table * 3)


def _light(rng: random.Random, image: Image.Image) -> Image.Image:
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.22)
    ys, xs = np.mgrid[-1:1:9j, -1:1:9j]
    slope = (xs * math.cos(angle) + ys * math.sin(angle)) / 1.415
    shade = (255 * (1 - depth * (slope + 1) / 2)).astype(np.uint8)
    grey = Image.fromarray(shade).resize(image.size, Image.Resampling.BILINEAR)
    return ImageChops.multiply(image, Image.merge("RGB", (grey, grey, grey)))


def photograph(rng: random.Random, image: Image.Image) -> Image.Image:
    """The picture as a camera or a scanner might give it: often untouched, else lightly degraded."""
    if rng.random() < 0.4:
        return image
    effects = [_tone, _light, _blur, _add_noise, _jpeg]
    chosen = set(rng.sample(range(len(effects)), rng.choice((1, 1, 2, 3))))
    for index, effect in enumerate(effects):
        if index in chosen:
            image = effect(rng, image)
    return image
