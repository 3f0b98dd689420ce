"""Data URLs in every spelling that clients use, through the decoder and each entry that takes one."""

from __future__ import annotations

import base64
import binascii
import io
import os
import random
import re
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cog import Path as CogPath
from cog.types import File
from PIL import Image

import predict
from kimi_vl.errors import UserError
from kimi_vl.media import data_url, images
from kimi_vl.media.image_files import MAX_BYTES
from kimi_vl.media.images import ImageOptions
from kimi_vl.prompt import image_sources
from kimi_vl.text.messages import read

OPTIONS = ImageOptions(14, 4096, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (9, 12, 3), dtype=np.uint8))


def png() -> bytes:
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    return stream.getvalue()


PNG = png() + b"\0\0"  # what is behind the end makes the length no multiple of three, so there is padding
PLAIN = base64.b64encode(PNG).decode()
SAFE = base64.urlsafe_b64encode(PNG).decode()
assert set("+/=") <= set(PLAIN)
EVERY_CHARACTER = "".join(f"%{ord(character):02x}" for character in PLAIN)
EVERY_BYTE = "".join(f"%{byte:02X}" for byte in PNG)
LINES = re.sub("(.{76})", r"\1\r\n", PLAIN)

SPELLINGS = {
    "plain": f"data:image/png;base64,{PLAIN}",
    "no type": f"data:;base64,{PLAIN}",
    "upper-case base64": f"data:image/png;BASE64,{PLAIN}",
    "mixed base64": f"data:image/png;Base64,{PLAIN}",
    "upper-case scheme": f"DATA:image/png;base64,{PLAIN}",
    "mixed scheme": f"Data:IMAGE/PNG;BASE64,{PLAIN}",
    "another type": f"data:text/html;base64,{PLAIN}",
    "no such type": f"data:image;base64,{PLAIN}",
    "a parameter": f"data:image/png;charset=utf-8;base64,{PLAIN}",
    "parameters": f"data:image/png;name=a%2Cb.png;x=y;base64,{PLAIN}",
    "a quoted parameter": f'data:image/png;name="a b";base64,{PLAIN}',
    "a parameter behind": f"data:image/png;base64;charset=utf-8,{PLAIN}",
    "a space before base64": f"data:image/png; base64,{PLAIN}",
    "a space before the comma": f"data:image/png;base64 ,{PLAIN}",
    "a space behind the comma": f"data:image/png;base64, {PLAIN}",
    "no padding": f"data:image/png;base64,{PLAIN.rstrip('=')}",
    "too much padding": f"data:image/png;base64,{PLAIN}==",
    "url-safe": f"data:image/png;base64,{SAFE}",
    "url-safe without padding": f"data:image/png;base64,{SAFE.rstrip('=')}",
    "both alphabets": f"data:image/png;base64,{PLAIN[:60]}{SAFE[60:]}",
    "percent-encoded signs": f"data:image/png;base64,{urllib.parse.quote(PLAIN, safe='')}",
    "percent-encoded signs, lower case": "data:image/png;base64,"
    + PLAIN.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d"),
    "percent-encoded throughout": f"data:image/png;base64,{EVERY_CHARACTER}",
    "line breaks": f"data:image/png;base64,{LINES}",
    "encoded line breaks": f"data:image/png;base64,{LINES}".replace("\r\n", "%0D%0A"),
    "tabs and spaces": f"data:image/png;base64,{PLAIN[:9]}\t{PLAIN[9:20]} {PLAIN[20:]}",
    "white space around": f" \n data:image/png;base64,{PLAIN}\r\n",
    "a fragment": f"data:image/png;base64,{PLAIN}#top",
    "no base64": f"data:image/png,{urllib.parse.quote_from_bytes(PNG)}",
    "no base64, all encoded": f"data:image/png,{EVERY_BYTE}",
    "no base64, little encoded": f"data:image/png,{urllib.parse.quote_from_bytes(PNG, safe='!$&()*+,;:@ ')}",
    "no base64, no type": f"data:,{EVERY_BYTE}",
}

