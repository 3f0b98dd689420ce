"""The thinking part of an output: where it ends in the text, its token budget, and loops in it.

:class:`ThinkingSplitter` works on characters, :class:`RepetitionDetector` and :class:`ThinkingBudget` on token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..events import ClosedBy
from .stop_sequences import overlap
from .tokenizer import Tokenizer

THINK_OPEN, THINK_CLOSE = "◁think▷", "◁/think▷"
MARKERS = ((THINK_OPEN, THINK_CLOSE), ("<think>", "</think>"))
"""Around the thinking in earlier answers: the model's own markers, and the tags that clients keep."""

# What counts as a loop; see RepetitionDetector.
MAX_BLOCK_TOKENS = 256
MIN_COPIES = 4
MIN_LOOP_TOKENS = 128
CHECK_EVERY = 16

# What is left of the length for an answer: so many tokens, but at most a quarter of it, half for a structured one.
RESERVE = 1024
STRUCTURED_RESERVE = 4096

Section = Literal["reasoning", "answer"]


def answer_of(text: str) -> str:
    """The part of a whole text after its thinking; all of it where it does not begin with thinking."""
    said = text.lstrip()
    for opener, closer in MARKERS:
        if said.startswith(opener):
            return said[len(opener) :].partition(closer)[2]
    return text


class ThinkingSplitter:
    """Splits a growing text into thinking and answer, the same way however it is cut into pieces.

    A text that begins with the opening marker (white space before it is skipped) is thinking up to the closing
    marker, and answer after it. A text without the opening marker is all answer.
    """

    def __init__(self) -> None:
        self.section: Section | None = None  # None until the beginning is known
        self._space: list[str] = []  # what the text begins with, while that is white space
        self._held = ""
        self._prefilled = 0  # how many of the characters that are held back belong to the assistant prefill

    def prefill(self, text: str) -> str:
        """Begin after ``text``, which gives no pieces, neither now nor where its end is held back.

        Returns the part of it that is answer for certain.
        """
        pieces = self.push(text)
        self._prefilled = sum(map(len, self._space)) + len(self._held)
        return "".join(piece for section, piece in pieces if section == "answer")

    def skip_thinking(self) -> str:
        """All that follows is answer, whatever it looks like; returns what of the prefill was held back."""
        held = "".join(self._space) + self._held
        self.section, self._space, self._held, self._prefilled = "answer", [], "", 0
        return held

    @property
    def held(self) -> str:
        """The end of the text that may become a marker."""
        return self._held

    def push(self, text: str) -> list[tuple[Section, str]]:
        """The pieces that ``text`` makes certain, in order; none of them empty."""
        if self.section is None and not self._held:
            rest = text.lstrip()
            self._space.append(text[: len(text) - len(rest)])
            text = rest
        self._held += text
        if self.section is None and self._held:
            if self._held.startswith(THINK_OPEN):
                self.section, self._held = "reasoning", self._held[len(THINK_OPEN) :]
                self._space, self._prefilled = [], 0
            elif not THINK_OPEN.startswith(self._held):
                self.section, self._held = "answer", "".join(self._space) + self._held
                self._space = []
        pieces: list[tuple[Section, str]] = []
        if self.section == "reasoning":
            thinking, closed, rest = self._held.partition(THINK_CLOSE)
            if closed:
                pieces.append(("reasoning", self._new(thinking)))
                self.section, self._held = "answer", rest
                self._prefilled = 0
            else:
                cut = len(self._held) - overlap(self._held, THINK_CLOSE)
                pieces.append(("reasoning", self._new(self._held[:cut])))
                self._held = self._held[cut:]
        if self.section == "answer":
            pieces.append(("answer", self._new(self._held)))
            self._held = ""
        return [piece for piece in pieces if piece[1]]

    def drop_unfinished(self) -> None:
        """Discard what is held back because it may become a marker: it is certain now that it does not."""
        if self._held and self.section is None:
            self._space = []  # it came before an opening marker, where it is skipped
        if self._held:
            self._held, self._prefilled = "", 0

    def finish(self) -> list[tuple[Section, str]]:
        """What is still held back, once no more text comes."""
        held = self._new("".join(self._space) + self._held)
        self._held, self._space = "", []
        return [(self.section or "answer", held)] if held else []

    def _new(self, text: str) -> str:
        """``text``, which was held back until now, without what the assistant prefill has of it."""
        new = text[self._prefilled :]
        self._prefilled = max(0, self._prefilled - len(text))
        return new


