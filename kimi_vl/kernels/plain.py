"""The operations in PyTorch, arranged for speed: the only ones on a CPU, and the fallback on a GPU.

They compute what :mod:`kimi_vl.kernels.reference` says; a comment gives the reason for each departure from the obvious
form. They cannot be captured in CUDA graphs: some synchronise with the device, and :func:`mla_prepare` needs a slot for
every token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.weight import Weight
from . import reference
from .attention_metadata import Block, DecodeMetadata
from .linear import NOT_PACKED, mlp, project
from .packed_weights import PackedWeight
from .reference import apply_rope_half

# Shapes as in `reference`.

_FEW = 16  # up to so many tokens, experts on a CPU compute W·xᵀ
_GROUPED = ((9, 0), (10, 0))  # compute capabilities for which torch has a grouped GEMM
_HIDDEN = 128  # up to so many tokens, a GEMM with one expert takes no longer than reading its weights


def moe(
    states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weight,
    down: Weight,
    shared: tuple[Weight, Weight, Weight] | None = None,
    packed: Mapping[Tensor, PackedWeight] = NOT_PACKED,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.moe`; ``packed`` has some of the weights packed, as :func:`prepack
    <kimi_vl.kernels.packed_weights.prepack>` makes them."""
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        outputs = _by_expert(states, topk_ids, gate_up, down)  # each is dequantised where it is needed
    elif len(states) == 1 and gate_up in packed:
        return _of_one(states, topk_ids, topk_weights, packed[gate_up], packed[down], len(down))
    elif states.device.type != "cpu":
        outputs = _on_device(states, topk_ids, down)(states, topk_ids, gate_up, down)
    elif 1 < len(states) <= _FEW and states.dtype == torch.bfloat16:
        outputs = _of_few(states, topk_ids, gate_up, down, packed)
    else:
        outputs = _by_expert(states, topk_ids, gate_up, down)
    routed = torch.bmm(topk_weights.unsqueeze(1), outputs.to(topk_weights.dtype)).squeeze(1).to(states.dtype)  # (T, H)
    return routed if shared is None else routed + mlp(states, shared, packed)


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


def _of_one(
    states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: PackedWeight, down: PackedWeight, routed: int
) -> Tensor:
    """The whole operation for one token from packed weights, where the shared experts follow the ``routed`` ones and
    count as experts of the token."""
    shared = torch.arange(routed, down.count, dtype=topk_ids.dtype)
    experts, topk_weights = torch.cat((topk_ids[0], shared)), F.pad(topk_weights[0], (0, len(shared)), value=1.0)  # (n)
    outputs = _from_packed(states.expand(len(experts), -1), experts, gate_up, down)  # (n, H)
    return (topk_weights @ outputs.to(topk_weights.dtype)).unsqueeze(0).to(states.dtype)


def _of_few(
    states: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor, packed: Mapping[Tensor, PackedWeight]
) -> Tensor:
    """Outputs (T, K, H) of the experts for few tokens: GEMMs in the W·xᵀ layout, where tokens are columns, as in
    :func:`kimi_vl.kernels.linear.project`.

    Experts that only one token has selected are GEMVs with packed weights where these exist, all in one call.
    """
    places: dict[int, list[int]] = {}  # where each expert stands in ``topk_ids``, flattened
    for place, expert in enumerate(topk_ids.flatten().tolist()):
        places.setdefault(expert, []).append(place)
    alone = {expert: own for expert, own in places.items() if len(own) == 1 and gate_up in packed}
    several = {expert: own for expert, own in places.items() if expert not in alone}
    order = torch.tensor([*itertools.chain(*several.values(), *alone.values())])  # (T K), those of ``several`` first
    tokens = states[order // topk_ids.shape[1]]  # (T K, H)
    count = len(order) - len(alone)
    gate, up = _each(tokens[:count].t(), several, gate_up).chunk(2)  # (I, n)
    outputs = _each(F.silu(gate) * up, several, down)  # (H, n)
    if alone:
        experts = topk_ids.flatten()[order[count:]]
        others = _from_packed(tokens[count:], experts, packed[gate_up], packed[down])
        outputs = torch.cat((outputs, others.t()), dim=1)
    return outputs.t()[order.argsort()].unflatten(0, topk_ids.shape)


def _each(columns: Tensor, places: Mapping[int, list[int]], weight: Tensor) -> Tensor:
    """(O, n) of ``columns`` (I, n), which are sorted by expert: each has as many as it has ``places``."""
    shares = [len(own) for own in places.values()]
    outputs = columns.new_empty(weight.shape[1], columns.shape[1])
    for expert, own, output in zip(places, columns.split(shares, 1), outputs.split(shares, 1), strict=True):
        if own.shape[1] > 1:
            torch.mm(weight[expert], own, out=output)
        else:
            output.copy_(project(own.t(), weight[expert]).t())
    return outputs


def _from_packed(states: Tensor, experts: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """(n, H) of ``states`` (n, H), each by one of ``experts`` (n)."""
    gate, up = gate_up.gemv(states, experts).chunk(2, dim=-1)  # (n, I)
    return down.gemv(F.silu(gate) * up, experts)


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
    to_key: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    eps: float,
    decoding: int,
    packed: Mapping[Tensor, PackedWeight] = NOT_PACKED,
) -> tuple[Tensor, Tensor]:
    """See :func:`kimi_vl.kernels.reference.mla_prepare`; ``packed`` has some of the weights packed."""
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
    absorbed = _per_head(query[:decoding, :, :nope], to_key, packed)  # (B, N, R)
    return torch.cat((absorbed, rotated[:decoding]), dim=-1), rotated[decoding:]


def mla_decode(
    query: Tensor,
    kv_cache: Tensor,
    decode: DecodeMetadata,
    scale: float,
    to_value: Tensor,
    splits: int = 0,
    packed: Mapping[Tensor, PackedWeight] = NOT_PACKED,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_decode`; ``packed`` has some of the weights packed.

    The KV cache is gathered block by block, see :attr:`kimi_vl.kernels.attention_metadata.DecodeMetadata.blocks`.
    """
    kv_cache, rank = kv_cache.flatten(0, 1), to_value.shape[-1]
    if len(decode.blocks) == 1:
        mixed = _mixed(query, kv_cache, decode.blocks[0], scale, rank)
    else:
        mixed = query.new_empty(*query.shape[:2], rank)  # (B, N, R)
        for block in decode.blocks:
            mixed[block.sequences] = _mixed(query[block.sequences], kv_cache, block, scale, rank)
    return _per_head(mixed, to_value, packed)


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


def _per_head(states: Tensor, weight: Tensor, packed: Mapping[Tensor, PackedWeight]) -> Tensor:
    """:func:`kimi_vl.kernels.reference.per_head`, for one sequence from the packed weight, if there is one."""
    found = packed.get(weight) if len(states) == 1 else None
    return reference.per_head(states, weight) if found is None else found.gemv(states[0]).unsqueeze(0)
