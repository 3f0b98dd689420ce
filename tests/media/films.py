"""Films that are made for the tests: every frame shows its number as black and white blocks, which lossy codecs keep.

A film is described by the times of its frames; which frame is on the screen at a time follows from them alone.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

COLUMNS, LINES = 5, 4
MARK = (1, 0, 0, 1, 1)
"""The blocks of the first line, by which a picture that is turned or mirrored is noticed."""
BITS = COLUMNS * (LINES - 1)
TICKS = 60_000  # a second
ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "yuv420p", {"preset": "ultrafast", "bf": "2", "g": "30"}),
    "hevc": ("libx265", "yuv420p", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=30"}),
    "hevc10": ("libx265", "yuv420p10le", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "vp8": ("libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "30"}),
    "vp9": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "30"}),
    "av1": ("libsvtav1", "yuv420p", {"preset": "8", "crf": "10", "svtav1-params": "lp=1"}),
    "mpeg4": ("mpeg4", "yuv420p", {"g": "30", "bf": "0"}),
    "mpeg4 with B": ("mpeg4", "yuv420p", {"g": "30", "bf": "2"}),
    "mjpeg": ("mjpeg", "yuvj420p", {}),
    "ffv1": ("ffv1", "yuv420p", {}),
    "raw": ("rawvideo", "yuv420p", {}),
    "mpeg2": ("mpeg2video", "yuv420p", {}),
    "png": ("png", "rgb24", {}),
}


def every(rate: float, seconds: float) -> tuple[float, ...]:
    return tuple(number / rate for number in range(round(rate * seconds)))


@dataclass(frozen=True)
class Film:
    """``times`` in seconds, ``rotation`` in degrees counter-clockwise that make it upright, ``offset`` of all times."""

    codec: str = "h264"
    container: str = "mp4"
    times: Sequence[float] = every(30, 3)
    size: tuple[int, int] = (160, 128)
    rotation: int = 0
    offset: float = 0.0
    aspect: Fraction | None = None
    sound: bool = False
    options: dict[str, str] = field(default_factory=dict)
    encoding: dict[str, str] = field(default_factory=dict)
    seekable: bool = True

    @property
    def seconds(self) -> float:
        """To the end of the last frame, which stays as long as the average."""
        return self.times[-1] + 1 / self._rate

    @property
    def _rate(self) -> int:
        return max(1, round((len(self.times) - 1) / self.times[-1])) if len(self.times) > 1 else 30

    def shown(self, time: float) -> int:
        """The number of the frame that is on the screen at a time after the first frame."""
        return max(number for number, at in enumerate(self.times) if at <= time + 1e-3 or number == 0)

    @property
    def _free_times(self) -> bool:
        return self.container != "avi" and self.codec != "mpeg2"

    def made(self) -> bytes:
        out = io.BytesIO() if self.seekable else Pipe()
        if "faststart" in self.options.get("movflags", ""):  # for which the file is opened a second time
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "film.mp4")
                self._write(path)
                with open(path, "rb") as file:
                    return file.read()
        self._write(out)
        return out.getvalue()

    def _write(self, out: Any) -> None:
        encoder, pixels, options = ENCODERS[self.codec]
        with av.open(out, "w", format=self.container, options=self.options) as container:
            stream: Any = container.add_stream(encoder, rate=self._rate, options={**options, **self.encoding})
            stream.width, stream.height = self.size if self.rotation % 180 == 0 else self.size[::-1]
            stream.pix_fmt = pixels
            stream.codec_context.thread_count = 1
            if self._free_times:
                stream.codec_context.time_base = Fraction(1, TICKS)
            if self.aspect:
                stream.codec_context.sample_aspect_ratio = self.aspect
            if self.rotation:
                stream.set_display_rotation(self.rotation)
            audio: Any = container.add_stream("aac", rate=8000, layout="mono") if self.sound else None
            for number, at in enumerate(self.times):
                stored = np.rot90(picture(number, self.size), -self.rotation // 90)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="gray")
                if not self._free_times:
                    frame.pts, frame.time_base = number, Fraction(1, self._rate)
                else:
                    frame.pts, frame.time_base = round((at + self.offset) * TICKS), Fraction(1, TICKS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if audio is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                for number in range(int(self.times[-1] * 8000 / 1024)):
                    silence.sample_rate, silence.pts = 8000, number * 1024
                    container.mux(audio.encode(silence))
                container.mux(audio.encode())


class Pipe(io.BytesIO):
    """What cannot go back, so that no length and no index is written."""

    def seekable(self) -> bool:
        return False

    seek: Any = None


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """(height, width) grey values with the number's bits."""
    bits = [*MARK, *((number >> bit) & 1 for bit in range(BITS))]
    blocks = np.array(bits, np.uint8).reshape(LINES, COLUMNS) * 215 + 20
    width, height = size
    lines, columns = np.arange(height) * LINES // height, np.arange(width) * COLUMNS // width
    return np.ascontiguousarray(blocks[lines][:, columns])


def number_of(image: Image.Image) -> int:
    """The number that a frame shows; raises AssertionError where it does not stand upright."""
    grey = np.asarray(image.convert("L"), np.float32)
    height, width = grey.shape
    bits = []
    for line in range(LINES):
        for column in range(COLUMNS):
            block = grey[
                int((line + 0.3) * height / LINES) : max(1, int((line + 0.7) * height / LINES)),
                int((column + 0.3) * width / COLUMNS) : max(1, int((column + 0.7) * width / COLUMNS)),
            ]
            bits.append(int(block.mean() > 127))
    assert tuple(bits[:COLUMNS]) == MARK, "the frame does not stand upright"
    return sum(bit << at for at, bit in enumerate(bits[COLUMNS:]))


