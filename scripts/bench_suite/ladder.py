"""The rungs of the ladder: the same engine in plain PyTorch, with kernels, with graphs on top, and with quantised
weights.

Random weights at the published widths. Each rung is measured in a process of its own, beside the bytes that a step has
to read and the bandwidth of the GPU, which is measured in the same process.
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
from kimi_vl.kernels.inputs import FLOAT8_SPREAD
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.quantization.weight import QuantizedWeight
from kimi_vl.weights import loader

from . import checkpoint, contestants, decode
from .kernels import machine

RUNGS: dict[str, tuple[str, str, str | None]] = {  # operations, graphs, the form of the weights
    "torch": ("torch", "0", None),
    "kernels": ("triton", "0", None),
    "graphs": ("triton", "1", None),
    "int8": ("triton", "1", "int8"),
    "int4": ("triton", "1", "int4"),
    "float8": ("triton", "1", "float8"),
}
SEQUENCES = [1, 4, 16, 32, 64, 128]
LONG = (1, 32768)  # one sequence and its context
Report = Callable[[str, Any], None]
Check = Callable[[str, bool, Any], None]


def shape(rehearsal: bool, text_layers: int = 27, vision_blocks: int = 1) -> dict[str, Any]:
    """The values of :func:`config`."""
    values = checkpoint.divided(
        16 if rehearsal else 1, min(2, text_layers) if rehearsal else text_layers, vision_blocks
    )
    if rehearsal:
        values["text_config"] |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
    return values


def config(rehearsal: bool, text_layers: int = 27, vision_blocks: int = 1, vocabulary: int = 0) -> Config:
    """The published one but for its layers; a rehearsal has a sixteenth of its widths, two layers and few experts."""
    values = shape(rehearsal, text_layers, vision_blocks)
    return Config.from_dict(checkpoint.with_vocabulary(values, vocabulary) if vocabulary else values)


@torch.no_grad()
def random_model(
    config: Config, device: torch.device, dtype: torch.dtype = torch.bfloat16, form: str | None = None
) -> KimiVL:
    """Weights that keep values of a layer's size, norms near one, and a router that spreads its choice."""
    model = loader.planned_model(config, dtype, form, device).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.modules():
        if isinstance(weight, QuantizedWeight):
            _fill(weight, generator)
    for name, parameter in model.named_parameters():
        if name.endswith((".codes", ".scales")):
            continue
        if name.endswith("e_score_correction_bias"):
            parameter.normal_(std=0.05, generator=generator)
        elif parameter.ndim == 1:
            parameter.normal_(std=0.1, generator=generator)
            if name.endswith("weight"):
                parameter.add_(1)
        else:
            parameter.normal_(std=(2 if "gate" in name else 1) * parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def _fill(weight: QuantizedWeight, generator: torch.Generator) -> None:
    """Codes that are equally likely, around 0; scales that make the standard deviation that of :func:`random_model`."""
    codes = weight.codes.view(torch.uint8)
    if weight.bits == 4:  # without -8, or every sum has a direction of its own, whatever a token is
        halves = torch.randint(1, 16, (2, *codes.shape), generator=generator, device=codes.device, dtype=torch.uint8)
        codes.copy_(halves[0] | halves[1] << 4)
    else:
        codes.copy_(torch.randint(256, codes.shape, generator=generator, device=codes.device, dtype=torch.uint8))
    spread = (1 << weight.bits) / 12**0.5
    if weight.kind == "float8":
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        spread = FLOAT8_SPREAD
    weight.scales.fill_(weight.shape[-1] ** -0.5 / spread)


def engine(
    model: KimiVL,
    rung: str,
    rehearsal: bool,
    max_num_seqs: int = 128,
    max_num_batched_tokens: int = 0,
    gigabytes: float = 12,
) -> Engine:
    """An engine on a rung; nothing of earlier requests is used again. A rehearsal calls what a GPU replays."""
    os.environ[kernels.VARIABLE], os.environ[cuda_graphs.VARIABLE], _ = RUNGS[rung]
    sequences, gigabytes = (4, 0.02) if rehearsal else (max_num_seqs, gigabytes)
    options = EngineOptions(
        prefix_caching=False,
        max_num_seqs=sequences,
        max_num_batched_tokens=max_num_batched_tokens,
        cache_bytes=int(gigabytes * 1e9),
        embedding_bytes=0,
    )
    ops = kernels.select_ops(model.device, "triton") if rehearsal and RUNGS[rung][1] == "1" else None  # as on a GPU
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
        super().__init__(max_new_tokens, sampling)
        self.tokens: list[int] = []

    def take(self, token: int) -> int | None:
        self.tokens.append(token)
        return super().take(token)


def measure(rung: str, rehearsal: bool, device: str, report: Report, check: Check) -> None:
    """The full model on a rung: that it works at all, its decoding by sequences, and its first tokens."""
    bandwidth = machine(torch.device(device), rehearsal).bytes_per_second
    report("copy_gb_per_s", round(bandwidth / 1e9, 1))
    began, form = time.perf_counter(), RUNGS[rung][2]
    published = config(rehearsal, vision_blocks=1 if rehearsal else 27)
    model = random_model(published, torch.device(device), form=form)
    always, routed = _weights(model)
    report("decoder_weights_gb", round((always + routed) / 1e9, 2))
    running = engine(model, rung, rehearsal)
    report("layers", published.text_config.num_hidden_layers)
    report("seconds to be ready", round(time.perf_counter() - began, 1))
    _smoke(running, rehearsal, check)
    _first_tokens(rung, running, rehearsal, report)
    text, max_new_tokens = published.text_config, 3 if rehearsal else 64
    latents = 2 * text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim)  # of a token, in bytes
    sizes = [(3, 9)] if rehearsal else [*((count, 2048) for count in SEQUENCES), LONG]
    experts = _distinct_experts(model, sorted({count for count, _ in sizes}), rehearsal)
    for sequences, length in sizes:
        ids = decode.prompts(sequences, length, text.vocab_size)
        if not rehearsal:
            decode.run_engine(running, [prompt[:8] for prompt in ids], 3)  # compiles, captures
        first, step, _ = decode.run_engine(running, ids, max_new_tokens, temperature=1)
        share = experts[sequences] / text.n_routed_experts
        nbytes = always + share * routed + sequences * (length + max_new_tokens // 2) * latents
        figures = {
            "rung": rung,
            "sequences": sequences,
            "context": length,
            "step_ms": round(step * 1e3, 3),
            "tokens_per_second": round(sequences / step, 1),
            "all_begun_s": round(first, 3),
            "experts": round(experts[sequences], 1),
            "gb_a_step": round(nbytes / 1e9, 3),
            "gb_per_s": round(nbytes / step / 1e9, 1),
            "percent_of_copy": round(100 * nbytes / step / bandwidth, 1),
        }
        report(f"{sequences} sequences of {length}", figures)
    if torch.device(device).type == "cuda":
        report("peak_memory_gb", round(torch.cuda.max_memory_allocated() / 1e9, 1))
    running.close()


def _distinct_experts(model: KimiVL, counts: Sequence[int], rehearsal: bool) -> dict[int, float]:
    """How many experts of a layer so many sequences read in a step, counted where no graph hides it."""
    found = {}
    running = engine(model, "torch" if rehearsal else "kernels", rehearsal, gigabytes=2)
    for sequences in counts:
        ids = decode.prompts(sequences, 5 if rehearsal else 40, model.config.text_config.vocab_size)
        with decode.counted_experts(running, sequences) as seen:
            decode.run_engine(running, ids, 4 if rehearsal else 8, temperature=1)
        found[sequences] = statistics.mean(seen)
    running.close()
    return found


def profile(rung: str, rehearsal: bool, device: str, report: Report) -> None:
    """Where the time goes of decode steps, of a prompt and of a picture: every kernel's microseconds and launches in a
    step or a request."""
    published = config(rehearsal, vision_blocks=1 if rehearsal else 27)
    model = random_model(published, torch.device(device), form=RUNGS[rung][2])
    running = engine(model, rung, rehearsal)
    pad, vocabulary = published.media_placeholder_token_id, published.text_config.vocab_size
    with _profiler(rehearsal):
        pass  # the first one takes seconds to begin
    (ids,) = decode.prompts(1, 20 if rehearsal else 4096, vocabulary)
    pictures = [square_picture(4 if rehearsal else 64, number) for number in range(4)]
    tokens = pictures[0].tokens
    for name, given, each in (
        (f"prompt of {len(ids)} tokens", ids, [[]] * 4),
        (f"picture of {tokens} tokens", [1, *[pad] * tokens, 3], [[picture] for picture in pictures]),
    ):
        _ask(running, given, each[0], 1)
        with _profiler(rehearsal) as profiler:
            began = time.perf_counter()
            for patches in each[1:]:
                _ask(running, given, patches, 1)
            took = time.perf_counter() - began
        report(name, _shares(profiler, took, 3))
    for sequences in [2] if rehearsal else [1, 4, 32]:
        ids = decode.prompts(sequences, 9 if rehearsal else 2048, vocabulary)
        decode.run_engine(running, ids, 3)
        clocks = [decode.Clock(20 if rehearsal else 800, Sampling(1, 1, 0, number)) for number, _ in enumerate(ids)]
        handles = [
            running.submit(prompt, [], clock.max_new_tokens, clock) for prompt, clock in zip(ids, clocks, strict=True)
        ]
        while not all(clock.times for clock in clocks):
            time.sleep(0.01)
        with _profiler(rehearsal) as profiler:
            began, steps = time.perf_counter(), running.steps
            time.sleep(0.05 if rehearsal else 0.3)
            took, steps = time.perf_counter() - began, max(1, running.steps - steps)
        for handle in handles:
            running.cancel(handle)
        report(f"decode step of {sequences} sequences", _shares(profiler, took, steps))
    running.close()


def _profiler(rehearsal: bool) -> torch.profiler.profile:
    activity = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activity.CPU if rehearsal else activity.CUDA])


