"""PDF documents that are made for the tests, byte by byte: every page shows its number as black and white blocks."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .films import BITS, COLUMNS, LINES, MARK, Film, picture, still

ID = b"0123456789abcdef"
PADDING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")


@dataclass(frozen=True)
class Page:
    """``size`` in points before it is turned; ``turn`` clockwise, in degrees; the number is drawn upright inside
    ``crop`` (left, bottom, right, top), or all of it."""

    number: int
    size: tuple[float, float] = (400, 320)
    turn: int = 0
    crop: tuple[float, float, float, float] | None = None
    origin: tuple[float, float] = (0, 0)
    extra: str = ""
    inherited: bool = False

    def content(self) -> bytes:
        bits = np.array([*MARK, *((self.number >> bit) & 1 for bit in range(BITS))]).reshape(LINES, COLUMNS)
        blocks = np.rot90(bits, self.turn // 90)
        left, bottom, right, top = self.crop or (
            *self.origin,
            *(o + s for o, s in zip(self.origin, self.size, strict=True)),
        )
        width, height = (right - left) / blocks.shape[1], (top - bottom) / blocks.shape[0]
        drawn = [f"0.5 g {self.origin[0]} {self.origin[1]} {self.size[0]} {self.size[1]} re f"] if self.crop else []
        for line, values in enumerate(blocks):
            for column, value in enumerate(values):
                x, y = left + column * width, top - (line + 1) * height
                drawn.append(f"{value} g {x:.3f} {y:.3f} {width:.3f} {height:.3f} re f")
        return "\n".join(drawn).encode()

    def box(self) -> str:
        x, y = self.origin
        return f"[{x} {y} {x + self.size[0]} {y + self.size[1]}]"


@dataclass(frozen=True)
class Paper:
    """Pages, and what is odd about the file; ``password`` locks it by RC4 or, with ``aes``, says that it is AES."""

    pages: Sequence[Page]
    catalog: str = ""
    objects: dict[int, str] = field(default_factory=dict)
    password: bytes | None = None
    bits: int = 128
    aes: bool = False
    before: bytes = b""

    def made(self) -> bytes:
        inherited = self.pages[0] if self.pages and self.pages[0].inherited else None
        parent = f" /MediaBox {inherited.box()} /Rotate {inherited.turn}" if inherited else ""
        first = 10
        kids = " ".join(f"{first + 2 * at} 0 R" for at in range(len(self.pages)))
        found: dict[int, bytes] = {
            1: f"<< /Type /Catalog /Pages 2 0 R {self.catalog} >>".encode(),
            2: f"<< /Type /Pages /Kids [{kids}] /Count {len(self.pages)}{parent} >>".encode(),
            3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        }
        for at, page in enumerate(self.pages):
            own = "" if page.inherited else f" /MediaBox {page.box()} /Rotate {page.turn}"
            crop = f" /CropBox [{' '.join(map(str, page.crop))}]" if page.crop else ""
            number = first + 2 * at
            found[number] = (
                f"<< /Type /Page /Parent 2 0 R /Contents {number + 1} 0 R /Resources << /Font << /F 3 0 R >> >>"
                f"{own}{crop} {page.extra} >>"
            ).encode()
            data = self._encrypted(number + 1, page.content())
            found[number + 1] = b"<< /Length %d >>\nstream\n%s\nendstream" % (len(data), data)
        found |= {number: text.encode("latin-1") for number, text in self.objects.items()}
        trailer = b"/Root 1 0 R /ID [<%s> <%s>]" % (ID.hex().encode(), ID.hex().encode())
        if self.password is not None:
            found[4] = self._security()
            trailer += b" /Encrypt 4 0 R"
        return self.before + file(found, trailer)

    def _key(self) -> bytes:
        size = self.bits // 8
        key = hashlib.md5(_padded(self.password or b"") + self._owner() + b"\xfc\xff\xff\xff" + ID).digest()
        for _ in range(50 if size > 5 else 0):
            key = hashlib.md5(key[:size]).digest()
        return key[:size]

    def _owner(self) -> bytes:
        return rc4(hashlib.md5(_padded(b"owner")).digest()[:5], _padded(self.password or b""))

    def _security(self) -> bytes:
        key = self._key()
        if self.bits == 40:
            user, version = rc4(key, PADDING), "/V 1 /R 2"
        else:
            user = hashlib.md5(PADDING + ID).digest()
            for at in range(20):
                user = rc4(bytes(byte ^ at for byte in key), user)
            user += bytes(16)
            version = "/V 2 /R 3 /Length 128"
            if self.aes:
                filters = "/StmF /S /StrF /S /CF << /S << /CFM /AESV2 /AuthEvent /DocOpen /Length 16 >> >>"
                version = f"/V 4 /R 4 /Length 128 {filters}"
        return f"<< /Filter /Standard {version} /O <{self._owner().hex()}> /U <{user.hex()}> /P -4 >>".encode()

    def _encrypted(self, number: int, data: bytes) -> bytes:
        if self.password is None or self.aes:
            return data
        size = min(16, self.bits // 8 + 5)
        return rc4(hashlib.md5(self._key() + number.to_bytes(3, "little") + b"\0\0").digest()[:size], data)


def _padded(password: bytes) -> bytes:
    return (password + PADDING)[:32]


def rc4(key: bytes, data: bytes) -> bytes:
    state = list(range(256))
    j = 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    out = bytearray()
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def file(objects: dict[int, bytes], trailer: bytes) -> bytes:
    """Objects with a table of where they are."""
    out = bytearray(b"%PDF-1.7\n")
    places = {}
    for number in sorted(objects):
        places[number] = len(out)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, objects[number])
    begin, size = len(out), max(objects) + 1
    out += b"xref\n0 %d\n0000000000 65535 f \n" % size
    for number in range(1, size):
        out += b"%010d %05d %c \n" % ((places[number], 0, ord("n")) if number in places else (0, 1, ord("f")))
    return bytes(out + b"trailer\n<< /Size %d %s >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, begin))


def pages(count: int, **how: Any) -> list[Page]:
    return [Page(number, **how) for number in range(1, count + 1)]


def of_pictures(count: int) -> bytes:
    out = io.BytesIO()
    first, *others = [Image.fromarray(picture(number, (400, 320))) for number in range(1, count + 1)]
    first.save(out, "PDF", save_all=True, append_images=others, resolution=100)
    return out.getvalue()


def updated() -> bytes:
    """A document whose second page was replaced by an update at its end."""
    data = Paper([Page(1), Page(9)]).made()
    content = Page(2).content()
    at, previous = len(data), int(data.split(b"startxref\n")[1].split()[0])
    body = b"13 0 obj\n<< /Length %d >>\nstream\n%s\nendstream\nendobj\n" % (len(content), content)
    table = b"xref\n13 1\n%010d 00000 n \ntrailer\n<< /Size 14 /Root 1 0 R /Prev %d >>\nstartxref\n%d\n%%%%EOF\n"
    return data + body + table % (at, previous, at + len(body))


def without_a_table(data: bytes) -> bytes:
    return data[: data.index(b"xref\n")] + b"trailer\n<< /Root 1 0 R >>\n"


def looping_table() -> bytes:
    """A table that names itself as the one before."""
    data = Paper(pages(2)).made()
    begin = data.split(b"startxref\n")[1].split()[0]
    return data.replace(b"/Root 1 0 R", b"/Prev " + begin + b" /Root 1 0 R")


FORM = {
    5: "<< /Fields [6 0 R] /DA (/F 12 Tf 0 g) /DR << /Font << /F 3 0 R >> >> >>",
    6: "<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (typed) /Rect [2 2 40 20] /DA (/F 12 Tf 0 g) /P 10 0 R >>",
}
GOOD: dict[str, tuple[Callable[[], bytes], int]] = {
    "one page": (Paper(pages(1)).made, 1),
    "17 pages": (Paper(pages(17)).made, 17),
    "120 pages": (Paper(pages(120, size=(60, 48))).made, 120),
    "turned by 90": (Paper(pages(3, turn=90)).made, 3),
    "turned by 180": (Paper(pages(2, turn=180)).made, 2),
    "turned by 270": (Paper(pages(2, turn=270)).made, 2),
    "turned by all": (Paper([Page(n + 1, turn=90 * n) for n in range(4)]).made, 4),
    "a crop box": (Paper(pages(2, crop=(100, 50, 300, 210))).made, 2),
    "a crop box, turned": (Paper(pages(2, crop=(100, 50, 300, 250), turn=90)).made, 2),
    "begins elsewhere": (Paper(pages(2, origin=(-500, 1000))).made, 2),
    "boxes of the parent": (Paper(pages(3, inherited=True, turn=270)).made, 3),
    "sizes that differ": (Paper([Page(1), Page(2, (320, 400)), Page(3, (90, 1200))]).made, 3),
    "as large as allowed": (Paper([Page(1), Page(2, (14_400, 14_400))]).made, 2),
    "as small as a stamp": (Paper(pages(1, size=(20, 16))).made, 1),
    "pictures": (lambda: of_pictures(4), 4),
    "a unit that is ignored": (Paper(pages(1, extra="/UserUnit 10")).made, 1),
    "JavaScript": (
        Paper(pages(1), "/OpenAction << /S /JavaScript /JS (while (true) {}) >>", {5: "<< >>"}).made,
        1,
    ),
    "a form": (Paper(pages(1, extra="/Annots [6 0 R]"), "/AcroForm 5 0 R", FORM).made, 1),
    "a link to a file": (Paper(pages(1), "/OpenAction << /S /Launch /F (/bin/sh) >>").made, 1),
    "locked for changes alone": (Paper(pages(2), password=b"").made, 2),
    "locked so by 40 bits": (Paper(pages(2), password=b"", bits=40).made, 2),
    "an update": (updated, 2),
    "without a table": (lambda: without_a_table(Paper(pages(3)).made()), 3),
    "noise before": (Paper(pages(1), before=b"\x00noise\n" * 20).made, 1),
    "cut at the end": (lambda: Paper(pages(3)).made()[:-15], 3),
    "without sizes": (Paper(pages(2, size=(0, 0))).made, 2),
    "a table that loops": (looping_table, 2),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "E_DOCUMENT_UNREADABLE"),
    "text": (lambda: b"no document " * 200, "E_DOCUMENT_FORMAT"),
    "a picture": (still, "E_DOCUMENT_FORMAT"),
    "a film": (lambda: Film(times=(0.0,)).made(), "E_DOCUMENT_FORMAT"),
    "a head alone": (lambda: b"%PDF-1.7\n", "E_DOCUMENT_UNREADABLE"),
    "a head and text": (lambda: b"%PDF-1.7\n" + b"no document " * 200, "E_DOCUMENT_UNREADABLE"),
    "cut at the start": (lambda: Paper(pages(3)).made()[:60], "E_DOCUMENT_UNREADABLE"),
    "cut before the root": (lambda: Paper(pages(3)).made()[:-80], "E_DOCUMENT_UNREADABLE"),
    "locked by 40 bits": (Paper(pages(1), password=b"secret", bits=40).made, "E_DOCUMENT_ENCRYPTED"),
    "locked by 128 bits": (Paper(pages(1), password=b"secret").made, "E_DOCUMENT_ENCRYPTED"),
    "locked by AES": (Paper(pages(1), password=b"secret", aes=True).made, "E_DOCUMENT_ENCRYPTED"),
    "larger than allowed": (Paper([Page(1), Page(2, (14_401, 10))]).made, "E_DOCUMENT_TOO_LARGE"),
    "a page of 200,000 points": (Paper(pages(1, size=(200_000, 200_000))).made, "E_DOCUMENT_TOO_LARGE"),
    "121 pages": (Paper(pages(121, size=(10, 10))).made, "E_DOCUMENT_PAGES"),
    "no pages": (Paper([]).made, "E_DOCUMENT_UNREADABLE"),
    "pages that loop": (
        Paper([], objects={2: "<< /Type /Pages /Kids [2 0 R] /Count 3 /Parent 2 0 R >>"}).made,
        "E_DOCUMENT_UNREADABLE",
    ),
    "a page that is missing": (
        Paper([], objects={2: "<< /Type /Pages /Kids [77 0 R] /Count 1 >>"}).made,
        "E_DOCUMENT_UNREADABLE",
    ),
}
