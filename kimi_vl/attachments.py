"""Videos and documents of a request to images with a text before each: what the model is told, within a budget.

Knows which parts of the messages are meant, and how many tokens there are; what a frame or a page is, `media` knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from .errors import UserError
from .events import MediaUse
from .media import data_url, images, kinds, sandbox
from .media.documents import MAX_PAGES, Document, ranges, too_many
from .media.images import ImageOptions
from .media.sources import FileSource
from .media.video import MAX_FRAMES, Video, VideoOptions
from .text.messages import DocumentPart, ImagePart, Part, Turn, VideoPart

MAX_FILES = 4
"""Videos and documents of a request."""
_STEPS = 40  # of a bisection


@dataclass(frozen=True)
class ReadingOptions:
    """How videos and documents are read where their parts do not say otherwise; None is the default of each."""

    fps: float | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    pages: str | None = None


class Pictures(Protocol):
    """What a video and a document have in common: a number of pictures that can be fewer and smaller."""

    kind: Any
    wanted: int
    fewest: int
    smallest_scale: float

    def taken(self, count: int) -> tuple[float, ...]: ...
    def labels(self, count: int) -> list[str]: ...
    def sizes(self, count: int, scale: float, options: ImageOptions) -> list[tuple[int, int]]: ...
    def read(self, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Image.Image]]: ...


class Seen(Protocol):
    """A picture that is ready for the model."""

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Share:
    """What of a file is shown: a text and a size (width, height) for each picture, and what they cost."""

    labels: list[str]
    sizes: list[tuple[int, int]]
    use: MediaUse

    def blanks(self) -> Iterator[tuple[int, Image.Image]]:
        """Empty pictures of the same sizes, numbered."""
        return enumerate(Image.new("1", size) for size in self.sizes)

    def of(self, pictures: Sequence[tuple[int, Seen]], overhead: Callable[[str], int]) -> Share:
        """The same for the numbers that there are in the end: some frames of a video may be damaged."""
        numbers = [number for number, _ in pictures]
        labels = [self.labels[number] for number in numbers]
        tokens = sum(picture.tokens for _, picture in pictures) + sum(map(overhead, labels))
        use = dataclasses.replace(self.use, tokens=tokens, taken=tuple(self.use.taken[number] for number in numbers))
        return Share(labels, [self.sizes[number] for number in numbers], use)


@contextlib.contextmanager
def opened(
    turns: Sequence[Turn],
    videos: Sequence[FileSource],
    documents: Sequence[FileSource],
    reading: ReadingOptions,
    options: ImageOptions,
) -> Iterator[list[Pictures]]:
    """The videos and documents of the messages, in order, each open in its process; bare parts take those beside.

    Raises :class:`UserError` for what cannot be read, or not as it was asked for.
    """
    parts = [part for turn in turns for part in turn.files if not isinstance(part, ImagePart)]
    if max(len(parts), len(videos) + len(documents)) > MAX_FILES:
        raise UserError("E_TOO_MANY_FILES", f"a request may have {MAX_FILES} videos and documents; send fewer.")
    video_files = iter(matched([p for p in parts if isinstance(p, VideoPart)], videos, kinds.VIDEO, FileSource))
    document_files = iter(
        matched([p for p in parts if isinstance(p, DocumentPart)], documents, kinds.DOCUMENT, FileSource)
    )
    # the request's own values are checked even where nothing uses them
    asked = [_asked(part, reading) for part in (VideoPart(), DocumentPart(), *parts)][2:]
    with contextlib.ExitStack() as stack:
        if parts:
            stack.enter_context(sandbox.turn())
        found: list[Pictures] = []
        for how in asked:
            if isinstance(how, VideoOptions):
                found.append(stack.enter_context(Video(next(video_files), how)))
            else:
                found.append(stack.enter_context(Document(next(document_files), how, options)))
        _check_totals(found)
        yield found


def _asked(part: VideoPart | DocumentPart, reading: ReadingOptions) -> VideoOptions | str | None:
    """How a part is to be read: what it says itself, or else what the request says."""
    if isinstance(part, VideoPart):
        return VideoOptions.checked(
            **{name: part.options.get(name, getattr(reading, name)) for name in ("fps", "max_frames", "start", "end")}
        )
    pages = part.options.get("pages", reading.pages)
    ranges(pages)
    return pages


def matched(
    parts: Sequence[ImagePart | VideoPart | DocumentPart], beside: Sequence[Any], kind: kinds.Kind, sources: Any
) -> list[Any]:
    """A source for each part, the bare ones taking those beside the messages in order.

    A text in a part is a data URL, or refused: others than the one who runs this program may have written it, so
    that nothing it names is fetched or opened. What is not among ``sources`` is refused as well. Raises
    :class:`UserError` (E_..._SOURCE, E_MESSAGES_INVALID).
    """
    for part in parts:
        if isinstance(part.source, str) and not data_url.is_data_url(part.source):
            raise UserError(kind.source, f"{kind.noun} in messages must be a data URL; nothing else is looked up.")
        if not isinstance(part.source, sources | None):
            raise UserError("E_MESSAGES_INVALID", f"a value in messages is no file of {kind.noun}; send a data URL.")
    bare = sum(part.source is None for part in parts)
    if bare != len(beside):
        raise UserError(
            "E_MESSAGES_INVALID",
            f"the messages have {bare} bare parts for {kind.noun} and {len(beside)} came beside; make these equal.",
        )
    waiting = iter(beside)
    return [next(waiting) if part.source is None else part.source for part in parts]


def _check_totals(files: Sequence[Pictures]) -> None:
    frames = sum(file.wanted for file in files if file.kind == "video")
    if frames > MAX_FRAMES:
        raise UserError(
            "E_VIDEO_TOO_LARGE", f"a request may have {MAX_FRAMES} frames of its videos in all; lower max_frames."
        )
    pages = sum(file.wanted for file in files if file.kind == "document")
    if pages > MAX_PAGES:
        raise too_many()


def share(files: Sequence[Pictures], budget: int, overhead: Callable[[str], int], options: ImageOptions) -> list[Share]:
    """What of each file is taken so that all cost ``budget`` tokens at most: fewer frames, then smaller pictures, then
    fewer frames still. ``overhead`` is what a picture with its label costs beside its own tokens.

    Raises :class:`UserError` (E_PROMPT_TOO_LONG, E_DOCUMENT_PAGES) where that is not enough.
    """

    def shares(part: float, fewest: int | None, scale: float) -> list[Share]:
        made = []
        for file in files:
            floor = file.fewest if fewest is None else min(fewest, file.fewest)
            floor = file.wanted if file.kind == "document" else floor
            count = max(floor, int(file.wanted * part + 1e-9))
            sizes = file.sizes(count, max(scale, file.smallest_scale), options)
            labels = file.labels(count)
            tokens = sum(images.plan(*size, options).tokens * n for size, n in Counter(sizes).items())
            tokens += sum(map(overhead, labels))
            largest = max(sizes, key=lambda size: size[0] * size[1])
            made.append(Share(labels, sizes, MediaUse(file.kind, tokens, *largest, file.taken(count), file.wanted)))
        return made

    def fits(made: list[Share]) -> bool:
        return sum(one.use.tokens for one in made) <= budget

    def most(make: Callable[[float], list[Share]], low: float) -> list[Share] | None:
        """Of what is made of numbers from ``low`` to 1, the largest that fits."""
        best, high = make(low), 1.0
        if not fits(best):
            return None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if fits(made := make(middle)):
                best, low = made, middle
            else:
                high = middle
        return best

    if fits(whole := shares(1.0, None, 1.0)):
        return whole
    found = (
        most(lambda part: shares(part, None, 1.0), 0.0)
        or most(lambda scale: shares(0.0, None, scale), 0.0)
        or most(lambda part: shares(part, 1, 0.0), 0.0)
    )
    if found is not None:
        return found
    raise _no_room(shares(0.0, 1, 0.0), budget, overhead, options)


def _no_room(least: Sequence[Share], budget: int, overhead: Callable[[str], int], options: ImageOptions) -> UserError:
    """The refusal of files of which not even the ``least`` fits; it says how many pages would."""
    documents = [one for one in least if one.use.kind == "document"]
    if not documents:
        return UserError(
            "E_PROMPT_TOO_LONG", "there is no room for a frame of each video; shorten the prompt or send fewer."
        )
    room = budget - sum(one.use.tokens for one in least if one.use.kind == "video")
    tokens = sorted(
        images.plan(*size, options).tokens + overhead(label)
        for one in documents
        for size, label in zip(one.sizes, one.labels, strict=True)
    )
    count = sum(taken <= room for taken in itertools.accumulate(tokens))
    if not count:
        return UserError("E_DOCUMENT_PAGES", "there is no room for a page; shorten the prompt or send fewer files.")
    return UserError(
        "E_DOCUMENT_PAGES", f"the pages do not fit the context; choose {count} of them at most with pages."
    )


def with_images(turns: Sequence[Turn], seen: Sequence[Seen]) -> list[Turn]:
    """``turns`` with the k-th image part holding the k-th of ``seen``."""
    waiting = iter(seen)
    return [
        Turn(turn.role, tuple(ImagePart(next(waiting)) if isinstance(part, ImagePart) else part for part in turn.parts))
        for turn in turns
    ]


def uses(turns: Sequence[Turn], shares: Sequence[Share], overhead: int, patch: int) -> Iterator[MediaUse]:
    """What each image, video and document of the messages costs, in order.

    An image costs ``overhead`` tokens more than its own; its patches have ``patch`` pixels a side.
    """
    waiting = iter(shares)
    for part in (part for turn in turns for part in turn.files):
        if isinstance(part, ImagePart):
            rows, columns = part.source.grid
            yield MediaUse("image", part.source.tokens + overhead, columns * patch, rows * patch)
        else:
            yield next(waiting).use


def expanded(turns: Sequence[Turn], pictures: Sequence[Sequence[tuple[str, Any]]]) -> list[Turn]:
    """``turns`` with the k-th video or document replaced by the k-th list of labels and images."""
    waiting = iter(pictures)

    def parts(turn: Turn) -> Iterator[Part]:
        for part in turn.parts:
            if isinstance(part, VideoPart | DocumentPart):
                for label, picture in next(waiting):
                    yield label
                    yield ImagePart(picture)
            else:
                yield part

    return [Turn(turn.role, tuple(parts(turn))) for turn in turns]


def file_list(name: str, files: Any, code: str) -> list[FileSource]:
    """``files`` as a list; a single one need not be in one, and None is none. Raises :class:`UserError`."""
    if files is None:
        return []
    if isinstance(files, FileSource):
        return [files]
    if isinstance(files, Sequence) and not isinstance(files, Mapping) and all(isinstance(f, FileSource) for f in files):
        return list(files)
    raise UserError(code, f"{name} must be a list of bytes, paths or data URLs; change it.")