def _shares(profiler: torch.profiler.profile, took: float, times: int) -> dict[str, Any]:
    """Of each of ``times``: its microseconds, those of the GPU, and the kernels with most of them."""
    found = [
        (round(event.self_device_time_total / times, 2), round(event.count / times, 2), event.key[:90])
        for event in profiler.key_averages()
    ]
    return {
        "us": round(took / times * 1e6, 1),
        "us_on_gpu": round(sum(spent for spent, _, _ in found), 1),
        "us_calls_kernel": sorted(found, reverse=True)[:28],
    }


def chunks(rehearsal: bool, device: str, report: Report) -> None:
    """What the size of a step's batch of tokens costs and gains: first tokens of one prompt and of many at once."""
    published = config(rehearsal)
    model = random_model(published, torch.device(device))
    long, (count, length) = (20, (2, 9)) if rehearsal else (8192, (16, 2048))
    for tokens in [8] if rehearsal else [1024, 2048, 4096, 8192]:
        running = engine(model, "graphs", rehearsal, max_num_batched_tokens=tokens)
        vocabulary = published.text_config.vocab_size
        (ids,) = decode.prompts(1, long, vocabulary)
        several = decode.prompts(count, length, vocabulary)
        begun = [decode.run_engine(running, several, 4)[0] for _ in range(2)]
        alone = [_ask(running, ids, [], 1)[0] for _ in range(3)]
        figures = {
            f"ms, {long} tokens alone": round(min(alone) * 1e3, 1),
            f"ms, {count} prompts of {length}": [round(seconds * 1e3, 1) for seconds in begun],
        }
        report(f"{tokens} tokens a step", figures)
        running.close()
        del running


