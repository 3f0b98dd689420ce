"""What only a compiler sees: shared memory, registers that run over, types that change within a loop, and how often.

No GPU is needed to compile. The default ring compiles for the card with the least shared memory and for the one with
its own matrix instructions.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = {"8.0": 166_912, "8.6": 101_376, "8.9": 101_376, "9.0": 232_448, "10.0": 232_448, "12.0": 101_376}  # bytes
FLOAT8 = ("8.9", "9.0", "10.0", "12.0")  # cards whose kernels read it
# Forms of the weights in the default ring: those whose kernels differ from others' in more than a number.
DEFAULT = {"8.9": ("bfloat16", "int4", "float8"), "9.0": ("bfloat16", "int4")}
CARDS = [pytest.param(card, marks=[] if card in DEFAULT else pytest.mark.nightly) for card in LIMITS]
KERNELS = {
    "_add_rms_norm", "_norm_logits", "_select_experts", "_norm_router", "_pair_gate_up", "_pair_down", "_group",
    "_block_gate_up", "_block_down",
    "_combine", "_prepare", "_decode_split_kv", "_decode_combine", "_prefill", "_project", "_project_vector",
}  # fmt: skip
FEW_SPILLED = 16
"""Bytes of a thread: ptxas may leave a register out for more warps at a time (Triton 3.7 does so once, by 8 bytes)."""


def python(*arguments: str) -> list[str]:
    """Lines of a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".cache" / "triton")
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@functools.cache
def compiled(capability: str) -> list[dict[str, Any]]:
    """With weights in the forms of the default ring, or in every form that the card takes."""
    lines = python("-m", "bench_suite.cards", "--json", capability, *DEFAULT.get(capability, ()))
    return [json.loads(line) for line in lines]


@functools.cache
def compiled_in(form: str, capability: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in python("-m", "bench_suite.cards", "--json", capability, form)]


@pytest.mark.parametrize("capability", CARDS)
def test_every_variant_fits_the_card_and_hardly_spills(capability):
    from kimi_vl.kernels import OPERATIONS

    own = compiled(capability)
    assert {each["capability"] for each in own} == {int(capability.replace(".", ""))}
    assert {each["name"] for each in own} == KERNELS
    assert len(own) >= len(KERNELS) + len(OPERATIONS)
    for each in own:
        assert each["shared"] <= LIMITS[capability], each
        assert each["spilled"] <= FEW_SPILLED, each


@pytest.mark.parametrize("capability", CARDS)
def test_products_use_the_matrix_unit(capability):
    used = {(each["name"], each["matrix"]) for each in compiled(capability)}
    for name in (
        "_norm_router",
        "_decode_split_kv",
        "_block_gate_up",
        "_block_down",
        "_prefill",
        "_project",
    ):
        assert (name, "none") not in used
    if capability == "9.0":
        assert {("_block_gate_up", "wgmma"), ("_block_down", "wgmma"), ("_prefill", "wgmma")} <= used


@pytest.mark.parametrize("capability", CARDS)
def test_weights_are_not_loaded_byte_by_byte(capability):
    """Which is what a mask costs whose bounds the compiler cannot compare with the bytes that lie together."""
    assert {each["name"]: each["single_bytes"] for each in compiled(capability) if each["single_bytes"]} == {}


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["int8", "int4", "int4-g128", "float8", "float8-blocks"])
@pytest.mark.parametrize("capability", LIMITS)
def test_every_form_is_compiled_where_it_can_be(capability: str, form: str):
    """Kernels of its own beside those of floating-point weights, or none at all."""
    own = compiled_in(form, capability)
    if form.startswith("float8") and capability not in FLOAT8:
        assert not own
        return
    assert {each["name"] for each in own} == KERNELS
    for each in own:
        assert each["shared"] <= LIMITS[capability], each
        assert each["spilled"] <= FEW_SPILLED, each


RECORDED = """
import json
import sys
from dataclasses import replace

import torch
from bench_suite import cards
from triton.runtime.jit import compute_cache_key

from kimi_vl.weights import loader
from kimi_vl.kernels.attention_metadata import DecodeMetadata, StepMetadata
from kimi_vl.engine.kv_cache import Chunk, PagedCache
from kimi_vl.model.config import PUBLISHED_TEXT, Config, VisionConfig
from kimi_vl.engine.engine import EngineOptions
from kimi_vl.engine.decoder import FusedDecoder
from kimi_vl.kernels import OPERATIONS, triton_ops
from kimi_vl.kernels.startup_check import Calls
from kimi_vl.quantization.weight import QuantizedWeight

options, ops, seen = EngineOptions(), triton_ops(), set()


def record(run, kernel, arguments, options):
    options = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
    options |= {"debug": False, "instrumentation_mode": ""}
    _, keys, _, _, binder = kernel.device_caches[90]
    _, specialization, options = binder(*arguments, **options)
    seen.add(kernel.fn.__name__ + compute_cache_key(keys, specialization, options))


def taken():
    global seen
    seen, last = set(), seen
    return last
"""
"""What every launch is compiled for, instead of the launch."""

