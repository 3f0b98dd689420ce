"""What each patch of a picture shows, for a vision tower to learn."""

from __future__ import annotations

import math

import numpy as np

from demo_world.pictures import COLOURS, KINDS, MERGED, PATCH, Picture, hundredths

PLACES = 6
"""Numbers that say where an object is: left, top, right, bottom, and its centre's x and y."""
NOWHERE = -1


def patch_labels(picture: Picture) -> np.ndarray:
    """What each 14 px patch of the picture shows, padded to multiples of 28: int64 (rows, columns, 3 + PLACES).

    Ids of kind, colour and order come first; then the place of a shape in hundredths of the picture, or NOWHERE. A
    patch takes the item whose box overlaps it most, if that covers a fifth of the patch or half of the item's box.
    """
    width, height = picture.size
    columns, rows = 2 * math.ceil(width / MERGED), 2 * math.ceil(height / MERGED)
    labels = np.zeros((rows, columns, 3 + PLACES), dtype=np.int64)
    labels[..., 3:] = NOWHERE
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
        place = hundredths(item, picture.size)
        numbers = [NOWHERE] * PLACES if item.colour is None else [*place.box, *place.centre]
        labels[wins] = (KINDS.index(item.kind), colour, item.order, *numbers)
    return labels