REFUSED = {
    "no comma": ("data:image/png;base64", "E_IMAGE_UNREADABLE"),
    "a comma in the fragment": ("data:image/png;base64#,AAAA", "E_IMAGE_UNREADABLE"),
    "nothing": ("data:,", "E_IMAGE_UNREADABLE"),
    "no base64 at all": ("data:image/png;base64,", "E_IMAGE_UNREADABLE"),
    "padding alone": ("data:image/png;base64,====", "E_IMAGE_UNREADABLE"),
    "other signs": ("data:image/png;base64,@@@@", "E_IMAGE_UNREADABLE"),
    "a letter of no alphabet": ("data:image/png;base64,AAé=", "E_IMAGE_UNREADABLE"),
    "a lone surrogate": ("data:image/png;base64,AAA\ud800", "E_IMAGE_UNREADABLE"),
    "one character over": ("data:image/png;base64,AAAAA", "E_IMAGE_UNREADABLE"),
    "padding inside": ("data:image/png;base64,AA==AAAA", "E_IMAGE_UNREADABLE"),
    "a broken percent sign": ("data:image/png;base64,AAA%3", "E_IMAGE_UNREADABLE"),
    "a percent sign of no number": ("data:image/png;base64,AAAA%zz", "E_IMAGE_UNREADABLE"),
    "too much": ("data:image/png;base64," + "A" * (MAX_BYTES // 3 * 4 + 8), "E_IMAGE_TOO_LARGE"),
    "too much without base64": ("data:image/png," + "A" * (MAX_BYTES + 1), "E_IMAGE_TOO_LARGE"),
    "far too much": ("data:image/png," + "%" * (5 * MAX_BYTES), "E_IMAGE_TOO_LARGE"),
}


def by_cog(url: str) -> Any:
    """What Cog makes of a file input: it opens what begins with a lower-case ``data:`` and passes the rest on."""
    data_url.install()
    if not url.startswith("data:"):
        return predict.build_chat("hi", "", [], url, [])[1][0]
    opened: Any = CogPath.validate(url)
    written = opened.convert()
    try:
        return predict.build_chat("hi", "", [], written, [])[1][0].read_bytes()
    finally:
        written.unlink()


def in_messages(url: str) -> Any:
    part = {"type": "image_url", "image_url": {"url": url}}
    (source,) = image_sources(read([{"role": "user", "content": [part]}])[0].images, [])
    return source


def by_processor(url: str) -> Image.Image:
    from kimi_vl.hf import processing

    return processing._image(url).convert("RGB")


def loaded(read: Callable[[str], Any]) -> Callable[[str], Image.Image]:
    return lambda url: images.load(read(url), OPTIONS)


ENTRIES: dict[str, Callable[[str], Image.Image]] = {
    "decoder": loaded(data_url.decode),
    "python": loaded(str),
    "cog": loaded(by_cog),
    "messages": loaded(in_messages),
    "processor": by_processor,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_data_is_exact(spelling: str) -> None:
    assert data_url.decode(SPELLINGS[spelling]) == PNG


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_shows_the_same_picture(entry: str) -> None:
    for spelling, url in SPELLINGS.items():
        assert ENTRIES[entry](url).tobytes() == PICTURE.tobytes(), spelling


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("fault", REFUSED)
def test_every_entry_refuses_the_same(entry: str, fault: str) -> None:
    url, code = REFUSED[fault]
    with pytest.raises(UserError, match=f"^{code}: [^/]*(data:image/png;base64,….)?") as caught:
        ENTRIES[entry](url)
    assert caught.value.code == code


def test_cog_s_other_urls_and_paths_stay_as_they_are(tmp_path: Path) -> None:
    for other in ("https://example.org/data:,x", "/etc/data:", "metadata:,x", "datas:,x", "data", ""):
        assert not data_url.is_data_url(other)
        with pytest.raises(UserError, match="E_IMAGE_SOURCE"):
            data_url.decode(other)
    data_url.install()
    written = tmp_path / "a"
    written.write_bytes(b"other")
    with urllib.request.urlopen(written.as_uri()) as response:
        assert response.read() == b"other"
    assert File.validate("data:text/plain;BASE64,eHk").read() == b"xy"


def test_a_path_is_no_data_url_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PICTURE.save("data:,x.png")
    assert images.load(Path("data:,x.png"), OPTIONS).tobytes() == PICTURE.tobytes()


@pytest.mark.slow
def test_the_limit_is_exact() -> None:
    whole = bytes(MAX_BYTES)
    assert data_url.decode("data:;base64," + base64.b64encode(whole).decode()) == whole
    assert len(data_url.decode("data:," + "%00" * MAX_BYTES)) == MAX_BYTES
    for url in ("data:;base64," + base64.b64encode(whole + b"\0").decode(), "data:," + "%00" * (MAX_BYTES + 1)):
        with pytest.raises(UserError, match="E_IMAGE_TOO_LARGE"):
            data_url.decode(url)


def test_too_much_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UserError, match="E_IMAGE_TOO_LARGE"):
        data_url.decode(REFUSED["too much"][0])


def test_percent_decoding_is_that_of_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    for part in (4, 5, 7, 2**20):
        monkeypatch.setattr(data_url, "_PART_BYTES", part)
        for _ in range(400):
            text = "".join(draw.choices("%%%%2aFzé,=", k=draw.randrange(1, 40)))
            expected = urllib.parse.unquote_to_bytes(text)
            if expected:
                assert data_url.decode("data:," + text) == expected


@pytest.mark.parametrize("alphabet", ["AZaz09+/-_=", "AB+/-_= \n%#,é@"])
def test_any_text_gives_bytes_or_an_error(alphabet: str) -> None:
    draw = random.Random(int(os.environ.get("KIMI_VL_FUZZ", "0")))
    for _ in range(500 + 100 * int(os.environ.get("KIMI_VL_FUZZ", "0"))):
        text = "".join(draw.choices(alphabet, k=draw.randrange(0, 30)))
        try:
            data = data_url.decode("data:;base64," + text)
        except UserError as error:
            assert error.code == "E_IMAGE_UNREADABLE"
            continue
        kept = re.sub(r"\s", "", urllib.parse.unquote(text.partition("#")[0])).rstrip("=")
        again = base64.urlsafe_b64encode(data).decode().rstrip("=")
        kept = kept.replace("+", "-").replace("/", "_")
        assert (again[:-1], len(again)) == (kept[:-1], len(kept))  # bits beyond the last byte do not count
        assert binascii.a2b_base64(kept.replace("-", "+").replace("_", "/") + "==") == data
