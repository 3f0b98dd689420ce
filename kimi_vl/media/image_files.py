"""Image files as bytes: the format by content, orientation, ICC profile, and a copy with only what decoding needs.

Text, previews and further pages are removed before a decoder sees the file, since reading them can cost far more than
the image itself, and anybody may send such a file. Knows no pixels. Raises ``ValueError`` for what breaks a limit here;
damage is left to the decoder.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from . import icc
from .tiff_samples import GreySamples

MAX_BYTES = 32 * 2**20
"""The largest file."""
MAX_PARTS = 100_000
"""The most chunks or segments of a file."""
MAX_VALUES = 50_000
"""The most values of one TIFF tag, such as its strips or tiles, each of which costs a decoder tens of microseconds."""
MAX_TILE_PIXELS = 40_000_000
"""The largest TIFF tile, which may be larger than its image."""


_PNG, _JPEG, _BMP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"
_GIF, _TIFF = (b"GIF87a", b"GIF89a"), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STARTS = (_PNG, _JPEG, _BMP, *_GIF, *_TIFF)


class UnsupportedError(ValueError):
    """An undamaged file of a kind that is not supported."""


@dataclass(frozen=True)
class ImageFile:
    """A file reduced to what decoding needs.

    ``orientation`` is that of EXIF, 1 to 8. Each of the ``scans`` of a JPEG covers the whole image. ``profile`` is the
    ICC profile, empty without one. A WebP may be ``animated``. For a TIFF with ``grey`` samples, ``data`` declares each
    of their bytes a pixel, and so does ``alpha``, a file for alpha samples in a plane of their own. A TIFF that is not
    ``whole`` lacks tags that a decoder needs.
    """

    format: str
    data: bytes
    orientation: int = 1
    scans: int = 1
    profile: bytes = b""
    animated: bool = False
    grey: GreySamples | None = None
    alpha: bytes = b""
    whole: bool = True


def is_image(head: bytes) -> bool:
    """Whether a file that begins so is of a format that :func:`read` knows."""
    return head.startswith(_STARTS) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")


def read(data: bytes) -> ImageFile | None:
    """The parts of ``data`` that decoding needs; None for an unknown format."""
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith(_GIF):
        return ImageFile("GIF", data)
    if data.startswith(_TIFF):
        return _tiff(data)
    if data.startswith(_BMP):
        return ImageFile("BMP", data, profile=_bmp_profile(data))
    return None


def _png(data: bytes) -> ImageFile:
    kept, exif, profile, at = [data[:8]], b"", b"", 8
    for _ in range(MAX_PARTS):
        header = data[at : at + 8]
        if len(header) < 8:
            break
        kind, end = header[4:], at + 12 + int.from_bytes(header[:4], "big")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        elif kind == b"tRNS":
            kept.append(_png_transparency(data[at:end], kept[1][16:18] if len(kept) > 1 else b""))
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        elif kind == b"iCCP" and not profile:
            profile = _png_profile(data[at + 8 : end - 4])
        if kind == b"IEND":
            break
        at = end
    else:
        raise ValueError("too many chunks")
    return ImageFile("PNG", b"".join(kept), _orientation(exif), profile=profile)


def _png_profile(body: bytes) -> bytes:
    """The profile of an iCCP chunk: a name, a zero, the method, and compressed bytes, which may be damaged."""
    try:
        unpacked = zlib.decompressobj().decompress(body[body.index(b"\0") + 2 :], icc.MAX_BYTES + 1)
    except (ValueError, zlib.error):
        return b""
    return unpacked if len(unpacked) <= icc.MAX_BYTES else b""


def _png_transparency(chunk: bytes, depth_and_kind: bytes) -> bytes:
    """A tRNS chunk with the colour scaled to the 8-bit samples that Pillow compares it with."""
    scales = {b"\x02\x00": (85, 0), b"\x04\x00": (17, 0), b"\x10\x02": (1, 8)}  # grey of 2 and 4 bits, RGB of 16
    factor, shift = scales.get(depth_and_kind, (1, 0))
    if (factor, shift) == (1, 0) or len(chunk) % 2:
        return chunk
    samples = struct.unpack(f">{len(chunk[8:-4]) // 2}H", chunk[8:-4])
    body = b"tRNS" + struct.pack(f">{len(samples)}H", *(sample * factor >> shift & 0xFFFF for sample in samples))
    return chunk[:4] + body + struct.pack(">I", zlib.crc32(body))


# Fill bytes before a marker and stray bytes between segments are skipped, as decoders do.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_JPEG_SCAN_END = re.compile(rb"\xff(?=[^\x00\xd0-\xd7\xff])", re.DOTALL)
# frame headers, tables, restart intervals, and the two segments that tell the colours
_JPEG_KEPT = frozenset((*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE))


def _jpeg(data: bytes) -> ImageFile:
    kept, exif, scans, at = [data[:2]], b"", 0, 2
    pieces: dict[bytes, bytes] = {}
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, at)
        if found is None:
            break
        marker, at = found[1][0], found.end()
        if marker == 0xD9:
            kept.append(b"\xff\xd9")
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue  # these have no body
        begin, at = at, at + max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker == 0xDA:
            scans += 1
            ended = _JPEG_SCAN_END.search(data, at)
            at = ended.start() if ended else len(data)
        if marker in _JPEG_KEPT:
            kept.append(b"\xff%c" % marker + data[begin:at])
        elif marker == 0xE1 and not exif and data.startswith(b"Exif\0\0", begin + 2):
            exif = data[begin + 8 : at]
        elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", begin + 2):
            # a number and how many there are stand before each piece
            pieces.setdefault(data[begin + 14 : begin + 15], data[begin + 16 : at])
    else:
        raise ValueError("too many segments")
    return ImageFile("JPEG", b"".join(kept), _orientation(exif), max(1, scans), _joined(pieces))


def _joined(pieces: dict[bytes, bytes]) -> bytes:
    return b"".join(piece for _, piece in sorted(pieces.items()))


def _webp(data: bytes) -> ImageFile:
    exif = _webp_chunk(data, b"EXIF").removeprefix(b"Exif\0\0")
    animated = data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 2)
    return ImageFile("WEBP", data, _orientation(exif), profile=_webp_chunk(data, b"ICCP"), animated=animated)


def _webp_chunk(data: bytes, kind: bytes) -> bytes:
    at = 12
    for _ in range(1000):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data.startswith(kind, at):
            return data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    return b""


def _bmp_profile(data: bytes) -> bytes:
    """The embedded profile of a version 5 header, whose offset counts from that header."""
    if data[14:18] != b"\x7c\0\0\0" or data[70:74] != b"DEBM":
        return b""
    begin, size = struct.unpack("<II", data[126:134].ljust(8, b"\0"))
    return data[14 + begin : 14 + begin + min(size, icc.MAX_BYTES + 1)]


# The tags that a TIFF's pixels depend on; everything else, other pages included, is removed.
_TIFF_KEPT_TAGS = (
    "256 257 258 259 262 266 273 277 278 279 284 292 293 317 320 322 323 324 325 332 338 339 347 "
    "512 513 514 515 517 518 519 520 521 529 530 531 532 34925 50674"
)
_TIFF_KEPT = frozenset(map(int, _TIFF_KEPT_TAGS.split()))
_TIFF_COMPRESSION, _TIFF_ORIENTATION, _TIFF_PROFILE = 259, 274, 34675
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_TIFF_WIDTH, _TIFF_LENGTH, _TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_CHANNELS = 256, 257, 258, 262, 277
_TIFF_PLANAR, _TIFF_PREDICTOR, _TIFF_EXTRA_SAMPLES, _TIFF_SAMPLE_FORMAT = 284, 317, 338, 339
_TIFF_PARTS = (273, 324)  # offsets of strips or tiles
_TIFF_BYTE_COUNTS = (279, 325)
_TIFF_LAYOUT = (257, 259, 266, 273, 278, 279, 323, 324, 325)  # the tags that stay when bytes become pixels
_TIFF_OF_BYTES = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, packbits, deflate, LZMA, zstd
_TIFF_PREDICTED = (5, 8, 32946, 34925, 50000)
_TIFF_BYTE_KINDS = (1, 2, 7)  # BYTE, ASCII, UNDEFINED
_TIFF_INTEGER_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8


@dataclass(frozen=True)
class _Entry:
    """One entry of a TIFF directory."""

    tag: int
    kind: int
    count: int
    raw: bytes

    def integers(self, data: bytes, order: str, inline: int) -> tuple[int, ...]:
        """The integer values of a tag, which are in the entry itself if they fit into ``inline`` bytes."""
        code = _TIFF_INTEGER_CODES.get(self.kind, "B")
        value = self.raw[-inline:]
        if self.count * struct.calcsize(code) > inline:
            at = int.from_bytes(value, "little" if order == "<" else "big")
            return struct.unpack_from(f"{order}{self.count}{code}", data, at)
        return struct.unpack_from(f"{order}{self.count}{code}", value)


def _directory(data: bytes) -> tuple[str, int, list[_Entry]]:
    """Byte order, the size of an offset, and the entries of a TIFF's first directory."""
    order = "<" if data[:2] == b"II" else ">"
    inline = 8 if data[2:4] in (b"+\0", b"\0+") else 4
    offset_code, count_code, entry_code = ("Q", "Q", "HHQ8s") if inline == 8 else ("I", "H", "HHI4s")
    (at,) = struct.unpack_from(order + offset_code, data, inline)
    (entries,) = struct.unpack_from(order + count_code, data, at)
    if entries > 4096:
        raise ValueError("too many tags")
    at += struct.calcsize(order + count_code)
    size = struct.calcsize(order + entry_code)
    rows = [data[begin : begin + size] for begin in range(at, at + entries * size, size)]
    found = []
    for row in rows:
        tag, kind, count, _ = struct.unpack(order + entry_code, row)
        found.append(_Entry(tag, kind, count, row))
    return order, inline, found


