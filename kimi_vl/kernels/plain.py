"""The operations in PyTorch, arranged for speed: the only ones on a CPU, and the fallback on a GPU.

They compute what :mod:`kimi_vl.kernels.reference` says; a comment gives the reason for each departure from the obvious
form. They cannot be captured in CUDA graphs: some synchronise with the device, and :func:`mla_prepare` needs a slot for
every token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.weight import Weight
from . import reference, sdpa
from .attention_metadata import Block, DecodeMetadata, PrefillChunk
from .linear import mlp, project
from .reference import apply_rope_half

# Shapes as in `reference`.

_GROUPED = ((9, 0), (10, 0))  # compute capabilities for which torch has a grouped GEMM
_HIDDEN = 128  # up to so many tokens, a GEMM with one expert takes no longer than reading its weights


def moe(
    states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weight,
    down: Weight,
    shared: tuple[Weight, Weight, Weight] | None = None,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.moe`."""
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor) and states.device.type != "cpu":
        outputs = _on_device(states, topk_ids, down)(states, topk_ids, gate_up, down)
    else:  # where weights are no tensors, each is dequantised where it is needed
        outputs = _by_expert(states, topk_ids, gate_up, down)
    routed = torch.bmm(topk_weights.unsqueeze(1), outputs.to(topk_weights.dtype)).squeeze(1).to(states.dtype)  # (T, H)
    return routed if shared is None else routed + mlp(states, shared)


