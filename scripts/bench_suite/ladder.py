"""The rungs of the ladder: the same engine in plain PyTorch, with kernels, and with graphs on top.

Random weights at the published widths. Each rung is measured in a process of its own, beside the bytes that a step has
to read and an H200's bandwidth.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kimi_vl import kernels
from kimi_vl.engine import cuda_graphs
from kimi_vl.engine.engine import Engine, EngineOptions, Patches
from kimi_vl.engine.sampling import Sampling
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.weights import loader

from . import checkpoint, decode

RUNGS = {"torch": ("torch", "0"), "kernels": ("triton", "0"), "graphs": ("triton", "1")}
H200_BYTES_PER_SECOND = 4.8e12
SEQUENCES = [1, 4, 16, 32, 64, 128]
Report = Callable[[str, Any], None]
Check = Callable[[str, bool, Any], None]


def config(rehearsal: bool, text_layers: int = 27, vision_blocks: int = 1, vocabulary: int = 0) -> Config:
    """The published one but for its layers; a rehearsal has a sixteenth of its widths, two layers and few experts."""
    layers = min(2, text_layers) if rehearsal else text_layers
    values = checkpoint.divided(16 if rehearsal else 1, layers, vision_blocks)
    if rehearsal:
        values["text_config"] |= {"n_routed_experts": 8, "num_experts_per_tok": 3}
    return Config.from_dict(checkpoint.with_vocabulary(values, vocabulary) if vocabulary else values)


@torch.no_grad()
def random_model(config: Config, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> KimiVL:
    """Weights that keep values of a layer's size, norms near one, and a router that spreads its choice."""
    model = loader.empty_model(config, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.normal_(std=0.05, generator=generator)
        elif parameter.ndim == 1:
            parameter.normal_(std=0.1, generator=generator)
            if name.endswith("weight"):
                parameter.add_(1)
        else:
            parameter.normal_(std=(2 if "gate" in name else 1) * parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def engine(model: KimiVL, rung: str, rehearsal: bool, max_num_seqs: int = 128) -> Engine:
    """An engine on a rung; nothing of earlier requests is used again. A rehearsal calls what a GPU replays."""
    os.environ[kernels.VARIABLE], os.environ[cuda_graphs.VARIABLE] = RUNGS[rung]
    sequences, gigabytes = (4, 0.02) if rehearsal else (max_num_seqs, 12)
    options = EngineOptions(
        prefix_caching=False, max_num_seqs=sequences, cache_bytes=int(gigabytes * 1e9), embedding_bytes=0
    )
    ops = kernels.select_ops(model.device, "triton") if rehearsal and rung == "graphs" else None  # as steps of a GPU
    return Engine(model, model.config.text_config.vocab_size, options, ops=ops)


def tokens(engine: Engine, rehearsal: bool) -> list[list[int]]:
    """What some requests side by side are answered: greedy ones and sampled ones, short and long."""
    vocabulary = engine.model.config.text_config.vocab_size
    count, longest, max_new_tokens = (3, 12, 3) if rehearsal else (12, 1500, 32)
    kept = []
    for number in range(count):
        (ids,) = decode.prompts(1, 1 + number * 131 % longest, vocabulary)
        processor = _Keeper(
            max_new_tokens, [decode.GREEDY, Sampling(1, 1, 0, number), Sampling(0.8, 0.9, 40, number)][number % 3]
        )
        engine.submit(ids, [], max_new_tokens, processor)
        kept.append(processor)
    for processor in kept:
        processor.wait()
    engine.close()
    return [processor.tokens for processor in kept]


class _Keeper(decode.Clock):
    def __init__(self, max_new_tokens: int, sampling: Sampling):
        super().__init__(max_new_tokens)
        self.sampling, self.tokens = sampling, []

    def take(self, token: int) -> int | None:
        self.tokens.append(token)
        return super().take(token)


def measure(rung: str, rehearsal: bool, device: str, report: Report, check: Check) -> None:
    """The full model on a rung: that it works at all, its decoding by sequences, and its first tokens."""
    began = time.perf_counter()
    shape = config(rehearsal, vision_blocks=1 if rehearsal else 27)
    model = random_model(shape, torch.device(device))
    running = engine(model, rung, rehearsal)
    report("layers", shape.text_config.num_hidden_layers)
    report("seconds to be ready", round(time.perf_counter() - began, 1))
    _smoke(running, rehearsal, check)
    context, max_new_tokens = (9, 3) if rehearsal else (2048, 64)
    _first_tokens(rung, running, rehearsal, report)
    for sequences in [3] if rehearsal else SEQUENCES:
        ids = decode.prompts(sequences, context, shape.text_config.vocab_size)
        if not rehearsal:
            decode.run_engine(running, [prompt[:8] for prompt in ids], 3)  # compiles, captures
        first, step, _ = decode.run_engine(running, ids, max_new_tokens)
        nbytes = decode.bytes_a_step(shape.text_config, sequences, context + max_new_tokens // 2)
        figures = {
            "rung": rung,
            "sequences": sequences,
            "context": context,
            "step_ms": round(step * 1e3, 3),
            "tokens_per_second": round(sequences / step, 1),
            "all_begun_s": round(first, 3),
            "gb_a_step": round(nbytes / 1e9, 3),
            "gb_per_s": round(nbytes / step / 1e9, 1),
            "percent_of_4.8_tb_per_s": round(100 * nbytes / step / H200_BYTES_PER_SECOND, 1),
        }
        report(f"{sequences} sequences", figures)
    if torch.device(device).type == "cuda":
        report("peak_memory_gb", round(torch.cuda.max_memory_allocated() / 1e9, 1))
    running.close()


def square_picture(side: int, number: int = 0) -> Patches:
    """``side`` by ``side`` patches: a quarter as many tokens. Another ``number`` is another picture."""
    pixels = np.random.default_rng([side, number]).uniform(-1, 1, (side * side, 3, 14, 14)).astype(np.float32)
    return Patches(pixels, (side, side))


def _ask(
    engine: Engine, ids: Sequence[int], patches: Sequence[Patches], max_new_tokens: int
) -> tuple[float, list[int]]:
    """Seconds to the first token, and the tokens."""
    processor, began = _Keeper(max_new_tokens, decode.GREEDY), time.perf_counter()
    engine.submit(ids, patches, max_new_tokens, processor)
    processor.wait()
    return processor.times[0] - began, processor.tokens


def _smoke(engine: Engine, rehearsal: bool, check: Check) -> None:
    """A picture and words give tokens of the vocabulary, the same ones again."""
    pad, picture = engine.model.config.media_placeholder_token_id, square_picture(4 if rehearsal else 32)
    ids = [1, 2, 3, *[pad] * picture.tokens, 4, 5]
    found = [_ask(engine, ids, [picture], 3 if rehearsal else 16)[1] for _ in range(2)]
    inside = all(0 <= token < engine.model.config.text_config.vocab_size for token in found[0])
    check("a picture is answered", inside and found[0] == found[1], found[0])


def _first_tokens(rung: str, engine: Engine, rehearsal: bool, report: Report) -> None:
    """Milliseconds to the first token: of a prompt of words, and of a picture."""
    pad, vocabulary = engine.model.config.media_placeholder_token_id, engine.model.config.text_config.vocab_size
    length, side = (20, 4) if rehearsal else (4096, 64)
    (ids,) = decode.prompts(1, length, vocabulary)
    picture = square_picture(side)
    for name, given, patches in (
        (f"{length} tokens", ids, []),
        (f"a picture of {picture.tokens} tokens", [1, 2, *[pad] * picture.tokens, 3], [picture]),
    ):
        times = [_ask(engine, given, patches, 1)[0] for _ in range(1 if rehearsal else 4)][-3:]
        report(f"first token of {name}", {"rung": rung, "milliseconds": round(statistics.median(times) * 1e3, 2)})
