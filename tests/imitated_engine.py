"""A small model, output processors and an engine for the tests on imitated devices."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_suite import checkpoint, ladder
from bench_suite.imitated_cuda import Counts, Machine
from torch import Tensor

from kimi_vl import kernels
from kimi_vl.engine.cuda_graphs import DecodeInput, Launched, StaticDecoder
from kimi_vl.engine.engine import Engine, EngineOptions, Patches, RequestHandle
from kimi_vl.engine.sampling import Sampling
from kimi_vl.kernels import plain, reference
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.weights import loader
from tests.listener import GREEDY, Listener

# KIMI_VL_KERNELS and KIMI_VL_GRAPHS. What is interpreted is slow, so most tests of graphs are "captured", with STATIC
# in the place of kernels; "called" are the same steps where nothing can be captured.
WAYS = {
    "torch": ("torch", "0"),
    "kernels": ("triton", "0"),
    "graphs": ("triton", "1"),
    "captured": ("torch", "1"),
    "called": ("torch", "1"),
}
PAD = 149
TEXT_TOKENS = 140  # ids below have text
OPTIONS = EngineOptions(page_size=8, max_num_seqs=4, max_num_batched_tokens=24, max_waiting=300, cache_bytes=48 << 10)


def _moe(
    states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Every expert for every token; those that are not in ``topk_ids`` weigh nothing."""
    mixed = torch.zeros_like(states)
    for expert, (both, last) in enumerate(zip(gate_up, down, strict=True)):
        weight = (topk_weights * (topk_ids == expert)).sum(-1, keepdim=True)  # (T, 1)
        gate, up = both.chunk(2)
        mixed = mixed + reference.mlp(states, gate, up, last) * weight
    return mixed if shared is None else mixed + reference.mlp(states, *shared)


def _mla_prepare(
    joined: Tensor,
    to_key: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    eps: float,
    decoding: int,
) -> tuple[Tensor, Tensor]:
    """All of the cache is written, most of it as it was."""
    flat = kv_cache.view(-1, kv_cache.shape[-1])
    new = torch.empty(1, len(joined), kv_cache.shape[-1], device=joined.device)
    own = torch.arange(len(joined), device=joined.device)
    queries = plain.mla_prepare(joined, to_key, norm_weight, rope, new, own, eps, decoding)
    hits = slot_mapping[:, None] == torch.arange(len(flat), device=slot_mapping.device)  # (T, slots)
    flat.copy_(new[0][hits.int().argmax(0)].where(hits.any(0)[:, None], flat))
    return queries


# Operations of torch that never wait for a device, as those that are captured must be. For float32, and a small model.
STATIC = dataclasses.replace(kernels.REFERENCE, name="static", moe=_moe, mla_prepare=_mla_prepare)


def save_model(folder: Path) -> None:
    """A checkpoint of two layers whose operations are of every kind that the published model has."""
    values = checkpoint.divided(1, 2, 1)
    values["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "init_pos_emb_height": 4,
        "init_pos_emb_width": 4,
    }  # fmt: skip
    values["text_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "max_position_embeddings": 256,
    }  # fmt: skip
    values = checkpoint.with_vocabulary(values, 384)
    (folder / "config.json").write_text(json.dumps(values))
    made = ladder.random_model(Config.from_dict(values), torch.device("cpu"), torch.float32)
    loader.save(made, folder / "model.safetensors", torch.float32)


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> KimiVL:
    return loader.load(folder, dtype=dtype, device=device, threads=2)


@dataclass
class Ask:
    """A request: what is sent, and what its output processor does."""

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    pictures: Sequence[Patches] = ()
    forced: dict[int, int] = field(default_factory=dict)  # tokens that are put in, by how many came before
    text_only: frozenset[int] = frozenset()  # where tokens without text are ruled out


class OutputProcessor(Listener):
    """Takes tokens as a request of the pipeline does; keeps them."""

    def __init__(self, ask: Ask):
        super().__init__(ask.max_new_tokens, ask.sampling)
        self.ask = ask

    @property
    def text_only(self) -> bool:
        return len(self.tokens) in self.ask.text_only

    def forced(self) -> int | None:
        return self.ask.forced.get(len(self.tokens))


