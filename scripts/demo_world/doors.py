"""The demo's questions through the service's own entry: frames as a video file, pages as a PDF document."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

import kimi_vl
from demo_world.lessons import Conversation, text_of
from demo_world.pictures import Picture
from kimi_vl.events import Done

DPI = 144  # at which the service renders pages


def seconds(label: str) -> int:
    """The time that a label like 00:01:05 says."""
    hours, minutes, rest = map(int, label.split(":"))
    return 3600 * hours + 60 * minutes + rest


def _times(frames: Sequence[Picture]) -> tuple[int, int]:
    """When the first frame is, and the time from one to the next."""
    first, second = (seconds(str(frame.label)) for frame in frames[:2])
    return first, second - first


def film_file(frames: Sequence[Picture]) -> bytes:
    """An MP4 file with each frame at the time of its label; the first one stands from the beginning."""
    begin, step = _times(frames)
    times = [0] * (begin > 0) + [begin + step * number for number in range(len(frames) + 1)]
    shown = [frames[0]] * (begin > 0) + [*frames, frames[-1]]
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "18", "bf": "0"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, frame in zip(times, shown, strict=True):
            encoded = av.VideoFrame.from_image(frame.image)
            encoded.pts, encoded.time_base = 1000 * time, Fraction(1, 1000)
            container.mux(stream.encode(encoded))
        container.mux(stream.encode())
    return out.getvalue()


def film_options(frames: Sequence[Picture]) -> dict[str, float]:
    """The parameters of a request that take just these frames from their file."""
    begin, step = _times(frames)
    return {"fps": 1 / step, "start": begin, "end": begin + step * len(frames)}


def paper_file(pages: Sequence[Picture]) -> bytes:
    """A PDF file whose pages have the numbers of their labels; those before them are empty."""
    first = int(str(pages[0].label).split()[1])
    images = [Image.new("RGB", (28, 28), "white")] * (first - 1) + [page.image for page in pages]
    out = io.BytesIO()
    images[0].save(out, "PDF", save_all=True, append_images=images[1:], resolution=DPI)
    return out.getvalue()


def paper_options(pages: Sequence[Picture]) -> dict[str, str]:
    """The parameter of a request that takes just these pages from their file."""
    first, last = (str(page.label).split()[1] for page in (pages[0], pages[-1]))
    return {"pages": f"{first}-{last}"}


def request(conversation: Conversation, pictures: Sequence[Picture]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and parameters of a conversation for :meth:`kimi_vl.pipeline.Pipeline.stream`."""
    if conversation.task not in ("film", "pages"):
        return conversation.messages, {"images": [picture.image for picture in pictures]}
    *before, last = conversation.messages
    question = {"type": "text", "text": text_of(last)}
    if conversation.task == "film":
        message = {"role": "user", "content": [{"type": "video"}, question]}
        return [*before, message], {"videos": [film_file(pictures)], **film_options(pictures)}
    message = {"role": "user", "content": [{"type": "document"}, question]}
    return [*before, message], {"documents": [paper_file(pictures)], **paper_options(pictures)}


class Service:
    """A pipeline that answers greedily."""

    def __init__(self, directory: Path):
        self.pipeline = kimi_vl.load(str(directory))

    def answer(self, asked: Sequence[tuple[Conversation, tuple[Picture, ...]]]) -> Iterator[tuple[str, str]]:
        """Thinking and answer of each conversation; all are asked at once."""
        requests = [request(conversation, shown) for conversation, shown in asked]
        streams = [self.pipeline.stream(messages, temperature=0, **params) for messages, params in requests]
        for stream in streams:
            *_, done = stream
            assert isinstance(done, Done)  # an error is raised
            yield done.reasoning, done.answer
