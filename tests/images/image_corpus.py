"""Image files of every kind that people send, by mistake or on purpose, with what is promised for each."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import icc_profiles
import numpy as np
from PIL import Image, features

FORMAT, UNREADABLE, TOO_LARGE = "E_IMAGE_FORMAT", "E_IMAGE_UNREADABLE", "E_IMAGE_TOO_LARGE"
ANSWER = ""
MEBIBYTE = 2**20

Colour = tuple[int, int, int]
COLOURS: tuple[Colour, ...] = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (240, 240, 240))
BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)
SIZE = (48, 32)


@dataclass(frozen=True)
class Case:
    """A file that is made when it is needed, and the codes it may give ("" is an answer).

    Of an answer: ``size``; the ``colours`` in the middle of its four quarters, each within ``tolerance``; or all
    pixels, by ``digest``.
    """

    name: str
    make: Callable[[], bytes]
    codes: tuple[str, ...] = (ANSWER,)
    size: tuple[int, int] | None = None
    colours: tuple[Colour, ...] | None = None
    tolerance: int = 0
    digest: str | None = None
    suffix: str = ""


def quarters(size: tuple[int, int] = SIZE) -> Image.Image:
    """Red and green above blue and almost white."""
    image = Image.new("RGB", size)
    half_x, half_y = size[0] // 2, size[1] // 2
    for index, colour in enumerate(COLOURS):
        left, top = index % 2 * half_x, index // 2 * half_y
        image.paste(colour, (left, top, left + half_x, top + half_y))
    return image


def grey(colour: Colour) -> Colour:
    level = (colour[0] * 19595 + colour[1] * 38470 + colour[2] * 7471 + 0x8000) >> 16
    return (level, level, level)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


# Files written by hand, for what Pillow does not write


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: tuple[int, int],
    rows: bytes,
    depth: int = 8,
    kind: int = 2,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows, 1)) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_rows(samples: np.ndarray, depth: int, interlaced: bool = False) -> bytes:
    """Rows of samples (H, W, C), which must fit ``depth`` bits, each behind a filter byte; perhaps in seven passes."""
    passes = [samples[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [samples]
    rows = []
    for part in passes:
        for row in part if part.size else ():
            flat = row.reshape(-1)
            if depth == 16:
                packed = flat.astype(">u2").tobytes()
            elif depth == 8:
                packed = flat.astype(np.uint8).tobytes()
            else:
                bits = (flat[:, None] >> np.arange(depth - 1, -1, -1)) & 1
                packed = np.packbits(bits.reshape(-1).astype(np.uint8)).tobytes()
            rows.append(b"\0" + packed)
    return b"".join(rows)


def samples(depth: int, channels: int = 3) -> np.ndarray:
    """The quarters as samples of ``depth`` bits; one channel is grey, an even number ends with an opaque alpha."""
    image = quarters() if channels >= 3 else quarters().convert("L")
    values = np.asarray(image).reshape(SIZE[1], SIZE[0], -1).astype(np.int64) * (2**depth - 1) // 255
    if channels % 2 == 0:
        values = np.concatenate([values, np.full_like(values[:, :, :1], 2**depth - 1)], axis=2)
    return values


def deep_png(depth: int, kind: int, interlaced: bool = False, before: bytes = b"") -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    rows = png_rows(samples(depth, channels), depth, interlaced)
    return png(SIZE, rows, depth, kind, interlaced, before)


Tag = tuple[int, int, Any]  # number, kind, values
LONG, SHORT, RATIONAL = 4, 3, 5
CODES = {1: "B", 2: "B", SHORT: "H", LONG: "I", RATIONAL: "II", 7: "B", 13: "I", 16: "Q"}


def tiff(tags: list[Tag], body: bytes = b"", order: str = "<", big: bool = False, following: int = 0) -> bytes:
    """A TIFF of one directory; the ``body`` is put at byte 16."""
    body += b"\0" * (len(body) % 2)
    word, counter, inline = ("Q", "Q", 8) if big else ("I", "H", 4)
    directory = 16 + len(body)
    end = directory + struct.calcsize(order + counter) + len(tags) * (4 + 2 * inline) + inline
    entries, values = b"", b""
    for number, kind, content in sorted(tags, key=lambda tag: tag[0]):
        packed = content
        count = len(content)
        if not isinstance(content, bytes):
            count //= len(CODES[kind])
            packed = struct.pack(order + CODES[kind][0] * len(content), *content)
        else:
            count = len(content) // struct.calcsize("=" + CODES[kind])
        if len(packed) > inline:
            place = struct.pack(order + word, end + len(values))
            values += packed + b"\0" * (len(packed) % 2)
        else:
            place = packed.ljust(inline, b"\0")
        entries += struct.pack(order + "HH" + word, number, kind, count) + place
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(order + "HHHQ", 43, 8, 0, directory)
    else:
        head = mark + struct.pack(order + "HI", 42, directory)
    return (
        head.ljust(16, b"\0")
        + body
        + struct.pack(order + counter, len(tags))
        + entries
        + struct.pack(order + word, following)
        + values
    )


def grey_tags(size: tuple[int, int], offsets: Any, counts: Any, rows: int, compression: int = 1) -> list[Tag]:
    """Tags of a grey picture in strips."""
    return [
        (256, LONG, [size[0]]),
        (257, LONG, [size[1]]),
        (258, SHORT, [8]),
        (259, SHORT, [compression]),
        (262, SHORT, [1]),
        (273, LONG, offsets),
        (277, SHORT, [1]),
        (278, LONG, [rows]),
        (279, LONG, counts),
    ]


def tile_tags(size: tuple[int, int], tile: tuple[int, int], offsets: Any, counts: Any, compression: int) -> list[Tag]:
    kept = [tag for tag in grey_tags(size, [0], [0], 1, compression) if tag[0] not in (273, 278, 279)]
    return [*kept, (322, LONG, [tile[0]]), (323, LONG, [tile[1]]), (324, LONG, offsets), (325, LONG, counts)]


def exif(orientation: Any, order: str = "<", kind: int = SHORT) -> bytes:
    """EXIF with an orientation, as it stands in a PNG; other files want ``Exif\\0\\0`` before it."""
    return tiff([(271, 2, b"A camera\0"), (274, kind, orientation)], order=order)


def jpeg(image: Image.Image, before: bytes = b"", **options: Any) -> bytes:
    """A JPEG with segments put before all others."""
    data = saved(image, "JPEG", quality=95, **options)
    return data[:2] + before + data[2:]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def arithmetic_jpeg(frame: int) -> bytes:
    """8x8 grey, arithmetically coded; the decoder makes some picture of any two bytes."""
    quantization = segment(0xDB, b"\0" + bytes([1] * 64))
    header = segment(frame, struct.pack(">BHHBBBB", 8, 8, 8, 1, 1, 0x11, 0))
    last = 63 if frame == 0xC9 else 0
    scan = segment(0xDA, bytes([1, 1, 0, 0, last, 0])) + b"\x00\x00"
    return b"\xff\xd8" + quantization + header + scan + b"\xff\xd9"


def scans_jpeg(size: tuple[int, int], scans: int) -> bytes:
    """A progressive JPEG whose last scan, some bytes that touch every block, comes again and again."""
    data = saved(Image.new("L", size), "JPEG", progressive=True)
    begin = data.rindex(b"\xff\xda")
    return data[:begin] + data[begin:-2] * scans + b"\xff\xd9"


def patched(data: bytes, at: int, code: str, *values: int) -> bytes:
    packed = struct.pack(code, *values)
    return data[:at] + packed + data[at + len(packed) :]


def with_size(data: bytes, size: tuple[int, int]) -> bytes:
    """A JPEG with another size in its header."""
    frame = re.search(rb"\xff[\xc0\xc2]", data)
    assert frame is not None
    return patched(data, frame.start() + 5, ">HH", *size[::-1])


def gif(blocks: bytes = b"") -> bytes:
    """A GIF with blocks put before its picture."""
    data = saved(Image.new("P", SIZE), "GIF")
    colours = 3 << ((data[10] & 7) + 1) if data[10] & 128 else 0
    begin = data.index(b",", 13 + colours)
    return data[:begin] + blocks + data[begin:]


def bmp(size: tuple[int, int], depth: int, body: bytes, compression: int = 0, palette: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, *size, 1, depth, compression, len(body), 0, 0, len(palette) // 4, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + palette + body


def webp_frames(frames: int) -> bytes:
    """An animation of small frames."""
    picture = saved(Image.new("RGB", (8, 8), "red"), "WEBP", lossless=True)[12:]
    frame = bytes(6) + struct.pack("<I", 7)[:3] + struct.pack("<I", 7)[:3] + bytes(4) + picture
    frame = b"ANMF" + struct.pack("<I", len(frame)) + frame
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + struct.pack("<I", 7)[:3] * 2
    body = b"WEBP" + extended + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


# The corpus


def modes() -> Iterator[Case]:
    """Every format in every mode that Pillow writes, and those that it only reads."""
    picture = quarters()
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    over_white = (WHITE, *COLOURS[1:])
    half = picture.convert("RGBA")
    half.putalpha(128)
    mixed = ((round(channel * 128 / 255 + 127) for channel in colour) for colour in COLOURS)
    faded: tuple[Colour, ...] = tuple((r, g, b) for r, g, b in mixed)
    greys = tuple(map(grey, COLOURS))
    two: tuple[Colour, ...] = tuple(WHITE if colour[0] > 127 else BLACK for colour in greys)
    palette = picture.quantize(4)
    index = palette.getpixel((1, 1))
    alphas = bytes(0 if number == index else 255 for number in range(4))
    black_white = picture.convert("1", dither=Image.Dither.NONE)
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    whole = Image.fromarray(np.asarray(picture.convert("L")).astype(np.int32) * 257)
    real = Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32))

    by_mode: dict[str, tuple[Image.Image, tuple[Any, ...]]] = {
        "1": (black_white, two),
        "L": (picture.convert("L"), greys),
        "LA": (clear.convert("LA"), (WHITE, *greys[1:])),
        "P": (palette, COLOURS),
        "RGB": (picture, COLOURS),
        "RGBA": (clear, over_white),
        "RGBA half": (half, faded),
        "RGBX": (picture.convert("RGBX"), COLOURS),
        "CMYK": (picture.convert("CMYK"), COLOURS),
        "YCbCr": (picture.convert("YCbCr"), COLOURS),
        "LAB": (Image.merge("LAB", [Image.new("L", SIZE, level) for level in (255, 128, 128)]), (WHITE,) * 4),
        "I;16": (deep, greys),
        "I": (whole, greys),
        "F": (real, greys),
        "PA": (clear.quantize(8).convert("PA"), over_white),
    }
    written = {
        "PNG": "1 L LA P RGB RGBA|RGBA half|I;16",
        "JPEG": "1 L RGB CMYK YCbCr RGBX",
        "WEBP": "1 L LA P RGB RGBA|RGBA half|RGBX CMYK YCbCr",
        "GIF": "1 L LA P RGB RGBA",
        "BMP": "1 L P RGB RGBA",
        "TIFF": "1 L LA P RGB RGBA|RGBA half|RGBX CMYK YCbCr LAB I;16 I F PA",
    }
    losses = {("JPEG", mode): 12 for mode in by_mode} | {(kind, "YCbCr"): 3 for kind in written}
    losses |= {(kind, "LAB"): 3 for kind in written} | {("JPEG", "YCbCr"): 12, ("GIF", "CMYK"): 40}
    losses |= {(kind, "RGBA half"): 1 for kind in written}

    def words(text: str) -> Iterator[str]:
        for part in text.split("|"):
            yield from [part] if part == "RGBA half" else part.split()

    for kind, names in written.items():
        for mode in words(names):
            image, colours = by_mode[mode]
            if (kind, mode) in (("BMP", "RGBA"), ("GIF", "LA")):
                colours = ((0, 0, 0), *colours[1:])  # these are written without what makes them transparent
            options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
            options = {"quality": 95} if kind == "JPEG" else options
            yield Case(
                f"{kind} {mode}",
                lambda i=image, k=kind, o=options: saved(i, k, **o),
                size=SIZE,
                colours=colours,
                tolerance=losses.get((kind, mode), 0),
            )
    compressions = ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma", "tiff_deflate"]
    for mode in words(written["TIFF"]):
        image, colours = by_mode[mode]
        for compression in (
            compressions[:5] if mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F") else compressions[:2]
        ):
            yield Case(
                f"TIFF {mode} {compression}",
                lambda i=image, c=compression: saved(i, "TIFF", compression=c),
                size=SIZE,
                colours=colours,
                tolerance=losses.get(("TIFF", mode), 0),
            )
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield Case(
            f"TIFF 1 {compression}",
            lambda c=compression: saved(black_white, "TIFF", compression=c),
            size=SIZE,
            colours=two,
        )
    for mode in ("L", "RGB", "CMYK", "YCbCr"):
        image, colours = by_mode[mode]
        yield Case(
            f"TIFF {mode} jpeg",
            lambda i=image: saved(i, "TIFF", compression="jpeg", quality=95),
            size=SIZE,
            colours=colours,
            tolerance=14,
        )
    yield Case("TIFF big", lambda: saved(picture, "TIFF", big_tiff=True), size=SIZE, colours=COLOURS)
    yield Case(
        "TIFF strips", lambda: saved(picture, "TIFF", compression="tiff_lzw", strip_size=64), size=SIZE, colours=COLOURS
    )
    level = bytes(picture.convert("L").tobytes())
    for order, big in (("<", False), (">", False), ("<", True), (">", True)):
        yield Case(
            f"TIFF by hand {order}{'big' if big else ''}",
            lambda o=order, b=big: tiff(grey_tags(SIZE, [16], [len(level)], SIZE[1]), level, o, b),
            (ANSWER, UNREADABLE) if order == ">" and big else (ANSWER,),  # Pillow does not know every one of these
            size=SIZE,
            colours=greys,
        )
    tile = b"".join(
        picture.convert("L").crop((x, y, x + 16, y + 16)).tobytes()
        for y in range(0, SIZE[1], 16)
        for x in range(0, SIZE[0], 16)
    )
    yield Case(
        "TIFF tiles",
        lambda: tiff(tile_tags(SIZE, (16, 16), [16 + 256 * n for n in range(6)], [256] * 6, 1), tile),
        size=SIZE,
        colours=greys,
    )
    odd = np.full(SIZE[::-1], 100, np.float32)
    odd[:16, :24], odd[:16, 24:], odd[16:, :24] = np.nan, np.inf, -np.inf
    yield Case(
        "TIFF F not finite",
        lambda: saved(Image.fromarray(odd), "TIFF"),
        colours=((0, 0, 0), WHITE, (0, 0, 0), (100, 100, 100)),
    )
    yield Case(
        "TIFF I beyond 16 bits",
        lambda: saved(Image.fromarray(np.full(SIZE[::-1], 2**31 - 1, np.int32)), "TIFF"),
        colours=(WHITE,) * 4,
    )

    for depth in (1, 2, 4, 8, 16):
        steps = 2**depth - 1
        levels = [round(grey(colour)[0] * steps // 255 * 255 / steps) for colour in COLOURS]
        shades: tuple[Colour, ...] = tuple((level, level, level) for level in levels)
        for interlaced in (False, True):
            name = f"PNG grey {depth} bits{' interlaced' if interlaced else ''}"
            yield Case(name, lambda d=depth, i=interlaced: deep_png(d, 0, i), size=SIZE, colours=shades, tolerance=1)
        # the level of the first quarter is declared transparent
        first = int(samples(depth, 1)[1, 1, 0])
        same = tuple(
            WHITE if grey(colour)[0] * steps // 255 == first else shade
            for colour, shade in zip(COLOURS, shades, strict=True)
        )
        key = chunk(b"tRNS", struct.pack(">H", first))
        yield Case(
            f"PNG grey {depth} bits tRNS", lambda d=depth, k=key: deep_png(d, 0, before=k), colours=same, tolerance=1
        )
    for depth in (8, 16):
        for kind, name in ((2, "RGB"), (4, "grey alpha"), (6, "RGBA")):
            for interlaced in (False, True):
                yield Case(
                    f"PNG {name} {depth} bits{' interlaced' if interlaced else ''}",
                    lambda d=depth, k=kind, i=interlaced: deep_png(d, k, i),
                    size=SIZE,
                    colours=greys if kind == 4 else COLOURS,
                    tolerance=1,
                )
        full = 2**depth - 1
        yield Case(
            f"PNG RGB {depth} bits tRNS",
            lambda d=depth, f=full: deep_png(d, 2, before=chunk(b"tRNS", struct.pack(">HHH", f, 0, 0))),
            colours=over_white,
            tolerance=1,
        )
    odd_level = np.full((SIZE[1], SIZE[0], 3), 0x8012)
    yield Case(
        "PNG RGB 16 bits tRNS of unlike bytes",
        lambda: png(SIZE, png_rows(odd_level, 16), 16, 2, before=chunk(b"tRNS", b"\x80\x12" * 3)),
        colours=(WHITE,) * 4,
    )
    for bits in (1, 2, 4, 8):
        few = quarters().quantize(2 if bits == 1 else 4)
        yield Case(f"PNG P {bits} bits", lambda f=few, b=bits: saved(f, "PNG", bits=b), digest=digest(few))
    yield Case("PNG P one clear colour", lambda: saved(palette, "PNG", transparency=index), colours=over_white)
    yield Case("PNG P alphas", lambda: saved(palette, "PNG", transparency=alphas), colours=over_white)
    yield Case("PNG P without palette", lambda: png(SIZE, bytes(SIZE[1] * (SIZE[0] + 1)), 8, 3), (ANSWER, UNREADABLE))
    yield Case("GIF P one clear colour", lambda: saved(palette, "GIF", transparency=index), colours=over_white)
    yield Case("PNG optimized", lambda: saved(picture, "PNG", optimize=True), digest=digest(picture))

    for subsampling in (0, 1, 2):
        for progressive in (False, True):
            yield Case(
                f"JPEG subsampling {subsampling}{' progressive' if progressive else ''}",
                lambda s=subsampling, p=progressive: jpeg(picture, subsampling=s, progressive=p),
                size=SIZE,
                colours=COLOURS,
                tolerance=12,
            )
    yield Case("JPEG RGB kept", lambda: jpeg(picture, keep_rgb=True), size=SIZE, colours=COLOURS, tolerance=12)
    yield Case(
        "JPEG restarts", lambda: jpeg(picture, restart_marker_blocks=1), size=SIZE, colours=COLOURS, tolerance=12
    )
    yield Case(
        "JPEG grey progressive", lambda: jpeg(picture.convert("L"), progressive=True), colours=greys, tolerance=12
    )
    yield Case(
        "JPEG CMYK progressive", lambda: jpeg(picture.convert("CMYK"), progressive=True), colours=COLOURS, tolerance=12
    )
    for frame, name in ((0xC9, "JPEG arithmetic"), (0xCA, "JPEG arithmetic progressive")):
        yield Case(name, lambda f=frame: arithmetic_jpeg(f), size=(8, 8))
    yield Case("JPEG lossless", lambda: jpeg(picture).replace(b"\xff\xc0", b"\xff\xc3", 1), (UNREADABLE,))
    for quality in (1, 50):
        yield Case(f"WEBP lossy {quality}", lambda q=quality: saved(picture, "WEBP", quality=q), size=SIZE)
    yield Case("WEBP lossy alpha", lambda: saved(clear, "WEBP", quality=95), colours=over_white, tolerance=16)

    row = struct.pack("<H", 0x7C00) * 24 + struct.pack("<H", 0x03E0) * 24
    low = struct.pack("<H", 0x001F) * 24 + struct.pack("<H", 0x7FFF) * 24
    of_fives = (*COLOURS[:3], WHITE)
    yield Case("BMP 16 bits", lambda: bmp(SIZE, 16, low * 16 + row * 16), size=SIZE, colours=of_fives)
    yield Case("BMP from the top", lambda: bmp((SIZE[0], -SIZE[1]), 16, row * 16 + low * 16), colours=of_fives)
    table = b"".join(bytes((*colour[::-1], 0)) for colour in COLOURS)
    run_length = b"".join(bytes((24, first, 24, first + 1, 0, 0)) for first in (2,) * 16 + (0,) * 16) + b"\0\1"
    yield Case("BMP run-length", lambda: bmp(SIZE, 8, run_length, 1, table), size=SIZE, colours=COLOURS)
    half_bytes = b"".join(bytes((24, f * 17, 24, (f + 1) * 17, 0, 0)) for f in (2,) * 16 + (0,) * 16) + b"\0\1"
    yield Case("BMP run-length 4 bits", lambda: bmp(SIZE, 4, half_bytes, 2, table), size=SIZE, colours=COLOURS)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    long_header = struct.pack("<IiiHHIIiiII", 108, *SIZE, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    clear_rows = np.asarray(clear)[::-1, :, [2, 1, 0, 3]].tobytes()
    yield Case(
        "BMP with alpha",
        lambda: b"BM" + struct.pack("<IHHI", 0, 0, 0, 122) + long_header.ljust(108, b"\0") + clear_rows,
        size=SIZE,
        colours=over_white,
    )
    os2 = struct.pack("<IHHHH", 12, *SIZE, 1, 24) + b"\x10\x20\x30" * (SIZE[0] * SIZE[1])
    yield Case(
        "BMP of OS/2",
        lambda: b"BM" + struct.pack("<IHHI", 14 + len(os2), 0, 0, 26) + os2,
        colours=((0x30, 0x20, 0x10),) * 4,
    )


# How a picture is stored that an orientation turns upright
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def orientations() -> Iterator[Case]:
    """Upright pictures give the same pixels, whatever their orientation."""
    picture = quarters()
    for number, turn in STORED.items():
        stored = picture.transpose(turn) if turn is not None else picture
        for order in "<>":
            block = exif([number], order)
            for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
                data = {"exif": b"Exif\0\0" + block if kind == "WEBP" else block}
                if kind == "TIFF":
                    data = {"tiffinfo": {274: number}, "compression": "raw" if order == "<" else "tiff_lzw"}
                yield Case(
                    f"{kind} orientation {number} {order}",
                    lambda s=stored, k=kind, o={**options, **data}: saved(s, k, **o),
                    size=SIZE,
                    digest=digest(picture),
                )
            yield Case(
                f"JPEG orientation {number} {order}",
                lambda s=stored, b=block: jpeg(s, segment(0xE1, b"Exif\0\0" + b), subsampling=0),
                size=SIZE,
                colours=COLOURS,
                tolerance=12,
            )
    turned = quarters().transpose(Image.Transpose.ROTATE_90)
    for profile in (b"odd", b"even"):
        yield Case(
            f"WEBP orientation behind an {profile.decode()} chunk",
            lambda p=profile: saved(turned, "WEBP", lossless=True, icc_profile=p, exif=b"Exif\0\0" + exif([6])),
            size=SIZE,
            digest=digest(picture),
        )
    late = saved(turned, "PNG")
    yield Case(
        "PNG orientation after the picture",
        lambda: late[:-12] + chunk(b"eXIf", exif([6])) + late[-12:],
        size=SIZE,
        digest=digest(picture),
    )


def odd_exif() -> Iterator[Case]:
    """EXIF that makes no sense turns nothing and breaks nothing."""
    rationals = struct.pack("<II", 1, 1) * 500_000
    blocks: dict[str, bytes] = {
        "empty": b"",
        "zero": exif([0]),
        "nine": exif([9]),
        "65535": exif([65535]),
        "two values": exif([6, 6]),
        "text": exif(b"6\0", kind=2),
        "half a million ratios": exif(rationals, kind=RATIONAL),
        "no directory": b"II*\0\xff\xff\xff\xff",
        "directory in itself": b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(12),
        "not a directory": b"not EXIF at all",
        "cut off": exif([6])[:24],
        "loop": tiff([(34665, LONG, [8]), (274, SHORT, [1])], following=16),
        "ratios elsewhere": tiff([(274, SHORT, [1]), (34665, LONG, [16])], rationals),
    }
    picture = quarters()
    for name, block in blocks.items():
        yield Case(
            f"PNG EXIF {name}",
            lambda b=block: png(SIZE, png_rows(samples(8), 8), before=chunk(b"eXIf", b)),
            digest=digest(picture),
        )
        if len(block) < 60_000:
            yield Case(
                f"JPEG EXIF {name}",
                lambda b=block: jpeg(picture, segment(0xE1, b"Exif\0\0" + b)),
                colours=COLOURS,
                tolerance=12,
            )
        yield Case(
            f"WEBP EXIF {name}",
            lambda b=block: saved(picture, "WEBP", lossless=True, exif=b"Exif\0\0" + b),
            digest=digest(picture),
        )


def odd_profiles() -> Iterator[Case]:
    """A colour profile that makes no sense changes nothing, costs little and breaks nothing."""
    picture = quarters()
    profiles = {
        "empty": b"",
        "text": b"no profile",
        "zeros": bytes(4096),
        "large": random.Random(1).randbytes(3 * 2**20),
    }
    for name, profile in profiles.items():
        yield Case(
            f"PNG profile {name}", lambda p=profile: saved(picture, "PNG", icc_profile=p), digest=digest(picture)
        )
        if len(profile) < 60_000:
            yield Case(
                f"JPEG profile {name}", lambda p=profile: jpeg(picture, icc_profile=p), colours=COLOURS, tolerance=12
            )
        yield Case(
            f"WEBP profile {name}",
            lambda p=profile: saved(picture, "WEBP", lossless=True, icc_profile=p),
            digest=digest(picture),
        )
        yield Case(
            f"TIFF profile {name}", lambda p=profile: saved(picture, "TIFF", icc_profile=p), digest=digest(picture)
        )
    not_compressed = chunk(b"iCCP", b"x\0\0not compressed")
    yield Case("PNG profile not compressed", lambda: deep_png(8, 2, before=not_compressed), digest=digest(picture))
    pieces = b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([1 + n % 3, 9]) + bytes(100)) for n in range(5))
    for name, profile in (
        ("RGB", icc_profiles.matrix(icc_profiles.ADOBE, 2.2)),
        ("inks", icc_profiles.inks()),
        ("grey", icc_profiles.grey(1.8)),
    ):
        mode = {"RGB": "RGB", "inks": "CMYK", "grey": "L"}[name]
        for number in range(40):
            rng = random.Random(f"{name} {number}")
            damaged = bytearray(profile)
            for _ in range(rng.choice((1, 4, 30))):
                damaged[rng.randrange(len(damaged) if number % 2 else 300)] = rng.choice((0, 1, 127, 128, 255))
            damaged = damaged[: rng.choice((len(damaged), len(damaged), rng.randrange(len(damaged))))]
            yield Case(
                f"TIFF {name} profile damaged {number}",
                lambda m=mode, d=bytes(damaged): saved(picture.convert(m), "TIFF", icc_profile=d),
                size=SIZE,
            )
    yield Case(
        "TIFF of 30 million inks with a profile",
        lambda: saved(Image.new("CMYK", (6000, 5000)), "TIFF", compression="zstd", icc_profile=icc_profiles.inks()),
        size=(6000, 5000),
        colours=(WHITE,) * 4,
    )
    yield Case("JPEG profile in odd pieces", lambda: jpeg(picture, pieces), colours=COLOURS, tolerance=12)


def several_frames() -> Iterator[Case]:
    """Of an animation or several pages the first is taken."""
    first = quarters()
    later = [Image.new("RGB", SIZE, colour) for colour in ("black", "yellow", "purple")]
    together: dict[str, Any] = {"save_all": True, "append_images": later}
    for kind, options in (
        ("GIF", {"duration": 50, "loop": 0}),
        ("WEBP", {"lossless": True, "duration": 50}),
        ("PNG", {"duration": 50}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        yield Case(
            f"{kind} of four frames {options.get('compression', '')}",
            lambda k=kind, o=options: saved(first, k, **together, **o),
            size=SIZE,
            digest=digest(first),
        )
    yield Case(
        "PNG of four frames, the first apart",
        lambda: saved(first, "PNG", **together, default_image=True),
        digest=digest(first),
    )
    yield Case(
        "JPEG of two pictures",
        lambda: saved(first, "MPO", save_all=True, append_images=later[:1], quality=95),
        colours=COLOURS,
        tolerance=12,
    )
    yield Case("JPEG with a film behind it", lambda: jpeg(first) + b"ftypmp42" + random.Random(2).randbytes(2**20))
    yield Case("WEBP of many frames", lambda: webp_frames(200_000), size=(8, 8))
    preview = segment(0xE1, b"Exif\0\0" + exif([1]) + jpeg(first.resize((24, 16))))
    yield Case("JPEG with a preview", lambda: jpeg(first, preview), size=SIZE, colours=COLOURS, tolerance=12)


def whole_files() -> dict[str, bytes]:
    """A file of each kind with enough in it to be cut and damaged."""
    noise = Image.effect_noise((120, 80), 60).convert("RGB")
    return {
        "PNG": saved(noise, "PNG"),
        "JPEG": saved(noise, "JPEG"),
        "JPEG progressive": saved(noise, "JPEG", progressive=True),
        "WEBP": saved(noise, "WEBP"),
        "WEBP lossless": saved(noise, "WEBP", lossless=True),
        "GIF": saved(noise, "GIF"),
        "BMP": saved(noise, "BMP"),
        "TIFF": saved(noise, "TIFF"),
        "TIFF packed": saved(noise, "TIFF", compression="tiff_lzw"),
    }


def truncations() -> Iterator[Case]:
    for name, data in whole_files().items():
        for part in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
            length = int(len(data) * part)
            yield Case(f"{name} cut at {part:.0%}", lambda d=data, n=length: d[:n], (UNREADABLE,))
        for length in (1, 3, 7, 11, 20, 30):
            codes = (FORMAT,) if length < 3 else (FORMAT, UNREADABLE)
            yield Case(f"{name} cut after {length} bytes", lambda d=data, n=length: d[:n], codes)
        for missing in (1, 4, 12):
            codes = (ANSWER, UNREADABLE)
            yield Case(f"{name} without the last {missing} bytes", lambda d=data, n=missing: d[:-n], codes)


def damages(each: int = 6) -> Iterator[Case]:
    """Bytes changed at random: an answer or a refusal, and nothing else."""
    for name, data in whole_files().items():
        for number in range(each):
            rng = random.Random(f"{name} {number}")
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 3, 20))):
                damaged[rng.randrange(12, min(len(data), 200) if number % 2 else len(data))] = rng.randrange(256)
            yield Case(f"{name} damaged {number}", lambda d=bytes(damaged): d, (ANSWER, UNREADABLE, TOO_LARGE))


def wrong_names() -> Iterator[Case]:
    picture = quarters()
    for kind, suffix in (
        ("PNG", ".jpg"), ("JPEG", ".png"), ("WEBP", ".gif"), ("GIF", ".tiff"), ("BMP", ".webp"), ("TIFF", ".txt"),
    ):  # fmt: skip
        yield Case(f"{kind} named {suffix}", lambda k=kind: saved(picture, k), size=SIZE, suffix=suffix)
    yield Case("PDF named .png", lambda: b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n<<>>\nendobj\n", (FORMAT,), suffix=".png")


def no_images() -> Iterator[Case]:
    others: dict[str, bytes] = {
        "SVG": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "SVG that includes a file": b"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/hostname'>]><svg>&e;</svg>",
        "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "text": "Grüße".encode(),
        "JSON": b'{"error": "no such picture"}',
        "a script": b"#!/bin/sh\nexit 0\n",
        "a program": b"\x7fELF" + bytes(60),
        "gzip": gzip.compress(saved(quarters(), "PNG")),
        "zeros": bytes(1000),
        "noise": random.Random(3).randbytes(5000).replace(b"BM", b"bm"),
        "one byte": b"\x89",
        "WAVE": b"RIFF\x24\0\0\0WAVEfmt ",
        "PPM": b"P6 4 4 255\n" + bytes(48),
        "ICO": saved(quarters((32, 32)), "ICO"),
        "TGA": saved(quarters(), "TGA"),
        "PCX": saved(quarters(), "PCX"),
        "DDS": saved(quarters(), "DDS"),
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
        "MP4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(40),
        "PSD": b"8BPS\0\1" + bytes(40),
    }  # fmt: skip
    for feature, kind in (("jpg_2000", "JPEG2000"), ("avif", "AVIF")):
        if features.check(feature):
            others[kind] = saved(quarters(), kind)
    for name, data in others.items():
        yield Case(f"not an image: {name}", lambda d=data: d, (FORMAT,))
    yield Case("not an image: empty", lambda: b"", (UNREADABLE,))
    starts = (
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"RIFF\0\0\0\0WEBP",
    )
    for start in starts:
        yield Case(f"only the first bytes of {start[:4]!r}", lambda s=start: s, (UNREADABLE,))
        yield Case(
            f"{start[:4]!r} and noise", lambda s=start: s + random.Random(4).randbytes(3000), (UNREADABLE, TOO_LARGE)
        )


@functools.cache
def zeros(count: int = 250_000_000) -> bytes:
    """So many zeros in few bytes."""
    return zlib.compress(bytes(count), 1)


def nested_zip() -> bytes:
    data = bytes(MEBIBYTE)
    for _ in range(12):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", data)
        data = stream.getvalue()
    return data


def bombs() -> Iterator[Case]:
    """Small files that ask for much, and large ones that ask for many small steps."""
    small = Image.new("L", SIZE)
    huge = (50_000, 50_000)
    full = 32 * MEBIBYTE - 4096
    yield Case("PNG declares 50,000 x 50,000", lambda: png(huge, bytes(9), 8, 6), (TOO_LARGE,))
    yield Case("PNG declares 2 G x 2 G", lambda: png((2**31 - 1,) * 2, bytes(9), 8, 6), (TOO_LARGE,))
    yield Case("PNG really 50,000 x 50,000", lambda: png(huge, bytes(50_000 * 6251), 1, 0), (TOO_LARGE,))
    yield Case("PNG declares nothing", lambda: png((0, 0), b""), (UNREADABLE,))
    yield Case("JPEG declares 50,000 x 50,000", lambda: with_size(saved(small, "JPEG"), huge), (TOO_LARGE,))
    yield Case("JPEG declares nothing", lambda: with_size(saved(small, "JPEG"), (0, 0)), (UNREADABLE,))
    yield Case("GIF declares 50,000 x 50,000", lambda: patched(saved(small, "GIF"), 6, "<HH", *huge), (TOO_LARGE,))
    yield Case("GIF declares nothing", lambda: patched(saved(small, "GIF"), 6, "<HH", 0, 0), (ANSWER, UNREADABLE))
    yield Case("BMP declares 50,000 x 50,000", lambda: bmp(huge, 24, bytes(99)), (TOO_LARGE,))
    yield Case("BMP declares a negative width", lambda: bmp((-40, 30), 24, bytes(9999)), (UNREADABLE, TOO_LARGE))
    yield Case("BMP declares the lowest height", lambda: bmp((40, -(2**31)), 24, bytes(99)), (TOO_LARGE, UNREADABLE))
    yield Case(
        "BMP of many short runs", lambda: bmp((8000, 5000), 8, b"\1\0" * (full // 2), 1, bytes(4)), (UNREADABLE,)
    )
    yield Case("WEBP declares 16,383 x 16,383", lambda: webp_of((16_383, 16_383)), (TOO_LARGE,))
    yield Case("WEBP declares 12,000 x 12,000", lambda: lossless_webp_of((12_000, 12_000)), (TOO_LARGE,))
    yield Case("WEBP declares another size than it has", lambda: webp_of((200, 200)), (ANSWER, UNREADABLE))
    strips = grey_tags(huge, [16], [100], huge[1])
    yield Case("TIFF declares 50,000 x 50,000", lambda: tiff(strips, bytes(100)), (TOO_LARGE,))
    for compression, name in ((1, "plain"), (5, "packed")):
        yield Case(
            f"TIFF of eight million strips, {name}",
            lambda c=compression: tiff(grey_tags((4, 4_000_000), bytes(16_000_000), bytes(16_000_000), 1, c)),
            (UNREADABLE,),
        )
        yield Case(
            f"TIFF of a tile beyond its picture, {name}",
            lambda c=compression: tiff(tile_tags((16, 16), (60_000, 60_000), [16], [100], c), bytes(100)),
            (UNREADABLE,),
        )
    yield Case(
        "TIFF of a tile that holds 49 million pixels for a small picture",
        lambda: tiff(tile_tags((16, 16), (7_000, 7_000), [16], [len(zeros(49_000_000))], 8), zeros(49_000_000)),
        (UNREADABLE,),
    )
    endless = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + bytes(4000)
    yield Case("TIFF of endless tags", lambda: endless, (UNREADABLE,))
    yield Case(
        "PNG with EXIF of endless tags",
        lambda: deep_png(8, 2, before=chunk(b"eXIf", endless)),
        digest=digest(quarters()),
    )
    yield Case(
        "TIFF of a million tiles",
        lambda: tiff(tile_tags((1_000_000, 4), (1, 4), bytes(4_000_000), [4], 1)),
        (UNREADABLE,),
    )
    mirror = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    shared = zlib.compress(bytes(800)).ljust(MEBIBYTE, b"\0").translate(mirror)  # has to be turned round each time
    yield Case(
        "TIFF of strips that share their bytes",
        lambda: tiff(
            [*grey_tags((800, 40_000), [16] * 40_000, [len(shared)] * 40_000, 1, 8), (266, SHORT, [2])], shared
        ),
        (UNREADABLE,),
    )
    ratios = struct.pack("<II", 1, 1) * 1_000_000
    plain = grey_tags((16, 16), [16], [256], 16)
    for tag in (282, 258, 34665, 700):
        yield Case(
            f"TIFF with a million ratios in tag {tag}",
            lambda t=tag: tiff([*(e for e in plain if e[0] != t), (t, RATIONAL, ratios)], bytes(256)),
            (UNREADABLE,) if tag == 258 else (ANSWER,),
        )
    yield Case(
        "TIFF with EXIF of a million ratios",
        lambda: tiff([*plain, (34665, LONG, [16 + 256])], bytes(256) + tiff([(33434, RATIONAL, ratios)])[16:]),
    )
    yield Case("TIFF whose next page is itself", lambda: tiff(plain, bytes(256), following=16 + 256))
    wide = zlib.compress(bytes(40_000_000), 9)
    yield Case(
        "TIFF of one large strip",
        lambda: tiff(grey_tags((8000, 5000), [16], [len(wide)], 5000, 8), wide),
        size=(8000, 5000),
    )

    texts: dict[str, Callable[[], bytes]] = {
        "zTXt": lambda: chunk(b"zTXt", b"a\0\0" + zeros()),
        "iTXt": lambda: chunk(b"iTXt", b"a\0\1\0\0\0" + zeros()),
        "iCCP": lambda: chunk(b"iCCP", b"a\0\0" + zeros()),
        "many zTXt": lambda: b"".join(chunk(b"zTXt", b"a%d\0\0" % n + zeros(MEBIBYTE)) for n in range(200)),
        "zTXt in zTXt": lambda: chunk(b"zTXt", b"a\0\0" + zlib.compress(chunk(b"zTXt", b"a\0\0" + zeros()))),
    }
    for name, block in texts.items():
        yield Case(f"PNG bomb in {name}", lambda b=block: deep_png(8, 2, before=b()), digest=digest(quarters()))
        yield Case(
            f"PNG bomb in {name} at the end",
            lambda b=block: png(SIZE, png_rows(samples(8), 8), after=b()),
            digest=digest(quarters()),
        )
    yield Case("PNG bomb in its pixels", lambda: png((40, 30), bytes(250_000_000), 8, 0), size=(40, 30))
    yield Case("PNG of many chunks", lambda: deep_png(8, 2, before=chunk(b"prVt", b"") * (full // 12)), (UNREADABLE,))
    yield Case("PNG of empty data", lambda: deep_png(8, 2, before=chunk(b"IDAT", b"") * (full // 12)), (UNREADABLE,))
    red = Image.new("RGB", SIZE, "red")
    segments = {
        "fill bytes": b"\xff" * full,
        "comments of 65,533 bytes": segment(0xFE, bytes(65_533)) * (full // 65_537),
        "EXIF": segment(0xE1, b"Exif\0\0" + bytes(65_000)) * (full // 65_010),
        "profiles": segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) * (full // 65_020),
    }
    for name, block in segments.items():
        yield Case(f"JPEG full of {name}", lambda b=block: jpeg(red, b), colours=((255, 0, 0),) * 4, tolerance=4)
    yield Case("JPEG full of short comments", lambda: jpeg(red, segment(0xFE, b"") * (full // 4)), (UNREADABLE,))
    yield Case("JPEG of 20 scans", lambda: scans_jpeg((600, 400), 20), size=(600, 400))
    yield Case("JPEG of 3,000 scans", lambda: scans_jpeg((600, 400), 10_000), (UNREADABLE,))
    yield Case("large JPEG of 300 scans", lambda: with_size(scans_jpeg(SIZE, 300), (8000, 5000)), (UNREADABLE,))
    yield Case("too large JPEG of 300 scans", lambda: with_size(scans_jpeg(SIZE, 300), huge), (TOO_LARGE,))
    yield Case("GIF with a long comment", lambda: gif(b"!\xfe" + (b"\xff" + b"a" * 255) * 120_000 + b"\0"))
    yield Case("GIF with many comments", lambda: gif(b"!\xfe\1a\0" * (full // 5)), (UNREADABLE,))
    yield Case("GIF with one comment of short blocks", lambda: gif(b"!\xff" + b"\1a" * (full // 2)), (UNREADABLE,))
    yield Case("zip in zip", nested_zip, (FORMAT,))
    yield Case("more than 32 MiB", lambda: bytes(32 * MEBIBYTE + 1), (TOO_LARGE,))
    yield Case("more than 32 MiB behind a picture", lambda: deep_png(8, 2) + bytes(32 * MEBIBYTE), (TOO_LARGE,))
    yield Case("more than 32 MiB on disk", lambda: bytes(32 * MEBIBYTE + 1), (TOO_LARGE,), suffix=".png")


def webp_of(size: tuple[int, int]) -> bytes:
    """A WebP that declares a canvas and has a small picture."""
    picture = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"".join(struct.pack("<I", side - 1)[:3] for side in size)
    body = b"WEBP" + extended + picture
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lossless_webp_of(size: tuple[int, int]) -> bytes:
    """A lossless WebP with another size in its header."""
    data = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    return patched(data, 21, "<I", size[0] - 1 | size[1] - 1 << 14)


def shapes() -> Iterator[Case]:
    """Sides from one pixel to the largest that are allowed, and beyond."""
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        yield Case(f"{kind} 1x1", lambda k=kind: saved(Image.new("RGB", (1, 1), "red"), k), size=(1, 1))
    for size in ((1, 9), (9, 1), (1, 900), (900, 1), (13, 13), (14, 14), (28, 28), (29, 27), (7140, 20), (20, 7140)):
        yield Case(f"PNG {size[0]}x{size[1]}", lambda s=size: saved(Image.new("L", s), "PNG"), size=size)
    for size, fitted in (
        ((7141, 20), (7140, 19)),
        ((20, 7141), (19, 7140)),
        ((10_000, 10), (7140, 7)),
        ((10, 10_000), (7, 7140)),
        ((30_000, 3), (7140, 1)),
        ((1_000_000, 40), (7140, 1)),
        ((40, 1_000_000), (1, 7140)),
    ):
        raw = Image.new("1", size)
        yield Case(f"PNG {size[0]}x{size[1]}", lambda i=raw: saved(i, "PNG"), size=fitted)
    for size in ((6325, 6325), (8000, 5001), (40_000_001, 1), (1, 40_000_001), (1_000_001, 1), (1, 1_000_001)):
        yield Case(f"PNG {size[0]}x{size[1]}", lambda s=size: png(s, b"", 1, 0), (TOO_LARGE,))


@dataclass(frozen=True)
class _Large:
    """40 million pixels that cost little to make."""

    size: tuple[int, int] = (8000, 5000)
    rows: dict[int, bytes] = field(default_factory=dict)

    def image(self, mode: str) -> Image.Image:
        band = np.linspace(0, 255, self.size[0]).astype(np.uint8)
        return Image.fromarray(np.broadcast_to(band, self.size[::-1]).copy()).convert(mode)

    def png(self, depth: int, kind: int, before: bytes = b"") -> bytes:
        width, height = self.size
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
        row = b"\0" + bytes(range(256)) * (width * channels * depth // 8 // 256 + 1)
        row = row[: 1 + width * channels * depth // 8]
        return png(self.size, row * height, depth, kind, before=before)


def large() -> Iterator[Case]:
    """The largest pictures that are allowed, in the modes that cost most."""
    most = _Large()
    size = most.size
    for depth, kind, name in ((8, 2, "RGB"), (8, 6, "RGBA"), (16, 0, "16 bits"), (16, 6, "RGBA 16 bits")):
        yield Case(f"PNG {name} of 40 million pixels", lambda d=depth, k=kind: most.png(d, k), size=size)
    turned = segment(0xE1, b"Exif\0\0" + exif([6]))
    yield Case("JPEG of 40 million pixels, turned", lambda: jpeg(most.image("RGB"), turned), size=(size[1], size[0]))
    yield Case(
        "JPEG CMYK progressive of 40 million pixels",
        lambda: jpeg(most.image("CMYK"), subsampling=0, progressive=True),
        size=size,
    )
    yield Case("WEBP of 40 million pixels", lambda: saved(most.image("RGB"), "WEBP", quality=30, method=0), size=size)
    yield Case("TIFF F of 40 million pixels", lambda: saved(most.image("F"), "TIFF", compression="zstd"), size=size)


def grey_tiffs() -> Iterator[Case]:
    """Grey TIFFs of odd samples: large ones within the bounds, and directories that make no sense."""
    size = (8000, 5000)

    def zeros(bits: int, kind: int = 1, channels: int = 1, tags: tuple[Tag, ...] = ()) -> bytes:
        body = zlib.compress(bytes(size[0] * size[1] * bits // 8 if bits < 64 and channels == 1 else 100), 1)
        own = [(258, SHORT, [bits] * channels), (277, SHORT, [channels]), (339, SHORT, [kind] * channels), *tags]
        rest = [tag for tag in grey_tags(size, [16], [len(body)], size[1], 8) if tag[0] not in {t[0] for t in own}]
        return tiff([*rest, *own], body)

    for bits, kind, name in ((12, 1, "12 bits"), (32, 3, "float")):
        yield Case(
            f"TIFF of 40 million grey samples, {name}",
            lambda b=bits, k=kind: zeros(b, k),
            size=size,
            colours=(BLACK,) * 4,
        )
    yield Case("TIFF of 40 million long floats", lambda: zeros(64, 3), (TOO_LARGE,))
    yield Case("TIFF of 40 million of many samples", lambda: zeros(8, 1, 16), (TOO_LARGE,))
    yield Case("TIFF of a predictor of floats", lambda: zeros(32, 3, tags=((317, SHORT, [3]),)), colours=(BLACK,) * 4)
    level = bytes(quarters().convert("L").tobytes())
    good = grey_tags(SIZE, [16], [len(level)], SIZE[1])
    for name, tag, codes in (
        ("no samples", (277, SHORT, [0]), (UNREADABLE,)),
        ("many samples", (277, LONG, [2**31]), (UNREADABLE,)),
        ("bits of none", (258, SHORT, [0]), (FORMAT,)),
        ("many bits", (258, SHORT, [65535]), (FORMAT,)),
        ("alpha of no sample", (338, SHORT, [2]), (UNREADABLE,)),
        ("no width", (256, LONG, [0]), (UNREADABLE,)),
        ("too wide", (256, LONG, [2**32 - 1]), (TOO_LARGE,)),
        ("too high", (257, LONG, [2**32 - 1]), (TOO_LARGE,)),
        ("tiles of no width", (322, LONG, [0]), (UNREADABLE,)),
        ("strange samples", (339, SHORT, [9]), (FORMAT,)),
    ):
        tags = [other for other in good if other[0] != tag[0]]
        yield Case(f"grey TIFF, {name}", lambda t=(*tags, tag): tiff(list(t), level), codes)
    deep = [tag for tag in good if tag[0] not in (258, 279)] + [(258, SHORT, [12]), (279, LONG, [2304])]
    whole = tiff(deep, level + level[:768])
    for number in range(40):
        rng = random.Random(f"grey {number}")
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 3, 10))):
            damaged[rng.randrange(2320 if number % 4 else 4, len(whole))] = rng.choice((0, 1, 2, 8, 127, 255))
        yield Case(
            f"grey TIFF damaged {number}",
            lambda d=bytes(damaged): d,
            (ANSWER, UNREADABLE, TOO_LARGE, FORMAT),
        )


GROUPS = (
    modes, grey_tiffs, orientations, odd_exif, odd_profiles, several_frames, truncations, damages, wrong_names,
    no_images, bombs, shapes, large,
)  # fmt: skip


def corpus() -> list[Case]:
    return [case for group in GROUPS for case in group()]
