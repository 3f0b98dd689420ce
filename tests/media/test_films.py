"""Frames of generated films are those on the screen at their times, read back from the pixels; other files are refused.

What is expected follows from the times at which the films were made, without a decoder.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct

import av
import pytest

from kimi_vl.errors import UserError
from kimi_vl.media import images
from kimi_vl.media.images import ImageOptions
from kimi_vl.media.video import MAX_FRAMES, Video, VideoOptions, clock

from .films import BAD, GOOD, Film, cut, every, hole, number_of

PART = VideoOptions(fps=50, max_frames=7, start=0.3141, end=2.5)
SEEKING = {
    "h264 avi", "vp9 webm", "variable rate mp4", "begins at 10 s, mkv", "mkv without an index", "open groups",
    "reference frames", "one frame",
}  # fmt: skip


@functools.cache
def made(name: str) -> bytes:
    return GOOD[name].made()


def frames(data: bytes, how: VideoOptions, options: ImageOptions) -> tuple[tuple[float, ...], list[int]]:
    """The times that were taken, and the numbers that their frames show."""
    with Video(data, how) as video:
        times = video.taken(video.wanted)
        pictures = list(video.read(video.sizes(video.wanted, 1.0, options)))
        return tuple(times[at] for at, _ in pictures), [number_of(picture) for _, picture in pictures]


@pytest.mark.parametrize("name", GOOD)
def test_the_frames_on_the_screen_are_taken(name: str, options: ImageOptions) -> None:
    film = GOOD[name]
    times, numbers = frames(made(name), VideoOptions(fps=5), options)
    assert numbers == [film.shown(time) for time in times]
    assert times == pytest.approx([number / 5 for number in range(len(times))])
    assert len(times) == min(64, max(1, math.ceil(film.seconds * 5 - 1e-3)))


@pytest.mark.parametrize(
    "name", [name if name in SEEKING else pytest.param(name, marks=pytest.mark.nightly) for name in GOOD]
)
def test_the_middles_of_a_part_of_a_film_are_taken(name: str, options: ImageOptions) -> None:
    film = GOOD[name]
    if film.times[-1] < 0.4:
        with pytest.raises(UserError, match=r"^E_PARAMETER: start "):
            frames(made(name), PART, options)
        return
    end = min(2.5, film.seconds)
    times, numbers = frames(made(name), PART, options)
    assert times == pytest.approx([0.3141 + (end - 0.3141) * (at + 0.5) / 7 for at in range(7)], abs=2e-3)
    assert numbers == [film.shown(time) for time in times]


def test_times_are_regular_up_to_the_cap_and_middles_above() -> None:
    data = made("h264 mp4")  # 3 s
    expected = {
        VideoOptions(): (0.0, 1.0, 2.0),
        VideoOptions(fps=2): (0.0, 0.5, 1.0, 1.5, 2.0, 2.5),
        VideoOptions(fps=2, max_frames=6): (0.0, 0.5, 1.0, 1.5, 2.0, 2.5),
        VideoOptions(fps=2, max_frames=3): (0.5, 1.5, 2.5),
        VideoOptions(fps=0.1): (0.0,),
        VideoOptions(max_frames=1): (1.5,),
        VideoOptions(start=1): (1.0, 2.0),
        VideoOptions(start=0.5, end=2.5): (0.5, 1.5),
        VideoOptions(start=1, end=100, fps=0.5): (1.0,),
        VideoOptions(end=1.5): (0.0, 1.0),
    }
    for how, times in expected.items():
        with Video(data, how) as video:
            assert video.taken(video.wanted) == pytest.approx(times), how
            assert video.labels(video.wanted) == [clock(time) for time in times]
    assert [clock(at) for at in (0, 59.99, 60, 3599, 3600, 86399.5, 360000)] == [
        "00:00:00", "00:00:59", "00:01:00", "00:59:59", "01:00:00", "23:59:59", "100:00:00",
    ]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_film_is_refused(name: str) -> None:
    make, code = BAD[name]
    with pytest.raises(UserError) as caught, Video(make(), VideoOptions()):
        pass
    assert caught.value.code == code


def test_a_file_of_sound_is_called_that() -> None:
    make, _ = BAD["sound alone"]
    with pytest.raises(UserError, match="has sound but no pictures"), Video(make(), VideoOptions()):
        pass


def test_a_film_is_no_image(options: ImageOptions) -> None:
    for name in ("h264 mp4", "vp9 webm", "mjpeg avi"):
        with pytest.raises(UserError, match=r"^E_IMAGE_FORMAT"):
            images.load(made(name), options)


@pytest.mark.parametrize("name", ["h264 mkv", "vp9 webm", "mjpeg avi", "index first", "av1 webm", "h264 avi"])
def test_of_a_film_that_is_cut_short_what_came_is_taken(name: str, options: ImageOptions) -> None:
    film = GOOD[name]
    for part in (0.75, 0.9):
        times, numbers = frames(cut(part)(made(name)), VideoOptions(fps=5), options)
        # the last one may be half there
        assert numbers[:-1] == [film.shown(time) for time in times[:-1]]
        assert len(numbers) >= 3


@pytest.mark.parametrize("name", ["index first", "h264 mkv", "hevc mkv", "vp9 webm", "mpeg4 avi", "mjpeg mkv"])
def test_damage_costs_the_frames_that_it_hits(name: str, options: ImageOptions) -> None:
    """Before the hole everything is right; behind it there may be less, and nothing fails."""
    film, data = GOOD[name], hole(made(name))
    with Video(data, VideoOptions(fps=5)) as video:
        pictures = dict(video.read(video.sizes(video.wanted, 1.0, options)))
        times = video.taken(video.wanted)
    assert [number_of(pictures[at]) for at in range(3)] == [film.shown(time) for time in times[:3]]


def test_a_damaged_frame_is_left_out_and_none_stands_for_it(options: ImageOptions) -> None:
    film = Film(container="matroska", encoding={"g": "1", "bf": "0"})
    data = film.made()
    with av.open(io.BytesIO(data), "r") as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for packet in packets[40:60]:
        at = data.index(packet)
        data = data[:at] + bytes(len(packet)) + data[at + len(packet) :]
    times, numbers = frames(data, VideoOptions(fps=5), options)
    assert numbers == [0, 6, 12, 18, 24, 30, 36, 60, 66, 72, 78, 84]
    assert times == pytest.approx([number / 30 for number in numbers])


def test_small_pictures_of_many_frames(options: ImageOptions) -> None:
    """Nine thousand frames of which few are key frames: no length of a film costs more than its frames are worth."""
    film = Film(times=every(30, 300), size=(80, 64), encoding={"g": "9000", "bf": "0"})
    data = film.made()
    assert len(data) < 4_000_000
    times, numbers = frames(data, VideoOptions(max_frames=5), options)
    assert numbers == [film.shown(time) for time in times] and times[-1] == 270


def test_more_than_may_be_decoded_is_refused_before_it_is(
    options: ImageOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kimi_vl.media import video_decoder

    film = GOOD["one key frame"]  # of 240 frames
    pixels = 160 * 128
    for most, fails in ((240 * pixels, False), (230 * pixels, True)):
        monkeypatch.setattr(video_decoder, "MAX_DECODED_PIXELS", most)
        reader = video_decoder.read(io.BytesIO(made("one key frame")))
        if fails:
            with pytest.raises(video_decoder.SandboxError, match=r"too long"):
                reader.answer({"times": [0.0, 7.9], "width": 16, "height": 16})
        else:
            reader.answer({"times": [0.0, 7.9], "width": 16, "height": 16})
            assert len(list(reader.pictures())) == 2
        reader.answer({"times": [0.0, 1.0], "width": 16, "height": 16})
    monkeypatch.setattr(video_decoder, "MAX_PACKETS", 239)
    with pytest.raises(video_decoder.SandboxError, match=r"too long"):
        video_decoder.read(io.BytesIO(made("one key frame")))
    assert len(film.times) == 240


@pytest.mark.parametrize(
    "name", ["reference frames", "open groups", "one key frame", "hevc mp4", "av1 mp4", "h264 avi"]
)
def test_frames_that_are_left_out_change_no_pixel(name: str) -> None:
    """Decoding what is wanted alone gives the same pixels as decoding everything."""
    from kimi_vl.media import video_decoder

    def read(times: list[float]) -> list[bytes]:
        reader = video_decoder.read(io.BytesIO(made(name)))
        reader.answer({"times": times, "width": 160, "height": 128})
        return [pixels for _, pixels in reader.pictures()]

    every_time = [time + 0.001 for time in GOOD[name].times]
    some = every_time[5::17]
    assert read(some) == read(every_time)[5::17]
    assert read([every_time[-1]]) == read(every_time)[-1:]


def test_a_picture_is_as_large_as_it_is_shown(options: ImageOptions) -> None:
    sizes = {
        "h264 mp4": (160, 128),
        "turned by 90": (160, 128),
        "wide pixels": (160, 128),
        "odd size": (161, 97),
    }
    for name, size in sizes.items():
        with Video(made(name), VideoOptions()) as video:
            assert (video.width, video.height) == size, name
            assert {picture.size for _, picture in video.read(video.sizes(1, 1.0, options))} == {size}
            assert video.sizes(2, 0.5, options) == [(round(size[0] / 2), round(size[1] / 2))] * 2
    large = dataclasses.replace(GOOD["mjpeg avi"], size=(896, 640), times=every(5, 1)).made()
    with Video(large, VideoOptions()) as video:
        assert video.sizes(1, 1.0, options) == [(448, 320)]


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotation_as_a_phone_writes_it(quarters: int, options: ImageOptions) -> None:
    """The matrix of the track in the file itself: so many quarter turns clockwise make the picture upright."""
    upright = Film(times=every(10, 1), rotation=-90 * quarters % 360)
    data = bytearray(upright.made())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    one = 65536
    data[at : at + 36] = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    times, numbers = frames(bytes(data), VideoOptions(fps=4), options)
    assert numbers == [upright.shown(time) for time in times]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"fps": 0}, "fps"), ({"fps": 61}, "fps"), ({"fps": "two"}, "fps"), ({"fps": float("nan")}, "fps"),
        ({"max_frames": 0}, "max_frames"), ({"max_frames": MAX_FRAMES + 1}, "max_frames"),
        ({"max_frames": 2.5}, "max_frames"), ({"start": -1}, "start"), ({"start": float("inf")}, "start"),
        ({"start": 2, "end": 2}, "end"), ({"end": 0}, "end"), ({"end": True}, "end"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(given: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=f"^E_PARAMETER: {name} "):
        VideoOptions.checked(**given)


def test_a_start_behind_the_end() -> None:
    with pytest.raises(UserError, match=r"^E_PARAMETER: start "), Video(made("h264 mp4"), VideoOptions(start=3)):
        pass


@pytest.mark.nightly
@pytest.mark.parametrize(
    "film",
    [
        Film("mjpeg", "avi", (0.0, 0.1), (7680, 4320)),
        Film("h264", times=every(30, 0.2), size=(7680, 4320)),
        Film("hevc", times=every(30, 0.1), size=(7680, 4320)),
        Film("av1", "webm", every(30, 0.1), (3840, 2160)),
        Film("vp9", "webm", every(30, 0.2), (3840, 2160)),
        Film(times=every(30, 300), size=(1280, 720), encoding={"g": "9000", "bf": "0"}),
    ],
    ids=lambda film: f"{film.codec}-{film.size[0]}-{len(film.times)}",
)
def test_large_films(film: Film, options: ImageOptions) -> None:
    times, numbers = frames(film.made(), VideoOptions(fps=10, max_frames=16), options)
    assert numbers == [film.shown(time) for time in times]


@pytest.mark.nightly
@pytest.mark.parametrize("name", GOOD)
def test_every_cut_and_hole_is_survived(name: str, options: ImageOptions) -> None:
    data = made(name)
    for step in range(1, 25):
        at = len(data) * step // 25
        for changed in (data[:at], data[:at] + b"\xff" * 64 + data[at + 64 :], data[:at] + data[at + 64 :]):
            try:
                frames(changed, VideoOptions(fps=2), options)
            except UserError as error:
                assert error.code in ("E_VIDEO_UNREADABLE", "E_VIDEO_FORMAT", "E_VIDEO_TOO_LARGE")
            except AssertionError as error:
                assert "upright" in str(error)  # a damaged picture
