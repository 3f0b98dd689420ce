"""Stop sequences in streamed text: the result does not depend on how the text is cut into pieces.

Knows characters alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UserError

MAX_SEQUENCES = 64
MAX_CHARACTERS = 1000


class StopSequences:
    """Lets a text through up to a stop sequence. Of several, the one that is complete first ends the text.

    Raises :class:`UserError` (E_PARAMETER) for more sequences, or longer ones, than are looked for.
    """

    def __init__(self, sequences: Iterable[str]) -> None:
        self._sequences = tuple(dict.fromkeys(filter(None, sequences)))
        if len(self._sequences) > MAX_SEQUENCES:
            raise UserError("E_PARAMETER", f"there may be {MAX_SEQUENCES} stop sequences; give fewer.")
        if any(len(sequence) > MAX_CHARACTERS for sequence in self._sequences):
            raise UserError("E_PARAMETER", f"a stop sequence may have {MAX_CHARACTERS} characters; shorten it.")
        self._held = ""
        self.stopped = False

    @property
    def any(self) -> bool:
        """Whether there is something to look for."""
        return bool(self._sequences)

    def push(self, text: str) -> str:
        """What may leave after ``text`` came: not a stop sequence, nor what may yet become one."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._sequences if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)[1]], ""
            return ready
        keep = max((overlap(self._held, stop) for stop in self._sequences), default=0)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def finish(self) -> str:
        """What is still held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker`` but is not all of it."""
    at = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while at >= 0 and not marker.startswith(text[at:]):
        at = text.find(marker[0], at + 1)
    return len(text) - at if at >= 0 else 0
