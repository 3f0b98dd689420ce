"""One step of a decoder layer through a table of operations: how they fit together, and with the plain matrix products.

A layer hands on its residual and what is still to be added to it, so that each addition happens within a norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_vl.kernels import Ops
from kimi_vl.language import LATENT_NORM_EPS, Layer, MoE


@dataclass(frozen=True)
class Step:
    """One new token for each of B rows, as all layers see it."""

    cos: Tensor  # (B, P) of the tokens' positions, as is sin
    sin: Tensor
    slots: Tensor  # (B) where the tokens are remembered: page * page_size + place
    table: Tensor  # (B, M) int32, each row's pages
    lengths: Tensor  # (B) int32, entries of each row, the new one among them


@torch.no_grad()
def decode(
    layer: Layer, ops: Ops, residual: Tensor, delta: Tensor | None, entries: Tensor, step: Step
) -> tuple[Tensor, Tensor]:
    """The residual and what is to be added to it, (B, H) both; ``entries`` (pages, page_size, R+P) are written to."""
    attention, config = layer.self_attn, layer.self_attn.config
    rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
    heads, width = config.num_attention_heads, rank + config.qk_rope_head_dim
    residual, normed = ops.add_rms_norm(
        residual, delta, layer.input_layernorm.weight, layer.input_layernorm.eps
    )  # (B, H)
    query = attention.q_proj(normed).unflatten(-1, (heads, -1))  # (B, N, Q+P)
    kv_a = attention.kv_a_proj_with_mqa(normed)  # (B, R+P)
    absorbed = torch.empty(len(residual), heads, width, dtype=residual.dtype, device=residual.device)
    ops.latent_write(
        query[..., nope:], kv_a, attention.kv_a_layernorm.weight, step.cos, step.sin, entries, step.slots,
        LATENT_NORM_EPS, out=absorbed[..., rank:],
    )  # fmt: skip
    up = attention.kv_b_proj.weight.view(heads, -1, rank)  # (N, Q+V, R)
    to_key, to_value = up.split((nope, config.v_head_dim), dim=1)
    torch.bmm(query[..., :nope].transpose(0, 1), to_key, out=absorbed[..., :rank].transpose(0, 1))
    mixed = ops.mla_decode(absorbed, entries, step.table, step.lengths, attention.scale, rank)  # (B, N, R)
    values = torch.bmm(mixed.transpose(0, 1), to_value.transpose(1, 2))  # (N, B, V)
    delta = attention.o_proj(values.transpose(0, 1).flatten(1))
    residual, normed = ops.add_rms_norm(
        residual, delta, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps
    )
    mlp = layer.mlp
    if not isinstance(mlp, MoE):
        return residual, mlp(normed)
    gate, experts, always = mlp.gate, mlp.experts, mlp.shared_experts
    chosen, weights = ops.router(normed, gate.weight, gate.e_score_correction_bias, gate.top_k, gate.scaling)
    shared = (always.gate_proj.weight, always.up_proj.weight, always.down_proj.weight)
    return residual, ops.moe(normed, chosen, weights, experts.gate_up_proj, experts.down_proj, shared)
