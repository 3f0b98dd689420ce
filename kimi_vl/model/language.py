"""The decoder: multi-head latent attention and a mixture of experts, with the checkpoint's parameter names.

Norms, routing and experts are the reference operations of :mod:`kimi_vl.kernels.reference`. A layer's routed experts
are fused in two tensors; all else has the layout of the checkpoint. Knows no images and no files. Sources: DeepSeek-V2
(latent attention, section 2.1) and DeepSeek-V3 (routing without auxiliary loss, section 2.1.2) reports, the published
modeling_kimi_vl.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import flash_attention, reference, sdpa
from ..kernels.linear import project
from ..kernels.reference import apply_rope_half, upcast
from ..quantization.weight import dense
from .config import TextConfig

# Shapes: B sequences, S new tokens a sequence, L tokens to attend to, H hidden_size, N heads, R kv_lora_rank,
# P / Q / V qk_rope / qk_nope / v head dims, E experts, K experts a token, T = B * S tokens, I expert width.
LATENT_NORM_EPS = 1e-6  # the published kv_a_layernorm does not take the config's rms_norm_eps


class Linear(nn.Linear):
    """A matrix (out_features, in_features) without bias, applied by :func:`project`; its weight may be quantised."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight)


class RMSNorm(nn.Module):
    """Root mean square norm, in float32 at least; the weight multiplies after the cast back."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        return reference.add_rms_norm(states, None, self.weight, self.eps)[1]


def rope_tables(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, S, dim) of positions (B, S): computed in float32, then cast to ``dtype``."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.unsqueeze(-1).float() * theta**-exponents  # (B, S, dim/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Past(Protocol):
    """A KV cache for the new tokens of one call: where they are written, and what they attend to."""

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, new_kv: Tensor) -> Tensor:
        """Write ``new_kv`` (B, S, R+P) of the new tokens to the cache of ``layer`` and attend: (B, N, S, V)."""
        ...


class Cache(Protocol):
    """A KV cache that is kept from call to call."""

    def at(self, positions: Tensor) -> Past:
        """The cache for new tokens at ``positions`` (B, S)."""
        ...


class Attention(nn.Module):
    """Multi-head latent attention. Only the normed latent and the rotated key of a token are cached.

    Decode steps use the absorbed form: queries move into the latent space, so that the past is never expanded. Prefill
    expands keys and values, which is cheaper for many new tokens.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        self.scale = config.qk_head_dim**-0.5

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, past: Past | None, layer: int) -> Tensor:
        """(B, S, H) of ``states`` (B, S, H). Without a past every sequence begins here, and attention is causal."""
        config = self.config
        query = self.q_proj(states).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)  # (B, N, S, Q+P)
        q_nope, q_rope = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(states).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        q_rope = apply_rope_half(q_rope, cos.unsqueeze(1), sin.unsqueeze(1))  # (B, N, S, P)
        new_kv = torch.cat((self.kv_a_layernorm(latent), apply_rope_half(k_rope, cos, sin)), dim=-1)  # (B, S, R+P)
        if past is None:
            heads = self.expanded(q_nope, q_rope, new_kv, None)
        else:
            heads = past.attend(layer, self, q_nope, q_rope, new_kv)
        return self.o_proj(heads.transpose(1, 2).flatten(2))  # (B, S, H)

    def expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent_kv: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Heads (B, N, S, V) of queries over ``latent_kv`` (B, L, R+P), expanding their keys and values.

        ``mask`` (…, S, L) is true where a query may attend. None is causal, for S = L queries.
        """
        config = self.config
        latent, k_rope = latent_kv.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        expanded = self.kv_b_proj(latent)  # (B, L, N (Q+V))
        expanded = expanded.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)  # (B, N, L, Q+V)
        k_nope, value = expanded.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)  # (B, N, L, Q), (…, V)
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, config.num_attention_heads, -1, -1)), dim=-1)
        if mask is None and flash_attention.usable(query):
            return flash_attention.causal(query, key, value, self.scale)
        return sdpa.attention(query, key, value, mask, causal=mask is None, scale=self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latent_kv: Tensor, mask: Tensor | None) -> Tensor:
        """The same with queries moved into the latent space; with ``mask`` None every query attends to all tokens."""
        rank, heads, batch = self.config.kv_lora_rank, *q_nope.shape[1::-1]
        up = dense(self.kv_b_proj.weight, latent_kv.dtype).view(heads, -1, rank)  # (N, Q+V, R)
        to_key, to_value = up.split((self.config.qk_nope_head_dim, self.config.v_head_dim), dim=1)
        # batched GEMMs by head or by sequence: a broadcast one would copy ``latent_kv`` for every head
        lifted = q_nope.transpose(0, 1).flatten(1, 2) @ to_key  # (N, B S, R)
        query = torch.cat((lifted.unflatten(1, (batch, -1)).transpose(0, 1), q_rope), dim=-1)  # (B, N, S, R+P)
        scores = upcast(query.flatten(1, 2) @ latent_kv.transpose(1, 2)) * self.scale  # (B, N S, L)
        scores = scores.unflatten(1, (heads, -1))  # (B, N, S, L)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        mixed = scores.softmax(-1).to(latent_kv.dtype).flatten(1, 2) @ latent_kv  # (B, N S, R+P)
        latent = mixed[..., :rank].unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)  # (N, B S, R)
        answers = to_value @ latent.transpose(1, 2)  # (N, V, B S)
        return answers.transpose(1, 2).unflatten(1, (batch, -1)).transpose(0, 1)  # (B, N, S, V)


class Mlp(nn.Module):
    """down(silu(gate x) * up x): the first layers' MLP, and the shared experts of the others."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of gate, up and down."""
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class Gate(nn.Module):
    """The router: sigmoid scores choose experts with a correction bias, and weigh them without it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts), requires_grad=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """``topk_ids`` (T, K), int32, best first, and ``topk_weights`` (T, K), float32, of tokens (T, H)."""
        return reference.router(states, self.weight, self.e_score_correction_bias, self.top_k, self.scaling)


class Experts(nn.Module):
    """All routed experts of a layer in two tensors; ``gate_up_proj`` (E, 2I, H) is gate, then up."""

    def __init__(self, config: TextConfig):
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    def forward(self, states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The weighted sum (T, H) over each token's experts.

        ``states`` are (T, H), ``topk_ids`` and ``topk_weights`` (T, K), as the gate gives them.
        """
        return reference.moe(states, topk_ids, topk_weights, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts plus shared experts, which are computed for every token and not scaled."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = Mlp(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.flatten(0, -2)  # (T, H)
        routed = self.experts(tokens, *self.gate(tokens))
        return routed.view_as(states) + self.shared_experts(states)


class Layer(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size) if config.is_dense(layer) else MoE(config)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, past: Past | None) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), cos, sin, past, self.layer)
        return states + self.mlp(self.post_attention_layernorm(states))


class Decoder(nn.Module):
    """``language_model.model``: embeddings to final states, all (B, S, H)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeddings: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        cos, sin = rope_tables(positions, self.config.qk_rope_head_dim, self.config.rope_theta, embeddings.dtype)
        past = None if cache is None else cache.at(positions)
        states = embeddings
        for layer in self.layers:
            states = layer(states, cos, sin, past)
        return self.norm(states)


class LanguageModel(nn.Module):
    """``language_model``: the decoder and its output head."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, embeddings: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Final states (B, S, H); :meth:`logits` turns those that are needed into scores.

        ``positions`` (B, S) count from 0 in each sequence. Without a cache every sequence starts at 0.
        """
        return self.model(embeddings, positions, cache)

    def logits(self, states: Tensor) -> Tensor:
        """float32 logits (…, vocab_size), contiguous."""
        return self.lm_head(states).to(torch.float32, memory_format=torch.contiguous_format)
