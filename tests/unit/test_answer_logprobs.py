"""Which tokens an answer has, against their places in the bytes of the whole output."""

from __future__ import annotations

import random

import pytest

from kimi_vl.events import Answer, Event, TokenLogprob
from kimi_vl.text.output_text import OutputText
from kimi_vl.text.stop_sequences import StopSequences
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer

WORDS = ["a", " the", " 25", "◁", "◁/thi", "think▷", "日本", "😀", "é", " \n", "EN", "END", "▷", "👍🏽", "1", "{", '"']


def some_ranks() -> dict[bytes, int]:
    """Single bytes, and pieces cut anywhere: through characters, and over the ends of markers."""
    rng = random.Random(0)
    pieces = {bytes([value]): None for value in range(256)}
    while len(pieces) < 1500:
        words = "".join(
            [*rng.choices(WORDS, k=2), rng.choice([THINK_OPEN, THINK_CLOSE, "END"]), *rng.choices(WORDS, k=2)]
        )
        begin, size = rng.randrange(len(words.encode())), rng.randrange(2, 9)
        pieces[words.encode()[begin : begin + size]] = None
    return {piece: rank for rank, piece in enumerate(pieces) if piece}


TOKENIZER = Tokenizer(some_ranks())
BYTES = {TOKENIZER.token_bytes(index): index for index in range(TOKENIZER.num_ranks)}
LONGEST = max(map(len, BYTES))


def spelled(text: bytes, rng: random.Random) -> list[int]:
    """Tokens of ``text`` cut anywhere, through characters and markers too."""
    ids, at = [], 0
    while at < len(text):
        fitting = [size for size in range(1, LONGEST + 1) if text[at : at + size] in BYTES and at + size <= len(text)]
        size = rng.choice(fitting)
        ids.append(BYTES[text[at : at + size]])
        at += size
    return ids


def told(text: OutputText, ids: list[int], cut: bool, rng: random.Random) -> list[Event]:
    """Events of tokens, each with its place in the place of a log-probability; some are special tokens."""
    events: list[Event] = []
    for place, token in enumerate(ids):
        events += text.push(token, TokenLogprob(token, TOKENIZER.token_bytes(token), -float(place)))
        if text.stopped:
            return events
        if rng.random() < 0.1:
            special = TOKENIZER.num_ranks + 30
            events += text.push(special, TokenLogprob(special, b"<|reserved_token_1054|>", 1.0))
    if cut:
        text.drop_unfinished()
    return events + text.finish()


def expected(ids: list[int], answer: bytes, thinks: bool) -> list[tuple[int, bytes]]:
    """The place of each token of ``answer`` in ``ids``, and those of its bytes that are in the answer."""
    whole = b"".join(map(TOKENIZER.token_bytes, ids))
    begin = whole.index(THINK_CLOSE.encode()) + len(THINK_CLOSE.encode()) if thinks else 0
    found, at = [], 0
    for place, token in enumerate(ids):
        own = TOKENIZER.token_bytes(token)
        kept = own[max(0, begin - at) : max(0, begin + len(answer) - at)]
        if kept:
            found.append((place, kept))
        at += len(own)
    return found


def test_the_bytes_of_an_answer_s_tokens_are_the_answer() -> None:
    rng = random.Random(1)
    kinds = {"thinks": 0, "stopped": 0, "cut": 0, "split": 0}
    for _ in range(600):
        thinks, cut = rng.random() < 0.7, rng.random() < 0.5
        thinking = THINK_OPEN + "".join(rng.choices(WORDS, k=rng.randrange(4))) + THINK_CLOSE if thinks else "x"
        answer = "".join(rng.choices(WORDS, k=rng.randrange(9)))
        spoken = (thinking + answer).encode()
        ids = spelled(spoken, rng)
        if cut:
            ids = ids[: len(spelled(thinking.encode(), rng)) + rng.randrange(6)]
            cut = THINK_CLOSE.encode() in b"".join(map(TOKENIZER.token_bytes, ids)) or not thinks
            ids = ids if cut else spelled(spoken, rng)
        text = OutputText(TOKENIZER, StopSequences(["END", "日本😀"] if rng.random() < 0.6 else []), "", logprobs=True)
        events = told(text, ids, cut, rng)
        pieces = [event for event in events if isinstance(event, Answer)]
        found = [logprob for piece in pieces for logprob in piece.logprobs]
        assert "\ufffd" not in text.answer
        assert b"".join(each.token_bytes for each in found) == text.answer.encode()
        assert [(-each.logprob, each.token_bytes) for each in found] == expected(ids, text.answer.encode(), thinks)
        assert [each.token_id for each in found] == [ids[int(-each.logprob)] for each in found]
        assert text.answer_logprobs == found
        early = said = b""
        for piece in pieces:  # no token comes before the last of its text
            early += b"".join(each.token_bytes for each in piece.logprobs)
            said += piece.text.encode()
            assert said.startswith(early)
        kinds["thinks"] += thinks
        kinds["stopped"] += text.stopped
        kinds["cut"] += cut
        kinds["split"] += any(each.token_bytes != TOKENIZER.token_bytes(each.token_id) for each in found)
    assert min(kinds.values()) > 20, kinds


def test_bytes_that_are_no_text_stay_as_they_are() -> None:
    """Of an answer with U+FFFD the tokens tell what the model said."""
    raw = b"x\xe6\x97y\xff\xf0\x9f\x98z\xe6"
    for seed in range(20):
        text = OutputText(TOKENIZER, StopSequences([]), "", logprobs=True)
        events = told(text, spelled(raw, random.Random(seed)), False, random.Random(seed))
        found = b"".join(each.token_bytes for event in events if isinstance(event, Answer) for each in event.logprobs)
        assert found == raw
        assert text.answer == raw.decode(errors="replace")


@pytest.mark.parametrize("prefill", ["", "one", "◁think▷so◁/think▷two", "◁thi", "  "])
def test_a_prefilled_answer_has_the_tokens_that_follow_it(prefill: str) -> None:
    text = OutputText(TOKENIZER, StopSequences([]), prefill, logprobs=True)
    ids = spelled("n 日".encode(), random.Random(1))
    events = told(text, ids, False, random.Random(2))
    found = [each for event in events if isinstance(event, Answer) for each in event.logprobs]
    assert b"".join(each.token_bytes for each in found).decode() == text.answer == "n 日"


def test_nothing_is_kept_where_nothing_is_asked_for() -> None:
    text = OutputText(TOKENIZER, StopSequences([]), "")
    events = told(text, spelled(b"yes", random.Random(1)), False, random.Random(2))
    assert all(event.logprobs == () for event in events if isinstance(event, Answer))


def test_thinking_that_is_closed_by_force_leaves_no_token_behind() -> None:
    """Half a character and half a marker are dropped where the closing marker is put in."""
    text = OutputText(TOKENIZER, StopSequences([]), "", logprobs=True)
    for place, token in enumerate(spelled("◁think▷so ◁/th".encode() + b"\xe6", random.Random(3))):
        text.push(token, TokenLogprob(token, TOKENIZER.token_bytes(token), -float(place)))
    text.drop_unfinished()
    for token in TOKENIZER.encode(THINK_CLOSE):
        assert text.push(token) == []
    events = text.push(BYTES[b"7"], TokenLogprob(BYTES[b"7"], b"7", -0.5))
    assert events == [Answer("7", (TokenLogprob(BYTES[b"7"], b"7", -0.5),))]
