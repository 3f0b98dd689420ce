"""Which page of the KV cache holds what: free, in use by sequences, or kept for prefix caching.

Bookkeeping only: no tensors, no requests. A full page is known by a key that stands for every token up to its end.
"""

from __future__ import annotations

from collections import OrderedDict


class PagePool:
    """Numbers of ``count`` pages, each free, used by one or more holders, or unused but registered under its key.

    Registered pages without holders count as available: the least recently used is evicted when none is free.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._pages: dict[bytes, int] = {}  # key to page
        self._unused: OrderedDict[int, None] = OrderedDict()  # registered pages without holders, oldest first

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can still give."""
        return len(self._free) + len(self._unused)

    def take(self) -> int:
        """A page for one holder, evicted from under its old key. Raises :class:`MemoryError` where none is left."""
        if self._free:
            page = self._free.pop()
        elif self._unused:
            page, _ = self._unused.popitem(last=False)
            self.evict(page)
        else:
            raise MemoryError("no page is left")
        self._holders[page] = 1
        return page

    def lookup(self, key: bytes) -> int | None:
        """The page registered under ``key``, with one holder more; None where there is none."""
        page = self._pages.get(key)
        if page is not None:
            self._unused.pop(page, None)
            self._holders[page] += 1
        return page

    def register(self, page: int, key: bytes) -> None:
        """The page is full now and may be shared. If another page has this key already, that one stays known."""
        if self._keys[page] is None and key not in self._pages:
            self._keys[page] = key
            self._pages[key] = page

    def release(self, page: int) -> None:
        """One holder less."""
        if self._holders[page] < 1:
            raise ValueError(f"page {page} has no holder")
        self._holders[page] -= 1
        if not self._holders[page]:
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._unused[page] = None

    def evict(self, page: int) -> None:
        """Lookups no longer find the page; its holders keep it."""
        key = self._keys[page]
        if key is not None:
            del self._pages[key]
            self._keys[page] = None
