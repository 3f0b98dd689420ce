"""The engine's paged KV cache: one latent and one rotary key a token and layer, in pages that sequences may share.

Makes the tensors of a step's attention metadata. Which page belongs to which sequence is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device import cuda as devices
from ..kernels.attention_metadata import DecodeMetadata, PrefillChunk, StepMetadata
from ..model import flash_attention as flash
from ..model.config import TextConfig


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: positions ``begin`` to ``end``, the pages of everything up to ``end``."""

    pages: Sequence[int]
    begin: int
    end: int


class PagedCache:
    """Pages of ``page_size`` tokens; any sequence may use any of them, and several may share one.

    Memory that was never written holds anything: :meth:`clear` pages before their first use. Per token and layer
    ``kv_lora_rank + qk_rope_head_dim`` values, as in :class:`LatentCache`.
    """

    def __init__(
        self, config: TextConfig, pages: int, page_size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.page_size = page_size
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_cache = torch.empty(config.num_hidden_layers, pages, page_size, width, dtype=dtype, device=device)

    @staticmethod
    def page_bytes(config: TextConfig, page_size: int, dtype: torch.dtype) -> int:
        """Memory of one page, all layers together."""
        return page_size * config.kv_values_per_token * dtype.itemsize

    def clear(self, pages: Sequence[int]) -> None:
        """Set some pages to zero. Does not synchronise, so a step may be under way meanwhile."""
        if pages:
            self.kv_cache.index_fill_(1, devices.tensor(pages, torch.int64, self.kv_cache.device), 0)

    def step(self, chunks: Sequence[Chunk]) -> StepMetadata:
        """For the new tokens of ``chunks``, one after another; chunks of one token come first."""
        size, device = self.page_size, self.kv_cache.device
        slot_mapping = [
            chunk.pages[at // size] * size + at % size for chunk in chunks for at in range(chunk.begin, chunk.end)
        ]
        positions = [at for chunk in chunks for at in range(chunk.begin, chunk.end)]
        single = [chunk for chunk in chunks if chunk.end - chunk.begin == 1]
        most = max((-(-chunk.end // size) for chunk in single), default=0)
        page_table = [[*chunk.pages[:most], *[-1] * (most - len(chunk.pages))] for chunk in single]
        prefills, first = [], len(single)
        for chunk in chunks[first:]:
            count, mask = chunk.end - chunk.begin, None
            if chunk.begin and not flash.usable(self.kv_cache):
                mask = torch.ones(count, chunk.end, dtype=torch.bool, device=device).tril(chunk.begin)  # (S, L)
            own = devices.tensor(chunk.pages[: -(-chunk.end // size)], torch.int64, device)
            prefills.append(PrefillChunk(slice(first, first + count), own, chunk.end, mask))
            first += count
        return StepMetadata(
            self.kv_cache,
            devices.tensor(positions, torch.int64, device),
            devices.tensor(slot_mapping, torch.int64, device),
            DecodeMetadata(
                devices.tensor(page_table, torch.int32, device).view(len(single), most),
                devices.tensor([chunk.end for chunk in single], torch.int32, device),
                size,
                [chunk.end for chunk in single],
            ),
            prefills,
        )