def _tiff(data: bytes) -> ImageFile:
    """The first page with only the tags that its pixels depend on, in a new directory at the end of the file."""
    try:
        order, inline, entries = _directory(data)
        kept = [entry for entry in entries if entry.tag in _TIFF_KEPT]
        _check_tiff(data, order, inline, kept)
    except struct.error:
        raise ValueError("the directory is cut off") from None
    profile = next((_undefined(entry, data, order, inline) for entry in entries if entry.tag == _TIFF_PROFILE), b"")
    turn = _turn(entries, order, inline)
    grey = _grey_samples(data, order, inline, kept)
    if grey is None:
        whole = _is_whole(data, order, inline, kept)
        return ImageFile("TIFF", _with_directory(data, order, inline, kept), turn, profile=profile, whole=whole)
    planes = 1 if grey.channels > 1 else _scalar(data, order, inline, kept, _TIFF_CHANNELS, 1)
    picture = _with_directory(data, order, inline, _as_bytes(data, order, inline, kept, grey, planes, 0))
    alpha = b""
    if grey.alpha and planes > 1:
        apart = _as_bytes(data, order, inline, kept, grey, planes, grey.alpha_channel)
        alpha = _with_directory(data, order, inline, apart)
    return ImageFile("TIFF", picture, turn, profile=profile, grey=grey, alpha=alpha)


