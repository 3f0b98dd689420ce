"""Memory for the cache: what a device has left beside the weights, less what steps take while they are computed."""

from __future__ import annotations

import torch

from ..model.config import TextConfig
from . import memory

GB = 1 << 30
SHARE = 0.95  # of a GPU's free memory; the rest goes to pieces that fit nothing
LIBRARIES = GB // 2  # workspaces of cuBLAS, compiled kernels and graphs, beyond what the first steps took
GATHERED = 3 * GB // 4  # decoding without kernels gathers cached tokens in blocks of about 0.6 GB, and scores them


def spare_bytes(
    device: torch.device,
    config: TextConfig,
    dtype: torch.dtype,
    *,
    sequences: int,
    max_num_batched_tokens: int,
    images: int,
) -> int:
    """Bytes for the cache of an engine: on a GPU see :func:`cache_bytes`; on a CPU a tenth of the machine's memory,
    4 GiB at most."""
    if device.type != "cuda":
        return min(4 * GB, memory.total() // 10)
    free, _ = torch.cuda.mem_get_info(device)
    return cache_bytes(
        free, config, dtype, sequences=sequences, max_num_batched_tokens=max_num_batched_tokens, images=images
    )


def cache_bytes(
    free: int, config: TextConfig, dtype: torch.dtype, *, sequences: int, max_num_batched_tokens: int, images: int
) -> int:
    """What of ``free`` bytes of a GPU the cache may take; 0 where steps need all of it.

    Steps are of at most ``sequences`` sequences and ``max_num_batched_tokens`` tokens, and ``images`` bytes of image
    vectors are kept. A prompt's chunk needs memory for each token that it attends to, and can attend to no more than
    the cache holds, which with little memory is less than the model's context.
    """
    left = free * SHARE - LIBRARIES - images - drawing_bytes(config, sequences)
    cached, seen = config.kv_values_per_token * dtype.itemsize, attention_bytes(config, dtype, max_num_batched_tokens)
    with_whole_context = left - max(GATHERED, seen * config.max_position_embeddings)
    with_less = min(left - GATHERED, left * cached / (cached + seen))
    return max(0, int(max(with_whole_context, with_less)))


def attention_bytes(config: TextConfig, dtype: torch.dtype, max_num_batched_tokens: int) -> int:
    """Of a prompt's chunk, for each token that it attends to: its latent and rotary key twice (gathered, and cut out of
    that), expanded keys and values, both once more as contiguous copies, and a mask as truth values and as
    numbers."""
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    head = config.qk_nope_head_dim + config.v_head_dim + config.qk_head_dim + config.v_head_dim
    return (
        2 * latent + config.num_attention_heads * head + max_num_batched_tokens
    ) * dtype.itemsize + max_num_batched_tokens


def drawing_bytes(config: TextConfig, sequences: int) -> int:
    """Scores in float32 as computed, limited and divided, sorted ones with their ids, and four float64 of
    probabilities; all twice, since graphs have memory of their own."""
    return 2 * sequences * config.vocab_size * (3 * 4 + 4 + 8 + 4 * 8)
