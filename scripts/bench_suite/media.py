"""`scripts/bench media`: seconds from the bytes of a film or a document to pictures at the size that the model sees.

The process that reads them is started anew each time, as for a request. A film of moving noise and a document of text
are made once.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from kimi_vl.media.documents import Document
from kimi_vl.media.images import ImageOptions
from kimi_vl.media.video import Video, VideoOptions

from . import conditions

ROOT = Path(__file__).parents[2]
RATE = 30
PUBLISHED_LIMIT = 4096  # in_token_limit of the published thinking model


def film(seconds: int, width: int, height: int) -> bytes:
    """H.264 in MP4 with a key frame every 250 frames."""
    out = io.BytesIO()
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (height, 2 * width), np.uint8) // 4 + 96
    noise[:, width:] = noise[:, :width]
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "libx264", rate=RATE, options={"preset": "ultrafast", "g": "250", "crf": "30"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * RATE):
            begin = 4 * number % width
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, begin : begin + width]), format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def document(pages: int) -> bytes:
    """A4 pages of 60 lines of text each."""
    line = "(The quick brown fox jumps over the lazy dog, again and again, until its line is full of words.) Tj T*"
    content = f"BT /F 9 Tf 50 800 Td 12 TL {' '.join([line] * 60)} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] >>" % (pages, b" ".join(b"%d 0 R" % (5 + at) for at in range(pages))),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        *[
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R"
            b" /Resources << /Font << /F 3 0 R >> >> >>"
        ]
        * pages,
    ]
    out = bytearray(b"%PDF-1.7\n")
    places = []
    for number, text in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, text)
    begin = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    return bytes(out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, begin))


def processor_seconds() -> float:
    """Of this process and those of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench media")
    parser.add_argument("--seconds", type=int, default=30, help="of the film (30)")
    parser.add_argument("--size", type=int, nargs=2, default=(1920, 1080), help="of the film, in pixels (1920 1080)")
    parser.add_argument("--frames", type=int, nargs="*", default=[1, 16, 64], help="that are taken (1 16 64)")
    parser.add_argument("--pages", type=int, nargs="*", default=[1, 17, 120], help="of documents (1 17 120)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (5)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "bench", help="where the film is kept")
    args = parser.parse_args(arguments)
    width, height = args.size
    kept = args.cache / f"film-{args.seconds}-{width}-{height}.mp4"
    if not kept.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(film(args.seconds, width, height))
    data = kept.read_bytes()
    options = ImageOptions(14, PUBLISHED_LIMIT, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def frames(count: int) -> int:
        with Video(data, VideoOptions(fps=RATE, max_frames=count)) as opened:
            assert len(list(opened.read(opened.sizes(opened.wanted, 1.0, options)))) == count
            return opened.peak_bytes()

    def pages(count: int) -> int:
        with Document(document(count), None, options) as opened:
            assert len(list(opened.read(opened.sizes(count, 1.0, options)))) == count
            return opened.peak_bytes()

    print(f"{conditions.processor()}; a film of {args.seconds} s, {width} x {height}, {len(data):,} bytes")
    print("\n| what | seconds | processor seconds | peak MB of the process |\n|---|---|---|---|")
    results = []
    measured: list[tuple[str, Callable[[int], int], list[int]]] = [
        ("frames", frames, args.frames),
        ("pages", pages, args.pages),
    ]
    for name, read, counts in measured:
        for count in counts:
            took, used, peak = [], [], 0
            for _ in range(args.rounds):
                began, before = time.perf_counter(), processor_seconds()
                peak = max(peak, read(count))
                took.append(time.perf_counter() - began)
                used.append(processor_seconds() - before)
            result = {
                name: count,
                "seconds": round(statistics.median(took), 3),
                "processor_seconds": round(statistics.median(used), 3),
                "peak_mb": round(peak / 1e6),
            }
            results.append(result)
            print("| " + f"{count} {name} | " + " | ".join(map(str, [*result.values()][1:])) + " |", flush=True)
    print(
        json.dumps(
            {
                "bench": "media",
                "machine": conditions.processor(),
                "seconds": args.seconds,
                "size": [width, height],
                "results": results,
            }
        )
    )
    return 0
