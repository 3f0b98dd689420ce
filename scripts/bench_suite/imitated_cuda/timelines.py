"""Who knows that what is over: the order of work on streams and on the host.

A timeline is a stream, or the host. Each keeps, for every timeline, up to where that one's work is known to be over
before its own next piece begins (a vector clock). Two accesses to one piece of memory of which one writes are in order
only if the later one's timeline knows the earlier one: nothing depends on how fast anything was.
"""

from __future__ import annotations

from collections.abc import Mapping

Mark = tuple["Timeline", int]  # the n-th piece of work of a timeline


class Timeline:
    def __init__(self, name: str):
        self.name = name
        self.count = 0  # pieces of work so far
        self.version = 0  # changes with ``known``
        self.known: dict[Timeline, int] = {}

    def step(self) -> Mark:
        """One more piece of work."""
        self.count += 1
        self.version += 1
        self.known[self] = self.count
        return self, self.count

    def knows(self, mark: Mark) -> bool:
        timeline, number = mark
        return timeline is self or self.known.get(timeline, 0) >= number

    def follow(self, known: Mapping[Timeline, int]) -> None:
        """From here on, all of ``known`` is over before this timeline's next piece of work."""
        changed = False
        for timeline, number in known.items():
            if timeline is not self and self.known.get(timeline, 0) < number:
                self.known[timeline] = number
                changed = True
        self.version += changed

    def __repr__(self) -> str:
        return self.name


Extent = tuple[int, int]  # bytes of a block: begin and end
_MOST = 32  # extents of one timeline that a block tells apart


class _Accesses:
    """The last accesses of each timeline, by extent."""

    def __init__(self) -> None:
        self._last: dict[Timeline, dict[Extent, int]] = {}

    def racing(self, by: Timeline, extent: Extent) -> Timeline | None:
        for timeline, extents in self._last.items():
            known = by.count if timeline is by else by.known.get(timeline, 0)
            for (begin, end), number in extents.items():
                if number > known and begin < extent[1] and extent[0] < end:
                    return timeline
        return None

    def add(self, mark: Mark, extent: Extent) -> None:
        extents = self._last.setdefault(mark[0], {})
        extents[extent] = mark[1]
        if len(extents) > _MOST:
            hull = min(begin for begin, _ in extents), max(end for _, end in extents)
            self._last[mark[0]] = {hull: mark[1]}

    def clear(self) -> None:
        self._last.clear()


class Block:
    """A piece of memory, with the last accesses to it. ``device`` is None for pinned memory of the host."""

    def __init__(self, device: int | None, nbytes: int):
        self.device, self.nbytes = device, nbytes
        self._writes, self._reads = _Accesses(), _Accesses()

    def access(self, mark: Mark, extent: Extent, writes: bool) -> str | None:
        """Takes note of an access, and returns what it races with."""
        found = None
        if timeline := self._writes.racing(mark[0], extent):
            found = f"written by {timeline}"
        elif writes and (timeline := self._reads.racing(mark[0], extent)):
            found = f"read by {timeline}"
        if writes and extent[0] == 0 and extent[1] >= self.nbytes:
            # whoever is in order with this access is so with all before it
            self._writes.clear()
            self._reads.clear()
        (self._writes if writes else self._reads).add(mark, extent)
        return found
