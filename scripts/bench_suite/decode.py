"""`scripts/bench latency` and `throughput`: tokens a second at real widths, beside the bytes that have to be read.

Random weights at the published widths, as many layers as are asked for; speed does not depend on the values, only
routing does, and the experts that are read are counted. The engine and, with ``--peer``, transformers' generate take
turns in one process, so that a slow minute of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kimi_vl import loader
from kimi_vl.config import TextConfig
from kimi_vl.engine import Engine, EngineOptions
from kimi_vl.language import Gate
from kimi_vl.sampling import Sampling

from . import checkpoint

CACHE = Path(__file__).parents[2] / ".cache" / "bench"
GREEDY = Sampling(0, 1, 0, 0)


class Clock:
    """A guide that only notes when its tokens come."""

    text_only = False
    sampling = GREEDY

    def __init__(self, room: int):
        self.room = room
        self.times: list[float] = []
        self.over = threading.Event()
        self.error: Exception | None = None

    def forced(self) -> int | None:
        return None

    def take(self, token: int) -> int | None:
        self.times.append(time.perf_counter())
        if len(self.times) < self.room:
            return token
        self.over.set()
        return None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.over.set()


def read_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes a second of reading memory: the best of several sums over ``nbytes``."""
    values = torch.ones(nbytes // 4, device=device)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        values.sum().item()
        best = min(best, time.perf_counter() - began)
    return nbytes / best


def bytes_a_step(
    config: TextConfig, rows: int, context: int, distinct: float | None = None, itemsize: int = 2
) -> float:
    """Weights and latents that decoding one token in each of ``rows`` has to read, in bytes.

    ``distinct`` experts of a layer are read. Where nobody counted them: of E experts, of which a token takes K at
    random, E (1 - (1 - K/E)^rows) are expected.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    attention = hidden * (heads * (config.qk_nope_head_dim + config.qk_rope_head_dim) + latent)
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * hidden
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    distinct = distinct or experts * (1 - (1 - chosen / experts) ** rows)
    expert = 3 * hidden * config.moe_intermediate_size
    sparse = layers - config.first_k_dense_replace
    values = layers * attention + config.first_k_dense_replace * 3 * hidden * config.intermediate_size
    values += sparse * ((distinct + config.n_shared_experts) * expert + experts * hidden)
    values += config.vocab_size * hidden + rows * context * layers * latent
    return itemsize * values


@contextmanager
def counted_experts(model: nn.Module, rows: int) -> Iterator[list[int]]:
    """How many experts each layer reads in each step that decodes ``rows`` tokens, as long as the block runs."""
    counts: list[int] = []

    def count(_: nn.Module, __: Any, routed: tuple[torch.Tensor, torch.Tensor]) -> None:
        if routed[0].shape[0] == rows:
            counts.append(routed[0].unique().numel())

    hooks = [part.register_forward_hook(count) for part in model.modules() if isinstance(part, Gate)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def prompts(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows * 100_003 + length)
    return torch.randint(0, vocabulary - 300, (rows, length), generator=generator).tolist()


def run_engine(engine: Engine, ids: Sequence[list[int]], room: int) -> tuple[float, float]:
    """(seconds to the first token of the last row, seconds a step after that)."""
    began = time.perf_counter()
    clocks = [Clock(room) for _ in ids]
    for row, clock in zip(ids, clocks, strict=True):
        engine.submit(row, [], room, clock)
    for clock in clocks:
        clock.over.wait()
        if clock.error:
            raise clock.error
    all_begun = max(clock.times[0] for clock in clocks)
    end = max(clock.times[-1] for clock in clocks)
    steps = sum(moment > all_begun for moment in max(clocks, key=lambda clock: clock.times[0]).times)
    return all_begun - began, (end - all_begun) / steps


def run_peer(model: Any, ids: Sequence[list[int]], room: int) -> tuple[float, float]:
    inputs = torch.tensor(ids, device=model.device)

    def generate(count: int) -> float:
        began = time.perf_counter()
        model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    first = generate(1)
    return first, (generate(room) - first) / (room - 1)


def latency(arguments: list[str]) -> int:
    """One request, at several lengths of its prompt."""
    contexts = [128, 2048, 8192] if torch.cuda.is_available() else [128, 1024]
    return _measure("latency", arguments, [1], contexts)


def throughput(arguments: list[str]) -> int:
    """Several requests at once."""
    rows = [1, 4, 16, 32, 64, 128] if torch.cuda.is_available() else [1, 4, 16]
    return _measure("throughput", arguments, rows, [128])


def _measure(name: str, arguments: list[str], all_rows: list[int], contexts: list[int]) -> int:
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}")
    parser.add_argument("--layers", type=int, default=0, help="text layers (default: all 27 on a GPU, 6 on a CPU)")
    parser.add_argument("--rows", type=int, nargs="*", default=all_rows, help="requests at once")
    parser.add_argument("--context", type=int, nargs="*", default=contexts, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="transformers' generate on the same weights")
    parser.add_argument("--divide", type=int, default=1, help="divide the published widths, for a quick look")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of random weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    layers = args.layers or (27 if device.type == "cuda" else 6)
    if args.model:
        folder, shape = args.model, str(args.model)
    else:
        made = checkpoint.with_layers(args.cache, layers, divisor=args.divide)
        folder, shape = made.folder, made.shape
    dtype = getattr(torch, args.dtype)
    model = loader.load(folder, dtype=dtype, device=device)
    text = model.config.text_config
    contestants: dict[str, Callable[[Sequence[list[int]]], tuple[float, float]]] = {}
    engine = Engine(model, text.vocab_size, EngineOptions(reuse=False, max_rows=max(64, *args.rows)))
    contestants["kimi_vl"] = lambda ids: run_engine(engine, ids, args.tokens)
    if args.peer:
        from kimi_vl.hf import KimiVLForConditionalGeneration

        peer = KimiVLForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map=args.device)
        peer.eval()
        contestants["transformers"] = lambda ids: run_peer(peer, ids, args.tokens)
    print(f"{shape}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| rows | context | who | first token s | step ms | tok/s | GB a step | GB/s | of read bandwidth |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for rows in args.rows:
        for context in args.context:
            ids = prompts(rows, context, text.vocab_size)
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
            bandwidth = []
            with counted_experts(model, rows) as counts:
                run_engine(engine, ids, args.tokens)
            distinct = statistics.mean(counts) if counts else None
            for round_ in range(args.rounds + 1):
                bandwidth.append(read_bandwidth(device))
                for name, run in contestants.items():
                    with torch.inference_mode():
                        figures = run(ids)
                    if round_:  # the first round warms up
                        taken[name].append(figures)
            nbytes, best = (
                bytes_a_step(text, rows, context + args.tokens // 2, distinct, dtype.itemsize),
                max(bandwidth),
            )
            for name, figures in taken.items():
                first, step = (statistics.median(column) for column in zip(*figures, strict=True))
                rate = nbytes / step
                result = {
                    "rows": rows,
                    "context": context,
                    "experts_read": distinct and round(distinct, 1),
                    "who": name,
                    "first_token_s": round(first, 4),
                    "step_ms": round(step * 1e3, 2),
                    "tokens_per_second": round(rows / step, 1),
                    "gb_a_step": round(nbytes / 1e9, 3),
                    "gb_per_second": round(rate / 1e9, 1),
                    "of_read_bandwidth": round(rate / best, 3),
                }
                results.append(result)
                print(
                    f"| {rows} | {context} | {name} | {first:.3f} | {step * 1e3:.1f} | {rows / step:.1f} "
                    f"| {nbytes / 1e9:.2f} | {rate / 1e9:.1f} | {rate / best:.0%} |",
                    flush=True,
                )
    engine.close()
    print(
        json.dumps(
            {
                "shape": shape,
                "dtype": args.dtype,
                "device": args.device,
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "results": results,
            }
        )
    )
    return 0