def _is_whole(data: bytes, order: str, inline: int, entries: list[_Entry]) -> bool:
    """Whether the tags that a decoder needs are there and valid, so that it refuses only unsupported files."""
    try:
        values = {e.tag: e.integers(data, order, inline) for e in entries if e.kind in _TIFF_INTEGER_CODES}
    except struct.error:
        return False
    channels, bits = sum(values.get(_TIFF_CHANNELS, (1,))), values.get(_TIFF_BITS, (1,))
    sized = all(sum(values.get(tag, ())) > 0 for tag in (_TIFF_WIDTH, _TIFF_LENGTH))
    return (
        sized
        and not values.keys().isdisjoint(_TIFF_PARTS)
        and channels <= 16
        and len(bits) in (1, channels)
        and all(1 <= size <= 64 for size in bits)
    )


def _with_directory(data: bytes, order: str, inline: int, entries: list[_Entry]) -> bytes:
    """The file with a directory of these entries at its end, which replaces its own."""
    directory = len(data) + len(data) % 2
    number = struct.Struct(order + ("Q" if inline == 8 else "I"))
    parts = [data[:inline], number.pack(directory), data[2 * inline :], b"\0" * (len(data) % 2)]
    parts += [struct.pack(order + ("Q" if inline == 8 else "H"), len(entries)), *(entry.raw for entry in entries)]
    return b"".join((*parts, number.pack(0)))


