"""The network in training: arithmetic that is quick to differentiate, and conversations that share their pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_world import gallery
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.language import Attention, Experts, Gate

LENGTHS = 64
"""Rows are taken together whose lengths are the same multiple of this, rounded up."""


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``scaled_dot_product_attention`` as two products: the fused one's backward pass is far slower on a CPU."""
    scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if is_causal:
        length = query.shape[-2]
        attn_mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ value


def all_experts(self: Experts, states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """What :meth:`kimi_vl.model.language.Experts.forward` computes, with every expert seeing every token.

    Two large products, most of their rows weighted by zero, train these small experts several times faster than
    many small GEMMs over the tokens of each.
    """
    experts, width, hidden = self.gate_up_proj.shape
    dense = topk_weights.new_zeros(states.shape[0], experts).scatter(1, topk_ids.long(), topk_weights)  # (T, E)
    gate, up = F.linear(states, self.gate_up_proj.flatten(0, 1)).view(-1, experts, width).chunk(2, dim=-1)
    weighted = (F.silu(gate) * up) * dense.unsqueeze(-1).to(gate.dtype)  # (T, E, I)
    return F.linear(weighted.flatten(1), self.down_proj.transpose(0, 1).reshape(hidden, -1)).to(states.dtype)


class RouterBalance:
    """Moves the routers' correction biases toward equal load (DeepSeek-V3 report, section 2.1.2)."""

    def __init__(self, model: KimiVL, speed: float = 1e-3):
        self.speed, self.lock = speed, threading.Lock()
        self.gates: list[Gate] = [module for module in model.modules() if isinstance(module, Gate)]
        self.loads = [torch.zeros_like(gate.e_score_correction_bias) for gate in self.gates]
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.register_forward_hook(self._counting(load))

    def _counting(self, load: Tensor) -> Callable[..., None]:
        def count(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
            with self.lock:
                load.add_(torch.bincount(output[0].flatten(), minlength=load.numel()))

        return count

    @torch.no_grad()
    def update(self) -> None:
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.e_score_correction_bias.add_(self.speed * torch.sign(load.mean() - load))
            load.zero_()


class SharedPast:
    """A cache for training: what the rows of pictures left behind comes before each conversation."""

    def __init__(self, past: dict[int, Tensor] | None = None, rows: Tensor | None = None) -> None:
        self.past, self.rows = past or {}, rows
        self.present: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}

    def before(self, rows: Tensor) -> SharedPast:
        """A cache in which row r is preceded by row ``rows[r]`` of this one."""
        return SharedPast(self.present, rows)

    def at(self, positions: Tensor) -> SharedPast:
        return self

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, new_kv: Tensor) -> Tensor:
        self.present[layer], self.queries[layer] = new_kv, torch.cat((q_nope, q_rope), dim=-1)
        if self.rows is None:
            return attention.expanded(q_nope, q_rope, new_kv, None)
        seen = torch.cat((self.past[layer].index_select(0, self.rows), new_kv), dim=1)
        own, length = new_kv.shape[1], seen.shape[1]
        mask = torch.ones(own, length, dtype=torch.bool, device=new_kv.device).tril(length - own)
        return attention.expanded(q_nope, q_rope, seen, mask)


def read_pictures(model: KimiVL, batch: gallery.LessonBatch) -> SharedPast | None:
    """What the batch's conversations share, in the cache; None where they are about no picture."""
    if batch.shared_ids is None or batch.groups is None:
        return None
    past, positions = SharedPast(), torch.arange(batch.shared_ids.shape[1], device=batch.ids.device)
    embeddings = model.embed(batch.shared_ids, model.multi_modal_projector(batch.groups.to(model.dtype)))
    model.language_model(embeddings, positions.expand_as(batch.shared_ids), past)
    return past


def latents(model: KimiVL, batch: gallery.LessonBatch, past: SharedPast, layers: Sequence[int]) -> list[Tensor]:
    """What the caches of some layers keep of the pictures' tokens, without their positions: (T, R) each."""
    shown = batch.shared_ids == model.config.media_placeholder_token_id
    rank = model.config.text_config.kv_lora_rank
    return [past.present[layer][shown][:, :rank] for layer in layers]


class Kept(threading.local):
    """What a layer took and gave last in this thread: (r, S, H)."""

    before: Tensor
    states: Tensor

    def of(self, layer: nn.Module) -> Kept:
        def keep(_: nn.Module, given: tuple[Tensor, ...], states: Tensor) -> None:
            self.before, self.states = given[0], states

        layer.register_forward_hook(keep)
        return self


@dataclass
class Learnt:
    """Some rows of a batch, of about equal length, as the network sees them."""

    rows: Tensor  # (r,)
    length: int  # S
    logits: Tensor  # (N, vocab_size) of all tokens to learn
    targets: Tensor  # (N,)
    of_row: Tensor  # (N,): which of the batch's rows each is in
    before: Tensor  # (r, S, H), what a layer took
    states: Tensor  # (r, S, H), what it gave
    cache: SharedPast


def learnt(model: KimiVL, batch: gallery.LessonBatch, past: SharedPast | None, kept: Kept) -> Iterator[Learnt]:
    """All tokens to learn, for rows of about equal length at a time: padding and prompts cost little."""
    shared_length = 0 if batch.shared_ids is None else batch.shared_ids.shape[1]
    steps = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    lengths = (steps * (batch.targets >= 0)).amax(-1) + 1  # (R,)
    padded = -(-lengths // LENGTHS) * LENGTHS
    for length in padded.unique().tolist():
        rows = (padded == length).nonzero().squeeze(-1)  # (r,)
        ids, targets = batch.ids[rows, :length], batch.targets[rows, :length]
        own = past.before(batch.shared_row[rows]) if past and batch.shared_row is not None else SharedPast()
        positions = (shared_length + steps[: ids.shape[1]]).expand_as(ids)
        states = model.language_model(model.embed(ids), positions, own)  # (r, S, H)
        due = targets >= 0
        logits, of_row = model.language_model.logits(states[due]), rows[due.nonzero()[:, 0]]
        yield Learnt(rows, ids.shape[1], logits, targets[due], of_row, kept.before, kept.states, own)


def initialise(model: KimiVL) -> None:
    """Small outputs into the residual stream, so that depth does not make the first steps unsteady."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
        scale = fan_in**-0.5
        if name.endswith(("wo.weight", "fc1.weight", "o_proj.weight", "down_proj.weight", "down_proj")):
            scale *= 0.3
        if "pos_emb" in name or "embed_tokens" in name:
            scale = 0.1
        nn.init.normal_(parameter, std=scale)
