"""The decoder through a table of operations: :mod:`kimi_vl.language` again, cut where kernels are.

Computes what the modules of a :class:`LanguageModel` compute, with their parameters, for the tokens of one step of the
engine. Each addition to the residual happens within the norm that follows it, and a new token's entry is written by the
kernel that makes it. Knows no model but the decoder, and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cache import LongChunk, PagedStep
from .kernels import Ops
from .language import LATENT_NORM_EPS, Attention, LanguageModel, Layer, MoE, rope_tables

# Shapes: T tokens, of which the first B are one of each row, M pages a row; H, N, R, P, Q, V as in the decoder.


@dataclass(frozen=True)
class Step:
    """New tokens as all layers see them: one of each of B rows, then those of longer chunks."""

    entries: Tensor  # (layers, pages, page_size, R+P), written to
    positions: Tensor  # (T) int64
    slots: Tensor  # (T) int64, where each is remembered: page * page_size + place; a negative one is not
    table: Tensor  # (B, M) int32, the pages of each row
    lengths: Tensor  # (B) int32, how many entries a row has, the new one among them
    longer: Sequence[LongChunk] = ()


class FusedDecoder:
    """Takes the place of a :class:`LanguageModel` in a step of the engine; parameters are shared with it."""

    def __init__(self, model: LanguageModel, ops: Ops):
        self._model, self._ops = model, ops
        self._joined: list[Tensor] = []  # (N (Q+P) + R+P, H) a layer
        for layer in model.model.layers:
            assert isinstance(layer, Layer)
            self._joined.append(_joined(layer.self_attn.q_proj, layer.self_attn.kv_a_proj_with_mqa))

    def __call__(self, embeddings: Tensor, positions: Tensor, past: PagedStep) -> Tensor:
        """Final states (1, T, H) of the tokens of ``past``, of embeddings (1, T, H) and positions (1, T)."""
        table, lengths = past.table.int(), past.lengths.int()
        step = Step(past.entries, positions[0], past.slots, table, lengths, past.longer)
        return self.states(embeddings[0], step).unsqueeze(0)

    def states(self, embeddings: Tensor, step: Step) -> Tensor:
        """Final states (T, H) of embeddings (T, H)."""
        decoder, ops = self._model.model, self._ops
        config = decoder.config
        cos, sin = rope_tables(step.positions, config.qk_rope_head_dim, config.rope_theta, embeddings.dtype)  # (T, P)
        residual, delta = embeddings, None
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, Layer)
            norm = layer.input_layernorm
            residual, normed = ops.add_rms_norm(residual, delta, norm.weight, norm.eps)  # (T, H)
            delta = self._attend(number, layer.self_attn, normed, cos, sin, step)
            norm = layer.post_attention_layernorm
            residual, normed = ops.add_rms_norm(residual, delta, norm.weight, norm.eps)
            delta = self._experts(layer.mlp, normed) if isinstance(layer.mlp, MoE) else layer.mlp(normed)
        return ops.add_rms_norm(residual, delta, decoder.norm.weight, decoder.norm.eps)[1]

    def _attend(
        self, number: int, attention: Attention, normed: Tensor, cos: Tensor, sin: Tensor, step: Step
    ) -> Tensor:
        """The attention's output (T, H): rows in the latent space, longer chunks with keys and values written out."""
        config, ops, entries = attention.config, self._ops, step.entries[number]
        heads, rank, nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
        rows, width = len(step.lengths), rank + config.qk_rope_head_dim
        both = nn.functional.linear(normed, self._joined[number])  # (T, N (Q+P) + R+P)
        query, kv_a = both.split((heads * config.qk_head_dim, width), dim=-1)
        query = query.unflatten(-1, (heads, -1))  # (T, N, Q+P)
        absorbed = torch.empty(len(normed), heads, width, dtype=normed.dtype, device=normed.device)
        ops.latent_write(
            query[..., nope:], kv_a, attention.kv_a_layernorm.weight, cos, sin, entries, step.slots,
            LATENT_NORM_EPS, out=absorbed[..., rank:],
        )  # fmt: skip
        parts: list[Tensor] = []
        if rows:
            up = attention.kv_b_proj.weight.view(heads, -1, rank)  # (N, Q+V, R)
            to_key, to_value = up.split((nope, config.v_head_dim), dim=1)
            inside = torch.bmm(query[:rows, :, :nope].transpose(0, 1), to_key)  # (N, B, R)
            absorbed[:rows, :, :rank] = inside.transpose(0, 1)
            mixed = ops.mla_decode(absorbed[:rows], entries, step.table, step.lengths, attention.scale, rank)
            values = torch.bmm(mixed.transpose(0, 1), to_value.transpose(1, 2))  # (N, B, V)
            parts.append(values.transpose(0, 1).flatten(1))
        for chunk in step.longer:
            past = entries[chunk.pages].flatten(0, 1)[: chunk.end].unsqueeze(0)  # (1, L, R+P)
            q, r = query[chunk.tokens, :, :nope], absorbed[chunk.tokens, :, rank:]  # (S, N, Q), (S, N, P)
            q, r = q.transpose(0, 1).unsqueeze(0), r.transpose(0, 1).unsqueeze(0)
            parts.append(attention.expanded(q, r, past, chunk.mask)[0].transpose(0, 1).flatten(1))  # (S, N V)
        return attention.o_proj(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _experts(self, moe: MoE, normed: Tensor) -> Tensor:
        gate, experts, shared = moe.gate, moe.experts, moe.shared_experts
        chosen, weights = self._ops.router(normed, gate.weight, gate.e_score_correction_bias, gate.top_k, gate.scaling)
        always = shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight
        return self._ops.moe(normed, chosen, weights, experts.gate_up_proj, experts.down_proj, always)


@torch.no_grad()
def _joined(*projections: nn.Linear) -> Tensor:
    """The weights of some projections of one input in one tensor, of which their own become parts: no memory more."""
    weight = torch.cat([projection.weight for projection in projections])
    for projection, part in zip(projections, weight.split([p.out_features for p in projections]), strict=True):
        projection.weight.data = part
    return weight
