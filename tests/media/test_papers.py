"""Pages of generated documents are those that were asked for, upright, read back from the pixels."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image

from kimi_vl.errors import UserError
from kimi_vl.media import images
from kimi_vl.media.documents import MAX_PAGES, Document, chosen, ranges
from kimi_vl.media.images import ImageOptions

from .films import number_of
from .papers import BAD, FORM, GOOD, Page, Paper, pages


@pytest.fixture(scope="module")
def published(options: ImageOptions) -> ImageOptions:
    """What the published processor takes."""
    return dataclasses.replace(options, in_token_limit=4096)


@functools.cache
def long() -> bytes:
    return Paper(pages(5000, size=(100, 80))).made()


def read(data: bytes, which: str | None, options: ImageOptions, scale: float = 1.0) -> list[Image.Image]:
    with Document(data, which, options) as document:
        sizes = document.sizes(document.wanted, scale, options)
        found = list(document.read(sizes))
    assert [number for number, _ in found] == list(range(len(sizes)))
    assert [picture.size for _, picture in found] == sizes
    return [picture for _, picture in found]


@pytest.mark.parametrize("name", GOOD)
def test_every_page_is_read_upright(name: str, published: ImageOptions) -> None:
    make, count = GOOD[name]
    pictures = read(make(), None, published)
    if name == "without sizes":  # which is then a sheet of paper, and empty
        assert len(pictures) == count and all(picture.getextrema() == ((255, 255),) * 3 for picture in pictures)
        return
    assert [number_of(picture) for picture in pictures] == list(range(1, count + 1))


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused(name: str, published: ImageOptions) -> None:
    make, code = BAD[name]
    with pytest.raises(UserError) as caught:
        read(make(), None, published)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("which", "numbers"),
    [
        ("1", [1]), ("5000", [5000]), ("4999-", [4999, 5000]), ("1-3,7", [1, 2, 3, 7]), (" 2 - 4 , 9 ", [2, 3, 4, 9]),
        ("9,2,9,1-3", [9, 2, 1, 3]), ("4881-5000", list(range(4881, 5001))),
    ],
)  # fmt: skip
def test_pages_are_numbered_from_one(which: str, numbers: list[int], published: ImageOptions) -> None:
    with Document(long(), which, published) as document:
        assert document.taken(len(numbers)) == tuple(numbers) and document.wanted == len(numbers)
        assert document.labels(len(numbers)) == [f"Page {number}" for number in numbers]
        found = [number_of(picture) for _, picture in document.read(document.sizes(len(numbers), 1.0, published))]
    assert found == numbers


@pytest.mark.parametrize(
    ("which", "code"),
    [
        (None, "E_DOCUMENT_PAGES"), ("", "E_DOCUMENT_PAGES"), ("1-", "E_DOCUMENT_PAGES"), ("1-121", "E_DOCUMENT_PAGES"),
        ("0", "E_DOCUMENT_PAGES"), ("0-2", "E_DOCUMENT_PAGES"), ("5001", "E_DOCUMENT_PAGES"),
        ("4999-5001", "E_DOCUMENT_PAGES"), ("3-2", "E_PARAMETER"), ("999999999", "E_DOCUMENT_PAGES"),
        ("1,2,", "E_PARAMETER"), ("-3", "E_PARAMETER"), ("one", "E_PARAMETER"), ("1-2-3", "E_PARAMETER"),
        ("1;2", "E_PARAMETER"), ("1.5", "E_PARAMETER"), ("9" * 30, "E_PARAMETER"), ("٣", "E_PARAMETER"),
    ],
)  # fmt: skip
def test_pages_that_are_not_there(which: str | None, code: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen(which, 5000)
    assert caught.value.code == code


def test_a_range_goes_upward() -> None:
    with pytest.raises(UserError, match="from the smaller number to the larger"):
        ranges("1,5-2")
    assert ranges("2-2,7-") == [(2, 2), (7, None)]


def test_so_many_pages_and_no_more() -> None:
    assert chosen(None, MAX_PAGES) == list(range(1, MAX_PAGES + 1))
    assert chosen("1-60,1-120,5", 5000) == list(range(1, MAX_PAGES + 1))
    assert chosen("1-119,5000", 5000)[-1] == 5000


def test_of_a_damaged_document_the_pages_that_are_whole_can_be_read(published: ImageOptions) -> None:
    data = Paper([Page(1), Page(2, (14_401, 10)), Page(3)]).made()
    assert [number_of(picture) for picture in read(data, "1,3", published)] == [1, 3]
    with pytest.raises(UserError, match=r"^E_DOCUMENT_TOO_LARGE: page 2 is larger than 200 inches"):
        read(data, "3,2", published)


def test_a_page_is_rendered_at_the_size_that_the_model_sees(published: ImageOptions) -> None:
    """Nothing scales it again: the plan of its size is that size."""
    a4 = Paper([Page(1, (595, 842)), Page(2, (842, 595)), Page(3, (100, 50)), Page(4, (14_400, 40))]).made()
    for scale in (1.0, 0.7, 0.33, 0.01):
        for picture in read(a4, None, published, scale):
            assert images.plan(*picture.size, published).resized == picture.size
    with Document(a4, None, published) as document:
        sizes = document.sizes(4, 1.0, published)
    assert sizes[2] == (200, 100)  # 144 dpi
    assert [images.plan(*size, published).tokens for size in sizes[:2]] == [1053, 1053]
    larger = dataclasses.replace(published, in_token_limit=16_384)
    with Document(a4, "1", larger) as document:
        assert document.sizes(1, 1.0, larger) == [(1190, 1684)]


def test_what_is_typed_into_a_form_is_seen(published: ImageOptions) -> None:
    white = Page(2**15 - 1, (200, 160))
    blank = Paper([white]).made()
    form = Paper([dataclasses.replace(white, extra="/Annots [6 0 R]")], "/AcroForm 5 0 R", FORM).made()
    plain, typed = (np.asarray(read(data, None, published)[0], np.int16) for data in (blank, form))
    changed = np.abs(plain - typed).max(axis=2) > 50
    lines, columns = np.nonzero(changed)
    assert changed.sum() > 20
    assert lines.min() >= plain.shape[0] - 42 and columns.max() <= 84  # where its field is


@pytest.mark.nightly
@pytest.mark.parametrize("name", GOOD)
def test_every_cut_and_hole_is_survived(name: str, published: ImageOptions) -> None:
    data = GOOD[name][0]()
    for step in range(1, 30):
        at = len(data) * step // 30
        for changed in (data[:at], data[:at] + b"0" * 20 + data[at + 20 :], data[:at] + data[at + 20 :]):
            try:
                read(changed, None, published, 0.2)
            except UserError as error:
                allowed = ["E_DOCUMENT_UNREADABLE", "E_DOCUMENT_ENCRYPTED", "E_DOCUMENT_TOO_LARGE"]
                if b"%PDF-" not in changed:  # what says that it is one is gone
                    allowed.append("E_DOCUMENT_FORMAT")
                assert error.code in allowed
