"""Each operation in PyTorch, arranged for speed: what runs where there are no kernels.

Computes what :mod:`kimi_vl.kernels.reference` says; each deviation from the obvious has its reason beside it. Not for
steps over buffers that stay: the host may wait here, and every token of :func:`latent_write` must have a slot.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import memory
from ..cache import Rows
from ..language import apply_rope, project
from . import reference

# Shapes as in `reference`; t tokens of one expert.

_CACHE = 3 << 19  # bytes: three quarters of a second-level cache of 2 MB


def moe(
    states: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """``columns`` (E, I, H) hold ``down`` column by column, where it was worth it; see :func:`columns`."""
    if _groupable(states, down):
        outputs = _grouped(states, chosen, gate_up, down)
    else:
        outputs = _by_expert(states, chosen, gate_up, down, columns)
    # every part of an output has its expert's weight
    weights = weights.repeat_interleave(outputs.shape[1] // weights.shape[1], dim=1).unsqueeze(1)  # (T, 1, n)
    routed = torch.bmm(weights, outputs.to(weights.dtype)).squeeze(1).to(states.dtype)  # (T, H)
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


def _by_expert(states: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, columns: Tensor | None) -> Tensor:
    """The same with products for each expert in use, after the host has waited to learn which those are.

    An output may come in several parts, one after another.
    """
    count, choices = chosen.shape
    if count == 1:  # there is nothing to sort
        experts, order = chosen[0], None
        used, groups = experts.tolist(), states.expand(choices, -1).split(1)
    else:
        experts, order = chosen.flatten().sort(stable=True)  # (T K), expert by expert
        unique, shares = experts.unique_consecutive(return_counts=True)
        used, groups = unique.tolist(), states[order // choices].split(shares.tolist())  # (t, H)
    both = [_rounded(group, gate_up[expert]) for group, expert in zip(groups, used, strict=True)]
    gate, up = torch.cat(both).chunk(2, dim=-1)
    inner = F.silu(gate) * up  # (T K, I)
    if columns is not None and len(inner) <= 2 * len(used):
        outputs = _sums_of_columns(inner, experts, columns, distinct=len(used) == len(inner))
    else:
        groups = inner.split([len(group) for group in groups])  # (t, I)
        outputs = torch.cat([_rounded(group, down[expert]) for group, expert in zip(groups, used, strict=True)])
    outputs = outputs if order is None else outputs[order.argsort()]
    return outputs.view(count, -1, states.shape[-1])


def _rounded(states: Tensor, weight: Tensor) -> Tensor:
    """:func:`project` with the number of many rows rounded up: oneDNN compiles a product for each it has not met."""
    count = len(states)
    return project(F.pad(states, (0, 0, 0, -count % 16)), weight)[:count] if count > 16 else project(states, weight)


def columns(downs: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Each layer's ``down`` (E, H, I) a second time, column by column (E, I, H), for steps of few tokens.

    That is for bfloat16 on a CPU, and where it takes no more than a third of the memory that is free.
    """
    worth = all(down.device.type == "cpu" and down.dtype == torch.bfloat16 for down in downs)
    if not worth or 3 * sum(down.nbytes for down in downs) > memory.available():
        return [{} for _ in downs]
    return [{"columns": memory.like(down.transpose(1, 2))} for down in downs]


def _sums_of_columns(inner: Tensor, experts: Tensor, columns: Tensor, *, distinct: bool) -> Tensor:
    """Products of ``inner`` (n, I) with the matrices of ``experts`` (n), each in parts to be added: (n, parts, H).

    Weighted sums of columns, all of them in one call, are read up to 1.6 times as fast as a product for each matrix.
    A part of the columns at a time stays in a core's cache for the passes over it, and for other rows that need it:
    those come next to each other, unless all experts are ``distinct``.
    """
    count, (_, most, width) = len(inner), columns.shape
    size = _part(most, width * columns.itemsize)
    rows = (experts.int().unsqueeze(1) * most + _numbers(most)).view(-1, size)  # (n I/size, size)
    inner, order = inner.view(-1, size), None
    if not distinct:
        order = rows[:, 0].argsort()
        rows, inner = rows[order], inner[order]
    sums = F.embedding_bag(rows, columns.flatten(0, 1), mode="sum", per_sample_weights=inner)
    if order is not None:
        sums = sums[order.argsort()]
    return sums.view(count, -1, width)


@functools.cache
def _part(count: int, nbytes: int) -> int:
    """The greatest divisor of ``count`` such that as many times ``nbytes`` stay in a core's second-level cache."""
    return max(size for size in range(1, count + 1) if count % size == 0 and size * nbytes <= max(_CACHE, nbytes))


@functools.cache
def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


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
    rows = _numbers(heads * inner).view(heads, inner)
    return F.embedding_bag(rows, weight.flatten(0, 1), mode="sum", per_sample_weights=states[0]).unsqueeze(0)


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
