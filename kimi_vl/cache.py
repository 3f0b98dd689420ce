"""What attention remembers of the past: one latent and one rotary key a token, layer by layer.

Two forms: a plain one with a row of slots for each sequence, and pages that sequences of an engine share. Knows
no model beyond its configuration; which page belongs to whom is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import flash
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


@dataclass(frozen=True)
class LongChunk:
    """Several new tokens of one sequence within a step."""

    tokens: slice  # their places in the step
    pages: Tensor  # those of everything up to ``end``
    end: int
    mask: Tensor | None  # (S, end); None: plainly causal, or that flash_attn needs none


class PagedStep:
    """Pages as the new tokens of one step see them: each those of its own sequence up to itself.

    ``entries`` are those of all layers, ``positions`` (1, T), ``slots`` (T) page * page_size + place. The first tokens
    are one of each of B rows, with a ``table`` (B, M) of their pages and ``lengths`` (B).
    """

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]):
        self.entries = cache.entries
        size, device = cache.page_size, cache.entries.device
        slots = [chunk.pages[at // size] * size + at % size for chunk in chunks for at in range(chunk.begin, chunk.end)]
        self.positions = torch.tensor([[at for chunk in chunks for at in range(chunk.begin, chunk.end)]], device=device)
        self.slots = torch.tensor(slots, device=device)  # (T,)
        single = [chunk for chunk in chunks if chunk.end - chunk.begin == 1]
        self._rows = len(single)
        self._longest = max((chunk.end for chunk in single), default=0)
        pages = -(-self._longest // size)
        # rows are filled up with a page of their own, hidden by the mask: no row ever reads another's
        table = [[*chunk.pages[:pages], *[chunk.pages[0]] * (pages - len(chunk.pages))] for chunk in single]
        self.table = torch.tensor(table, dtype=torch.long, device=device)  # (B, M)
        self.lengths = torch.tensor([chunk.end for chunk in single], dtype=torch.long, device=device)
        self._mask = None
        if any(chunk.end != self._longest for chunk in single):
            slots = torch.arange(self._longest, device=device)
            self._mask = (slots < self.lengths.unsqueeze(1))[:, None, None]  # (B, 1, 1, L)
        self.longer: list[LongChunk] = []
        first = self._rows
        for chunk in chunks[self._rows :]:
            count, mask = chunk.end - chunk.begin, None
            if chunk.begin and not flash.usable(cache.entries):
                mask = torch.ones(count, chunk.end, dtype=torch.bool, device=device).tril(chunk.begin)  # (S, L)
            own = torch.tensor(chunk.pages[: -(-chunk.end // size)], device=device)
            self.longer.append(LongChunk(slice(first, first + count), own, chunk.end, mask))
            first += count

    @cached_property
    def _seen(self) -> Tensor:
        """Slots (B * L) that the rows look at: no more than those, since products would copy a part of whole pages."""
        size = self.entries.shape[2]
        slots = self.table.unsqueeze(-1) * size + torch.arange(size, device=self.table.device)  # (B, M, page_size)
        return slots.flatten(1)[:, : self._longest].flatten()

    def at(self, positions: Tensor) -> PagedStep:
        return self

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        pages = self.entries[layer]  # (pages, page_size, R+P)
        pages.flatten(0, 1)[self.slots] = entries[0]
        heads = []
        if self._rows:
            past = pages.flatten(0, 1).index_select(0, self._seen).unflatten(0, (self._rows, -1))  # (B, L, R+P)
            q, r = (part[:, :, : self._rows].permute(2, 1, 0, 3) for part in (q_nope, q_rope))  # (B, N, 1, …)
            heads.append(attention.absorbed(q, r, past, self._mask).permute(2, 1, 0, 3))  # (1, N, B, V)
        for chunk in self.longer:
            past = pages[chunk.pages].flatten(0, 1)[: chunk.end].unsqueeze(0)  # (1, L, R+P)
            q, r = q_nope[:, :, chunk.tokens], q_rope[:, :, chunk.tokens]
            heads.append(attention.expanded(q, r, past, chunk.mask))
        return heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)  # (1, N, T, V)