def send(
    engine: Engine, ask: Ask, after: Callable[[int], object] | None = None, handles: list[RequestHandle] | None = None
) -> OutputProcessor:
    """Submits a request; ``after`` is called in the engine's thread with the number of tokens after each of them."""
    processor = OutputProcessor(ask)
    processor.after = after or processor.after
    with engine._lock:  # the engine takes it in only when its handle is known here
        handle = engine.submit(ask.ids, ask.pictures, ask.max_new_tokens, processor)
        if handles is not None:
            handles.append(handle)
    return processor


def picture(rows: int, columns: int, seed: int) -> Patches:
    pixels = np.random.default_rng(seed).uniform(-1, 1, (rows * columns, 3, 14, 14)).astype(np.float32)
    return Patches(pixels, (rows, columns))


@contextmanager
def engine_of(model: KimiVL, way: str = "torch", options: EngineOptions = OPTIONS) -> Iterator[Engine]:
    """An engine that computes in one of WAYS."""
    static = way in ("captured", "called")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("KIMI_VL_KERNELS", "KIMI_VL_GRAPHS"), WAYS[way], strict=True):
            patch.setenv(name, value)
        capture = (lambda action: action) if way == "called" else None
        engine = Engine(model, TEXT_TOKENS, options, ops=STATIC if static else None, capture=capture)
    try:
        yield engine
    finally:
        engine.close(wait=engine.healthy())


class Steps:
    """Watches an engine's decode steps over static buffers: while one is under way, nothing may wait.

    ``counts`` are what each step took that was begun before the tokens of the last one were read.
    """

    def __init__(self, machine: Machine, patch: pytest.MonkeyPatch):
        self.counts: list[Counts] = []
        under_way = 0
        launch, read = StaticDecoder.launch, Launched.read
        forbidden = "while a step is under way"

        def launched(decoder: StaticDecoder, sequences: Sequence[DecodeInput]) -> Launched:
            nonlocal under_way
            before = copy.copy(machine.counts)
            result = launch(decoder, sequences)
            if under_way:
                self.counts.append(machine.counts - before)
            else:
                machine.own.no_waits.append(forbidden)
            under_way += 1
            return result

        def was_read(in_flight: Launched) -> tuple[list[int], list[bool]]:
            nonlocal under_way
            machine.own.no_waits.remove(forbidden)
            under_way -= 1
            try:
                return read(in_flight)
            finally:
                if under_way:
                    machine.own.no_waits.append(forbidden)

        patch.setattr(StaticDecoder, "launch", launched)
        patch.setattr(Launched, "read", was_read)


def some_asks(most: int = 7) -> list[Ask]:
    """Prompts of one token and of several chunks, pictures, all ways to sample, tokens that are put in or ruled out."""
    samplings = [Sampling(0, 1, 0, 0), Sampling(1, 1, 0, 5), Sampling(0.8, 0.9, 0, 6), Sampling(1.5, 1, 20, 7)]
    pictures = [picture(2, 4, 1), picture(4, 4, 2)]
    beginning = [*range(40, 60)]  # several share it, pages and all
    asks = [
        Ask([3], 5),
        Ask([5, *[PAD] * 2, 6], 4, samplings[1], [pictures[0]]),
        Ask(beginning, 6, samplings[2], forced={2: 7, 4: 9}),
        Ask([*beginning, 8, *[PAD] * 4, 9], 5, samplings[3], [pictures[1]]),
        Ask([*beginning[:17], 11], 12, samplings[1], text_only=frozenset({3, 4})),
        Ask([21, *range(60, 95)], 3, samplings[2]),
        Ask([5, *[PAD] * 2, 6, *[PAD] * 2], 7, samplings[0], [pictures[0], pictures[0]], {3: 1}),
    ]
    return asks[:most]


def answers(engine: Engine, asks: Sequence[Ask], late: bool = False) -> list[list[int]]:
    """Tokens of all; sent at once, or each when the one before has sampled its second token."""
    processors = []
    for ask in asks:
        begun = threading.Event()
        processors.append(send(engine, ask, lambda count, begun=begun: count > 1 and begun.set()))
        if late:
            assert begun.wait(120)
    return [processor.result() for processor in processors]


def settle(engine: Engine) -> None:
    """Waits until nothing runs or waits; then every page is free."""
    end = time.monotonic() + 300
    while not engine.idle() and engine.healthy() and time.monotonic() < end:
        time.sleep(0.002)
    assert not engine.healthy() or engine.scheduler.pool.available == engine.scheduler.pool.count