def _scalar(data: bytes, order: str, inline: int, entries: list[_Entry], tag: int, default: int) -> int:
    return next((entry.integers(data, order, inline)[0] for entry in entries if entry.tag == tag), default)


def _grey_samples(data: bytes, order: str, inline: int, entries: list[_Entry]) -> GreySamples | None:
    """The samples of a grey TIFF without image compression such as JPEG; None for any other."""

    def scalar(tag: int, default: int) -> int:
        return _scalar(data, order, inline, entries, tag, default)

    def values(tag: int, default: int) -> set[int]:
        return {v for entry in entries if entry.tag == tag for v in entry.integers(data, order, inline)} or {default}

    photometric, compression = scalar(_TIFF_PHOTOMETRIC, 0), scalar(_TIFF_COMPRESSION, 1)
    width, height = scalar(_TIFF_WIDTH, 0), scalar(_TIFF_LENGTH, 0)
    channels = scalar(_TIFF_CHANNELS, 1)
    if photometric not in (0, 1) and scalar(_TIFF_PLANAR, 1) == 2 and channels > 1 and scalar(_TIFF_BITS, 1) > 8:
        raise UnsupportedError("Pillow takes them for single bits")
    if photometric not in (0, 1) or compression not in _TIFF_OF_BYTES or not width or not height:
        return None
    bits, kinds = values(_TIFF_BITS, 1), values(_TIFF_SAMPLE_FORMAT, 1)
    extra = next((e.integers(data, order, inline) for e in entries if e.tag == _TIFF_EXTRA_SAMPLES), ())
    alpha = next((at for at, meaning in enumerate(extra) if meaning in (1, 2)), None)
    found = GreySamples(
        width,
        height,
        min(bits),
        min(kinds),
        1 if scalar(_TIFF_PLANAR, 1) == 2 else channels,
        scalar(_TIFF_TILE_WIDTH, width),
        photometric == 0,
        order == ">",
        scalar(_TIFF_PREDICTOR, 1) if compression in _TIFF_PREDICTED else 1,
        0 if alpha is None else extra[alpha],
        1 if alpha is None else alpha + 1,
    )
    if not found.block or not 1 <= channels <= 16 or (found.alpha and found.alpha_channel >= channels):
        raise ValueError("the samples make no sense")
    if len(bits) > 1 or len(kinds) > 1 or not found.supported():
        raise UnsupportedError("samples of this kind")
    return found


