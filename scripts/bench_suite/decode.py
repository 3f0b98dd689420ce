"""What decoding and reading prompts cost at least, and what the engine needs: shared by `scripts/bench` and the ladder.

Speed does not depend on the values of weights, only routing does, and the experts that are read are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from kimi_vl.engine.engine import Engine
from kimi_vl.engine.requests import CountingOutputProcessor
from kimi_vl.engine.sampling import Sampling
from kimi_vl.model.config import TextConfig

GREEDY = Sampling(0, 1, 0, 0)


class Clock(CountingOutputProcessor):
    """An output processor that only notes when its tokens come, and the last one."""

    def __init__(self, max_new_tokens: int, sampling: Sampling = GREEDY):
        super().__init__(max_new_tokens, sampling)
        self.times: list[float] = []
        self.last = -1

    def take(self, token: int) -> int | None:
        self.times.append(time.perf_counter())
        self.last = token
        return super().take(token)

    def wait(self) -> None:
        """For the last token; raises what the request failed of."""
        self.over.wait()
        if self.error:
            raise self.error


def read_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes a second of reading memory: the best of several sums over ``nbytes``, on a CPU in one stream a core and in
    eight, which are faster."""
    values = torch.ones(nbytes // 4, device=device)
    ways: list[Callable[[], Any]] = [lambda: values.sum().item()]
    if device.type == "cpu":
        lines = values.view(torch.bfloat16).view(-1, 256)
        numbers = torch.arange(len(lines), dtype=torch.int32).view(8, -1).t().flatten()
        begins = torch.arange(0, len(lines), 2048, dtype=torch.int32)
        ways.append(lambda: torch.embedding_bag(lines, numbers, begins, mode=0))
    best = float("inf")
    for way in 5 * ways:
        began = time.perf_counter()
        way()
        best = min(best, time.perf_counter() - began)
    return nbytes / best


def attention_weights(config: TextConfig) -> int:
    """Values in the projections of one layer's attention."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    down = hidden * (heads * config.qk_head_dim + config.kv_lora_rank + config.qk_rope_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return down + up + heads * config.v_head_dim * hidden


def distinct_experts(config: TextConfig, sequences: int) -> float:
    """How many of E experts of a layer a step reads, where each of ``sequences`` takes K of them at random."""
    experts = config.n_routed_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** sequences)


def bytes_a_step(
    config: TextConfig, sequences: int, context: int, distinct: float | None = None, itemsize: int = 2
) -> float:
    """Weights and latents that decoding one token in each of ``sequences`` has to read, in bytes.

    ``distinct`` experts of a layer are read; where nobody counted them, as many as :func:`distinct_experts` expects.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    experts = config.n_routed_experts
    distinct = distinct or distinct_experts(config, sequences)
    expert = 3 * hidden * config.moe_intermediate_size
    sparse = layers - config.first_k_dense_replace
    values = layers * attention_weights(config) + config.first_k_dense_replace * 3 * hidden * config.intermediate_size
    values += sparse * ((distinct + config.n_shared_experts) * expert + experts * hidden)
    values += config.vocab_size * hidden + sequences * context * layers * latent
    return itemsize * values


def prefill_operations(config: TextConfig, length: int) -> float:
    """Multiplications and additions of the decoder for a prompt of ``length`` tokens, its keys and values expanded;
    the output head, which only the last token meets, left aside."""
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    looked_at = (length + 1) / 2  # by a token, in the mean
    attention = attention_weights(config) + heads * (config.qk_head_dim + config.v_head_dim) * looked_at
    dense = 3 * hidden * config.intermediate_size
    used = config.num_experts_per_tok + config.n_shared_experts
    sparse = 3 * hidden * config.moe_intermediate_size * used + hidden * config.n_routed_experts
    first = min(layers, config.first_k_dense_replace)
    return 2 * length * (layers * attention + first * dense + (layers - first) * sparse)


@contextmanager
def counted_experts(engine: Engine, sequences: int) -> Iterator[list[int]]:
    """How many experts each layer reads in each step that decodes ``sequences`` tokens, as long as the block runs."""
    decoder, counts = engine._decoder, []
    ops = decoder._ops

    def norm_router(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        results = ops.norm_router(*arguments)
        if len(results[2]) == sequences:
            counts.append(results[2].unique().numel())
        return results

    decoder._ops = replace(ops, norm_router=norm_router)
    try:
        yield counts
    finally:
        decoder._ops = ops


def prompts(sequences: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random ids, always the same; every sequence ends with another one. Of the lower half, so that a model that counts
    on meets no special token."""
    generator = torch.Generator().manual_seed(sequences * 100_003 + length)
    ids = torch.randint(0, vocabulary // 2, (sequences, length), generator=generator)
    ids[:, -1] = torch.randperm(vocabulary // 2, generator=generator)[:sequences]
    return ids.tolist()


def run_engine(
    engine: Engine, ids: Sequence[list[int]], max_new_tokens: int, temperature: float = 0
) -> tuple[float, float, list[int]]:
    """(seconds to the first token of the last sequence, seconds a step after that, the last token of each).

    Above ``temperature`` 0 a model of random weights gives every sequence tokens of its own, and so experts."""
    began = time.perf_counter()
    clocks = [Clock(max_new_tokens, Sampling(temperature, 1, 0, number)) for number, _ in enumerate(ids)]
    for prompt, clock in zip(ids, clocks, strict=True):
        engine.submit(prompt, [], max_new_tokens, clock)
    for clock in clocks:
        clock.wait()
    all_begun = max(clock.times[0] for clock in clocks)
    end = max(clock.times[-1] for clock in clocks)
    steps = sum(moment > all_begun for moment in max(clocks, key=lambda clock: clock.times[0]).times)
    return all_begun - began, (end - all_begun) / steps, [clock.last for clock in clocks]
