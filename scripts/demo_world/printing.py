"""Sums in printed type, as this world lays them out and as any program draws them."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo_world.pictures import Box, Colour, Item, Picture, Size, ground, photograph, picture_size, tint, wide_size

TRUE_MINUS = "\u2212"

INKS: tuple[Colour, ...] = (
    (0, 0, 0),
    (20, 20, 24),
    (60, 60, 64),
    (16, 32, 96),
    (10, 70, 40),
    (110, 16, 20),
    (70, 20, 96),
    (80, 48, 16),
)

TRUETYPE = Path(os.environ.get("KIMI_VL_FONTS", "/usr/share/fonts/truetype"))
# Name, path below TRUETYPE, Debian package.
FONT_TABLE: tuple[tuple[str, str, str], ...] = (
    ("DejaVu Sans", "dejavu/DejaVuSans.ttf", "fonts-dejavu-core"),
    ("DejaVu Sans Bold", "dejavu/DejaVuSans-Bold.ttf", "fonts-dejavu-core"),
    ("DejaVu Sans Mono", "dejavu/DejaVuSansMono.ttf", "fonts-dejavu-core"),
    ("DejaVu Sans Mono Bold", "dejavu/DejaVuSansMono-Bold.ttf", "fonts-dejavu-core"),
    ("DejaVu Serif", "dejavu/DejaVuSerif.ttf", "fonts-dejavu-core"),
    ("DejaVu Serif Bold", "dejavu/DejaVuSerif-Bold.ttf", "fonts-dejavu-core"),
    ("DejaVu Sans Condensed", "dejavu/DejaVuSansCondensed.ttf", "fonts-dejavu-extra"),
    ("Liberation Sans", "liberation/LiberationSans-Regular.ttf", "fonts-liberation"),
    ("Liberation Sans Bold", "liberation/LiberationSans-Bold.ttf", "fonts-liberation"),
    ("Liberation Serif", "liberation/LiberationSerif-Regular.ttf", "fonts-liberation"),
    ("Liberation Serif Bold", "liberation/LiberationSerif-Bold.ttf", "fonts-liberation"),
    ("Liberation Mono", "liberation/LiberationMono-Regular.ttf", "fonts-liberation"),
    ("Liberation Mono Bold", "liberation/LiberationMono-Bold.ttf", "fonts-liberation"),
    ("FreeSans", "freefont/FreeSans.ttf", "fonts-freefont-ttf"),
    ("FreeSans Bold", "freefont/FreeSansBold.ttf", "fonts-freefont-ttf"),
    ("FreeSerif", "freefont/FreeSerif.ttf", "fonts-freefont-ttf"),
    ("FreeSerif Bold", "freefont/FreeSerifBold.ttf", "fonts-freefont-ttf"),
    ("Roboto", "roboto/unhinted/RobotoTTF/Roboto-Regular.ttf", "fonts-roboto-unhinted"),
    ("Roboto Bold", "roboto/unhinted/RobotoTTF/Roboto-Bold.ttf", "fonts-roboto-unhinted"),
    ("Open Sans", "open-sans/OpenSans-Regular.ttf", "fonts-open-sans"),
    ("Open Sans Bold", "open-sans/OpenSans-Bold.ttf", "fonts-open-sans"),
    ("Lato", "lato/Lato-Regular.ttf", "fonts-lato"),
    ("Lato Bold", "lato/Lato-Bold.ttf", "fonts-lato"),
)


@dataclass(frozen=True)
class Font:
    """A typeface: a TrueType file, or Pillow's built-in one where `path` is None."""

    name: str
    path: str | None

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The face at a size in pixels (cached)."""
        return _load_font(self.path, size)


@dataclass(frozen=True)
class Glyph:
    """The ink of a character, and where it is from the pen."""

    mask: Image.Image
    left: int
    top: int


@lru_cache(maxsize=512)
def _load_font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    if path is None:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow comes with FreeType
        return font
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=12000)
def glyph_of(font: Font, size: int, character: str) -> Glyph | None:
    """The ink of one character, cropped, with its offset from the origin on the baseline."""
    canvas = Image.new("L", (2 * size, 2 * size), 0)
    half, base = size // 2, size + size // 2
    ImageDraw.Draw(canvas).text((half, base), character, fill=255, font=font.at(size), anchor="ls")
    box = canvas.getbbox()
    if box is None:
        return None
    return Glyph(canvas.crop(box), box[0] - half, box[1] - base)


@lru_cache(maxsize=256)
def has(font: Font, character: str) -> bool:
    """Whether the font draws a character, rather than its box for missing ones."""
    glyph, missing = glyph_of(font, 40, character), glyph_of(font, 40, "\U0010fffd")
    if glyph is None:
        return False
    return missing is None or glyph.mask.tobytes() != missing.mask.tobytes()


def find_fonts() -> list[Font]:
    """Pillow's built-in face and every font of `FONT_TABLE` that is installed."""
    fonts = [Font("Pillow", None)]
    fonts += [Font(name, str(TRUETYPE / path)) for name, path, _ in FONT_TABLE if (TRUETYPE / path).is_file()]
    return fonts


