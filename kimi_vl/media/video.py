"""Videos: bytes to upright frames at chosen times. What decodes them runs in a process of its own (:mod:`.sandbox`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .. import parameters
from ..errors import UserError
from . import images, kinds, sources
from .images import ImageOptions
from .sandbox import Reason, SandboxedFile, SandboxError, understood

DEFAULT_FPS = 1.0
MAX_FPS = 60.0
DEFAULT_MAX_FRAMES = 64
MAX_FRAMES = 512
"""Of all videos of a request."""
LONGEST_SIDE = 448
"""Of a frame, in pixels; smaller ones stay as they are."""
FEWEST_FRAMES = 16
"""Where a budget is short there are so many at least before they become smaller."""
SMALLEST_SCALE = 0.5
"""Of a frame's side, where a budget is short."""

_MAX_SECONDS, _MAX_SIDE = 1e7, 1e6
_FORMATS = "an MP4, MOV, MKV, WebM or AVI file of H.264, HEVC, VP8, VP9, AV1, MPEG-4 or Motion JPEG; convert it first."
_ERRORS: dict[Reason, tuple[str, str]] = {
    "missing": ("E_VIDEO_UNAVAILABLE", "videos are not read here; whoever runs this service installs kimi-vl[video]."),
    "format": ("E_VIDEO_FORMAT", f"a video is not {_FORMATS}"),
    "no pictures": ("E_VIDEO_FORMAT", "a video has sound but no pictures; send one that has pictures."),
    "too large": ("E_VIDEO_TOO_LARGE", "a video needs too much memory to be decoded; send one of fewer pixels."),
    "too long": (
        "E_VIDEO_TOO_LARGE",
        "a video takes too long to decode; send a shorter one, or ask for less with max_frames, start and end.",
    ),
}
_UNREADABLE = ("E_VIDEO_UNREADABLE", "a video is damaged or has no frames; send the file again, or save it as MP4.")


@dataclass(frozen=True)
class VideoOptions:
    """Which frames are taken: ``fps`` of them a second between ``start`` and ``end`` (seconds), ``max_frames`` at most.

    Raises :class:`UserError` (E_PARAMETER) for values that make no sense.
    """

    fps: float = DEFAULT_FPS
    max_frames: int = DEFAULT_MAX_FRAMES
    start: float = 0.0
    end: float | None = None

    @classmethod
    def checked(cls, **given: Any) -> VideoOptions:
        """What is None is left to the defaults."""
        values: dict[str, Any] = {}
        for name, value in given.items():
            if value is None:
                continue
            if name == "max_frames":
                values[name] = parameters.integer(name, value, 1, MAX_FRAMES)
            else:
                values[name] = parameters.number(name, value, 0, MAX_FPS if name == "fps" else None)
        options = cls(**values)
        if options.fps <= 0:
            raise UserError("E_PARAMETER", "fps must be above 0; change it.")
        if options.end is not None and options.end <= options.start:
            raise UserError("E_PARAMETER", "end must be after start; change them.")
        return options


class Video(SandboxedFile):
    """One video, open in its process; a context manager. Times are in seconds from its first frame."""

    kind = "video"
    smallest_scale = SMALLEST_SCALE

    def __init__(self, source: sources.FileSource, options: VideoOptions):
        data = sources.read(source, kinds.VIDEO)
        if kinds.of(data[: kinds.HEAD_BYTES]) is not kinds.VIDEO:
            raise UserError("E_VIDEO_FORMAT", f"a video is not {_FORMATS}")
        with self._opening("video", data):
            told = self._sandbox.hello()
            self.width, self.height = (_bounded(told[side], 1, _MAX_SIDE) for side in ("width", "height"))
            seconds = _bounded(told["seconds"], 0, _MAX_SECONDS)
        self._begin, self._end = options.start, seconds if options.end is None else min(seconds, options.end)
        if self._begin and self._begin >= self._end:
            self.close()
            raise UserError("E_PARAMETER", "start is after the end of the video; change it.")
        self.wanted = min(self._frames(options.fps), options.max_frames)
        self.fewest = min(self.wanted, FEWEST_FRAMES)
        self._fps = options.fps

    def taken(self, count: int) -> tuple[float, ...]:
        """The times of ``count`` frames: as many a second as was asked for, or else the middles of equal parts."""
        if count == self._frames(self._fps):
            return tuple(self._begin + number / self._fps for number in range(count))
        part = (self._end - self._begin) / count
        return tuple(self._begin + (number + 0.5) * part for number in range(count))

    def labels(self, count: int) -> list[str]:
        """What the model is told before each frame: HH:MM:SS."""
        return [clock(time) for time in self.taken(count)]

    def sizes(self, count: int, scale: float, options: ImageOptions) -> list[tuple[int, int]]:
        """Width and height of each frame, upright."""
        scale *= min(1.0, LONGEST_SIDE / max(self.width, self.height))
        size = max(1, round(self.width * scale)), max(1, round(self.height * scale))
        return [images.plan(*images.fitted_size(*size, options), options).resized] * count

    def read(self, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Image.Image]]:
        """The frames at :meth:`taken` with their numbers there, at least one; damaged ones are left out.

        Raises :class:`UserError`.
        """
        (width, height), count = sizes[0], len(sizes)
        with self._refusing():
            self._sandbox.ask(times=self.taken(count), width=width, height=height)
            last = -1
            while (picture := self._sandbox.picture(width, height)) is not None:
                said, pixels = picture
                with understood():
                    turns = int(_bounded(said["turns"], 0, 3))
                    last = int(_bounded(said["at"], last + 1, count - 1))
                stored = Image.frombytes("RGB", (height, width) if turns % 2 else (width, height), pixels)
                yield last, stored.transpose(_TURNS[turns]) if turns else stored
            if last < 0:
                raise SandboxError("unreadable")

    @staticmethod
    def _refusal(error: SandboxError) -> UserError:
        return UserError(*_ERRORS.get(error.reason, _UNREADABLE))

    def _frames(self, fps: float) -> int:
        """How many there are at so many a second, the first at once and none at the very end."""
        return max(1, math.ceil((self._end - self._begin) * fps - 1e-6))


def _bounded(value: Any, low: float, high: float) -> float:
    """A number of a reply. Raises ValueError, or TypeError, for any other."""
    if not low <= value <= high:
        raise ValueError
    return value


_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def clock(seconds: float) -> str:
    """Whole seconds as HH:MM:SS."""
    minutes, second = divmod(int(seconds + 1e-6), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}"
