"""Draws the demo world: sums in printed type, scenes of coloured shapes, and glyph soups.

Every function takes a `random.Random`, so one seed fixes every pixel for a given set of fonts.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

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
GAP = 8
NEAR = 14
TRUE_MINUS = "\u2212"

GROUNDS: tuple[tuple[Colour, int], ...] = (
    ((255, 255, 255), 10),
    ((253, 246, 227), 3),
    ((232, 232, 232), 3),
    ((228, 238, 250), 2),
    ((230, 245, 231), 2),
    ((238, 232, 248), 2),
)
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

_TRUETYPE = "/usr/share/fonts/truetype/"
# Name, path below _TRUETYPE, Debian package.
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
class Item:
    """One thing in a picture: its kind, colour (None for text), tight box and place in reading order."""

    kind: str
    colour: str | None
    box: Box
    order: int


@dataclass(frozen=True)
class Picture:
    """An RGB image and the items drawn on it, in reading order."""

    image: Image.Image
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Place:
    """Where an object of a scene goes: its centre and its diameter in pixels."""

    x: int
    y: int
    diameter: int


@dataclass(frozen=True)
class _Glyph:
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
def _glyph(font: Font, size: int, character: str) -> _Glyph | None:
    """The ink of one character, cropped, with its offset from the origin on the baseline."""
    canvas = Image.new("L", (2 * size, 2 * size), 0)
    half, base = size // 2, size + size // 2
    ImageDraw.Draw(canvas).text((half, base), character, fill=255, font=font.at(size), anchor="ls")
    box = canvas.getbbox()
    if box is None:
        return None
    return _Glyph(canvas.crop(box), box[0] - half, box[1] - base)


@lru_cache(maxsize=256)
def _has(font: Font, character: str) -> bool:
    """Whether the font draws a character, rather than its box for missing ones."""
    glyph, missing = _glyph(font, 40, character), _glyph(font, 40, "\U0010fffd")
    if glyph is None:
        return False
    return missing is None or glyph.mask.tobytes() != missing.mask.tobytes()


def find_fonts() -> list[Font]:
    """Pillow's built-in face and every font of `FONT_TABLE` that is installed."""
    fonts = [Font("Pillow", None)]
    fonts += [Font(name, _TRUETYPE + path) for name, path, _ in FONT_TABLE if Path(_TRUETYPE + path).is_file()]
    return fonts


def picture_size(rng: random.Random, low: int = 224, high: int = 448, sizes: Sequence[Size] | None = None) -> Size:
    """A width and a height between the bounds, small ones a bit more often, or one of the given `sizes`."""
    if sizes:
        return rng.choice(sizes)
    span = high - low + 1
    return low + int(span * rng.random() ** 1.4), low + int(span * rng.random() ** 1.4)


def _ground(rng: random.Random) -> Colour:
    colours, weights = zip(*GROUNDS, strict=True)
    return rng.choices(colours, weights)[0]


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


# ---------------------------------------------------------------------------------------------
# Sums


def _lay_out(font: Font, size: int, text: str) -> tuple[list[tuple[str, _Glyph, Box]], Box]:
    """Inked characters with their boxes relative to the baseline's start, and the box round them all."""
    face = font.at(size)
    laid: list[tuple[str, _Glyph, Box]] = []
    advance = 0.0
    for character in text:
        glyph = None if character == " " else _glyph(font, size, character)
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
) -> Picture:
    """A printed sum somewhere in a picture; `text` fixes the form, which is random otherwise."""
    width, height = size or picture_size(rng)
    font = rng.choice(fonts)
    text = text or sum_text(rng, a, op, b)
    if op == "-" and _has(font, TRUE_MINUS) and rng.random() < 0.5:
        text = text.replace("-", TRUE_MINUS)
    points, margin = rng.randint(28, 96), 6
    laid, around = _lay_out(font, points, text)
    while points > 6 and not _fits(around, width - 2 * margin, height - 2 * margin):
        fit = min((width - 2 * margin) / (around[2] - around[0]), (height - 2 * margin) / (around[3] - around[1]))
        largest = max(6, min(points - 1, int(points * fit)))
        points = rng.randint(min(28, largest), largest)
        laid, around = _lay_out(font, points, text)
    left = rng.randint(margin, max(margin, width - margin - (around[2] - around[0]))) - around[0]
    top = rng.randint(margin, max(margin, height - margin - (around[3] - around[1]))) - around[1]
    image, ink = Image.new("RGB", (width, height), _ground(rng)), rng.choice(INKS)
    items = []
    for order, (character, glyph, (x0, y0, x1, y1)) in enumerate(laid, start=1):
        box = (x0 + left, y0 + top, x1 + left, y1 + top)
        image.paste(ink, box, glyph.mask)
        items.append(Item("-" if character == TRUE_MINUS else character, None, box, order))
    return Picture(photograph(rng, image) if photo else image, tuple(items))


