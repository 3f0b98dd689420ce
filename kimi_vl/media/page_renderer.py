"""Pages of a PDF document as pictures. Runs in the process of :mod:`.sandbox` alone, as the only module that imports
pypdfium2, whose library may not be used by two threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pypdfium2
import pypdfium2.raw as pdfium

from .sandbox import SandboxError

_HEADER_BYTES = 1024
_FLAGS = pdfium.FPDF_ANNOT | pdfium.FPDF_REVERSE_BYTE_ORDER


def read(file: BinaryIO) -> Document:
    """Raises :class:`SandboxError` (format, unreadable, encrypted)."""
    data = file.read()
    if b"%PDF-" not in data[:_HEADER_BYTES]:
        raise SandboxError("format")
    try:
        return Document(pypdfium2.PdfDocument(data))
    except pypdfium2.PdfiumError as error:
        locked = error.err_code in (pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY)
        raise SandboxError("encrypted" if locked else "unreadable") from None


class Document:
    """An open document. Nothing in it is run: the library is built without JavaScript."""

    def __init__(self, document: pypdfium2.PdfDocument):
        self._document = document
        if document.get_formtype() != pdfium.FORMTYPE_NONE:
            with contextlib.suppress(pypdfium2.PdfiumError):
                document.init_forms()
        self._wanted: list[tuple[int, int, int]] = []

    def hello(self) -> dict[str, Any]:
        """The number of pages."""
        return {"pages": len(self._document)}

    def answer(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The ``sizes`` in points of pages (numbers from 1), or render ``pages`` of [number, width, height]."""
        if "sizes" in question:
            return {"sizes": [self._size(number) for number in question["sizes"]]}
        self._wanted = question["pages"]
        return None

    def pictures(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        for number, width, height in self._wanted:
            yield {}, self._rendered(number, width, height)

    def _size(self, number: int) -> tuple[float, float]:
        with self._page(number) as page:
            return page.get_size()

    def _rendered(self, number: int, width: int, height: int) -> bytes:
        """A page on white, as large as it was asked for: (height, width, 3) bytes of RGB."""
        bitmap = pypdfium2.PdfBitmap.new_native(width, height, pdfium.FPDFBitmap_BGR, rev_byteorder=True)
        bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        with self._page(number) as page:
            pdfium.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, 0, _FLAGS)
            if self._document.formenv is not None:
                pdfium.FPDF_FFLDraw(self._document.formenv, bitmap, page, 0, 0, width, height, 0, _FLAGS)
        lines, length = memoryview(bitmap.buffer).cast("B"), bitmap.stride
        return b"".join(lines[at * length : at * length + 3 * width] for at in range(height))

    @contextlib.contextmanager
    def _page(self, number: int) -> Iterator[pypdfium2.PdfPage]:
        try:
            page = self._document[number - 1]
        except pypdfium2.PdfiumError:
            raise SandboxError("unreadable", number) from None
        try:
            yield page
        finally:
            page.close()