def _weights(model: KimiVL) -> tuple[int, int]:
    """Bytes of the decoder that every step reads, and those of all routed experts."""
    language = model.language_model
    sizes = {name: value.nbytes for name, value in [*language.named_parameters(), *language.named_buffers()]}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    return sum(size for name, size in sizes.items() if "embed_tokens" not in name) - routed, routed


def fill(rehearsal: bool, device: str, report: Report, check: Check) -> None:
    """An engine whose cache takes all memory that its plan leaves, with its largest steps: a prompt of nearly the whole
    context, pictures, and every other sequence drawing from cut distributions."""
    published = config(rehearsal, vision_blocks=1 if rehearsal else 27)
    model = random_model(published, torch.device(device))
    options = EngineOptions(cache_bytes=20_000_000) if rehearsal else EngineOptions()
    running = Engine(model, published.text_config.vocab_size, options)
    text, size = published.text_config, options.page_size
    report("cache_gb", round(running.cache.kv_cache.nbytes / 1e9, 1))
    longest, others, length, max_new_tokens = (90, 3, 9, 3) if rehearsal else (100_000, 63, 1000, 200)
    picture, pad = square_picture(4 if rehearsal else 64), published.media_placeholder_token_id
    asked = [(decode.prompts(1, longest, text.vocab_size)[0], [], decode.GREEDY)]
    for number, ids in enumerate(decode.prompts(others, length, text.vocab_size)):
        pictures = [picture] if number % 8 == 0 else []
        asked.append(
            ([*ids, *[pad] * sum(each.tokens for each in pictures), 1], pictures, Sampling(1, 0.9, 50, number))
        )
    kept = []
    for ids, pictures, sampling in asked:
        kept.append(_Keeper(max_new_tokens, sampling))
        running.submit(ids, pictures, max_new_tokens, kept[-1])
    failed = []
    for keeper in kept:
        try:
            keeper.wait()
        except Exception as error:
            failed.append(type(error).__name__)
    check("every request is answered", not failed and running.healthy(), failed)
    report("tokens of the cache", running.cache.kv_cache.shape[1] * size)
    if torch.device(device).type == "cuda":
        free, whole = torch.cuda.mem_get_info()
        report("gb", {"peak": torch.cuda.max_memory_reserved() / 1e9, "free": free / 1e9, "whole": whole / 1e9})
    running.close()