def _on_device(states: Tensor, topk_ids: Tensor, down: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """How a GPU computes the experts' outputs (T, K, H): the function with the least memory traffic.

    Without a grouped GEMM there are three. Gathering the weights of T K experts moves them three times. GEMMs with all
    E experts read each weight once and compute E / K times as much as needed, which is hidden behind reading the
    weights up to about 128 tokens. For more tokens, one synchronisation in each layer costs less than that.
    """
    if _groupable(states, down):
        return _grouped
    if 3 * topk_ids.numel() < len(down):
        return _of_gathered
    return _of_all if len(states) <= _HIDDEN else _by_expert


def _groupable(states: Tensor, down: Tensor) -> bool:
    """Whether torch has a grouped GEMM for this: bfloat16 with strides of 16 bytes, on compute capability 9.0 or 10.0.

    Elsewhere ``grouped_mm`` copies the offsets to the host and runs one GEMM for each group.
    """
    aligned = all(size % 8 == 0 for size in down.shape[1:])
    if not (aligned and states.is_cuda and states.dtype == torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(states.device) in _GROUPED


def _grouped(states: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Outputs (T, K, H) of the experts, without device synchronisation."""
    count, choices = topk_ids.shape
    experts, order = topk_ids.flatten().sort(stable=True)  # (T K), expert by expert
    numbers = torch.arange(len(down), device=experts.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)  # (E)
    gate, up = F.grouped_mm(states[order // choices], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)  # (T K, I)
    outputs = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)  # (T K, H)
    return outputs[order.argsort()].view(count, choices, -1)


def _of_gathered(states: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same from a copy of the selected experts' weights: a GEMV for each pair of a token and an expert. It does not
    synchronise; each weight is read, written and read again."""
    count, choices = topk_ids.shape
    experts = topk_ids.flatten()  # (T K)
    tokens = states.unsqueeze(1).expand(-1, choices, -1).reshape(len(experts), 1, -1)  # (T K, 1, H)
    gate, up = torch.bmm(tokens, gate_up[experts].transpose(1, 2)).chunk(2, dim=-1)  # (T K, 1, I)
    return torch.bmm(F.silu(gate) * up, down[experts].transpose(1, 2)).view(count, choices, -1)


def _of_all(states: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same by computing all experts for all tokens and taking the outputs in ``topk_ids``. It does not synchronise;
    each weight is read once, however many tokens have selected it."""
    gate, up = torch.matmul(states, gate_up.transpose(1, 2)).chunk(2, dim=-1)  # (E, T, I)
    outputs = torch.bmm(F.silu(gate) * up, down.transpose(1, 2))  # (E, T, H)
    return outputs[topk_ids.long(), torch.arange(len(states), device=states.device).unsqueeze(1)]


def _by_expert(states: Tensor, topk_ids: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """The same expert by expert, for any number of tokens. Synchronises once, to learn which experts are selected."""
    if len(states) == 1:  # there is nothing to sort
        return torch.stack([_expert(states, gate_up[number], down[number]) for number in topk_ids[0].tolist()], dim=1)
    experts, order = topk_ids.flatten().sort(stable=True)  # (T K)
    numbers, shares = (part.tolist() for part in experts.unique_consecutive(return_counts=True))
    groups = states[order // topk_ids.shape[1]].split(shares)
    outputs = [_expert(group, gate_up[number], down[number]) for group, number in zip(groups, numbers, strict=True)]
    return torch.cat(outputs)[order.argsort()].view(*topk_ids.shape, -1)


def _expert(states: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """(n, H) of one expert. More than 16 tokens are padded to a multiple of 16: oneDNN compiles for each new count."""
    count = len(states)
    padded = F.pad(states, (0, 0, 0, -count % 16)) if count > 16 else states
    gate, up = project(padded, gate_up).chunk(2, dim=-1)  # (n, I)
    return project(F.silu(gate) * up, down)[:count]


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
    """See :func:`kimi_vl.kernels.reference.mla_prepare`."""
    to_key = reference.from_key(to_key, joined.dtype)
    heads, rank, nope = to_key.shape
    cos, sin = rope.unsqueeze(1).chunk(2, dim=-1)  # (T, 1, P)
    query, latent, key = joined.split((joined.shape[-1] - rank - cos.shape[-1], rank, cos.shape[-1]), dim=-1)
    query = query.unflatten(-1, (heads, -1))  # (T, N, Q+P)
    both = torch.cat((query[..., nope:], key.unsqueeze(1)), dim=1)  # (T, N+1, P): one rotation for both
    rotated = apply_rope_half(both, cos, sin)
    _, normed = reference.add_rms_norm(latent, None, norm_weight, eps)
    kv_cache.flatten(0, 1)[slot_mapping] = torch.cat((normed, rotated[:, -1]), dim=-1)  # (T, R+P)
    rotated = rotated[:, :-1]
    if not decoding:
        return joined.new_empty(0, heads, rank + cos.shape[-1]), rotated
    absorbed = reference.per_head(query[:decoding, :, :nope], to_key)  # (B, N, R)
    return torch.cat((absorbed, rotated[:decoding]), dim=-1), rotated[decoding:]


def mla_decode(
    query: Tensor,
    kv_cache: Tensor,
    decode: DecodeMetadata,
    scale: float,
    to_value: Weight,
    splits: int = 0,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_decode`.

    The KV cache is gathered block by block, see :attr:`kimi_vl.kernels.attention_metadata.DecodeMetadata.blocks`.
    """
    kv_cache, rank = kv_cache.flatten(0, 1), to_value.shape[-1]
    if len(decode.blocks) == 1:
        mixed = _mixed(query, kv_cache, decode.blocks[0], scale, rank)
    else:
        mixed = query.new_empty(*query.shape[:2], rank)  # (B, N, R)
        for block in decode.blocks:
            mixed[block.sequences] = _mixed(query[block.sequences], kv_cache, block, scale, rank)
    return reference.per_head(mixed, to_value)


def _mixed(query: Tensor, kv_cache: Tensor, block: Block, scale: float, rank: int) -> Tensor:
    """Weighted sums (b, N, R) of the latents that the queries (b, N, R+P) of one block attend to."""
    mask = block.mask
    if not block.slots.numel():
        return query.new_zeros(*query.shape[:2], rank)
    # only the cached tokens in use: slices of whole pages would be copied by the GEMM
    past = kv_cache.index_select(0, block.slots.flatten()).view(*block.slots.shape, -1)  # (b, L, R+P)
    if query.device.type == "cpu":  # one head whose queries are all heads: they share keys and values
        visible = None if mask is None else mask[:, None, None]  # (b, 1, 1, L)
        past = past.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query.unsqueeze(1), past, past, visible, scale=scale)
        mixed = mixed[:, 0]  # (b, N, R+P)
    else:
        scores = (query @ past.transpose(1, 2)).float() * scale  # (b, N, L)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
        mixed = scores.softmax(-1).to(past.dtype) @ past
    mixed = mixed[..., :rank]  # (b, N, R)
    return mixed if mask is None else mixed.masked_fill(block.empty[:, None, None], 0)


def mla_prefill(
    query: Tensor, rotated: Tensor, latents: Tensor, expanded: Tensor, chunk: PrefillChunk, scale: float
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_prefill`."""
    heads = reference.heads_of(query, rotated, latents, expanded)
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in heads)  # (1, N, S or L, D)
    mixed = sdpa.attention(query, key, value, chunk.mask, causal=chunk.mask is None, scale=scale)
    return mixed[0].transpose(0, 1)  # (S, N, V)
