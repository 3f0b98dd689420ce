"""The model against itself: the cache, the absorbed form, rows side by side, gradients, bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kimi_vl.kernels.linear import project
from kimi_vl.model.config import Config
from kimi_vl.model.generation import Prompt, Session, greedy
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.language import Attention
from kimi_vl.model.latent_cache import LatentCache
from kimi_vl.weights import loader

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
NO_STOP: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model():
    return loader.load(CHECKPOINT, dtype=torch.float32)


def some_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def picture(model: KimiVL, rows: int, columns: int, seed: int) -> Prompt:
    slots = rows * columns // 4
    ids = [*some_ids(3, seed), *[model.config.media_placeholder_token_id] * slots, *some_ids(4, seed + 1)]
    pixels = torch.rand(rows * columns, 3, 14, 14, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Prompt(ids, pixels, [(rows, columns)])


@torch.inference_mode()
def test_decoding_equals_prefill(model):
    """The absorbed form over latents gives what the expanded form gives over the whole text."""
    ids = some_ids(24)
    whole = model(torch.tensor([ids]))[0]
    session = Session(model, [Prompt(ids[:9])], max_new_tokens=15)
    assert (session.logits[0] - whole[8]).abs().max() < 5e-5
    for position in range(9, 24):
        assert (session.step([ids[position]])[0] - whole[position]).abs().max() < 5e-5


@torch.inference_mode()
def test_prefill_in_chunks_equals_whole(model):
    ids = some_ids(30)
    whole = model(torch.tensor([ids]))[0]
    cache = LatentCache(model.config.text_config, 1, 30, dtype=torch.float32)
    parts = []
    for begin, end in ((0, 11), (11, 12), (12, 30)):
        positions = torch.arange(begin, end).unsqueeze(0)
        parts.append(model(torch.tensor([ids[begin:end]]), positions=positions, cache=cache)[0])
    assert (torch.cat(parts) - whole).abs().max() < 5e-5


def test_rows_of_different_lengths_and_pictures_are_as_alone(model):
    prompts = [Prompt(some_ids(5)), picture(model, 4, 6, 3), Prompt(some_ids(17, 2)), picture(model, 2, 8, 9)]
    together = greedy(model, prompts, NO_STOP, 12)
    assert together == [greedy(model, [prompt], NO_STOP, 12)[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) == 4


def test_a_row_ends_before_its_stop_token(model):
    prompt = Prompt(some_ids(6))
    free = greedy(model, [prompt], NO_STOP, 8)[0]
    stop = frozenset((free[3],))
    assert greedy(model, [prompt, Prompt(some_ids(9, 5))], stop, 8)[0] == free[: free.index(free[3])]


def test_the_cache_is_latent_and_refuses_more_than_it_holds(model):
    text = model.config.text_config
    cache = LatentCache(text, 2, 10, dtype=torch.bfloat16)
    assert cache.nbytes == text.num_hidden_layers * 2 * 10 * (text.kv_lora_rank + text.qk_rope_head_dim) * 2
    session = Session(model, [Prompt(some_ids(4))], max_new_tokens=1)
    session.step([1])
    with pytest.raises(ValueError, match="capacity"):
        session.step([1])


def test_placeholders_and_image_vectors_must_match(model):
    prompt = picture(model, 2, 2, 0)
    with pytest.raises(ValueError, match="placeholders"):
        Session(
            model,
            [Prompt([*prompt.ids, model.config.media_placeholder_token_id], prompt.pixel_values, prompt.grids)],
            1,
        )


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = KimiVL(Config.from_directory(CHECKPOINT))
    prompt = picture(model, 8, 8, 1)
    logits = model(torch.tensor([list(prompt.ids) * 1]), prompt.pixel_values, prompt.grids)
    logits.logsumexp(-1).sum().backward()
    # experts that no token chose have no gradient to receive; the fused tensors as a whole do
    silent = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert silent == []


@torch.inference_mode()
def test_bfloat16_runs_and_stays_near(model):
    """One dense layer's worth of arithmetic: experts of these tiny nets flip in bfloat16, attention must not drift."""
    halved = loader.load(CHECKPOINT, dtype=torch.bfloat16)
    bias = [p.dtype for name, p in halved.named_parameters() if name.endswith("e_score_correction_bias")]
    assert set(bias) == {torch.float32}
    assert halved.dtype == torch.bfloat16
    prompt = picture(model, 6, 6, 4)
    assert prompt.pixel_values is not None
    exact, rounded = (m.vision_tower(prompt.pixel_values.to(m.dtype), prompt.grids).float() for m in (model, halved))
    assert ((exact - rounded).norm() / exact.norm()) < 0.03
    assert greedy(halved, [prompt], NO_STOP, 4)[0]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extra", [-8, 0, 8])