def measure_transformers(rehearsal: bool, device: str, report: Report) -> None:
    """What transformers' ``generate`` makes of the same model on the same GPU."""
    from kimi_vl.hf import KimiVLConfig, KimiVLForConditionalGeneration

    values = shape(rehearsal, vision_blocks=1)
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration(KimiVLConfig(**values)).bfloat16()
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.buffers()]:
            if parameter.is_floating_point():
                parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
    contestant = contestants.of_transformers(model)
    length, max_new_tokens = (9, 3) if rehearsal else (2048, 32)
    for sequences in [2] if rehearsal else [1, 16]:
        ids = decode.prompts(sequences, length, values["text_config"]["vocab_size"])
        contestant.decode(ids, 3)
        found = contestant.decode(ids, max_new_tokens)
        figures = {
            "rung": "transformers",
            "sequences": sequences,
            "context": length,
            "step_ms": round(found["step"] * 1e3, 3),
            "tokens_per_second": round(sequences / found["step"], 1),
            "all_begun_s": round(found["first"], 3),
        }
        report(f"{sequences} sequences of {length}", figures)


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
    """Milliseconds to the first token: of a prompt of words, and of a picture, a new one each time."""
    pad, vocabulary = engine.model.config.media_placeholder_token_id, engine.model.config.text_config.vocab_size
    length, side = (20, 4) if rehearsal else (4096, 64)
    (words,) = decode.prompts(1, length, vocabulary)
    pictures = [square_picture(side, number) for number in range(1 if rehearsal else 4)]
    pictured = [1, 2, *[pad] * pictures[0].tokens, 3]
    for name, ids, each in (
        (f"{length} tokens", words, [[] for _ in pictures]),
        (f"a picture of {pictures[0].tokens} tokens", pictured, [[picture] for picture in pictures]),
    ):
        times = [_ask(engine, ids, patches, 1)[0] for patches in each][-3:]
        report(f"first token of {name}", {"rung": rung, "milliseconds": round(statistics.median(times) * 1e3, 2)})