def _as_bytes(
    data: bytes, order: str, inline: int, entries: list[_Entry], grey: GreySamples, planes: int, plane: int
) -> list[_Entry]:
    """Entries that declare each byte of ``grey`` a pixel, for one of the planes."""
    replaced = {_TIFF_WIDTH: grey.row_bytes, _TIFF_BITS: 8, _TIFF_PHOTOMETRIC: 1, _TIFF_TILE_WIDTH: grey.block_bytes}
    number = struct.Struct(order + "I")
    kept = []
    present = {entry.tag for entry in entries}
    for tag, value in replaced.items():
        if tag in present or tag != _TIFF_TILE_WIDTH:
            raw = struct.pack(order + ("HHQ" if inline == 8 else "HHI"), tag, 4, 1) + number.pack(value)
            kept.append(_Entry(tag, 4, 1, raw.ljust(len(entries[0].raw), b"\0")))
    for entry in entries:
        if entry.tag in (*_TIFF_PARTS, *_TIFF_BYTE_COUNTS) and planes > 1:
            kept.append(_slice(entry, data, order, inline, planes, plane))
        elif entry.tag in _TIFF_LAYOUT:
            kept.append(entry)
    return sorted(kept, key=lambda entry: entry.tag)


def _slice(entry: _Entry, data: bytes, order: str, inline: int, planes: int, plane: int) -> _Entry:
    """An entry with the values of one of so many planes, which are moved only if they fit into the entry."""
    count, rest = divmod(entry.count, planes)
    if rest:
        raise ValueError("the planes differ")
    code = _TIFF_INTEGER_CODES.get(entry.kind, "B")
    size = struct.calcsize(code)
    values = entry.integers(data, order, inline)[plane * count : (plane + 1) * count]
    if count * size <= inline:
        place = struct.pack(f"{order}{count}{code}", *values).ljust(inline, b"\0")
    else:
        word = struct.Struct(order + ("Q" if inline == 8 else "I"))
        place = word.pack(word.unpack(entry.raw[-inline:])[0] + plane * count * size)
    head = struct.pack(order + ("HHQ" if inline == 8 else "HHI"), entry.tag, entry.kind, count)
    return _Entry(entry.tag, entry.kind, count, head + place)


def _undefined(entry: _Entry, data: bytes, order: str, inline: int) -> bytes:
    at = int.from_bytes(entry.raw[-inline:], "little" if order == "<" else "big")
    return data[at : at + min(entry.count, icc.MAX_BYTES + 1)] if entry.kind in _TIFF_BYTE_KINDS else b""


def _check_tiff(data: bytes, order: str, inline: int, entries: list[_Entry]) -> None:
    tile = 1
    for entry in entries:
        if entry.kind not in _TIFF_BYTE_KINDS and entry.count > MAX_VALUES:
            raise ValueError("a tag has too many values")
        if entry.tag in (_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH):
            tile *= sum(entry.integers(data, order, inline))
        if entry.tag in _TIFF_BYTE_COUNTS:
            # parts that share bytes would let a small file cause any amount of work
            counts = entry.integers(data, order, inline)
            if sum(min(count, len(data)) for count in counts) > 2 * len(data):
                raise ValueError("the parts of the picture overlap")
            # in a TIFF with JPEG inside, each part may have scans of its own
            if data.count(b"\xff\xda") > 32 * len(counts) and _is_jpeg(data, order, inline, entries):
                raise ValueError("too many scans")
    if tile > MAX_TILE_PIXELS:
        raise ValueError("a tile is too large")


def _is_jpeg(data: bytes, order: str, inline: int, entries: list[_Entry]) -> bool:
    return any(set(e.integers(data, order, inline)) & {6, 7} for e in entries if e.tag == _TIFF_COMPRESSION)


def _orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, which has the layout of a TIFF; 1 without a valid one."""
    try:
        order, inline, entries = _directory(exif)
    except (struct.error, ValueError):
        return 1
    return _turn(entries, order, inline)


def _turn(entries: list[_Entry], order: str, inline: int) -> int:
    for entry in entries:
        if entry.tag == _TIFF_ORIENTATION and entry.kind in (1, 3, 4) and entry.count == 1:
            (value,) = entry.integers(b"", order, inline)
            return value if 1 <= value <= 8 else 1
    return 1
