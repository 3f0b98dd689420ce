"""The engine's paged KV cache: one latent and one rotary key a token and layer, in pages that sequences may share.

Makes the tensors of a step's attention metadata, and says how much of a device's memory the cache may take: what is
left beside the weights, less what steps take while they are computed. Which page belongs to which sequence is the
scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device import cuda, memory
from ..kernels.attention_metadata import DecodeMetadata, PrefillChunk, StepMetadata
from ..model.config import TextConfig

GB = 1 << 30
SHARE = 0.95  # of a GPU's free memory; the rest goes to pieces that fit nothing
LIBRARIES = GB // 2  # workspaces of cuBLAS, compiled kernels and graphs, beyond what the first steps took
GATHERED = 3 * GB // 4  # decoding without kernels gathers cached tokens in blocks of about 0.6 GB, and scores them


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
            self.kv_cache.index_fill_(1, cuda.tensor(pages, torch.int64, self.kv_cache.device), 0)

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
            count = chunk.end - chunk.begin
            own = cuda.tensor(chunk.pages[: -(-chunk.end // size)], torch.int64, device)
            prefills.append(PrefillChunk(slice(first, first + count), own, chunk.end))
            first += count
        return StepMetadata(
            self.kv_cache,
            cuda.tensor(positions, torch.int64, device),
            cuda.tensor(slot_mapping, torch.int64, device),
            DecodeMetadata(
                cuda.tensor(page_table, torch.int32, device).view(len(single), most),
                cuda.tensor([chunk.end for chunk in single], torch.int32, device),
                size,
                [chunk.end for chunk in single],
            ),
            prefills,
        )


def spare_bytes(
    device: torch.device,
    config: TextConfig,
    dtype: torch.dtype,
    *,
    sequences: int,
    max_num_batched_tokens: int,
    images: int,
    weights: int = 0,
) -> int:
    """Bytes for the cache of an engine: on a GPU see :func:`cache_bytes`; on a CPU a tenth of the machine's memory,
    4 GiB at most. ``weights`` are bytes of a GPU that a model takes as soon as it is loaded."""
    if device.type != "cuda":
        return min(4 * GB, memory.total() // 10)
    free, _ = torch.cuda.mem_get_info(device)
    return cache_bytes(
        free - weights,
        config,
        dtype,
        sequences=sequences,
        max_num_batched_tokens=max_num_batched_tokens,
        images=images,
    )


def cache_bytes(
    free: int, config: TextConfig, dtype: torch.dtype, *, sequences: int, max_num_batched_tokens: int, images: int
) -> int:
    """What of ``free`` bytes of a GPU the cache may take; 0 where steps need all of it.

    Steps are of at most ``sequences`` sequences and ``max_num_batched_tokens`` tokens, and ``images`` bytes of image
    vectors are kept. A prompt's chunk needs memory for each token that it attends to, and can attend to no more than
    the cache holds, which with little memory is less than the model's context.
    """
    left = free * SHARE - LIBRARIES - images - drawing_bytes(config, sequences) - logits_bytes(config, sequences)
    cached, seen = config.kv_values_per_token * dtype.itemsize, attention_bytes(config, dtype, max_num_batched_tokens)
    with_whole_context = left - max(GATHERED, seen * config.max_position_embeddings)
    with_less = min(left - GATHERED, left * cached / (cached + seen))
    return max(0, int(max(with_whole_context, with_less)))


def attention_bytes(config: TextConfig, dtype: torch.dtype, max_num_batched_tokens: int) -> int:
    """Of a prompt's chunk, for each token that it attends to, whatever computes its attention.

    Always: its latent and rotary key as they are gathered, the latent once more where it is cut out for a quantised
    weight, and each head's expanded key and value. A kernel needs nothing else. Which kernels are taken is not known
    yet, so what the greatest of the others needs is left free: whole keys, and in PyTorch a mask as truth values, as
    numbers, and as numbers in aligned rows; in FlashAttention 2 values as wide as keys.
    """
    heads, keys = config.num_attention_heads, config.num_attention_heads * config.qk_head_dim
    latent = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    mask = max_num_batched_tokens * (1 + 2 * dtype.itemsize)
    return (latent + expanded + keys) * dtype.itemsize + max(mask, keys * dtype.itemsize)


def drawing_bytes(config: TextConfig, sequences: int) -> int:
    """Scores in float32 as computed, limited and divided, sorted ones with their ids, and four float64 of
    probabilities; all twice, since graphs have memory of their own."""
    return 2 * sequences * config.vocab_size * (3 * 4 + 4 + 8 + 4 * 8)


def logits_bytes(config: TextConfig, sequences: int) -> int:
    """A static decoder's float32 logits, which stay from the first request on whose tokens the host samples."""
    return sequences * config.vocab_size * 4
