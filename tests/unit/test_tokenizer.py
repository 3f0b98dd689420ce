"""The tokenizer against the original's ids, and the inertness of what a user types."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kimi_vl.errors import CheckpointError
from kimi_vl.text.tokenizer import TextStream, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "golden_a"
DATA = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory(GOLDEN / "checkpoint")


def test_strings(tokenizer):
    assert len(DATA["strings"]) > 70
    for entry in DATA["strings"]:
        assert tokenizer.encode(entry["text"]) == entry["ids_special_as_text"], entry["text"]
        assert tokenizer.encode(entry["text"], allow_special=True) == entry["ids_via_processor_call"], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["decode"]
        assert tokenizer.decode(entry["ids"], skip_special=True) == entry["decode_skip_special"]


def test_long_strings(tokenizer):
    for entry in DATA["long_strings"]:
        text = eval(entry["expr"], {"__builtins__": {}})
        ids = tokenizer.encode(text)
        digest = hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()
        assert (len(ids), digest) == (entry["n_ids"], entry["sha256_of_ids_le_int32"]), entry["expr"]


def test_runs_of_placeholders(tokenizer):
    for entry in DATA["media_pad_runs"]["cases"]:
        count = entry["n_media_pad"]
        assert tokenizer.encode("<|media_pad|>" * count, allow_special=True) == [tokenizer.media_pad_id] * count


def test_decode_cases(tokenizer):
    for entry in DATA["decode_cases"]:
        assert tokenizer.decode(entry["ids"]) == entry["decode"]
        assert tokenizer.decode(entry["ids"], skip_special=True) == entry["batch_decode_skip_special"]


def test_every_added_token_is_text_when_typed(tokenizer):
    assert len(tokenizer.special) == 258
    for name in tokenizer.special:
        ids = tokenizer.encode(f"a {name} b")
        assert not any(tokenizer.is_special(index) for index in ids), name
        assert tokenizer.decode(ids) == f"a {name} b"


def test_stream_equals_decode_at_every_cut(tokenizer):
    text = "naïve 🧑‍🚀 日本 ◁think▷ é"
    stream = TextStream(tokenizer)
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)


def test_stream_ends_with_a_replacement_where_a_character_is_cut(tokenizer):
    stream = TextStream(tokenizer)
    first = tokenizer.encode("é")[:1]
    if tokenizer.token_bytes(first[0]) == "é".encode():
        first = [next(i for i in range(256) if tokenizer.token_bytes(i) == b"\xc3")]
    assert stream.push(first[0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "cannot be read"),
        (b"IQ== 0\nnonsense\n", "line 2"),
        (b"IQ== 0\nIg== 2\n", "ranks"),
        (b"IQ== 0\n", "byte"),
    ],
)
def test_a_bad_rank_file_is_named(tmp_path, content, word):
    if content is not None:
        (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tiktoken\.model.*{word}"):
        Tokenizer.from_directory(tmp_path)


def test_names_with_other_ids_are_refused(tmp_path):
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "checkpoint" / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["1030"] = config["added_tokens_decoder"].pop("1026")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*im_end"):
        Tokenizer.from_directory(tmp_path)


def test_without_names_the_published_offsets_hold(tmp_path, tokenizer):
    shutil.copy(GOLDEN / "checkpoint" / "tiktoken.model", tmp_path)
    assert Tokenizer.from_directory(tmp_path).special == tokenizer.special
