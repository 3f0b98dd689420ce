"""The reference of each operation in PyTorch: other implementations are tested against it, and the model calls it.

Written to be read beside the papers, not to be fast. Rounding is the published model's: norms and scores in float32,
results in the dtype of the input. With float64 inputs everything is computed in float64, which makes these functions
their own yardstick.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.weight import QuantizedWeight, Weight, dense
from .attention_metadata import DecodeMetadata, PrefillChunk

# Shapes: T tokens, H hidden_size, E routed experts, K experts a token, I expert width, W shared experts' width,
# B sequences that decode one token each, N heads, R rank of the latent, P rotary dims, Q other dims of keys, V dims of
# values, M pages a sequence; a prompt's chunk has S tokens, the last of L.


def upcast(values: Tensor) -> Tensor:
    """``values`` in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + delta, its root mean square norm), both of the shape (…, H) of ``residual`` and ``delta``.

    The norm is taken of the sum as it is stored, in float32; the weight (H) multiplies after the cast back. Without
    ``delta`` the first result is ``residual`` itself.
    """
    total = residual if delta is None else residual + delta
    wide = upcast(total)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normed.to(total.dtype)


def router(states: Tensor, weight: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``topk_ids``, the experts of each token, int32 (T, K), best first, and ``topk_weights``, float32 (T, K).

    ``states`` (T, H), ``weight`` (E, H), ``bias`` (E). Scores are sigmoids in float32. The bias is added to select
    experts, and is not part of their weights (DeepSeek-V3 report, section 2.1.2).
    """
    scores = F.linear(upcast(states), upcast(weight)).sigmoid()  # (T, E)
    topk_ids = (scores + upcast(bias)).topk(top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    return topk_ids.int(), topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20) * scaling


