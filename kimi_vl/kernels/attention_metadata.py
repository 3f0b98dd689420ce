"""The attention metadata of one step: where the KV cache of each sequence is, and how long it is.

Values only: the scheduler decides which page belongs to which sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Shapes: B sequences that decode one token each, M pages a sequence, T tokens of a step, R + P values of a token's
# latent and rotary key.

GATHERED = 1 << 19  # cached tokens gathered at a time: about 0.6 GB in bfloat16 at the published widths


@dataclass(frozen=True)
class PrefillChunk:
    """Several new tokens of one sequence within a step."""

    tokens: slice  # among those of the step
    pages: Tensor  # of all tokens up to ``end``
    end: int

    @cached_property
    def mask(self) -> Tensor | None:
        """(S, end), true where a new token may attend; None where no token is before the chunk. Made when a layer asks
        for it first, since kernels do not."""
        count = self.tokens.stop - self.tokens.start
        if count == self.end:
            return None
        return torch.ones(count, self.end, dtype=torch.bool, device=self.pages.device).tril(self.end - count)


@dataclass(frozen=True)
class Block:
    """Some sequences of a step whose cached tokens are gathered together; L is the greatest of their lengths."""

    sequences: Tensor | slice  # of the batch (b)
    slots: Tensor  # (b, L) int64, slots of the KV cache, padded with each sequence's first one
    mask: Tensor | None  # (b, L), true up to each sequence's length; None: no padding
    empty: Tensor  # (b), true where the length is 0


@dataclass(frozen=True)
class DecodeMetadata:
    """What the one new token of each of B sequences attends to."""

    page_table: Tensor  # (B, M) int32, pages in order; entries past those in use are ignored
    seq_lens: Tensor  # (B) int32, cached tokens of each sequence, including the new one
    page_size: int
    host_seq_lens: Sequence[int] | None = None  # the same on the host; without it ``blocks`` synchronises

    @cached_property
    def blocks(self) -> list[Block]:
        """The sequences in blocks, each of which gathers at most GATHERED cached tokens or is a single sequence.

        With several blocks, no sequence shares one with another that is more than twice as long: padding stays small.
        """
        lengths = self.seq_lens.tolist() if self.host_seq_lens is None else self.host_seq_lens
        if len(lengths) * max(lengths, default=0) <= GATHERED or len(lengths) == 1:
            return [self._block(slice(None), max(lengths, default=0))]
        order, lengths = self.seq_lens.argsort(descending=True), sorted(lengths, reverse=True)
        blocks, begin = [], 0
        while begin < len(lengths):
            longest, end = lengths[begin], begin + 1
            while end < len(lengths) and (end + 1 - begin) * longest <= GATHERED and 2 * lengths[end] >= longest:
                end += 1
            blocks.append(self._block(order[begin:end], longest))
            begin = end
        return blocks

    def _block(self, sequences: Tensor | slice, longest: int) -> Block:
        seq_lens = self.seq_lens[sequences]
        positions = torch.arange(longest, device=seq_lens.device)  # (L)
        pages = self.page_table[sequences][:, positions // self.page_size].long()
        slots = pages.clamp(min=0) * self.page_size + positions % self.page_size  # (b, L)
        if len(seq_lens) == 1:
            return Block(sequences, slots, None, seq_lens == 0)
        mask = positions < seq_lens.unsqueeze(1)
        return Block(sequences, slots.where(mask, slots[:, :1]), mask, seq_lens == 0)


@dataclass(frozen=True)
class StepMetadata:
    """The new tokens of a step, for all layers: one of each of B decoding sequences, then those of prefill chunks."""

    kv_cache: Tensor  # (layers, pages, page_size, R+P), written to
    positions: Tensor  # (T) int64
    slot_mapping: Tensor  # (T) int64, page * page_size + offset; a token with a negative one is not written
    decode: DecodeMetadata
    prefills: Sequence[PrefillChunk] = ()
