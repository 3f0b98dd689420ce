"""What of videos and documents fits a budget of tokens, and how it is told: with readers in place of real files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import kimi_vl
from kimi_vl import attachments
from kimi_vl.attachments import ReadingOptions, Share
from kimi_vl.engine.image_cache import EmbeddingCache
from kimi_vl.errors import UserError
from kimi_vl.events import MediaUse
from kimi_vl.media import images, sandbox, video
from kimi_vl.media.documents import Document
from kimi_vl.media.images import ImageOptions
from kimi_vl.media.video import Video, VideoOptions
from kimi_vl.pipeline import Pipeline
from kimi_vl.text.messages import DocumentPart, ImagePart, Turn, VideoPart, read

OPTIONS = dataclasses.replace(
    ImageOptions.from_directory(Path(__file__).parents[2] / "kimi_vl" / "demo"), in_token_limit=4096
)
HEAD = b"\0\0\0\x18ftypisom"


class Reader:
    """In the place of a process: a film or a document as the file says it, of one colour a picture."""

    opened = 0

    def __init__(self, backend: str, data: bytes):
        self.facts: dict[str, Any] = json.loads(data[len(HEAD) :])
        self.waiting: list[Any] = []
        Reader.opened += 1

    def hello(self) -> dict[str, Any]:
        return self.facts

    def ask(self, **question: Any) -> dict[str, Any]:
        if "sizes" in question:
            return {"sizes": [self.facts["points"]] * len(question["sizes"])}
        colours = [int(time * 10) % 256 for time in question.get("times", ())]
        self.waiting = list(enumerate(colours or [number % 256 for number, *_ in question["pages"]]))
        self.waiting = [one for one in self.waiting if one[0] not in self.facts.get("damaged", ())]
        return {}

    def picture(self, width: int, height: int) -> tuple[dict[str, Any], bytes] | None:
        if not self.waiting:
            return None
        at, colour = self.waiting.pop(0)
        return {"at": at, "turns": 0}, bytes([colour]) * (3 * width * height)

    def __exit__(self, *_: object) -> None:
        Reader.opened -= 1


@pytest.fixture(autouse=True)
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sandbox, "Sandbox", Reader)
    yield
    assert Reader.opened == 0, "every file is closed"


def film(seconds: float, width: int = 1920, height: int = 1080, **facts: Any) -> bytes:
    return HEAD + json.dumps({"seconds": seconds, "width": width, "height": height, **facts}).encode()


def paper(pages: int, points: tuple[float, float] = (595, 842)) -> bytes:
    return HEAD + json.dumps({"pages": pages, "points": points}).encode()


def overhead(label: str) -> int:
    return 4 + len(label)


def tokens(size: tuple[int, int]) -> int:
    return images.plan(*size, OPTIONS).tokens


def cost(shares: list[Share]) -> int:
    return sum(
        tokens(size) + overhead(label) for one in shares for label, size in zip(one.labels, one.sizes, strict=True)
    )


FRAME = tokens((448, 252)) + overhead("00:00:00")


def test_what_fits_is_taken_whole() -> None:
    with Video(film(60), VideoOptions()) as one, Document(paper(3), None, OPTIONS) as two:
        shares = attachments.share([one, two], 100_000, overhead, OPTIONS)
    assert [share.use.kind for share in shares] == ["video", "document"]
    assert shares[0].use == MediaUse("video", 60 * FRAME, 448, 252, tuple(map(float, range(60))), 60)
    assert shares[1].labels == ["Page 1", "Page 2", "Page 3"] and shares[1].use.taken == (1, 2, 3)
    assert sum(share.use.tokens for share in shares) == cost(shares)


@pytest.mark.parametrize("count", [59, 40, 16])
def test_then_there_are_fewer_frames(count: int) -> None:
    """As many as fit, evenly spread, as large as before; and it is said how many were wanted."""
    for budget in (count * FRAME, (count + 1) * FRAME - 1):
        with Video(film(60), VideoOptions()) as one:
            (share,) = attachments.share([one], budget, overhead, OPTIONS)
        assert (len(share.sizes), share.use.wanted) == (count, 60)
        assert set(share.sizes) == {(448, 252)}
        assert share.use.taken == pytest.approx([60 / count * (at + 0.5) for at in range(count)])


def test_then_they_are_smaller_and_then_fewer_still() -> None:
    half = tokens((224, 126)) + overhead("00:00:00")
    with Video(film(60), VideoOptions()) as one:
        (smaller,) = attachments.share([one], 16 * FRAME - 1, overhead, OPTIONS)
        (smallest,) = attachments.share([one], 16 * half, overhead, OPTIONS)
        (fewer,) = attachments.share([one], 16 * half - 1, overhead, OPTIONS)
        (single,) = attachments.share([one], half, overhead, OPTIONS)
        with pytest.raises(UserError, match=r"^E_PROMPT_TOO_LONG"):
            attachments.share([one], half - 1, overhead, OPTIONS)
    assert len(smaller.sizes) == 16 and 224 < smaller.use.width < 448
    assert tokens(smaller.sizes[0]) * 16 > 0.8 * tokens((448, 252)) * 15
    assert len(smallest.sizes) == 16 and smallest.use.width >= 224
    assert (len(fewer.sizes), fewer.use.width) == (15, 224)
    assert single.use == MediaUse("video", half, 224, 126, (30.0,), 60)


def test_pages_become_smaller_and_are_never_left_out() -> None:
    with Document(paper(20), None, OPTIONS) as one:
        whole = attachments.share([one], 10**6, overhead, OPTIONS)[0]
        (smaller,) = attachments.share([one], 20 * 600, overhead, OPTIONS)
        with pytest.raises(UserError, match=r"^E_DOCUMENT_PAGES: there is no room for a page; "):
            attachments.share([one], 150, overhead, OPTIONS)
    assert len(smaller.sizes) == len(whole.sizes) == 20 and smaller.use.taken == tuple(range(1, 21))
    assert smaller.use.width < whole.use.width and 500 < tokens(smaller.sizes[0]) < 600


@pytest.mark.parametrize("count", [1, 5, 19])
def test_it_is_said_how_many_pages_fit(count: int) -> None:
    frame = tokens((224, 126)) + overhead("00:00:00")
    with (
        Video(film(60), VideoOptions()) as clip,
        Document(paper(20), None, OPTIONS) as whole,
        Document(paper(count), None, OPTIONS) as part,
    ):
        (size,) = whole.sizes(1, whole.smallest_scale, OPTIONS)
        budget = 9 * frame + sum(tokens(size) + overhead(label) for label in part.labels(count))
        with pytest.raises(UserError, match=f"^E_DOCUMENT_PAGES: .* choose {count} of them at most with pages"):
            attachments.share([*[clip] * 9, whole], budget, overhead, OPTIONS)
        assert attachments.share([*[clip] * 9, part], budget, overhead, OPTIONS)
        with pytest.raises(UserError, match=r"^E_DOCUMENT_PAGES"):
            attachments.share([*[clip] * 9, part], budget - 1, overhead, OPTIONS)


def test_frames_go_before_pages_shrink() -> None:
    with Video(film(60), VideoOptions()) as one, Document(paper(4), None, OPTIONS) as two:
        pages = attachments.share([two], 10**6, overhead, OPTIONS)[0]
        shares = attachments.share([one, two], pages.use.tokens + 20 * FRAME, overhead, OPTIONS)
    assert (len(shares[0].sizes), shares[1].sizes) == (20, pages.sizes)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.1, 4000), st.integers(1, 4000), st.integers(1, 4000)), max_size=2),
    st.lists(st.tuples(st.integers(1, 60), st.floats(1, 14_400), st.floats(1, 14_400)), max_size=2),
    st.integers(0, 130_000),
    st.integers(0, 3000),
)
def test_no_budget_is_passed_and_more_of_it_gives_no_less(
    films: list[Any], papers: list[Any], budget: int, more: int
) -> None:
    files: list[Any] = [Video(film(*facts), VideoOptions(max_frames=200)) for facts in films]
    files += [Document(paper(count, (width, height)), None, OPTIONS) for count, width, height in papers]
    found: list[list[Share] | None] = []
    for room in (budget, budget + more):
        try:
            found.append(attachments.share(files, room, overhead, OPTIONS))
        except UserError as error:
            assert error.code == ("E_DOCUMENT_PAGES" if papers else "E_PROMPT_TOO_LONG")
            found.append(None)
    for file in files:
        file.close()
    less, larger = found
    assert less is None or larger is not None
    for room, shares in ((budget, less), (budget + more, larger)):
        for share, file in zip(shares or (), files, strict=shares is not None):
            assert len(share.labels) == len(share.sizes) == len(share.use.taken) >= 1
            assert len(share.sizes) == file.wanted or file.kind == "video"
            assert share.use.wanted == file.wanted
            assert all(images.plan(*size, OPTIONS).resized == size for size in share.sizes)
        assert cost(shares or []) == sum(share.use.tokens for share in shares or []) <= room
    if less and larger and len(files) == 1:
        assert cost(less) <= cost(larger) or len(less[0].sizes) != len(larger[0].sizes)


# Messages

ASK = {"type": "text", "text": "What?"}
URL = "data:video/mp4;base64,AAAA"
PDF = "data:application/pdf;base64,AAAA"


def turns(*parts: Any) -> list[Turn]:
    return read([{"role": "user", "content": list(parts)}])


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "video"}, VideoPart()),
        ({"type": "video_url", "video_url": {"url": URL}}, VideoPart(URL)),
        ({"type": "video_url", "video_url": URL}, VideoPart(URL)),
        ({"video_url": {"url": URL}}, VideoPart(URL)),
        ({"type": "input_video", "input_video": {"url": URL}}, VideoPart(URL)),
        ({"type": "video", "video": URL, "fps": 2, "nframes": 9}, VideoPart(URL, {"fps": 2, "max_frames": 9})),
        ({"type": "video", "start": 1, "video_end": 2}, VideoPart(None, {"start": 1, "end": 2})),
        ({"type": "video", "max_frames": 5, "nframes": 5.0}, VideoPart(None, {"max_frames": 5})),
        ({"type": "video_url", "video_url": {"url": URL, "fps": 3}, "fps": 4}, VideoPart(URL, {"fps": 4})),
        ({"type": "video", "source": {"type": "base64", "data": "AAAA"}}, VideoPart("data:;base64,AAAA")),
        ({"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}}, DocumentPart(PDF)),
        (
            {"type": "file", "file": {"file_data": "AAAA"}, "pages": "2"},
            DocumentPart("data:;base64,AAAA", {"pages": "2"}),
        ),
        ({"type": "input_file", "filename": "a.pdf", "file_data": PDF, "detail": "low"}, DocumentPart(PDF)),
        ({"type": "input_file", "file_url": PDF}, DocumentPart(PDF)),
        ({"type": "file"}, DocumentPart()),
        ({"type": "document", "pages": "1-3"}, DocumentPart(None, {"pages": "1-3"})),
        (
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}},
            DocumentPart("data:;base64,AAAA"),
        ),
    ],
)
def test_parts_of_every_client(part: dict[str, Any], expected: Any) -> None:
    assert turns(part, ASK)[0].parts == (expected, "What?")
    assert turns({**part, "text": None, "cache_control": {"type": "ephemeral"}}) == [Turn("user", (expected,))]


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}}, "E_VIDEO_SOURCE"),
        ({"type": "video", "video": "/etc/hostname"}, "E_VIDEO_SOURCE"),
        ({"type": "video", "path": "/etc/hostname"}, "E_VIDEO_SOURCE"),
        ({"type": "video", "file_id": "1"}, "E_VIDEO_SOURCE"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "E_DOCUMENT_SOURCE"),
        ({"type": "input_file", "file_url": "https://example.org/a.pdf"}, "E_DOCUMENT_SOURCE"),
        ({"type": "file", "file": "/etc/hostname"}, "E_DOCUMENT_SOURCE"),
        ({"type": "file", "file": {"path": "/etc/hostname"}}, "E_DOCUMENT_SOURCE"),
        ({"type": "video", "video": [URL, URL]}, "E_MESSAGES_INVALID"),
        ({"type": "video", "video": 3}, "E_MESSAGES_INVALID"),
        ({"type": "video", "text": "hi"}, "E_MESSAGES_INVALID"),
        ({"type": "video", "length": 3}, "E_MESSAGES_INVALID"),
        ({"type": "video", "video": URL, "num_frames": 5, "max_frames": 3}, "E_PARAMETER"),
        ({"type": "video_url", "video_url": {"url": URL, "start": 1, "video_start": 2}}, "E_PARAMETER"),
        ({"type": "input_file"}, "E_MESSAGES_INVALID"),
        ({"type": "document", "source": {"type": "text", "data": "hi"}}, "E_MESSAGES_INVALID"),
        ({"type": "file", "file": {"file_data": PDF, "file_id": "1"}}, "E_MESSAGES_INVALID"),
        ({"type": "video"}, "E_MESSAGES_INVALID"),
        ({"type": "file"}, "E_MESSAGES_INVALID"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,####"}}, "E_VIDEO_UNREADABLE"),
        ({"type": "file", "file": {"file_data": "####"}}, "E_DOCUMENT_UNREADABLE"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + "A" * 2000}}, "E_VIDEO_FORMAT"),
    ],
)
def test_parts_that_are_refused(demo: Pipeline, part: dict[str, Any], code: str) -> None:
    with pytest.raises(UserError) as caught:
        demo.estimate([{"role": "user", "content": [part, ASK]}])
    assert caught.value.code == code
    assert "hostname" not in caught.value.message and "example" not in caught.value.message


# The pipeline


@pytest.fixture(scope="module")
def demo() -> Iterator[Pipeline]:
    loaded = kimi_vl.load("demo")
    yield loaded
    loaded.close()


def ask(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, ASK]}]


BOTH = ask({"type": "video"}, {"type": "document"})


def test_times_and_numbers_stand_before_their_images(demo: Pipeline) -> None:
    ids = demo.estimate(BOTH, videos=film(3, 56, 56), documents=paper(2, (28, 28))).ids
    told = "".join(demo.tokenizer.decode([token]) for token in ids)
    pad = "<|media_pad|>" * 4
    image = f"<|media_start|>image<|media_content|>{pad}<|media_end|>"
    times = "".join(f"00:00:0{second}{image}" for second in range(3))
    assert f"{times}Page 1{image}Page 2{image}What?" in told


def test_an_estimate_is_what_the_request_then_costs(demo: Pipeline) -> None:
    beside = {"videos": [film(9, 448, 448)], "documents": [paper(2)], "images": [PICTURE]}
    messages = ask({"type": "video"}, {"type": "image"}, {"type": "document"})
    estimate = demo.estimate(messages, **beside, fps=0.5)
    done = demo.complete(messages, **beside, fps=0.5, max_length_tokens=1)
    assert estimate.input_tokens == done.usage.input_tokens == len(estimate.ids)
    assert [use.kind for use in estimate.media] == ["video", "image", "document"]
    assert (estimate.media[0], estimate.media[2]) == done.media
    assert estimate.text_tokens == demo.estimate(ask()).input_tokens
    assert estimate.text_tokens + sum(use.tokens for use in estimate.media) == estimate.input_tokens
    assert done.media[0].taken == (0, 2, 4, 6, 8) and estimate.context == 8192


def test_what_does_not_fit_is_said(demo: Pipeline) -> None:
    found = demo.estimate(ask({"type": "video"}), videos=film(600), max_length_tokens=1, max_frames=512)
    (use,) = found.media
    assert use.wanted == 512 and len(use.taken) < 64 and (use.width, use.height) == (448, 252)
    assert 8192 - 1 - FRAME < use.tokens + found.text_tokens == found.input_tokens <= 8192 - 1
    kept = demo.estimate(ask({"type": "video"}), videos=film(600), max_length_tokens=8192, max_frames=512)
    assert kept.input_tokens <= 8192 - 2048, "a quarter of the context is kept for the answer"


def test_damaged_frames_are_left_out_and_counted(demo: Pipeline) -> None:
    whole = demo.complete(ask({"type": "video"}), videos=film(5, 56, 56), max_length_tokens=1)
    done = demo.complete(ask({"type": "video"}), videos=film(5, 56, 56, damaged=[0, 3]), max_length_tokens=1)
    assert done.media[0].taken == (1.0, 2.0, 4.0) and done.media[0].wanted == 5
    assert whole.media[0].tokens * 3 == done.media[0].tokens * 5
    assert done.usage.input_tokens == whole.usage.input_tokens - done.media[0].tokens * 2 // 3
    with pytest.raises(UserError, match=r"^E_VIDEO_UNREADABLE"):
        demo.complete(ask({"type": "video"}), videos=film(2, 56, 56, damaged=[0, 1]))


def test_a_second_question_about_a_film_encodes_nothing(demo: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    encode = demo.model.encode_images

    def counted(pixels: Any, grids: Any) -> Any:
        encoded.extend(grids)
        return encode(pixels, grids)

    monkeypatch.setattr(demo.model, "encode_images", counted)
    lookups = []
    monkeypatch.setattr(
        EmbeddingCache,
        "lookup",
        lambda self, digest, plain=EmbeddingCache.lookup: lookups.append(1) or plain(self, digest),
    )

    def question(text: str, system: str = "", **how: Any) -> int:
        before = len(encoded)
        chat = [{"role": "system", "content": system}] if system else []
        content = [{"type": "video"}, {"type": "document"}, {"type": "text", "text": text}]
        chat.append({"role": "user", "content": content})  # pyright: ignore[reportArgumentType]
        demo.complete(chat, videos=film(12, 84, 56), documents=paper(3, (40, 40)), max_length_tokens=1, **how)
        return len(encoded) - before

    assert question("What happens?") == 12 + 3
    assert question("And then?") == 0, "prefix caching"
    seen = len(lookups)
    assert question("And then?", "Another system message makes another prefix.") == 0, "the image cache"
    assert len(lookups) > seen
    assert question("Fewer of them?", fps=0.5) == 0
    assert question("Others?", start=0.5, end=2) == 2


def test_requests_that_ask_for_too_many(demo: Pipeline) -> None:
    for count, code in ((4, None), (5, "E_TOO_MANY_FILES")):
        messages = ask(*[{"type": "video"}] * count)
        if code is None:
            assert len(demo.estimate(messages, videos=[film(1, 56, 56)] * count).media) == count
        else:
            with pytest.raises(UserError, match=code):
                demo.estimate(messages, videos=[film(1, 56, 56)] * count)
    with pytest.raises(UserError, match="E_VIDEO_TOO_LARGE"):
        demo.estimate(ask(*[{"type": "video"}] * 3), videos=[film(600, 56, 56)] * 3, max_frames=200)
    with pytest.raises(UserError, match="E_DOCUMENT_PAGES"):
        demo.estimate(ask(*[{"type": "file"}] * 2), documents=[paper(61, (20, 20))] * 2)
    many = [{"type": "image"}] * 64
    dots = [Image.new("RGB", (28, 28))] * 64
    found = demo.estimate(ask(*many, {"type": "video"}), dots, videos=film(70, 56, 56))
    assert len(found.media) == 65, "frames are no images of the request's own"


@pytest.mark.parametrize(
    "reading",
    [
        {"fps": 0}, {"fps": -1}, {"fps": 61}, {"fps": "1"}, {"max_frames": 0}, {"max_frames": 513}, {"start": -1},
        {"start": 3, "end": 2}, {"pages": "x"}, {"pages": 3}, {"pages": ["1"]},
    ],
)  # fmt: skip
def test_values_are_checked_even_where_nothing_uses_them(demo: Pipeline, reading: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^E_PARAMETER: "):
        demo.estimate(ask(), **reading)
    with pytest.raises(UserError, match=r"^E_PARAMETER: "):
        demo.submit(ask(), (), lambda event: None, **reading)


def test_a_part_says_more_than_the_request(demo: Pipeline) -> None:
    parts = [{"type": "video", "fps": 2}, {"type": "video"}, {"type": "file", "pages": "3,1"}, {"type": "file"}]
    found = demo.estimate(
        ask(*parts), videos=[film(2, 56, 56)] * 2, documents=[paper(3, (20, 20))] * 2, fps=1, pages="2"
    )
    assert [use.taken for use in found.media] == [(0, 0.5, 1, 1.5), (0, 1), (3, 1), (2,)]


@pytest.mark.parametrize("files", [3, "x" * 3, {"a": b""}, [b"", 3], object()])
def test_what_is_no_list_of_files(demo: Pipeline, files: Any) -> None:
    with pytest.raises(UserError, match=r"^E_VIDEO_(SOURCE|UNREADABLE)"):
        demo.estimate(ask({"type": "video"}), videos=files)
    with pytest.raises(UserError, match=r"^E_DOCUMENT_(SOURCE|UNREADABLE)|^E_MESSAGES_INVALID"):
        demo.estimate(ask({"type": "file"}), documents=files)


def test_the_format_itself_knows_images_alone(demo: Pipeline) -> None:
    from kimi_vl.text import chat

    for part in ({"type": "video"}, {"type": "file"}):
        with pytest.raises(UserError, match=r"^E_MESSAGES_INVALID"):
            chat.render(ask(part))
    assert attachments.with_images([Turn("user", (ImagePart(), "hi"))], [images.plan(28, 28, OPTIONS)])[0].images


def test_defaults_of_the_inputs_are_those_of_the_readers() -> None:
    from cog_local import schema

    fields = schema.generate((Path(__file__).parents[2] / "predict.py").read_text(encoding="utf-8"))
    inputs = fields["components"]["schemas"]["Input"]["properties"]
    assert inputs["fps"]["default"] == video.DEFAULT_FPS and inputs["fps"]["maximum"] == video.MAX_FPS
    assert inputs["max_frames"]["default"] == video.DEFAULT_MAX_FRAMES
    assert inputs["max_frames"]["maximum"] == video.MAX_FRAMES
    assert ReadingOptions() == ReadingOptions(None, None, None, None, None)


PICTURE = str(Path(__file__).parents[2] / "images" / "math_problem.png")
