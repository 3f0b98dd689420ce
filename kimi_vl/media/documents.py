"""PDF documents: bytes to pictures of pages, rendered at the size that the model sees. What renders them runs in a
process of its own (:mod:`.sandbox`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from PIL import Image

from ..errors import UserError
from . import images, kinds, sources
from .images import ImageOptions
from .sandbox import Reason, SandboxedFile, SandboxError

MAX_POINTS = 14_400
"""Of a side of a page, 1/72 inch each: what the format allows without another unit."""
MAX_PAGES = 120
"""Of all documents of a request."""
DPI = 144
"""At which a page is rendered where the model takes as many pixels."""
SMALLEST_PAGE_TOKENS = 256
"""Of a page, where a budget is short: its headings can be read."""
_POINTS_PER_INCH = 72
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{1,9})?\s*)?", re.ASCII)

_ERRORS: dict[Reason, tuple[str, str]] = {
    "missing": (
        "E_DOCUMENT_UNAVAILABLE",
        "documents are not read here; whoever runs this service installs kimi-vl[pdf].",
    ),
    "format": ("E_DOCUMENT_FORMAT", "a document is not a PDF file; convert it first, and send pictures as images."),
    "encrypted": ("E_DOCUMENT_ENCRYPTED", "a document asks for a password; save it without one."),
    "too large": ("E_DOCUMENT_TOO_LARGE", "a document needs too much memory to be read; send fewer of its pages."),
    "too long": ("E_DOCUMENT_TOO_LARGE", "a document takes too long to read; choose fewer pages with pages."),
}
_UNREADABLE = ("E_DOCUMENT_UNREADABLE", "a document is damaged; send the file again, or save it anew as PDF.")


class Document(SandboxedFile):
    """One document, open in its process; a context manager. Pages are numbered from 1.

    ``pages`` are texts like ``"1-3,7"``, or None for all.
    """

    kind = "document"

    def __init__(self, source: sources.FileSource, pages: str | None, options: ImageOptions):
        data = sources.read(source, kinds.DOCUMENT)
        with self._opening("document", data):
            self._numbers = chosen(pages, int(self._sandbox.hello()["pages"]))
            points = self._sandbox.ask(sizes=self._numbers)["sizes"]
            pages_and_points = zip(self._numbers, points, strict=True)
            self._largest = [_size(number, width, height, options) for number, (width, height) in pages_and_points]
        self.wanted = self.fewest = len(self._numbers)
        tokens = max(images.plan(*size, options).tokens for size in self._largest)
        self.smallest_scale = min(1.0, (SMALLEST_PAGE_TOKENS / tokens) ** 0.5)

    def taken(self, count: int) -> tuple[float, ...]:
        """The numbers of the pages."""
        return tuple(self._numbers[:count])

    def labels(self, count: int) -> list[str]:
        """What the model is told before each page."""
        return [f"Page {number}" for number in self._numbers[:count]]

    def sizes(self, count: int, scale: float, options: ImageOptions) -> list[tuple[int, int]]:
        """Width and height of each page in pixels."""
        return [(max(1, int(width * scale)), max(1, int(height * scale))) for width, height in self._largest[:count]]

    def read(self, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Image.Image]]:
        """The pages as pictures, with their numbers among those chosen. Raises :class:`UserError`."""
        with self._refusing():
            self._sandbox.ask(pages=[[n, *size] for n, size in zip(self._numbers, sizes, strict=True)])
            for number, size in enumerate(sizes):
                picture = self._sandbox.picture(*size)
                if picture is None:
                    raise SandboxError("unreadable")
                yield number, Image.frombytes("RGB", size, picture[1])

    @staticmethod
    def _refusal(error: SandboxError) -> UserError:
        if error.detail is not None:
            return _bad_page(error.detail)
        return UserError(*_ERRORS.get(error.reason, _UNREADABLE))


def ranges(pages: str | None) -> list[tuple[int, int | None]]:
    """First and last page of each piece of a text like ``"1-3,7,9-"``; None is the end. All pages for an empty one.

    Raises :class:`UserError` (E_PARAMETER) for what is no such text.
    """
    if pages is not None and not isinstance(pages, str):
        raise _misspelt()
    found: list[tuple[int, int | None]] = []
    for piece in (pages if pages and pages.strip() else "1-").split(","):
        match = _RANGE.fullmatch(piece)
        if match is None:
            raise _misspelt()
        first = int(match[1])
        last = int(match[3]) if match[3] else None if match[2] else first
        if last is not None and last < first:
            raise UserError("E_PARAMETER", "a range in pages goes from the smaller number to the larger; write it so.")
        found.append((first, last))
    return found


def chosen(pages: str | None, count: int) -> list[int]:
    """Numbers of the pages that such a text names, each once and in its order.

    Raises :class:`UserError`: E_PARAMETER, or E_DOCUMENT_PAGES for pages that are not among the ``count`` of the
    document, or for too many.
    """
    if count < 1:
        raise UserError(*_UNREADABLE)
    found: dict[int, None] = {}
    for first, end in ranges(pages):
        last = count if end is None else end
        if not 1 <= first <= last <= count:
            raise UserError(
                "E_DOCUMENT_PAGES", f"the document has the pages 1 to {count}; ask for some of these with pages."
            )
        found |= dict.fromkeys(range(first, min(last, first + MAX_PAGES) + 1))
        if len(found) > MAX_PAGES:
            raise too_many()
    return list(found)


def _misspelt() -> UserError:
    return UserError("E_PARAMETER", 'pages must be numbers and ranges like "1-3,7"; change it.')


def too_many() -> UserError:
    return UserError("E_DOCUMENT_PAGES", f"a request may have {MAX_PAGES} pages; choose fewer with pages.")


def _size(number: int, width: float, height: float, options: ImageOptions) -> tuple[int, int]:
    """Of a page in points, at :data:`DPI` or as large as the model takes it. Raises :class:`UserError`."""
    if not (width > 0 and height > 0):
        raise _bad_page(number)
    if max(width, height) > MAX_POINTS:
        raise UserError("E_DOCUMENT_TOO_LARGE", f"page {number} is larger than 200 inches; leave it out with pages.")
    scale = DPI / _POINTS_PER_INCH
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return images.plan(*images.fitted_size(*size, options), options).resized


def _bad_page(number: int) -> UserError:
    return UserError("E_DOCUMENT_UNREADABLE", f"page {number} is damaged or has no size; leave it out with pages.")
