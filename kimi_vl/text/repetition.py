"""Notices thinking that goes round in circles.

The rule, looked at after every 16th token: the tokens end with one block of at most 256 tokens that stands there at
least four times, token for token, and the copies are at least 128 tokens together. A list that counts, or a table
whose cells change, has no such block; a line of dashes is seldom so long. Knows ids, and nothing of what they mean.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

LONGEST_BLOCK = 256
COPIES = 4
SHORTEST_LOOP = 128
EVERY = 16


class Repetition:
    """Watches the tokens of one request. The work a token does not depend on how many came before."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._tokens = np.full(LONGEST_BLOCK + EVERY, -1, dtype=np.int32)  # the last ones, the oldest first
        self._before = sliding_window_view(self._tokens, LONGEST_BLOCK)[:EVERY]  # what is before each of the newest
        blocks = np.arange(LONGEST_BLOCK, 0, -1)  # lengths of a block, one for each column of `_before`
        self._equal = np.zeros_like(blocks)  # how many tokens in a row equal the one that is a block before them
        self._enough = np.maximum(COPIES * blocks, SHORTEST_LOOP) - blocks

    def push(self, token: int) -> bool:
        """Add a token (an id, at least 0); whether the tokens are now seen to end in a loop."""
        self._waiting.append(token)
        if len(self._waiting) < EVERY:
            return False
        self._tokens[:-EVERY] = self._tokens[EVERY:]
        self._tokens[-EVERY:] = self._waiting
        self._waiting.clear()
        differ = self._before != self._tokens[-EVERY:, None]  # (EVERY, LONGEST_BLOCK)
        since = differ[::-1].argmax(axis=0)  # the newest that differs, counted from the end
        self._equal = np.where(differ.any(axis=0), since, self._equal + EVERY)
        return bool((self._equal >= self._enough).any())
