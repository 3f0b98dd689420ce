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

from . import devices, flash
from .config import TextConfig
from .language import Attention

GATHERED = 1 << 19  # entries that are gathered at a time, about 0.6 GB in bfloat16 at the published widths


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
        """Set all entries of some pages to zero. The host does not wait, so a step may be under way meanwhile."""
        if pages:
            self.entries.index_fill_(1, devices.tensor(pages, torch.int64, self.entries.device), 0)

    def step(self, chunks: Sequence[Chunk]) -> Step:
        """For the new tokens of ``chunks``, one after another; chunks of one token come first."""
        size, device = self.page_size, self.entries.device
        slots = [chunk.pages[at // size] * size + at % size for chunk in chunks for at in range(chunk.begin, chunk.end)]
        positions = [at for chunk in chunks for at in range(chunk.begin, chunk.end)]
        single = [chunk for chunk in chunks if chunk.end - chunk.begin == 1]
        most = max((-(-chunk.end // size) for chunk in single), default=0)
        table = [[*chunk.pages[:most], *[-1] * (most - len(chunk.pages))] for chunk in single]
        longer, first = [], len(single)
        for chunk in chunks[first:]:
            count, mask = chunk.end - chunk.begin, None
            if chunk.begin and not flash.usable(self.entries):
                mask = torch.ones(count, chunk.end, dtype=torch.bool, device=device).tril(chunk.begin)  # (S, L)
            own = devices.tensor(chunk.pages[: -(-chunk.end // size)], torch.int64, device)
            longer.append(LongChunk(slice(first, first + count), own, chunk.end, mask))
            first += count
        return Step(
            self.entries,
            devices.tensor(positions, torch.int64, device),
            devices.tensor(slots, torch.int64, device),
            Rows(
                devices.tensor(table, torch.int32, device).view(len(single), most),
                devices.tensor([chunk.end for chunk in single], torch.int32, device),
                size,
                [chunk.end for chunk in single],
            ),
            longer,
        )


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


@dataclass(frozen=True)
class Block:
    """Some of the sequences of a step, whose entries are gathered together; L is the greatest of their lengths."""

    sequences: Tensor | slice  # their places (b)
    slots: Tensor  # (b, L) int64; where an entry does not count, a sequence's first one stands again
    counts: Tensor | None  # (b, L), which entries count; None: all
    empty: Tensor  # (b), who has none


@dataclass(frozen=True)
class Rows:
    """What each of B sequences looks at with its one new token."""

    table: Tensor  # (B, M) int32, its pages in order; what stands behind those in use means nothing
    lengths: Tensor  # (B) int32, how many entries there count, the new one among them
    page_size: int
    known: Sequence[int] | None = None  # the same lengths on the host; without them it has to wait for the device

    @cached_property
    def blocks(self) -> list[Block]:
        """The sequences, in as many blocks as it takes for none to gather more than GATHERED entries.

        One that looks at more is alone. Where there are several blocks, no sequence is with another that is more than
        twice as long.
        """
        lengths = self.lengths.tolist() if self.known is None else self.known
        if len(lengths) * max(lengths, default=0) <= GATHERED or len(lengths) == 1:
            return [self._block(slice(None), max(lengths, default=0))]
        order, lengths = self.lengths.argsort(descending=True), sorted(lengths, reverse=True)
        blocks, begin = [], 0
        while begin < len(lengths):
            longest, end = lengths[begin], begin + 1
            while end < len(lengths) and (end + 1 - begin) * longest <= GATHERED and 2 * lengths[end] >= longest:
                end += 1
            blocks.append(self._block(order[begin:end], longest))
            begin = end
        return blocks

    def _block(self, sequences: Tensor | slice, longest: int) -> Block:
        lengths = self.lengths[sequences]
        places = torch.arange(longest, device=lengths.device)  # (L)
        pages = self.table[sequences][:, places // self.page_size].long()
        slots = pages.clamp(min=0) * self.page_size + places % self.page_size  # (b, L)
        if len(lengths) == 1:
            return Block(sequences, slots, None, lengths == 0)
        counts = places < lengths.unsqueeze(1)
        return Block(sequences, slots.where(counts, slots[:, :1]), counts, lengths == 0)


@dataclass(frozen=True)
class Step:
    """New tokens as all layers see them: one of each of B rows, then those of longer chunks."""

    entries: Tensor  # (layers, pages, page_size, R+P), written to
    positions: Tensor  # (T) int64
    slots: Tensor  # (T) int64, where each is remembered: page * page_size + place; a negative one is not
    rows: Rows
    longer: Sequence[LongChunk] = ()