def test_values_may_have_fewer_or_more_dims_than_keys(model, extra, dtype):
    text = replace(model.config.text_config, v_head_dim=model.config.text_config.qk_head_dim + extra)
    attention, generator = Attention(text).to(getattr(torch, dtype)), torch.Generator().manual_seed(extra)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    attention.kv_b_proj.weight.copy_(drawn(*attention.kv_b_proj.weight.shape) / 4)
    q_nope = drawn(1, text.num_attention_heads, 7, text.qk_nope_head_dim)
    q_rope = drawn(1, text.num_attention_heads, 7, text.qk_rope_head_dim)
    latent_kv = drawn(1, 7, text.kv_lora_rank + text.qk_rope_head_dim)
    found = attention.expanded(q_nope, q_rope, latent_kv, None)
    exact = copy.deepcopy(attention).double()
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    right = exact.absorbed(q_nope.double(), q_rope.double(), latent_kv.double(), mask)
    assert found.shape == (1, text.num_attention_heads, 7, text.v_head_dim)
    assert (found - right).norm() <= (2e-2 if dtype == "bfloat16" else 1e-5) * right.norm()


@torch.inference_mode()
def test_norms_routing_and_experts_of_a_float64_model_are_in_float64(model):
    """What float32 would round away (2^-24 of the value) is there."""
    moe = copy.deepcopy(model.language_model.model.layers[1].mlp).double()
    norm = copy.deepcopy(model.language_model.model.layers[1].input_layernorm).double()
    size, states = len(norm.weight), torch.randn(7, len(norm.weight), dtype=torch.float64)
    mean = states.square().sum(-1, keepdim=True) / size
    torch.testing.assert_close(norm(states), norm.weight * states / (mean + norm.eps).sqrt(), rtol=1e-13, atol=1e-13)
    topk_ids, topk_weights = moe.gate(states)
    scores = 1 / (1 + (-(states @ moe.gate.weight.T)).exp())
    own = scores.gather(-1, topk_ids.long())
    right = own / own.sum(-1, keepdim=True) * moe.gate.scaling
    torch.testing.assert_close(topk_weights, right, rtol=1e-13, atol=1e-13)
    right = torch.zeros_like(states)
    for token in range(len(states)):
        for expert, weight in zip(topk_ids[token].tolist(), topk_weights[token], strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ states[token]).chunk(2)
            right[token] += weight * (moe.experts.down_proj[expert] @ (gate / (1 + (-gate).exp()) * up))
    torch.testing.assert_close(moe.experts(states, topk_ids, topk_weights), right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (5, 96), (2, 3, 96), (0, 96)])
def test_bfloat16_products_are_rounded_once(shape):
    generator = torch.Generator().manual_seed(len(shape))
    states, weight = (torch.randn(size, generator=generator).bfloat16() for size in (shape, (40, 96)))
    exact = states.double() @ weight.double().t()
    product = project(states, weight)
    assert product.dtype == torch.bfloat16 and product.shape == exact.shape
    # half a unit in the last of 8 bits, and what float32 sums may add to it
    assert torch.all((product.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4)
