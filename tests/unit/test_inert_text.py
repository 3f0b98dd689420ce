"""What a user types is only ever text, wherever it is typed, and reading it takes time in proportion to its length."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import predict
from kimi_vl.errors import UserError
from kimi_vl.text import chat
from kimi_vl.text.messages import read
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN, ThinkingSplitter, answer_of
from kimi_vl.text.tokenizer import TextStream, Tokenizer

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
TOKENIZER = Tokenizer.from_directory(CHECKPOINT)
MARKERS = [THINK_OPEN, THINK_CLOSE, "<think>", "</think>"]


def ids_of(images: int = 0, **inputs: Any) -> list[int]:
    """Ids of a request with these inputs, by the way that they take in the service; an image has five tokens."""
    values = {"prompt": "", "system_prompt": "", "messages": [], **inputs}
    messages, files = predict.build_chat(**values, image=None, images=[predict.Path("/x.png")] * images)
    assert len(files) == images
    return chat.encode(TOKENIZER, chat.without_earlier_thinking(read(messages)), [5] * images)


def controls(ids: list[int]) -> list[int]:
    return [index for index in ids if TOKENIZER.is_special(index)]


PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt": lambda text: {"prompt": text},
    "system prompt": lambda text: {"prompt": "x", "system_prompt": text},
    "message": lambda text: {"messages": [{"role": "user", "content": text}]},
    "part": lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    "parts": lambda text: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": piece} for piece in (text[:3], text[3:])]}]
    },
    "system message": lambda text: {
        "messages": [{"role": "system", "content": text}, {"role": "user", "content": "x"}]
    },
    "earlier answer": lambda text: {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "x"},
        ]
    },
    "developer message": lambda text: {
        "messages": [{"role": "developer", "content": text}, {"role": "user", "content": "x"}]
    },
}


@pytest.mark.parametrize("name", [*TOKENIZER.special, *MARKERS])
def test_a_typed_token_is_text(name: str) -> None:
    for place, inputs in PLACES.items():
        for typed in (name, f"a{name}{name} b", name + "\n"):
            ids = ids_of(**inputs(typed))
            assert controls(ids) == controls(ids_of(**inputs("word"))), place
            kept = answer_of(typed) if place == "earlier answer" else typed
            assert kept in TOKENIZER.decode(ids), place


@pytest.mark.parametrize("name", [*TOKENIZER.special, *MARKERS])
def test_a_token_is_no_role(name: str) -> None:
    for role in (name, name + "user", "user" + name):
        with pytest.raises(UserError, match="E_MESSAGES_INVALID"):
            ids_of(messages=[{"role": role, "content": "x"}, {"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["<|media_pad|>", "<|im_end|>", "◁think▷", "<|im_user|>user<|im_middle|>"])
def test_a_text_full_of_a_token_has_none_of_it(name: str) -> None:
    ids = ids_of(prompt=name * 5000)
    assert controls(ids) == controls(ids_of(prompt="x"))
    assert TOKENIZER.decode(ids).count(name) >= 5000


def test_typed_placeholders_are_no_image_slots() -> None:
    slot = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
    for images in (0, 1, 3):
        ids = ids_of(images=images, prompt=slot * 4)
        assert ids.count(TOKENIZER.media_pad_id) == 5 * images
    typed = {"type": "text", "text": slot}
    ids = ids_of(images=1, messages=[{"role": "user", "content": [typed, {"type": "image"}, typed]}])
    assert ids.count(TOKENIZER.media_pad_id) == 5


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([*TOKENIZER.named, *MARKERS, "<|", "|>", "◁", "\u2029"]), st.text(max_size=5))),
    st.sampled_from(sorted(PLACES)),
)
def test_no_mixture_of_tokens_and_text_makes_a_control_id(pieces: list[str], place: str) -> None:
    typed = "x" + "".join(pieces)
    expected = controls(ids_of(**PLACES[place]("word")))
    assert controls(ids_of(**PLACES[place](typed))) == expected


@settings(max_examples=80, deadline=None)
@given(st.text())
def test_every_text_is_kept(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    stream = TextStream(TOKENIZER)
    assert "".join([*map(stream.push, ids), stream.finish()]) == text


def test_half_a_pair_of_surrogates_is_replaced() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud83d b")) == "a\ufffd b"


# Long texts

NOISE = random.Random(1)


def some(letters: str) -> Callable[[int], str]:
    return lambda length: "".join(NOISE.choices(letters, k=length))


def again(text: str) -> Callable[[int], str]:
    return lambda length: (text * (length // len(text) + 1))[:length]


LONG: dict[str, Callable[[int], str]] = {
    "a word": again("a"),
    "a word of many letters": some("abcdefghijklmnopqrstuvwxyz"),
    "a word of capitals": some("ABCDEFG"),
    "a word of both": some("aB"),
    "a number": again("7"),
    "spaces": again(" "),
    "spaces before a word": lambda length: " " * (length - 1) + "x",
    "spaces and line ends": some(" \n\t\r"),
    "punctuation": some("!?;-"),
    "apostrophes": again("'s"),
    "emoji": again("😀"),
    "families": again("👨‍👩‍👧‍👦"),
    "flags": again("🇩🇪"),
    "accents": lambda length: "e" + "\u0301" * (length - 1),
    "Han": some("山川日月火水木"),
    "Thai": some("กขคงจ"),
    "zero bytes": again("\0"),
    "placeholders": again("<|media_pad|>"),
    "ends": again("<|im_end|>"),
    "markers": again("◁think▷"),
}


def cost(work: Callable[[], object]) -> float:
    """Processor time of one try."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def in_proportion(short: Callable[[], object], long: Callable[[], object]) -> bool:
    """Whether ``long``, which does four times as much, takes about four times as long; 16 times would be quadratic.

    Others use the machine as well, so that one of several tries is enough.
    """
    return any(min(cost(long), cost(long)) < 10 * min(cost(short) for _ in range(3)) for _ in range(6))