class ThinkingBudget:
    """Counts the tokens of the thinking, and closes it where it reaches its budget or repeats itself.

    It is closed by forcing the tokens of the closing marker in place of sampled ones. ``closed_by`` is then "budget",
    for a loop too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinks: bool,
        max_new_tokens: int,
        budget: int | None,
        section: Section | None,
        structured: bool = False,
    ):
        """``thinks`` is whether the model begins with thinking; ``section`` is where an assistant prefill ends.

        ``budget`` None is as much of ``max_new_tokens`` as leaves tokens for an answer, which also bounds any other.
        A ``structured`` answer must be whole to be of use: more is left for it, and a model that thinks is made to
        begin with the opening marker, so that it is known where the answer begins.
        """
        self._opener, self._closer = tokenizer.encode(THINK_OPEN), tokenizer.encode(THINK_CLOSE)
        self.thinks = thinks
        self._forced: list[int] = []
        self.closing = False  # whether the tokens of the closing marker are being forced
        self._inside = 0  # tokens after the opening marker
        self._repetition = RepetitionDetector()
        self.closed_by: ClosedBy = "none"
        self.reasoning_tokens = 0
        reserve = min(STRUCTURED_RESERVE, max_new_tokens // 2) if structured else min(RESERVE, max_new_tokens // 4)
        longest = max(0, max_new_tokens - reserve - len(self._closer))
        self._budget = longest if budget is None else min(budget, longest)
        if thinks and budget == 0 and section != "answer":
            self._forced, self.closing = self._closing_tokens(section), True
        elif thinks and structured and section is None:
            self._forced = self._opener.copy()

    @property
    def forces(self) -> bool:
        """Whether the next token is not to be sampled."""
        return bool(self._forced)

    def force(self, tokens: Sequence[int]) -> None:
        """Put ``tokens`` in the place of sampled ones."""
        self._forced = list(tokens)

    def forced(self) -> int | None:
        """The next token where it is not to be sampled."""
        return self._forced.pop(0) if self._forced else None

    def close(self) -> int:
        """Close the thinking now: the first token of the closing marker, whose others are forced after it."""
        self._forced, self.closing = self._closer[1:], True
        return self._closer[0]

    def update(self, token: int, section: Section | None) -> bool:
        """Count a token, after which the text is in ``section`` (None while unknown). Whether that closes the thinking.

        An unfinished character or marker is then dropped by the caller: the forced tokens follow it.
        """
        if section == "answer":
            if self._inside or self.closing:
                if self.closed_by == "none":
                    self.reasoning_tokens += 1
                    self.closed_by = "budget" if self.closing else "model"
            else:
                self.reasoning_tokens = 0  # what came so far only looked like an opening marker
            return False
        self.reasoning_tokens += 1
        self._inside += section == "reasoning"
        loops = self._repetition.push(token) and (self.thinks or section == "reasoning")
        closes = (loops or self._inside >= max(1, self._budget)) and not self.closing
        if closes:
            self._forced, self.closing = self._closing_tokens(section), True
        return closes

    def _closing_tokens(self, section: Section | None) -> list[int]:
        """The closing marker, after an opening one where there is none yet."""
        return [*([] if section else self._opener), *self._closer]


class RepetitionDetector:
    """Notices that the tokens of one request have become a loop, at a constant cost a token.

    Checked after every 16th token: the tokens end with one block of at most 256 tokens, repeated exactly at least four
    times, and the copies are at least 128 tokens together. A list that counts, or a table whose cells change, has no
    such block; a line of dashes is seldom so long.
    """

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._tokens = np.full(MAX_BLOCK_TOKENS + CHECK_EVERY, -1, dtype=np.int32)  # the last ones, the oldest first
        self._before = sliding_window_view(self._tokens, MAX_BLOCK_TOKENS)[:CHECK_EVERY]  # what precedes each new one
        blocks = np.arange(MAX_BLOCK_TOKENS, 0, -1)  # lengths of a block, one for each column of `_before`
        self._equal = np.zeros_like(blocks)  # how many tokens in a row equal the one that is a block before them
        self._enough = np.maximum(MIN_COPIES * blocks, MIN_LOOP_TOKENS) - blocks

    def push(self, token: int) -> bool:
        """Add a token (an id, at least 0); whether the tokens are now found to end in a loop."""
        self._waiting.append(token)
        if len(self._waiting) < CHECK_EVERY:
            return False
        self._tokens[:-CHECK_EVERY] = self._tokens[CHECK_EVERY:]
        self._tokens[-CHECK_EVERY:] = self._waiting
        self._waiting.clear()
        differ = self._before != self._tokens[-CHECK_EVERY:, None]  # (CHECK_EVERY, MAX_BLOCK_TOKENS)
        since = differ[::-1].argmax(axis=0)  # the newest that differs, counted from the end
        self._equal = np.where(differ.any(axis=0), since, self._equal + CHECK_EVERY)
        return bool((self._equal >= self._enough).any())
