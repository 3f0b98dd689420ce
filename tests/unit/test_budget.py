"""What the cache takes of a GPU's memory, against a slow search for the most that leaves enough for every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_vl.engine import kv_cache
from kimi_vl.engine.engine import EngineOptions
from kimi_vl.engine.kv_cache import PagedCache
from kimi_vl.model.config import PUBLISHED_TEXT as TEXT

GB = 1 << 30
STEPS = {"sequences": 64, "max_num_batched_tokens": 1024, "images": 256 << 20}
# What is free beside 30.6 GiB of weights in bfloat16, or, on 24 GB, beside a quarter of them; as drivers report cards.
FREE = {"24": 23.6 - 7.7, "48": 44.5 - 30.6 - 0.6, "80": 79.2 - 30.6 - 0.6, "141": 139.8 - 30.6 - 0.6}


def needed(cache: float) -> float:
    """What steps take beside a cache of this size: bytes of the tensors that are alive at once, written out anew."""
    tokens = min(131_072, cache / (27 * 576 * 2))
    gathered, cut_out = tokens * 576 * 2, tokens * 512 * 2
    expanded = tokens * 16 * (128 + 128) * 2  # keys without their rotary part, and values
    keys = tokens * 16 * 192 * 2
    mask = tokens * 1024 * (1 + 2 + 2)
    attention = max(0.75 * GB, gathered + cut_out + expanded + keys + max(mask, keys))
    drawing = 64 * 163_840 * (12 + 12 + 32)
    sampled_on_the_host = 64 * 163_840 * 4
    return attention + 2 * drawing + sampled_on_the_host + (256 << 20) + GB / 2


@pytest.mark.parametrize("free", [*FREE.values(), 3.0, 5.0, 8.0])
def test_the_cache_takes_all_that_steps_leave(free):
    found = kv_cache.cache_bytes(int(free * GB), TEXT, torch.bfloat16, **STEPS)
    most = 0.0
    while most + GB / 256 + needed(most + GB / 256) <= 0.95 * free * GB:
        most += GB / 256
    assert most - 1 <= found <= most + GB / 256


def test_figures_of_cards():
    caches = {card: kv_cache.cache_bytes(int(free * GB), TEXT, torch.bfloat16, **STEPS) for card, free in FREE.items()}
    tokens = {card: nbytes // PagedCache.page_bytes(TEXT, 1, torch.bfloat16) for card, nbytes in caches.items()}
    # at least one request as long as the context everywhere
    assert all(count > 131_072 for count in tokens.values())
    left = {card: FREE[card] - nbytes / GB for card, nbytes in caches.items()}
    # a chunk over the whole context takes 2.8 GiB beside what drawing takes
    assert all(value > 4.5 for value in left.values())
    # and most of a large card is the cache's
    assert caches["80"] > 0.8 * FREE["80"] * GB and caches["141"] > 0.9 * FREE["141"] * GB


def test_with_too_little_there_is_none():
    for free in (0, 1, 2):
        assert kv_cache.cache_bytes(free * GB, TEXT, torch.bfloat16, **STEPS) == 0


def test_smaller_steps_leave_more():
    free = int(FREE["48"] * GB)
    less = kv_cache.cache_bytes(free, TEXT, torch.bfloat16, sequences=4, max_num_batched_tokens=256, images=0)
    assert less > kv_cache.cache_bytes(free, TEXT, torch.bfloat16, **STEPS) + GB


@pytest.mark.parametrize("values", [40, 128, 192, 256])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_attention_is_planned_by_a_model_s_own_widths(values, tokens):
    """With a mask, or with FlashAttention 2 and values as wide as keys, whichever takes more."""
    found = kv_cache.attention_bytes(replace(TEXT, v_head_dim=values), torch.bfloat16, tokens)
    latents, expanded, keys = 576 + 512, 16 * (128 + values), 16 * (128 + 64)
    masked = 2 * (latents + expanded + keys) + 5 * tokens
    padded = 2 * (latents + expanded + keys + 16 * 192)
    assert found == max(masked, padded)


def test_a_gpu_is_asked_what_is_free(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (int(13.3 * GB), 48 * GB))
    device = torch.device("cuda:1")
    found = kv_cache.spare_bytes(device, TEXT, torch.bfloat16, **STEPS)
    assert found == kv_cache.cache_bytes(int(13.3 * GB), TEXT, torch.bfloat16, **STEPS)
    assert asked == [device]


def test_a_cpu_gives_a_tenth_and_four_gigabytes_at_most(monkeypatch):
    for total, right in ((20 * GB, 2 * GB), (400 * GB, 4 * GB)):
        monkeypatch.setattr(kv_cache.memory, "total", lambda total=total: total)
        assert kv_cache.spare_bytes(torch.device("cpu"), TEXT, torch.float32, **STEPS) == right


@pytest.mark.parametrize(("kind", "tokens"), [("cuda", 2048), ("cpu", 1024)])
def test_steps_have_a_token_for_every_sequence(kind, tokens):
    """Unless a number is asked for, which is taken as it is."""
    assert EngineOptions().batched_tokens(kind) == tokens
    assert EngineOptions(max_num_seqs=3000).batched_tokens(kind) == 3000
    assert EngineOptions(max_num_seqs=3000, max_num_batched_tokens=9).batched_tokens(kind) == 9