def sound_alone() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000, layout="mono")
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def still(size: tuple[int, int] = (64, 64), form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, form)
    return out.getvalue()


VFR = (0.0, 0.1, 0.15, 0.9, 1.6, 4.0, 4.05, 7.3)
GOOD: dict[str, Film] = {
    "h264 mp4": Film(),
    "h264 mov": Film(container="mov"),
    "h264 mkv": Film(container="matroska"),
    "h264 avi": Film(container="avi"),
    "hevc mp4": Film("hevc"),
    "hevc mkv": Film("hevc", "matroska"),
    "hevc of 10 bits": Film("hevc10", times=every(30, 2)),
    "vp8 webm": Film("vp8", "webm"),
    "vp8 mkv": Film("vp8", "matroska", every(10, 3)),
    "vp9 webm": Film("vp9", "webm"),
    "vp9 mp4": Film("vp9"),
    "av1 mp4": Film("av1", times=every(15, 3)),
    "av1 webm": Film("av1", "webm", every(15, 3)),
    "mpeg4 mp4": Film("mpeg4"),
    "mpeg4 avi": Film("mpeg4", "avi"),
    "mpeg4 with B-frames": Film("mpeg4 with B", "mov"),
    "mpeg4 avi with B-frames": Film("mpeg4 with B", "avi"),
    "mjpeg avi": Film("mjpeg", "avi"),
    "mjpeg mov": Film("mjpeg", "mov", every(12, 3)),
    "mjpeg mkv": Film("mjpeg", "matroska", every(12, 3)),
    "variable rate mp4": Film(times=VFR),
    "variable rate webm": Film("vp9", "webm", VFR),
    "frames that stay long": Film("vp8", "webm", (0.0, 3.0, 9.0, 9.1)),
    "begins at 10 s, mkv": Film(container="matroska", offset=10),
    "begins at 2 s, mp4": Film(offset=2),
    "turned by 90": Film(container="mov", rotation=90),
    "turned by 180": Film(rotation=180),
    "turned by 270": Film("hevc", "mov", rotation=270),
    "without a length": Film("vp9", "webm", seekable=False),
    "mkv without an index": Film(container="matroska", seekable=False),
    "fragments": Film(options={"movflags": "frag_keyframe+empty_moov"}),
    "index first": Film(options={"movflags": "faststart"}),
    "one frame": Film(times=(0.0,)),
    "one frame of mkv": Film("vp9", "matroska", (0.0,)),
    "many a second": Film(times=every(120, 1.5)),
    "few a second": Film("mpeg4", times=every(0.5, 10)),
    "one key frame": Film(times=every(30, 8), encoding={"g": "1000", "bf": "3", "b-pyramid": "strict"}),
    "open groups": Film(times=every(30, 4), encoding={"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "reference frames": Film(times=every(30, 4), encoding={"preset": "slow", "bf": "3", "g": "48"}),
    "wide pixels": Film("mpeg4", size=(80, 128), aspect=Fraction(2, 1)),
    "with sound": Film(sound=True),
    "odd size": Film("vp9", "webm", size=(161, 97)),
}


def damaged(film: Film, change: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    return lambda: change(film.made())


def cut(part: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * part)]


def hole(data: bytes) -> bytes:
    """Zeros in the middle."""
    begin = len(data) * 7 // 10
    return data[:begin] + bytes(len(data) // 10) + data[begin + len(data) // 10 :]


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "E_VIDEO_UNREADABLE"),
    "text": (lambda: b"no film, but words " * 50, "E_VIDEO_FORMAT"),
    "a picture": (still, "E_VIDEO_FORMAT"),
    "an animation": (lambda: still(form="GIF"), "E_VIDEO_FORMAT"),
    "sound alone": (sound_alone, "E_VIDEO_FORMAT"),
    "cut mp4": (damaged(Film(), cut(0.6)), "E_VIDEO_UNREADABLE"),
    "a head alone": (lambda: Film().made()[:64], "E_VIDEO_UNREADABLE"),
    "a head of mkv alone": (lambda: Film(container="matroska").made()[:200], "E_VIDEO_UNREADABLE"),
    "transport stream": (lambda: Film("mpeg2", "mpegts").made(), "E_VIDEO_FORMAT"),
    "flash": (lambda: Film(container="flv").made(), "E_VIDEO_FORMAT"),
    "ffv1": (lambda: Film("ffv1", "matroska").made(), "E_VIDEO_FORMAT"),
    "raw pixels": (lambda: Film("raw", "avi", every(10, 1)).made(), "E_VIDEO_FORMAT"),
    "mpeg2": (lambda: Film("mpeg2", "matroska").made(), "E_VIDEO_FORMAT"),
    "pngs": (lambda: Film("png", "mov", every(10, 1)).made(), "E_VIDEO_FORMAT"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n", "E_VIDEO_FORMAT"),
    "a list of files": (lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "E_VIDEO_FORMAT"),
    "48 million pixels": (lambda: Film("mjpeg", "avi", (0.0,), (8000, 6000)).made(), "E_VIDEO_TOO_LARGE"),
    "a document": (lambda: b"%PDF-1.4\n%%EOF", "E_VIDEO_FORMAT"),
    "noise behind a head": (lambda: Film().made()[:40] + bytes(range(256)) * 40, "E_VIDEO_UNREADABLE"),
}