def lay_out(font: Font, size: int, text: str) -> tuple[list[tuple[str, Glyph, Box]], Box]:
    """Inked characters with their boxes relative to the baseline's start, and the box round them all."""
    face = font.at(size)
    laid: list[tuple[str, Glyph, Box]] = []
    advance = 0.0
    for character in text:
        glyph = None if character == " " else glyph_of(font, size, character)
        if glyph is not None:
            x, y = round(advance) + glyph.left, glyph.top
            laid.append((character, glyph, (x, y, x + glyph.mask.width, y + glyph.mask.height)))
        advance += face.getlength(character)
    boxes = [box for _, _, box in laid]
    around = (
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    )
    return laid, around


def _fits(around: Box, width: int, height: int) -> bool:
    return around[2] - around[0] <= width and around[3] - around[1] <= height


def sum_text(rng: random.Random, a: int, op: str, b: int) -> str:
    """The way a sum is printed: mostly `a + b = ?`, at times closer or without its end."""
    form = rng.choices(("{} {} {} = ?", "{}{}{}=?", "{} {} {} =", "{} {} {}"), (52, 18, 15, 15))[0]
    return form.format(a, op, b)


def draw_sum(
    rng: random.Random,
    fonts: Sequence[Font],
    a: int,
    op: str,
    b: int,
    size: Size | None = None,
    text: str | None = None,
    photo: bool = True,
    wide: bool = False,
) -> Picture:
    """A printed sum somewhere in a picture; `text` fixes the form, which is random otherwise.

    `wide` is a ground of any light tint, another dark ink, and a place that may be at the very edge.
    """
    width, height = size or picture_size(rng)
    font = rng.choice(fonts)
    text = text or sum_text(rng, a, op, b)
    if op == "-" and has(font, TRUE_MINUS) and rng.random() < 0.5:
        text = text.replace("-", TRUE_MINUS)
    points, margin = rng.randint(28, 96), rng.choice((0, 2, 6)) if wide else 6
    laid, around = lay_out(font, points, text)
    while points > 6 and not _fits(around, width - 2 * margin, height - 2 * margin):
        fit = min((width - 2 * margin) / (around[2] - around[0]), (height - 2 * margin) / (around[3] - around[1]))
        largest = max(6, min(points - 1, int(points * fit)))
        points = rng.randint(min(28, largest), largest)
        laid, around = lay_out(font, points, text)
    left = rng.randint(margin, max(margin, width - margin - (around[2] - around[0]))) - around[0]
    top = rng.randint(margin, max(margin, height - margin - (around[3] - around[1]))) - around[1]
    image = Image.new("RGB", (width, height), tint(rng) if wide else ground(rng))
    ink = dark(rng) if wide else rng.choice(INKS)
    items = []
    for order, (character, glyph, (x0, y0, x1, y1)) in enumerate(laid, start=1):
        box = (x0 + left, y0 + top, x1 + left, y1 + top)
        image.paste(ink, box, glyph.mask)
        items.append(Item("-" if character == TRUE_MINUS else character, None, box, order))
    return Picture(photograph(rng, image) if photo else image, tuple(items))


def dark(rng: random.Random) -> Colour:
    """Any dark ink."""
    if rng.random() < 0.5:
        return rng.choice(INKS)
    red, green, blue = (rng.randint(0, 110) for _ in range(3))
    return red, green, blue


def draw_typed_sum(
    rng: random.Random,
    fonts: Sequence[Font],
    a: int,
    op: str,
    b: int,
    size: Size | None = None,
    photo: bool = True,
) -> Picture:
    """A sum as any program prints it: one call for the whole text, Pillow's own face mostly, any light ground, any
    place up to the very edges, and at times from a larger picture made smaller."""
    width, height = size or wide_size(rng)
    zoom = rng.uniform(1.0, 1.6) if rng.random() < 0.25 else 1.0
    canvas = round(width * zoom), round(height * zoom)
    font = fonts[0] if rng.random() < 0.6 else rng.choice(fonts)
    text = sum_text(rng, a, op, b)
    points = rng.randint(28, 90)
    if not _fits(_ink(font, 28, text), *canvas):
        text = f"{a}{op}{b}"
    box = _ink(font, points, text)
    while points > 6 and not _fits(box, *canvas):
        fit = min(canvas[0] / (box[2] - box[0]), canvas[1] / (box[3] - box[1]))
        points = max(6, min(points - 1, int(points * fit)))
        box = _ink(font, points, text)
    left, top = (_edge_or_anywhere(rng, canvas[axis] - (box[axis + 2] - box[axis])) - box[axis] for axis in (0, 1))
    image = Image.new("RGB", canvas, tint(rng))
    ImageDraw.Draw(image).text((left, top), text, fill=dark(rng), font=font.at(points))
    items = []
    for index, character in enumerate(text):
        if character != " ":
            x0, y0, x1, y1 = _ink(font, points, character)
            pen = left + font.at(points).getlength(text[:index])
            corners = pen + x0, top + y0, pen + x1, top + y1
            scaled = [round(corner / zoom) for corner in corners]
            items.append(Item(character, None, (scaled[0], scaled[1], scaled[2], scaled[3]), len(items) + 1))
    if zoom > 1:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return Picture(photograph(rng, image) if photo and rng.random() < 0.3 else image, tuple(items))


def _ink(font: Font, points: int, text: str) -> Box:
    """The box round what is drawn at (0, 0)."""
    left, top, right, bottom = font.at(points).getbbox(text)
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _edge_or_anywhere(rng: random.Random, room: int) -> int:
    """A place along an axis with so much room: anywhere, or often at one of its ends or in the middle."""
    room = max(0, room)
    return rng.choice((0, min(room, rng.randint(1, 8)), room, room // 2, *(rng.randint(0, room) for _ in range(4))))
