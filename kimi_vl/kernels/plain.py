"""Each operation in PyTorch, arranged for speed: what runs where there are no kernels.

Computes what :mod:`kimi_vl.kernels.reference` says; each deviation from the obvious has its reason beside it. Not for
steps over buffers that stay: the host may wait here, and every token of :func:`latent_write` must have a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import Rows
from ..language import apply_rope, project
from . import reference

# Shapes as in `reference`; t tokens of one expert.


def moe(
    states: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    if _groupable(states, down):
        outputs = _grouped(states, chosen, gate_up, down)
    else:
        outputs = _by_expert(states, chosen, gate_up, down)
    # summed in the order of the choices: the sum of a token does not depend on its company
    routed = (outputs.float() * weights.unsqueeze(-1)).sum(1).to(states.dtype)  # (T, H)
    if shared is None:
        return routed
    gate, up, back = shared
    return routed + project(F.silu(project(states, gate)) * project(states, up), back)


def _groupable(states: Tensor, down: Tensor) -> bool:
    """What torch's grouped product is made for: bfloat16 in rows of 16 bytes, on an Ampere GPU or a later one."""
    aligned = all(size % 8 == 0 for size in down.shape[1:])
    if not (aligned and states.is_cuda and states.dtype == torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(states.device) >= (8, 0)


def _grouped(states: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Outputs (T, K, H) of the experts, which the device finds by itself: the host does not wait."""
    count, choices = chosen.shape
    experts, order = chosen.flatten().sort(stable=True)  # (T K), expert by expert
    numbers = torch.arange(len(down), device=experts.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)  # (E)
    gate, up = F.grouped_mm(states[order // choices], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)  # (T K, I)
    outputs = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)  # (T K, H)
    return outputs[order.argsort()].view(count, choices, -1)


def _by_expert(states: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same with products for each expert in use, after the host has waited to learn which those are."""
    count, choices = chosen.shape
    if count == 1:  # there is nothing to sort
        return _products(states.expand(choices, -1).split(1), chosen[0].tolist(), gate_up, down).unsqueeze(0)
    experts, order = chosen.flatten().sort(stable=True)  # (T K), expert by expert
    used, shares = experts.unique_consecutive(return_counts=True)
    outputs = _products(states[order // choices].split(shares.tolist()), used.tolist(), gate_up, down)
    return outputs[order.argsort()].view(count, choices, -1)


def _products(groups: Sequence[Tensor], experts: Sequence[int], gate_up: Tensor, down: Tensor) -> Tensor:
    """Outputs of the tokens in ``groups`` (t, H) one after another, each group by its own expert."""
    both = [project(group, gate_up[expert]) for group, expert in zip(groups, experts, strict=True)]
    gate, up = torch.cat(both).chunk(2, dim=-1)
    inner = (F.silu(gate) * up).split([len(group) for group in groups])  # (t, I)
    return torch.cat([project(group, down[expert]) for group, expert in zip(inner, experts, strict=True)])


def latent_write(
    query_rope: Tensor,
    kv_a: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    entries: Tensor,
    slots: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    rank = norm_weight.numel()
    latent, key = kv_a.split((rank, kv_a.shape[-1] - rank), dim=-1)
    both = torch.cat((query_rope, key.unsqueeze(1)), dim=1)  # (T, N+1, P): turned together, in half as many calls
    turned = apply_rope(both, cos.unsqueeze(1), sin.unsqueeze(1))
    _, normed = reference.add_rms_norm(latent, None, norm_weight, eps)
    entries.flatten(0, 1)[slots] = torch.cat((normed, turned[:, -1]), dim=-1)  # (T, R+P)
    queries = turned[:, :-1]
    return queries if out is None else out.copy_(queries)


def per_head(states: Tensor, weight: Tensor) -> Tensor:
    if len(states) > 1 or states.device.type != "cpu":
        return reference.per_head(states, weight)
    # A batched product with one row takes twice as long as these sums of weighted rows of the matrices.
    heads, inner, _ = weight.shape
    rows = torch.arange(heads * inner).view(heads, inner)
    return F.embedding_bag(rows, weight.flatten(0, 1), mode="sum", per_sample_weights=states[0]).unsqueeze(0)


def mla_decode(query: Tensor, entries: Tensor, rows: Rows, scale: float, rank: int, splits: int = 0) -> Tensor:
    slots, counts = rows.seen
    # exactly the entries in use: a product would copy a part of whole pages
    past = entries.flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, -1)  # (B, L, R+P)
    scores = (past @ query.transpose(1, 2)).transpose(1, 2).float() * scale  # (B, N, L); as in `project`
    if counts is not None:
        scores = scores.masked_fill(~counts.unsqueeze(1), float("-inf"))
    mixed = (scores.softmax(-1).to(past.dtype) @ past)[..., :rank]  # (B, N, R)
    return mixed if counts is None else mixed.masked_fill((rows.lengths == 0)[:, None, None], 0)
