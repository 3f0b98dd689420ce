"""What attention remembers of the past: one latent and one rotary key a token, layer by layer.

Two forms: a plain one with a row of slots for each sequence, and pages that sequences of an engine share. Knows
no model beyond its configuration; which page belongs to whom is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TextConfig
from .language import Attention


class LatentCache:
    """Room for ``capacity`` tokens of each of ``batch`` sequences, slot i of a row holding its position i.

    Per token and layer ``kv_lora_rank + qk_rope_head_dim`` values of ``dtype`` (1,152 bytes in the published model
    in bfloat16), where expanded keys and values would take nine times as much.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        self.capacity = capacity
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, batch, capacity, width)
        # zeros, not uninitialised memory: a masked slot that held NaN would poison the weighted sum
        self._states = torch.zeros(shape, dtype=dtype, device=device)

    def at(self, positions: Tensor) -> _Rows:
        """For new tokens at ``positions`` (B, S), which are also the slots they take.

        Rows may be of different lengths: pad on the right and read the state of each row's own last token.
        """
        length, mask = int(positions.max()) + 1, None
        if length > self.capacity:
            raise ValueError(f"position {length - 1} is past the cache's capacity of {self.capacity}")
        if length > positions.shape[1]:  # else all rows begin here, and plain causal attention is the same
            slots = torch.arange(length, device=positions.device)
            # a row's slots past its own position may hold padding, and are never seen
            mask = (slots <= positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, S, L)
        return _Rows(self._states, positions, length, mask)

    @property
    def nbytes(self) -> int:
        return self._states.nbytes


@dataclass(frozen=True)
class _Rows:
    """A plain cache as new tokens see it."""

    states: Tensor
    positions: Tensor
    length: int
    mask: Tensor | None

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        rows = torch.arange(self.positions.shape[0], device=self.positions.device).unsqueeze(1)  # (B, 1)
        self.states[layer][rows, self.positions] = entries
        form = attention.absorbed if q_nope.shape[2] == 1 else attention.expanded
        return form(q_nope, q_rope, self.states[layer, :, : self.length], self.mask)


class PagedCache:
    """Pages of ``page_size`` entries; any sequence may use any of them, and several may share one.

    Memory that was never written holds anything: :meth:`clear` pages before their first use. Per token and layer
    ``kv_lora_rank + qk_rope_head_dim`` values, as in :class:`LatentCache`.
    """

    def __init__(
        self, config: TextConfig, pages: int, page_size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.page_size = page_size
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.entries = torch.empty(config.num_hidden_layers, pages, page_size, width, dtype=dtype, device=device)

    @staticmethod
    def page_bytes(config: TextConfig, page_size: int, dtype: torch.dtype) -> int:
        """Memory of one page, all layers together."""
        return config.num_hidden_layers * page_size * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize

    def clear(self, pages: Sequence[int]) -> None:
        """Set all entries of some pages to zero."""
        if pages:
            self.entries[:, torch.tensor(pages, device=self.entries.device)] = 0

    def step(self, chunks: Sequence[Chunk]) -> PagedStep:
        """For the new tokens of ``chunks``, one after another in one row (1, T); chunks of one token come first."""
        return PagedStep(self, chunks)


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: positions ``begin`` to ``end``, the pages of everything up to ``end``."""

    pages: Sequence[int]
    begin: int
    end: int


class PagedStep:
    """Pages as the new tokens of one step see them: each those of its own sequence up to itself."""

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]):
        self._cache = cache
        size, device = cache.page_size, cache.entries.device
        slots = [chunk.pages[at // size] * size + at % size for chunk in chunks for at in range(chunk.begin, chunk.end)]
        self.positions = torch.tensor([[at for chunk in chunks for at in range(chunk.begin, chunk.end)]], device=device)
        self._slots = torch.tensor(slots, device=device)  # (T,)
        single = [chunk for chunk in chunks if chunk.end - chunk.begin == 1]
        self._rows = len(single)
        if single:
            longest = max(chunk.end for chunk in single)
            pages = -(-longest // size)
            # rows are filled up with a page of their own, hidden by the mask: no row ever reads another's
            table = [[*chunk.pages[:pages], *[chunk.pages[0]] * (pages - len(chunk.pages))] for chunk in single]
            self._table = torch.tensor(table, device=device)  # (B, pages)
            ends = torch.tensor([chunk.end for chunk in single], device=device)
            self._longest = longest
            self._mask = None
            if any(chunk.end != longest for chunk in single):
                self._mask = (torch.arange(longest, device=device) < ends.unsqueeze(1))[:, None, None]  # (B, 1, 1, L)
        self._longer: list[tuple[slice, Tensor, int, Tensor | None]] = []
        first = self._rows
        for chunk in chunks[self._rows :]:
            count, mask = chunk.end - chunk.begin, None
            if chunk.begin:
                mask = torch.ones(count, chunk.end, dtype=torch.bool, device=device).tril(chunk.begin)  # (S, L)
            pages = torch.tensor(chunk.pages[: -(-chunk.end // size)], device=device)
            self._longer.append((slice(first, first + count), pages, chunk.end, mask))
            first += count

    def at(self, positions: Tensor) -> PagedStep:
        return self

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        pages = self._cache.entries[layer]  # (pages, page_size, R+P)
        pages.flatten(0, 1)[self._slots] = entries[0]
        heads = []
        if self._rows:
            past = pages[self._table].flatten(1, 2)[:, : self._longest]  # (B, L, R+P)
            q, r = (part[:, :, : self._rows].permute(2, 1, 0, 3) for part in (q_nope, q_rope))  # (B, N, 1, …)
            heads.append(attention.absorbed(q, r, past, self._mask).permute(2, 1, 0, 3))  # (1, N, B, V)
        for tokens, own, end, mask in self._longer:
            past = pages[own].flatten(0, 1)[:end].unsqueeze(0)  # (1, L, R+P)
            heads.append(attention.expanded(q_nope[:, :, tokens], q_rope[:, :, tokens], past, mask))
        return heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)  # (1, N, T, V)
