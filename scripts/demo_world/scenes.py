"""Scenes of coloured shapes, and films of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

from demo_world.pictures import COLOUR_VALUES, NEAR, Box, Item, Picture, Size, ground, photograph, picture_size, tint

GAP = 8


@dataclass(frozen=True)
class Place:
    """Where an object of a scene goes: its centre and its diameter in pixels."""

    x: int
    y: int
    diameter: int


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


def paint_shape(rng: random.Random, image: Image.Image, colour: str, shape: str, place: Place, outlined: bool) -> Box:
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
    largest = min(130.0, 0.62 * math.sqrt(width * height / count), (height - 32) / 2 if stacked else height - 12)
    largest = min(largest, width - 12)
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
    wide: bool = False,
) -> Picture:
    """A scene of (colour, shape) objects; object i goes to place i of `layout`, drawn at random if absent.

    Items read from left to right, or from top to bottom where two are stacked. `wide` is a ground of any light tint.
    """
    width, height = size or picture_size(rng)
    places = layout or lay_out_scene(rng, len(objects), (width, height), stacked)
    image = Image.new("RGB", (width, height), tint(rng) if wide else ground(rng))
    outlined = rng.random() < 0.2
    found = [
        (colour, shape, paint_shape(rng, image, colour, shape, place, outlined))
        for (colour, shape), place in zip(objects, places, strict=True)
    ]
    return Picture(photograph(rng, image) if photo else image, _in_reading_order(found))


@dataclass(frozen=True)
class Actor:
    """An object of a film in one of its frames."""

    colour: str
    shape: str
    place: Place


def draw_frames(rng: random.Random, frames: Sequence[Sequence[Actor]], size: Size) -> list[Picture]:
    """Frames of one film: the same ground, the same camera, and what stays is drawn the same."""
    colour, outlined = tint(rng) if rng.random() < 0.5 else ground(rng), rng.random() < 0.2
    brush, camera = rng.getrandbits(32), rng.getrandbits(32)
    pictures = []
    for actors in frames:
        image = Image.new("RGB", size, colour)
        found = []
        for actor in actors:
            hand = random.Random(f"{brush} {actor.colour} {actor.shape} {actor.place}")
            box = paint_shape(hand, image, actor.colour, actor.shape, actor.place, outlined)
            found.append((actor.colour, actor.shape, box))
        pictures.append(Picture(photograph(random.Random(camera), image), _in_reading_order(found)))
    return pictures