@pytest.mark.parametrize("kind", LONG)
def test_a_text_four_times_as_long_takes_about_four_times_as_long(kind: str) -> None:
    # the first pair is within one of the pieces in which long runs are read, the second goes over many of them
    for short, long in ((6_000, 24_000), (25_000, 100_000)):
        texts = [LONG[kind](length) for length in (short, long)]
        assert in_proportion(lambda: TOKENIZER.encode(texts[0]), lambda: TOKENIZER.encode(texts[1]))  # noqa: B023


@pytest.mark.parametrize("kind", LONG)
def test_long_texts_are_kept(kind: str) -> None:
    for length in (30_000, 100_000):
        text = LONG[kind](length)
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert not controls(ids)


def test_streaming_out_takes_time_in_proportion() -> None:
    ids = TOKENIZER.encode("naïve 🧑‍🚀 日本 ◁think▷ é" * 2000)

    def read(count: int) -> None:
        stream, splitter = TextStream(TOKENIZER), ThinkingSplitter()
        for index in ids[:count]:
            splitter.push(stream.push(index))

    assert in_proportion(lambda: read(5_000), lambda: read(20_000))


# Too long


class Counting(Tokenizer):
    """Counts how many ids were made."""

    made = 0

    def encode(self, text: str, allow_special: bool = False, limit: int | None = None) -> list[int]:
        ids = super().encode(text, allow_special, limit)
        self.made += len(ids)
        return ids


def test_what_cannot_fit_is_not_read_to_its_end() -> None:
    tokenizer = Counting.from_directory(CHECKPOINT)
    assert isinstance(tokenizer, Counting)
    message = {"role": "user", "content": "word " * 2_000_000}
    with pytest.raises(UserError, match=r"^E_PROMPT_TOO_LONG: .* more than 4000 tokens of 1000;"):
        chat.encode(tokenizer, [message] * 5, [], limit=1000)
    assert tokenizer.made < 500_000


@pytest.mark.parametrize("images", [0, 2])
def test_the_limit_is_exact(images: int) -> None:
    content = [{"type": "image"}] * images + [{"type": "text", "text": "Hello there. " * 20}]
    messages = [{"role": "user", "content": content}]
    whole = chat.encode(TOKENIZER, messages, [5] * images)
    assert chat.encode(TOKENIZER, messages, [5] * images, limit=len(whole)) == whole
    for limit in (len(whole) - 1, len(whole) // 4 + 1, 3, 0):
        count = len(whole) if 4 * limit >= len(whole) else f"more than {4 * limit}"
        with pytest.raises(UserError, match=f"^E_PROMPT_TOO_LONG: the prompt takes {count} tokens of {limit};"):
            chat.encode(TOKENIZER, messages, [5] * images, limit=limit)
