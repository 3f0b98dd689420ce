"""Each operation in PyTorch, arranged for speed: what runs where there are no kernels.

Computes what :mod:`kimi_vl.kernels.reference` says; each deviation from the obvious has its reason beside it. Not for
steps over buffers that stay: the host may wait here, and every token of :func:`latent_write` must have a slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import Rows
from ..language import apply_rope, project
from . import reference
from .strips import Strips, mlp

# Shapes as in `reference`.

_NONE: Mapping[Tensor, Strips] = MappingProxyType({})


def moe(
    states: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    laid_out: Mapping[Tensor, Strips] = _NONE,
) -> Tensor:
    """``laid_out`` are strips of some of the weights; see :func:`kimi_vl.kernels.strips.lay_out`."""
    if len(states) == 1 and gate_up in laid_out and down in laid_out:
        return _of_one(states, chosen, weights, laid_out[gate_up], laid_out[down], len(down))
    if _groupable(states, down):
        outputs = _grouped(states, chosen, gate_up, down)
    else:
        outputs = _by_expert(states, chosen, gate_up, down, laid_out)
    routed = torch.bmm(weights.unsqueeze(1), outputs.to(weights.dtype)).squeeze(1).to(states.dtype)  # (T, H)
    return routed if shared is None else routed + mlp(states, shared, laid_out)


def _of_one(states: Tensor, chosen: Tensor, weights: Tensor, gate_up: Strips, down: Strips, routed: int) -> Tensor:
    """All of it for one token, to whom the shared experts, behind ``routed`` others, are as those that it chose."""
    shared = torch.arange(routed, down.count, dtype=chosen.dtype)
    experts, weights = torch.cat((chosen[0], shared)), F.pad(weights[0], (0, len(shared)), value=1.0)  # (n)
    gate, up = gate_up.product(states.expand(len(experts), -1), experts).chunk(2, dim=-1)  # (n, I)
    outputs = down.product(F.silu(gate) * up, experts)  # (n, H)
    return (weights @ outputs.to(weights.dtype)).unsqueeze(0).to(states.dtype)


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


def _by_expert(
    states: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, laid_out: Mapping[Tensor, Strips]
) -> Tensor:
    """The same with products for each expert in use, after the host has waited to learn which those are."""
    count, choices = chosen.shape
    if count == 1:  # there is nothing to sort
        experts, order, shares = chosen[0], None, [1] * choices
        tokens = states.expand(choices, -1)
    else:
        experts, order = chosen.flatten().sort(stable=True)  # (T K), expert by expert
        shares = experts.unique_consecutive(return_counts=True)[1].tolist()
        tokens = states[order // choices]
    gate, up = _each(tokens, experts, shares, gate_up, laid_out.get(gate_up)).chunk(2, dim=-1)
    outputs = _each(F.silu(gate) * up, experts, shares, down, laid_out.get(down))  # (T K, H)
    outputs = outputs if order is None else outputs[order.argsort()]
    return outputs.view(count, choices, -1)


def _each(states: Tensor, experts: Tensor, shares: list[int], weight: Tensor, strips: Strips | None) -> Tensor:
    """(n, O) of ``states`` (n, I), of which as many as each of ``shares`` says are one after another for one expert.

    What an expert has to do for one token alone is done from its strips, in one call for all of them.
    """
    if strips is not None and len(shares) == len(states):
        return strips.product(states, experts)
    places = [end - 1 for end in itertools.accumulate(shares)]
    alone = [place for place, share in zip(places, shares, strict=True) if share == 1]
    done: dict[int, Tensor] = {}
    if strips is not None and alone:
        done = dict(zip(alone, strips.product(states[alone], experts[alone]).split(1), strict=True))
    groups = zip(places, states.split(shares), experts[places].tolist(), strict=True)
    return torch.cat(
        [done[place] if place in done else _rounded(group, weight[expert]) for place, group, expert in groups]
    )


def _rounded(states: Tensor, weight: Tensor) -> Tensor:
    """:func:`project` with the number of many rows rounded up: oneDNN compiles a product for each it has not met."""
    count = len(states)
    return project(F.pad(states, (0, 0, 0, -count % 16)), weight)[:count] if count > 16 else project(states, weight)


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


def mla_decode(query: Tensor, entries: Tensor, rows: Rows, scale: float, rank: int, splits: int = 0) -> Tensor:
    slots, counts = rows.seen
    # exactly the entries in use: a product would copy a part of whole pages
    past = entries.flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, -1)  # (B, L, R+P)
    if query.device.type == "cpu":  # heads as the queries of one head that sees all of them
        mask = None if counts is None else counts[:, None, None]  # (B, 1, 1, L)
        past = past.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query.unsqueeze(1), past, past, mask, scale=scale)[:, 0]  # (B, N, R+P)
    else:
        scores = (query @ past.transpose(1, 2)).float() * scale  # (B, N, L)
        if counts is not None:
            scores = scores.masked_fill(~counts.unsqueeze(1), float("-inf"))
        mixed = scores.softmax(-1).to(past.dtype) @ past
    mixed = mixed[..., :rank]  # (B, N, R)
    return mixed if counts is None else mixed.masked_fill((rows.lengths == 0)[:, None, None], 0)