VARIANTS = (
    RECORDED
    + """
with cards.launches(record):
    for operation in OPERATIONS:
        for call in cards.calls(options).of(operation):
            call.run(ops)
    warmed = taken()

    text = replace(PUBLISHED_TEXT, num_hidden_layers=1, first_k_dense_replace=0, vocab_size=512)
    vision = VisionConfig(14, 64, 64, 2, 1, 32, 32, (2, 2))
    model = loader.empty_model(Config(vision, text, 500)).language_model  # on no device: shapes and nothing else
    decoder = FusedDecoder(model, ops)
    cache = PagedCache(text, 64, options.page_size, dtype=torch.bfloat16, device="meta")

    def step(*lengths):  # (tokens before, new ones) of each sequence
        chunks = [Chunk(list(range(-(-(old + new) // 32))), old, old + new) for old, new in lengths]
        tokens = sum(new for _, new in lengths)
        decoder.states(torch.empty(tokens, 2048, dtype=torch.bfloat16, device="meta"), cache.step(chunks))

    for tokens in range(2, options.batched_tokens("cuda") + 1):
        step((0, tokens))
    prompts = taken()
    for count in (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 63, options.max_num_seqs):
        for old in (0, 39, 700, 3001):
            step(*[(old, 1)] * count)
            step(*[(old, 1)] * count, (0, options.batched_tokens("cuda") - count - old % 7))
            step(*[(old, 1)] * count, (64, 2 + old % 5))
        whole = torch.empty(count, 4096, dtype=torch.int32, device="meta")
        at, states = (torch.empty(count, *more, device="meta").to(dtype) for more, dtype in (
            ((), torch.int64), ((2048,), torch.bfloat16),
        ))
        decode = DecodeMetadata(whole, at.int(), 32)
        decoder.states(states, StepMetadata(cache.kv_cache, at, at, decode))  # as in a graph
    mixed = taken()

print(json.dumps([sorted(warmed), sorted(prompts), sorted(mixed)]))
"""
)


def test_steps_launch_what_was_compiled_before_and_nothing_else():
    """Prompts of every length that a step takes, steps that decode, and mixed ones."""
    warmed, prompts, mixed = (set(each) for each in json.loads(python("-c", VARIANTS)[-1]))
    assert len(prompts) > 8 and len(mixed) > 8
    assert prompts | mixed <= warmed, sorted((prompts | mixed) - warmed)
    assert len(warmed) < 40


QUANTIZED = (
    RECORDED
    + """
changes, beside = json.loads(sys.argv[1])
text = replace(PUBLISHED_TEXT, num_hidden_layers=2, vocab_size=512, **changes)
vision = VisionConfig(14, 64, 64, 2, 1, 32, 32, (2, 2))
model = loader.planned_model(Config(vision, text, 500), form="int4")
mlp = model.language_model.model.layers[1].mlp.shared_experts
for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if beside else ():
    shape = linear.weight.shape
    del linear.weight
    linear.weight = QuantizedWeight(
        torch.empty(shape, dtype=torch.uint8, device="meta"),
        torch.empty(shape[0], 1, dtype=torch.bfloat16, device="meta"), 8,
    )
use = options.use(model, torch.device("cuda"))

with cards.launches(record):
    calls = Calls(use, "cpu", cards.Unset(use.widths, use.dtype))
    calls._on_gpu = True  # as on a card: quantised weights alone are kernels' there
    for operation in OPERATIONS:
        for call in calls.of(operation):
            call.run(ops)
    warmed = taken()
    decoder = FusedDecoder(model.language_model, ops)
    cache = PagedCache(text, 64, options.page_size, dtype=torch.bfloat16, device="meta")
    prompts = [(0, 2), (0, 17), (0, 150), (0, 700), (0, 2048)]
    for decoding, new in [*prompts, (1, 0), (2, 0), (5, 0), (6, 0), (64, 0), (3, 9)]:
        chunks = [Chunk(list(range(22)), 700, 701)] * decoding + [Chunk(list(range(64)), 0, new)] * bool(new)
        states = torch.empty(decoding + new, text.hidden_size, dtype=torch.bfloat16, device="meta")
        decoder.states(states, cache.step(chunks))

print(json.dumps([sorted(warmed), sorted(taken())]))
"""
)


@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({"kv_lora_rank": 256}, True),
        pytest.param({"hidden_size": 4096}, False, marks=pytest.mark.nightly),
        pytest.param({}, True, marks=pytest.mark.nightly),
    ],
    ids=["both", "widths", "shared"],
)
def test_steps_of_quantised_models_launch_what_was_compiled_before(changes: dict[str, int], beside: bool):
    """A dense layer and one of experts: at other widths, and with shared experts in 8 bits beside routed ones in 4."""
    warmed, launched = map(set, json.loads(python("-c", QUANTIZED, json.dumps([changes, beside]))[-1]))
    assert len(launched) > 20
    assert launched <= warmed, sorted(launched - warmed)
