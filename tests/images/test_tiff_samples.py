"""TIFF samples of every size, meaning, order and packing: the right picture or E_IMAGE_FORMAT, never a wrong one.

The files are written sample by sample in plain Python, and the expected levels come from the samples themselves.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from image_corpus import LONG, SHORT, Tag, tiff

from kimi_vl.errors import UserError
from kimi_vl.media import images
from kimi_vl.media.images import ImageOptions

OPTIONS = ImageOptions(14, 4096, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
WIDTH, HEIGHT = 19, 17
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS = 1, 5, 8, 32946, 32773
FLOATS = {16: "e", 32: "f", 64: "d"}


@dataclass(frozen=True)
class Layout:
    bits: int
    kind: int = UNSIGNED
    photometric: int = 1
    order: str = "<"
    compression: int = NONE
    predictor: int = 1
    tiled: bool = False
    planar: int = 1
    extra: tuple[int, ...] = ()
    fill_order: int = 1
    big: bool = False
    colours: int = 1


def packed_row(row: list[Any], layout: Layout) -> bytes:
    """Samples of a row as bytes, each sample's bits one after the other."""
    order = layout.order
    if layout.kind == FLOAT:
        return struct.pack(f"{order}{len(row)}{FLOATS[layout.bits]}", *row)
    if layout.bits in (8, 16, 32):
        code = {8: "B", 16: "H", 32: "I"}[layout.bits]
        return struct.pack(f"{order}{len(row)}{code}", *(value % 2**layout.bits for value in row))
    text = "".join(format(value, f"0{layout.bits}b") for value in row)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def differences(row: list[Any], channels: int, layout: Layout) -> bytes:
    if layout.predictor == 2 and layout.bits in (8, 16, 32, 64):
        whole = row
        if layout.kind == FLOAT:
            code = {16: "H", 32: "I", 64: "Q"}[layout.bits]
            whole = [struct.unpack(code, struct.pack(FLOATS[layout.bits], value))[0] for value in row]
        less = [value - (whole[at - channels] if at >= channels else 0) for at, value in enumerate(whole)]
        code = {8: "B", 16: "H", 32: "I", 64: "Q"}[layout.bits]
        return struct.pack(f"{layout.order}{len(row)}{code}", *(value % 2**layout.bits for value in less))
    if layout.predictor == 3 and layout.kind == FLOAT:
        each = [struct.pack(">" + FLOATS[layout.bits], value) for value in row]
        planes = b"".join(bytes(value[place] for value in each) for place in range(layout.bits // 8))
        return bytes((byte - (planes[at - channels] if at >= channels else 0)) % 256 for at, byte in enumerate(planes))
    return packed_row(row, layout)


def lzw(data: bytes) -> bytes:
    """LZW that never uses its table: it is cleared before codes grow beyond nine bits."""
    codes = []
    for at in range(0, len(data), 250):
        codes += [256, *data[at : at + 250]]
    text = "".join(format(code, "09b") for code in [*codes, 257])
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def compressed(data: bytes, layout: Layout) -> bytes:
    if layout.compression == LZW:
        data = lzw(data)
    elif layout.compression in (DEFLATE, OLD_DEFLATE):
        data = zlib.compress(data)
    elif layout.compression == PACKBITS:
        data = b"".join(
            bytes([len(part) - 1]) + part for part in (data[at : at + 100] for at in range(0, len(data), 100))
        )
    if layout.fill_order == 2:
        data = bytes(int(format(byte, "08b")[::-1], 2) for byte in data)
    return data


def written(samples: np.ndarray, layout: Layout, palette: list[int] | None = None) -> bytes:
    """A TIFF of samples ``(H, W, C)``."""
    height, width, channels = samples.shape
    wide, high = (16, 16) if layout.tiled else (width, 8)
    parts = []
    planes = [samples] if layout.planar == 1 else [samples[..., [at]] for at in range(channels)]
    for plane in planes:
        for top, left in itertools.product(range(0, height, high), range(0, width, wide)):
            rows = []
            for y in range(top, top + high if layout.tiled else min(top + high, height)):
                row = [
                    value
                    for x in range(left, left + wide)
                    for value in (plane[y, x].tolist() if y < height and x < width else [0] * plane.shape[2])
                ]
                rows.append(differences(row, plane.shape[2], layout))
            parts.append(compressed(b"".join(rows), layout))
    places = [16 + sum(map(len, parts[:at])) for at in range(len(parts))]
    sizes = [len(part) for part in parts]
    tags: list[Tag] = [
        (256, LONG, [width]),
        (257, LONG, [height]),
        (258, SHORT, [layout.bits] * channels),
        (259, SHORT, [layout.compression]),
        (262, SHORT, [layout.photometric]),
        (277, SHORT, [channels]),
        (284, SHORT, [layout.planar]),
        (324 if layout.tiled else 273, LONG, places),
        (325 if layout.tiled else 279, LONG, sizes),
    ]
    tags += [(322, SHORT, [16]), (323, SHORT, [16])] if layout.tiled else [(278, SHORT, [high])]
    tags += [(339, SHORT, [layout.kind] * channels)] if layout.kind != UNSIGNED else []
    tags += [(317, SHORT, [layout.predictor])] if layout.predictor > 1 else []
    tags += [(338, SHORT, list(layout.extra))] if layout.extra else []
    tags += [(266, SHORT, [2])] if layout.fill_order == 2 else []
    tags += [(320, SHORT, palette)] if palette else []
    return tiff(tags, b"".join(parts), layout.order, layout.big)


def drawn(layout: Layout, channels: int = 1) -> np.ndarray:
    """Samples of the whole range, with its ends."""
    draw = np.random.default_rng(layout.bits)
    shape = (HEIGHT, WIDTH, channels)
    if layout.kind == FLOAT:
        values = draw.random(shape).astype(f"f{layout.bits // 8}")
        values[0, :3] = [[0], [1], [0.5]]
        return values
    top = 2**16 if layout.kind == SIGNED else 2**layout.bits
    values = draw.integers(0, top, shape)
    values[0, :2] = [[0], [top - 1]]
    return values


def share(samples: np.ndarray, layout: Layout) -> np.ndarray:
    """How light each sample is, from 0 to 1, were zero black."""
    if layout.kind == FLOAT:
        return samples.astype(np.float64)
    return samples / (2**16 - 1 if layout.kind == SIGNED else 2**layout.bits - 1)


def shown(samples: np.ndarray, layout: Layout) -> np.ndarray:
    """The levels ``(H, W, 3)`` that a picture of these samples must have, over white."""
    light = share(samples, layout)
    if layout.photometric == 0:
        light = np.concatenate([1 - light[..., :1], light[..., 1:]], axis=-1)
    grey = light[..., 0]
    for at, meaning in enumerate(layout.extra):
        if meaning == 2:
            grey = grey * light[..., 1 + at] + 1 - light[..., 1 + at]
            break
        if meaning == 1:  # grey is multiplied already: by itself over white
            stored = share(samples, layout)[..., 0]
            grey = 1 - stored if layout.photometric == 0 else stored + 1 - light[..., 1 + at]
            break
    return np.repeat((grey * 255)[..., None], 3, axis=-1)


def loaded(data: bytes) -> np.ndarray:
    return np.asarray(images.load(data, OPTIONS)).astype(int)


def check(layout: Layout) -> None:
    samples = drawn(layout, 1 + len(layout.extra))
    if 1 in layout.extra:
        at = 1 + layout.extra.index(1)
        samples[..., 0] = np.minimum(samples[..., 0], samples[..., at])
    ours = loaded(written(samples, layout))
    assert ours.shape == (HEIGHT, WIDTH, 3), layout
    assert np.abs(ours - shown(samples, layout)).max() <= (1.5 if layout.extra else 0.51), layout


def refused(layout: Layout, samples: np.ndarray | None = None) -> None:
    if samples is None:
        samples = drawn(layout, 1 + len(layout.extra))
    with pytest.raises(UserError) as caught:
        images.load(written(samples, layout), OPTIONS)
    assert caught.value.code == "E_IMAGE_FORMAT", layout


GREYS = [(bits, UNSIGNED) for bits in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 32)]
GREYS += [(32, SIGNED), (16, FLOAT), (32, FLOAT), (64, FLOAT)]


@pytest.mark.parametrize(("bits", "kind"), GREYS, ids=str)
def test_grey(bits: int, kind: int) -> None:
    for photometric, order, tiled in itertools.product((0, 1), "<>", (False, True)):
        if kind == SIGNED and photometric == 0:
            continue
        for compression in (NONE, LZW, DEFLATE, PACKBITS):
            layout = Layout(bits, kind, photometric, order, compression, tiled=tiled)
            check(layout)
            if compression in (LZW, DEFLATE):
                if bits in (8, 16, 32, 64):
                    check(replace(layout, predictor=2))
                if kind == FLOAT:
                    check(replace(layout, predictor=3))
        check(Layout(bits, kind, photometric, order, tiled=tiled, fill_order=2))
        check(Layout(bits, kind, photometric, order, LZW, tiled=tiled, fill_order=2))
    check(Layout(bits, kind, big=True))
    check(Layout(bits, kind, compression=OLD_DEFLATE))


@pytest.mark.parametrize(("bits", "kind"), [(4, UNSIGNED), (8, UNSIGNED), (12, UNSIGNED), (16, UNSIGNED), (32, FLOAT)])
@pytest.mark.parametrize("extra", [(0,), (1,), (2,), (0, 2), (0, 0)], ids=str)
def test_grey_with_more_samples(bits: int, kind: int, extra: tuple[int, ...]) -> None:
    for photometric, order, planar, tiled in itertools.product((0, 1), "<>", (1, 2), (False, True)):
        for compression, predictor in ((NONE, 1), (DEFLATE, 1), (LZW, 2), (DEFLATE, 3)):
            if (predictor == 2 and bits not in (8, 16, 32)) or (predictor == 3 and kind != FLOAT):
                continue
            check(Layout(bits, kind, photometric, order, compression, predictor, tiled, planar, extra))


def test_what_has_no_agreed_white_is_refused() -> None:
    for order in "<>":
        for bits in (8, 16):
            for photometric in (0, 1):
                refused(Layout(bits, SIGNED, photometric, order))
        refused(Layout(32, SIGNED, 0, order))
        refused(Layout(12, UNSIGNED, 1, order, LZW, predictor=2))
        refused(Layout(16, UNSIGNED, 1, order, LZW, predictor=3))
        refused(Layout(8, UNSIGNED, 4, order))  # a mask
        refused(Layout(8, 5, 1, order))
    data = written(drawn(Layout(8), 2), Layout(8, extra=(2,)))
    unlike = data.replace(struct.pack("<HHIHH", 258, SHORT, 2, 8, 8), struct.pack("<HHIHH", 258, SHORT, 2, 8, 4))
    assert unlike != data
    with pytest.raises(UserError, match="E_IMAGE_FORMAT"):
        images.load(unlike, OPTIONS)


def test_floats_run_to_one_or_to_255() -> None:
    layout = Layout(32, FLOAT)
    samples = drawn(layout)
    assert np.abs(loaded(written(samples * 255, layout)) - np.repeat(samples * 255, 3, axis=-1)).max() <= 0.51
    samples[2, :4, 0] = [np.nan, np.inf, -np.inf, -3]
    assert loaded(written(samples, layout))[2, :4, 0].tolist() == [0, 255, 0, 0]
    assert loaded(written(samples, replace(layout, photometric=0)))[2, :4, 0].tolist() == [255, 0, 255, 255]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits: int) -> None:
    palette = np.random.default_rng(1).integers(0, 256, (3, 2**bits)) * 257
    for order, compression, tiled in itertools.product("<>", (NONE, LZW, DEFLATE, PACKBITS), (False, True)):
        layout = Layout(bits, UNSIGNED, 3, order, compression, tiled=tiled)
        samples = drawn(layout)
        ours = loaded(written(samples, layout, palette.reshape(-1).tolist()))
        assert (ours == (palette.T // 257)[samples[..., 0]]).all(), layout


@pytest.mark.parametrize("bits", [8, 16])
def test_colours(bits: int) -> None:
    for order, compression, tiled, planar in itertools.product(
        "<>", (NONE, LZW, DEFLATE, PACKBITS), (False, True), (1, 2)
    ):
        for predictor in (1, 2) if compression in (LZW, DEFLATE) else (1,):
            layout = Layout(bits, UNSIGNED, 2, order, compression, predictor, tiled, planar)
            samples = drawn(layout, 3)
            if bits == 16 and planar == 2:
                refused(layout, samples)
                continue
            ours = loaded(written(samples, layout))
            assert np.abs(ours - share(samples, layout) * 255).max() <= (1 if bits == 16 else 0), layout


def test_colours_of_other_sizes_are_refused() -> None:
    for bits, kind in ((4, UNSIGNED), (12, UNSIGNED), (32, UNSIGNED), (16, SIGNED), (32, FLOAT)):
        layout = Layout(bits, kind, 2)
        refused(layout, drawn(layout, 3))