def mlp(states: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    """down(silu(gate x) * up x) of ``states`` (T, H), with ``gate`` and ``up`` (W, H) and ``down`` (H, W)."""
    gate, up, down = (dense(weight, states.dtype) for weight in (gate, up, down))
    return F.linear(F.silu(F.linear(states, gate)) * F.linear(states, up), down)


def moe(
    states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weight,
    down: Weight,
    shared: tuple[Weight, Weight, Weight] | None = None,
) -> Tensor:
    """The weighted sum (T, H) over each token's experts, taken in float32 and cast at the end.

    ``states`` (T, H), ``topk_ids`` and ``topk_weights`` (T, K), ``gate_up`` (E, 2I, H) with gate
    before up, ``down`` (E, H, I). ``shared`` are the weights of an :func:`mlp` of every token, whose result is added
    (DeepSeekMoE, section 3).
    """
    mixed = torch.zeros_like(upcast(states))
    for expert in topk_ids.unique().tolist():
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = dense(gate_up[expert], states.dtype).chunk(2)
        output = mlp(states[tokens], gate, up, down[expert])  # (t, H)
        mixed.index_add_(0, tokens, upcast(output) * topk_weights[tokens, slots].unsqueeze(-1))
    routed = mixed.to(states.dtype)
    return routed if shared is None else routed + mlp(states, *shared)


def norm_router(
    residual: Tensor,
    delta: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both results of :func:`add_rms_norm`, then both of the :func:`router` for the normed states."""
    total, normed = add_rms_norm(residual, delta, norm_weight, eps)
    return total, normed, *router(normed, weight, bias, top_k, scaling)


def apply_rope_half(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the last dimension; in the result the even components are the first half."""
    even, odd = states[..., 0::2], states[..., 1::2]
    straight, crossed = torch.cat((even, odd), dim=-1), torch.cat((-odd, even), dim=-1)
    return straight * cos + crossed * sin


def mla_prepare(
    joined: Tensor,
    to_key: Weight,
    norm_weight: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    eps: float,
    decoding: int,
) -> tuple[Tensor, Tensor]:
    """Write the new tokens to the KV cache, and prepare their queries.

    ``joined`` (T, N (Q+P) + R+P) holds each token's queries, head by head, then its latent (R), to be normed with
    ``norm_weight`` (R), and its rotary key (P). ``rope`` (T, 2P) are the cosines, then the sines of the tokens'
    positions. Latent and key are written to slot ``slot_mapping`` (T) of ``kv_cache`` (pages, page_size, R+P) of one
    layer; a slot is page * page_size + offset, and tokens with a negative one are not written.

    Returns the absorbed queries (B, N, R+P) of the first B = ``decoding`` tokens, moved into the latent space by
    ``to_key`` (N, R, Q), or (N, Q, R) where it is quantised, with the rotated part; and the rotated part (T-B, N, P) of
    the other tokens' queries (DeepSeek-V2 report, sections 2.1.2 and 2.1.3).
    """
    to_key = from_key(to_key, joined.dtype)
    heads, rank, nope = to_key.shape
    cos, sin = rope.chunk(2, dim=-1)  # (T, P)
    query, latent, key = joined.split((joined.shape[-1] - rank - cos.shape[-1], rank, cos.shape[-1]), dim=-1)
    query = query.unflatten(-1, (heads, -1))  # (T, N, Q+P)
    new = torch.cat(
        (add_rms_norm(latent, None, norm_weight, eps)[1], apply_rope_half(key, cos, sin)), dim=-1
    )  # (T, R+P)
    written = slot_mapping >= 0
    kv_cache.view(-1, kv_cache.shape[-1])[slot_mapping[written].long()] = new[written]
    rotated = apply_rope_half(query[..., nope:], cos.unsqueeze(1), sin.unsqueeze(1))  # (T, N, P)
    absorbed = per_head(query[:decoding, :, :nope], to_key)  # (B, N, R)
    return torch.cat((absorbed, rotated[:decoding]), dim=-1), rotated[decoding:]


def from_key(to_key: Weight, dtype: torch.dtype) -> Weight:
    """``to_key`` as (N, R, Q); where it is quantised it is (N, Q, R), since an output channel has a scale."""
    return to_key.dequantize(dtype).transpose(1, 2) if isinstance(to_key, QuantizedWeight) else to_key


def per_head(states: Tensor, weight: Weight) -> Tensor:
    """(B, N, O) of ``states`` (B, N, I), each head by its own matrix of ``weight`` (N, O, I): into or out of the latent
    space."""
    weight = dense(weight, states.dtype)
    return torch.bmm(states.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


def mla_decode(
    query: Tensor, kv_cache: Tensor, decode: DecodeMetadata, scale: float, to_value: Weight, splits: int = 0
) -> Tensor:
    """Attention of one token a sequence over the sequence's pages, in the latent space and out of it: (B, N, V).

    ``query`` (B, N, R+P) are absorbed queries, then their rotated part; ``kv_cache`` (pages, page_size, R+P) of one
    layer; ``to_value`` (N, V, R). Nothing past a sequence's length matters, in its page table or in the cache. A length
    of 0 gives zeros. ``splits`` is for kernels (DeepSeek-V2 report, section 2.1.2 and appendix C).
    """
    page_table, seq_lens, rank = decode.page_table, decode.seq_lens, to_value.shape[-1]
    past = kv_cache[page_table.clamp(min=0).long()].flatten(1, 2)  # (B, L, R+P)
    seen = torch.arange(past.shape[1], device=past.device) < seq_lens.unsqueeze(1)  # (B, L)
    past = past.masked_fill(~seen.unsqueeze(-1), 0)  # 0 * NaN would be NaN
    scores = upcast(query @ past.transpose(1, 2)) * scale  # (B, N, L)
    probabilities = scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
    mixed = probabilities.to(past.dtype) @ past[..., :rank]  # (B, N, R)
    return per_head(mixed.masked_fill((seq_lens == 0)[:, None, None], 0), to_value)


def heads_of(query: Tensor, rotated: Tensor, latents: Tensor, expanded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole queries (S, N, Q+P), keys (L, N, Q+P) and values (L, N, V) from the arguments of :func:`mla_prefill`."""
    nope, rope = query.shape[-1], rotated.shape[-1]
    shared = latents[:, -rope:].unsqueeze(1).expand(-1, query.shape[1], -1)  # (L, N, P): one rotary key for all heads
    key = torch.cat((expanded[..., :nope], shared), dim=-1)
    return torch.cat((query, rotated), dim=-1), key, expanded[..., nope:]


def mla_prefill(
    query: Tensor, rotated: Tensor, latents: Tensor, expanded: Tensor, chunk: PrefillChunk, scale: float
) -> Tensor:
    """Causal attention of a chunk's S tokens, which are the last of L, over expanded keys and values: (S, N, V).

    ``query`` (S, N, Q) and ``rotated`` (S, N, P) are both parts of the queries; ``latents`` (L, R+P) as they are
    cached, of which the rotary keys are used; ``expanded`` (L, N, Q+V) the keys and values of each head that
    ``kv_b_proj`` makes of them. ``chunk`` keeps a mask for those that need one (DeepSeek-V2 report, section 2.1.2).
    """
    query, key, value = heads_of(query, rotated, latents, expanded)
    scores = torch.einsum("snd,lnd->nsl", upcast(query), upcast(key)) * scale
    positions = torch.arange(len(key), device=key.device)  # (L)
    ahead = positions > positions[len(key) - len(query) :].unsqueeze(1)  # (S, L)
    probabilities = scores.masked_fill(ahead, float("-inf")).softmax(-1)  # (N, S, L)
    return torch.einsum("nsl,lnv->snv", probabilities, upcast(value)).to(query.dtype)