# ---------------------------------------------------------------------------------------------
# Shapes


def _outline_points(shape: str, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a shape around (0, 0) that stay within about `radius` of it along both axes."""
    if shape == "square":
        half = 0.84 * radius
        corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    elif shape == "triangle":
        corners = [
            (radius * math.sin(angle), -radius * math.cos(angle)) for angle in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)
        ]
    elif shape == "star":
        corners = []
        for index in range(10):
            reach = radius if index % 2 == 0 else 0.42 * radius
            corners.append((reach * math.sin(index * math.pi / 5), -reach * math.cos(index * math.pi / 5)))
    else:
        long, thick = 0.98 * radius, 0.34 * radius
        corners = [(-thick, -long), (thick, -long), (thick, -thick), (long, -thick), (long, thick)]
        corners += [(thick, thick), (thick, long), (-thick, long), (-thick, thick), (-long, thick)]
        corners += [(-long, -thick), (-thick, -thick)]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


def _paint_shape(rng: random.Random, image: Image.Image, colour: str, shape: str, place: Place, outlined: bool) -> Box:
    """Paint one shape with its ink centred on the place; returns the tight box."""
    scale, diameter = 3, place.diameter
    side = (diameter + 4) * scale
    middle, radius = side / 2, diameter * scale / 2
    turn = math.radians(rng.uniform(-12, 12)) if shape in ("square", "triangle", "star") else 0.0
    fill_mask = Image.new("L", (side, side), 0)
    edge_mask = Image.new("L", (side, side), 0) if outlined else None
    thin = scale * rng.choice((1, 2))
    if shape == "circle":
        round_box = (middle - radius, middle - radius, middle + radius, middle + radius)
        ImageDraw.Draw(fill_mask).ellipse(round_box, fill=255)
        if edge_mask is not None:
            ImageDraw.Draw(edge_mask).ellipse(round_box, outline=255, width=thin)
    else:
        points = [(x + middle, y + middle) for x, y in _outline_points(shape, radius, turn)]
        ImageDraw.Draw(fill_mask).polygon(points, fill=255)
        if edge_mask is not None:
            ImageDraw.Draw(edge_mask).polygon(points, fill=0, outline=255, width=thin)
            edge_mask = ImageChops.multiply(edge_mask, fill_mask)
    fill_mask = fill_mask.reduce(scale)
    ink = fill_mask.getbbox()
    if ink is None:
        raise ValueError(f"{shape} of {diameter} px left no ink")
    left, top = place.x - (ink[2] - ink[0]) // 2, place.y - (ink[3] - ink[1]) // 2
    box = (left, top, left + ink[2] - ink[0], top + ink[3] - ink[1])
    value = tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOUR_VALUES[colour])
    image.paste(value, box, fill_mask.crop(ink))
    if edge_mask is not None:
        image.paste((36, 36, 40), box, edge_mask.reduce(scale).crop(ink))
    return box


def _apart(one: Place, other: Place) -> bool:
    need = (one.diameter + other.diameter) / 2 + GAP + 4
    return abs(one.x - other.x) >= need or abs(one.y - other.y) >= need


def lay_out_scene(rng: random.Random, count: int, size: Size, stacked: bool | None = None) -> list[Place]:
    """Places for a scene's objects, without overlap, in random order.

    Centres differ along x by more than `NEAR` (by 30 and more in a scene of two), save in a scene of two
    that `stacked` puts one above the other (by chance where None).
    """
    width, height = size
    step = 32 if count == 2 else NEAR + 2
    if stacked is None:
        stacked = count == 2 and rng.random() < 0.4
    largest = min(130.0, 0.62 * math.sqrt(width * height / count), (height - 32) / 2 if stacked else 130.0)
    while True:
        smallest = min(36.0, 0.8 * largest)
        places: list[Place] = []
        for _ in range(60 * count):
            diameter = round(rng.uniform(smallest, largest))
            half = diameter // 2 + 4
            x, y = rng.randint(half, width - half), rng.randint(half, height - half)
            if stacked and places:
                x = min(max(places[0].x + rng.randint(-10, 10), half), width - half)
            place = Place(x, y, diameter)
            near = [abs(x - other.x) for other in places]
            spread = all(gap <= NEAR - 4 for gap in near) if stacked else all(gap >= step for gap in near)
            if spread and all(_apart(place, other) for other in places):
                places.append(place)
                if len(places) == count:
                    return places
        largest = max(12.0, 0.92 * largest)


def _in_reading_order(found: list[tuple[str, str, Box]]) -> tuple[Item, ...]:
    def twice_centre(entry: tuple[str, str, Box]) -> tuple[int, int]:
        box = entry[2]
        return box[0] + box[2], box[1] + box[3]

    ordered = sorted(found, key=twice_centre)
    if len(ordered) == 2 and abs(twice_centre(ordered[0])[0] - twice_centre(ordered[1])[0]) < 2 * NEAR:
        ordered.sort(key=lambda entry: twice_centre(entry)[1])
    return tuple(Item(shape, colour, box, n) for n, (colour, shape, box) in enumerate(ordered, start=1))


def draw_scene(
    rng: random.Random,
    objects: Sequence[tuple[str, str]],
    size: Size | None = None,
    layout: Sequence[Place] | None = None,
    stacked: bool | None = None,
    photo: bool = True,
) -> Picture:
    """A scene of (colour, shape) objects; object i goes to place i of `layout`, drawn at random if absent.

    Items read from left to right, or from top to bottom where two are stacked.
    """
    width, height = size or picture_size(rng)
    places = layout or lay_out_scene(rng, len(objects), (width, height), stacked)
    image = Image.new("RGB", (width, height), _ground(rng))
    outlined = rng.random() < 0.2
    found = [
        (colour, shape, _paint_shape(rng, image, colour, shape, place, outlined))
        for (colour, shape), place in zip(objects, places, strict=True)
    ]
    return Picture(photograph(rng, image) if photo else image, _in_reading_order(found))


# ---------------------------------------------------------------------------------------------
# Soups


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
    image = Image.new("RGB", (width, height), _ground(rng))
    ink = rng.choice(INKS)
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
                box = _paint_shape(rng, image, colour, shape, place, rng.random() < 0.15)
                items.append(Item(shape, colour, box, 0))
                boxes.append(box)
            continue
        font, kind = rng.choice(faces), rng.choice(GLYPHS)
        drawn = TRUE_MINUS if kind == "-" and rng.random() < 0.5 and _has(font, TRUE_MINUS) else kind
        glyph = _glyph(font, 4 * rng.randint(6, max(7, round(largest / 4))), drawn)
        if glyph is None or glyph.mask.width + 4 > width or glyph.mask.height + 4 > height:
            continue
        x, y = rng.randint(2, width - 2 - glyph.mask.width), rng.randint(2, height - 2 - glyph.mask.height)
        box = (x, y, x + glyph.mask.width, y + glyph.mask.height)
        if _clear(box, boxes):
            image.paste(ink if rng.random() < 0.7 else rng.choice(INKS), box, glyph.mask)
            items.append(Item(kind, None, box, 0))
            boxes.append(box)
    return Picture(photograph(rng, image) if photo else image, tuple(items))


# ---------------------------------------------------------------------------------------------
# Labels


def patch_labels(picture: Picture) -> np.ndarray:
    """Ids of (kind, colour, order) for each 14 px patch of the picture padded to multiples of 28.

    A patch takes the item whose box overlaps it most, if that covers a fifth of the patch or half of
    the item's box. The result is int64 of shape (rows, columns, 3).
    """
    width, height = picture.image.size
    columns, rows = 2 * math.ceil(width / MERGED), 2 * math.ceil(height / MERGED)
    labels = np.zeros((rows, columns, 3), dtype=np.int64)
    best = np.zeros((rows, columns), dtype=np.int64)
    lefts, tops = PATCH * np.arange(columns), PATCH * np.arange(rows)
    for item in picture.items:
        x0, y0, x1, y1 = item.box
        across = np.clip(np.minimum(lefts + PATCH, x1) - np.maximum(lefts, x0), 0, None)
        down = np.clip(np.minimum(tops + PATCH, y1) - np.maximum(tops, y0), 0, None)
        area = down[:, None] * across[None, :]
        enough = (5 * area >= PATCH * PATCH) | (2 * area >= (x1 - x0) * (y1 - y0))
        wins = enough & (area > best)
        best[wins] = area[wins]
        colour = 0 if item.colour is None else COLOURS.index(item.colour)
        labels[wins] = (KINDS.index(item.kind), colour, item.order)
    return labels
