"""Frames of a film at given times. Runs in the process of :mod:`.sandbox` alone, as the only module that imports PyAV.

The packets are listed first, without decoding: containers say too little about their length, and often what is wrong.
The list tells when each frame is shown, where decoding may begin, and what it will cost.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import av.audio.codeccontext
import av.audio.stream
import av.error
import av.stream
import av.subtitles.codeccontext
import av.subtitles.stream  # these are imported by a file that has such streams, when nothing can be opened any more
from av.video.reformatter import Interpolation

from .sandbox import SandboxError

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
DECODERS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg"})
MAX_FRAME_PIXELS = 40_000_000
MAX_PACKETS = 500_000
"""Of the film: more than two hours at 60 frames a second."""
MAX_DECODED_PIXELS = 16 * 10**9
"""All frames that have to be decoded for those that were asked for: about 7,700 of 1080p."""
_THREADS = 2
_LARGE = 16_000_000  # pixels of a frame
_ROUNDED_S = 0.001
_OLD_S = 0.05
_SKIPPING = frozenset({"h264", "hevc"})
"""Decoders that leave out single frames that no other frame needs."""


def read(file: BinaryIO) -> Film:
    """Raises :class:`SandboxError` (format, no pictures, unreadable, too large)."""
    try:
        return Film(file)
    except av.error.MemoryError:
        raise SandboxError("too large") from None
    except av.error.ArgumentError:  # a container that is not in the list
        raise SandboxError("format") from None


class Film:
    """A file with one stream of frames that is read."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._open()
        self._check(self._stream.codec_context.width, self._stream.codec_context.height)
        self._in_order = self._container.format.name == "avi"  # whose frames have the times of other frames
        self._keys: dict[int, int] = {}  # where decoding may begin: time of a frame, and what to seek for it
        self._starts: list[int] = []  # these times, ascending
        self._shown: list[int] = []  # times of all frames, ascending, in ticks
        self._duration = self._packets()
        first = next(self._decoded(self._starts[0], frozenset(self._shown)), None)
        if first is None:
            raise SandboxError("unreadable")
        self._check(first.width, first.height)
        self._first = first
        self._wanted: list[int] = []
        self._old = 0.0
        self._size = (0, 0)

    def _open(self) -> None:
        """Open the file from its beginning, whatever was read of it before."""
        self._file.seek(0)
        self._container = av.open(self._file, "r", options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
        # covers of audio files are video streams with one picture
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise SandboxError("no pictures" if self._container.streams.audio else "format")
        self._stream = streams[0]
        context = self._stream.codec_context
        # FFmpeg's own list of codecs does not hold for decoders
        if context is None or context.name not in DECODERS:
            raise SandboxError("format")
        context.thread_type = "AUTO"
        # each thread keeps frames of its own, and of large ones few fit the memory that this process may have
        context.thread_count = _THREADS if context.width * context.height <= _LARGE else 1

    def hello(self) -> dict[str, Any]:
        """Size as shown and upright, in pixels, length in seconds, and the number of frames."""
        ratio = self._stream.sample_aspect_ratio
        width, height = self._first.width, self._first.height
        if ratio and 0.1 < ratio < 10:
            width, height = (max(1, round(width * ratio)), height) if ratio > 1 else (width, round(height / ratio))
        turns = self._turns(self._first)
        if turns % 2:
            width, height = height, width
        return {"width": width, "height": height, "seconds": self._duration, "frames": len(self._shown)}

    def answer(self, question: dict[str, Any]) -> None:
        """Take frames at ``times`` (seconds from the beginning, ascending), each made ``width`` by ``height``."""
        base = float(self._stream.time_base or 1)
        times = [self._shown[0] + time / base for time in question["times"]]
        near = min(0.5, _ROUNDED_S / base)  # ticks by which the time of a frame may have been rounded up
        self._wanted = [self._shown[bisect.bisect_right(self._shown, time + near) - 1] for time in times]
        self._old = _OLD_S / base
        self._size = (question["width"], question["height"])
        pixels = self._first.width * self._first.height
        if self._cost() * pixels > MAX_DECODED_PIXELS:
            raise SandboxError("too long")

    def pictures(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The frames that are shown at the times, but for those that cannot be decoded.

        Each comes as it is stored, with the number ``at`` of its time and the quarter ``turns``, counter-clockwise,
        that make it upright.
        """
        width, height = self._size
        for at, frame in self._frames():
            self._check(frame.width, frame.height)
            turns = self._turns(frame)
            across, down = (height, width) if turns % 2 else (width, height)
            plane = frame.reformat(across, down, "rgb24", interpolation=Interpolation.BICUBIC).planes[0]
            lines, length = memoryview(plane), plane.line_size
            yield {"at": at, "turns": turns}, b"".join(lines[n * length : n * length + 3 * across] for n in range(down))

    def _packets(self) -> float:
        """List the packets; the length in seconds."""
        keys, shown, last = {}, [], 0
        by_dts = self._container.format.name.startswith("mov")
        try:
            for packet in self._container.demux(self._stream):
                at = _at(packet)
                if (packet.pts is None and packet.dts is None) or not packet.size or _is_useless(packet):
                    continue
                shown.append(at)
                last = packet.duration or last
                if packet.is_keyframe:
                    keys[at] = at if packet.dts is None or not by_dts else packet.dts
                if len(shown) > MAX_PACKETS:
                    raise SandboxError("too long")
        except av.error.FFmpegError:
            pass  # a file that is cut short ends here
        if not shown:
            raise SandboxError("unreadable")
        self._shown = shown = sorted(shown)
        if self._in_order and self._stream.codec_context.name in _SKIPPING:
            keys = {}  # which frame comes first after a seek, nobody knows
        self._keys = {at: keys[at] for at in sorted(keys)} or {shown[0]: shown[0]}
        self._starts = list(self._keys)
        if not last and len(shown) > 1:
            last = (shown[-1] - shown[0]) // (len(shown) - 1)
        return float((shown[-1] + last - shown[0]) * (self._stream.time_base or 1))

    def _key(self, at: int) -> int:
        """Where decoding begins for the frame of this time."""
        return self._starts[max(0, bisect.bisect_right(self._starts, at) - 1)]

    def _cost(self) -> int:
        """Frames between the beginnings and the frames that are wanted."""
        cost, reached = 0, 0
        for at in sorted(set(self._wanted)):
            begin = bisect.bisect_left(self._shown, self._key(at))
            end = bisect.bisect_right(self._shown, at)
            cost += end - max(begin, reached)
            reached = end
        return cost

    def _frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """The wanted frames with the number of each time, in order; several times where one is wanted so.

        Where one is damaged, the one before it stands for it unless that is old.
        """
        source: Iterator[av.VideoFrame] = iter(())
        shown: av.VideoFrame | None = None  # the last one whose time has come
        ahead: av.VideoFrame | None = None  # the first one whose time has not
        for number, at in enumerate(self._wanted):
            key = self._key(at)
            reached = max(_time(shown), _time(ahead))
            if number == 0 or reached < key:
                source = self._decoded(key, frozenset(self._wanted))
                shown, ahead = None, next(source, None)
            while ahead is not None and _time(ahead) <= at:
                shown, ahead = ahead, next(source, None)
            if shown is not None and _time(shown) >= at - self._old:
                yield number, shown

    def _decoded(self, begin: int, wanted: frozenset[int]) -> Iterator[av.VideoFrame]:
        """Frames from ``begin`` on as they are shown; those that nobody wants or needs may be missing."""
        skips = self._stream.codec_context.name in _SKIPPING and not self._in_order
        count = -1  # place of the next frame among all
        for packet in self._packets_from(begin):
            context = self._stream.codec_context
            if skips:
                needed = packet is None or packet.pts is None or packet.pts in wanted
                context.skip_frame = "DEFAULT" if needed else "NONREF"
            if count < 0 and packet is not None:
                count = bisect.bisect_left(self._shown, _at(packet))
            try:
                frames = context.decode(packet)
            except av.error.MemoryError:
                raise
            except av.error.FFmpegError:  # a damaged frame
                frames = []
                count += 1
            for frame in frames:
                if self._in_order:
                    frame.pts = self._shown[min(count, len(self._shown) - 1)]
                count += 1
                if not frame.is_corrupt:
                    yield frame

    def _packets_from(self, begin: int) -> Iterator[av.Packet | None]:
        """Packets from that of the time ``begin``, or from an earlier one; None at the end."""
        self._container.seek(self._keys[begin], stream=self._stream)
        packets = self._container.demux(self._stream)
        first = _next(packets)
        if first is not None and _at(first) > begin:  # an index that misleads, or none
            self._open()
            packets = self._container.demux(self._stream)
            first = _next(packets)
        while first is not None and first.size:
            yield first
            first = _next(packets)
        yield None

    @staticmethod
    def _turns(frame: av.VideoFrame) -> int:
        """Quarter turns, counter-clockwise, that make a frame upright."""
        return round(frame.rotation / 90) % 4

    @staticmethod
    def _check(width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise SandboxError("unreadable")
        if width * height > MAX_FRAME_PIXELS:
            raise SandboxError("too large")


def _time(frame: av.VideoFrame | None) -> float:
    """When a frame is shown, in ticks; before everything where there is none."""
    return float("-inf") if frame is None or frame.pts is None else frame.pts


def _at(packet: av.Packet) -> int:
    """When the frame of a packet is shown, in ticks, as far as the container knows."""
    return next((time for time in (packet.pts, packet.dts) if time is not None), 0)


def _is_useless(packet: av.Packet) -> bool:
    """Whether a packet is not to be shown, or not whole."""
    return packet.is_discard or packet.is_corrupt


def _next(packets: Iterator[av.Packet]) -> av.Packet | None:
    """The next one; None at the end, or where the file is cut short."""
    try:
        return next(packets, None)
    except av.error.FFmpegError:
        return None
