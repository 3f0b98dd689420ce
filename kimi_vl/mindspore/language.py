"""The decoder: multi-head latent attention over a cache of latents, and a mixture of experts."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from functools import partial

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor, ops

from ..model.config import TextConfig
from ..model.language import LATENT_NORM_EPS, rope_tables
from .layers import (
    Weights,
    attention,
    bmm,
    bmm_transposed,
    from_torch,
    gemm,
    hidden,
    in_blocks,
    linear,
    rms_norm,
    rotate,
)

# Shapes: B sequences, S new tokens of each, L tokens to attend to, H hidden_size, N heads, R kv_lora_rank,
# P / Q / V qk_rope / qk_nope / v head dims, E experts, K experts a token, T = B * S tokens.
KVCache = dict[int, Tensor]  # by layer, the normed latent and the rotated key of each token so far: (B, L, R+P)
Valid = Tensor | None  # (B, L), float32: 1 for tokens and 0 for padding; None is all ones


def decoder(weights: Weights, config: TextConfig, states: Tensor, seen: np.ndarray, cache: KVCache) -> Tensor:
    """``language_model.model``: embeddings to final states, (B, S, H), of tokens behind those in ``cache``, which keeps
    them, too. ``seen`` (B, L) is false where padding is, in the cache and behind it."""
    positions = np.maximum(seen.cumsum(1) - 1, 0)[:, -states.shape[1] :]  # (B, S), of tokens in their sequences
    valid = None if seen.all() else Tensor(seen.astype(np.float32))
    dim, eps = config.qk_rope_head_dim, config.rms_norm_eps
    tables = rope_tables(torch.from_numpy(positions), dim, config.rope_theta, torch.float32)  # (B, S, P) each
    rope = [from_torch(table[..., : dim // 2], states.dtype) for table in tables]
    for index in range(config.num_hidden_layers):
        layer, feed_forward = weights / f"layers.{index}", mlp if config.is_dense(index) else moe
        normed = rms_norm(layer / "input_layernorm", states, eps)
        mixed, cache[index] = self_attention(layer / "self_attn", config, normed, rope, cache.get(index), valid)
        states = states + mixed
        normed = rms_norm(layer / "post_attention_layernorm", states, eps)
        states = states + in_blocks(partial(feed_forward, layer / "mlp", config), normed)
    return rms_norm(weights / "norm", states, eps)


def self_attention(
    weights: Weights, config: TextConfig, states: Tensor, rope: list[Tensor], past: Tensor | None, valid: Valid
) -> tuple[Tensor, Tensor]:
    """What tokens (B, S, H) take from those that they see, and the cache (B, L, R+P): the ``past`` with them behind."""
    (batch, length, _), (cos, sin), rank = states.shape, rope, config.kv_lora_rank
    query = linear(weights / "q_proj", states).reshape(batch, length, config.num_attention_heads, -1).swapaxes(1, 2)
    q_nope, q_rope = query[..., : config.qk_nope_head_dim], query[..., config.qk_nope_head_dim :]
    q_rope = rotate(q_rope, cos.expand_dims(1), sin.expand_dims(1))  # (B, N, S, P)
    kv = linear(weights / "kv_a_proj_with_mqa", states)
    latent = rms_norm(weights / "kv_a_layernorm", kv[..., :rank], LATENT_NORM_EPS)
    kv = ops.cat((latent, rotate(kv[..., rank:], cos, sin)), axis=-1)
    kv = kv if past is None else ops.cat((past, kv), axis=1)  # (B, L, R+P)
    form = absorbed if length == 1 else expanded
    heads = form(weights / "kv_b_proj", config, q_nope, q_rope, kv, valid)  # (B, N, S, V)
    return linear(weights / "o_proj", heads.swapaxes(1, 2).reshape(batch, length, -1)), kv


def expanded(weights: Weights, config: TextConfig, q_nope: Tensor, q_rope: Tensor, kv: Tensor, valid: Valid) -> Tensor:
    """Heads (B, N, S, V) over the cache ``kv`` (B, L, R+P), expanding its keys and values: for prompts."""
    rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
    up = linear(weights, kv[..., :rank]).reshape(*kv.shape[:2], config.num_attention_heads, -1).swapaxes(1, 2)
    k_nope, value = up[..., :nope], up[..., nope:]  # (B, N, L, Q), (B, N, L, V)
    k_rope = kv[..., rank:].expand_dims(1).broadcast_to((*k_nope.shape[:3], -1))
    query, key = ops.cat((q_nope, q_rope), axis=-1), ops.cat((k_nope, k_rope), axis=-1)
    return attention(query, key, value, scale=config.qk_head_dim**-0.5, causal=True, valid=valid)


def absorbed(weights: Weights, config: TextConfig, q_nope: Tensor, q_rope: Tensor, kv: Tensor, valid: Valid) -> Tensor:
    """The same for one new token of each sequence, with its query taken into the latent space: nothing is expanded."""
    rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
    up = weights["weight"].reshape(config.num_attention_heads, -1, rank)  # (N, Q+V, R)
    lifted = bmm(q_nope[:, :, 0].swapaxes(0, 1), up[:, :nope]).swapaxes(0, 1)  # (B, N, R)
    query = ops.cat((lifted, q_rope[:, :, 0]), axis=-1)  # (B, N, R+P)
    scores = bmm_transposed(query, kv).astype(ms.float32) * config.qk_head_dim**-0.5  # (B, N, L)
    scores = scores if valid is None else scores + hidden(valid.expand_dims(1))
    mixed = bmm(ops.softmax(scores, -1).astype(kv.dtype), kv)[..., :rank]  # (B, N, R)
    return bmm_transposed(mixed.swapaxes(0, 1), up[:, nope:]).swapaxes(0, 1).expand_dims(2)  # (B, N, 1, V)


def mlp(weights: Weights, config: TextConfig, tokens: Tensor) -> Tensor:
    """down(silu(gate x) * up x), of tokens (T, H)."""
    gate, up = linear(weights / "gate_proj", tokens), linear(weights / "up_proj", tokens)
    return linear(weights / "down_proj", ops.silu(gate) * up)


def moe(weights: Weights, config: TextConfig, tokens: Tensor) -> Tensor:
    """Routed experts plus shared experts, which see every token and are not scaled: (T, H)."""
    routed = experts(weights, config, tokens, *route(weights / "gate", config, tokens))
    return routed + mlp(weights / "shared_experts", config, tokens)


def route(weights: Weights, config: TextConfig, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``topk_ids`` and ``topk_weights`` (T, K): sigmoid scores choose experts with a correction bias, and weigh them
    without it, in float32."""
    scores = ops.sigmoid(gemm(tokens.astype(ms.float32), weights["weight"].astype(ms.float32)))  # (T, E)
    _, topk_ids = ops.topk(scores + weights["e_score_correction_bias"], config.num_experts_per_tok)
    topk_weights = ops.gather_elements(scores, 1, topk_ids)
    topk_weights = topk_weights / (topk_weights.sum(-1, keepdims=True) + 1e-20)
    return topk_ids, topk_weights * config.routed_scaling_factor


def experts(weights: Weights, config: TextConfig, tokens: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Weighted sum (T, H) over each token's experts. The host sorts the pairs of token and expert by expert, so that
    an expert sees its tokens at once and nothing is scattered."""
    chosen = topk_ids.asnumpy()  # (T, K)
    order = np.argsort(chosen, axis=None, kind="stable").astype(np.int32)  # of pairs, by expert
    pairs = ops.gather(tokens, Tensor(order // chosen.shape[1]), 0)  # (T K, H)
    ends = np.cumsum(np.bincount(chosen.reshape(-1), minlength=config.n_routed_experts)).tolist()
    spans = enumerate(zip([0, *ends[:-1]], ends, strict=True))
    outputs = [mlp(weights / f"experts.{e}", config, pairs[begin:end]) for e, (begin, end) in spans if begin < end]
    back = Tensor(np.argsort(order).astype(np.int32))
    by_token = ops.gather(ops.cat(outputs), back, 0).reshape(*chosen.shape, -1)  # (T, K, H)
    return (by_token.astype(ms.float32) * topk_weights.expand_dims(-1)).sum(1).astype(tokens.dtype)
