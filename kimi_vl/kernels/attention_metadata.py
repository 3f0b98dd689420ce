"""What the attention of one step needs to know about its tokens: where each sequence's KV cache is, and how long.

Values only; which page belongs to whom is decided by the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GATHERED = 1 << 19  # entries that are gathered at a time, about 0.6 GB in bfloat16 at the published widths


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
