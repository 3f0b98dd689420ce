"""Auxiliary losses of the second phase: what is asked of the decoder beside the next token.

Digits tell a place only once an attention head finds the object, its latent has the place, and the rest of the network
writes it. These losses ask for the first two alone, in layers chosen here. Their readers are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_world import alignment, forward, gallery, labels, waves
from kimi_vl.model.config import TextConfig
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.language import Attention, Layer

LATENT_LAYERS = (2, 3)
"""The latents of image tokens are to keep places in these layers."""
ANSWER_LAYER, ANSWER_HEAD = 2, 3
"""With this head a token is to look at what the next one is about; after this layer it is to know the place that the
next ones say, and what the digit due tells of it."""
EVERY = 4  # tokens: attention is computed again for one of so many
LATENT_WEIGHT, ANSWER_WEIGHT, DIGIT_WEIGHT, LOOK_WEIGHT = 0.3, 0.2, 1.0, 0.03


class Aids(nn.Module):
    """Linear probes for places, and all auxiliary losses."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.of_latents = nn.ModuleList(nn.Linear(config.kv_lora_rank, waves.WAVES) for _ in LATENT_LAYERS)
        self.of_answer = nn.Linear(config.hidden_size, waves.WAVES)
        self.of_digit = nn.Linear(config.hidden_size, waves.WAVES // labels.PLACES)

    def loss(
        self,
        model: KimiVL,
        batch: gallery.LessonBatch,
        past: forward.SharedPast | None,
        parts: Sequence[forward.Learnt],
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum and figures of all losses that a batch has something for."""
        total, figures = torch.zeros((), device=batch.ids.device), {}
        if past is None or batch.places is None or batch.aligned is None:
            return total, figures
        placed = batch.places[:, 0] != labels.NOWHERE
        if placed.any():
            wanted = waves.waves(batch.places[placed])
            of_layers = forward.latents(model, batch, past, LATENT_LAYERS)
            values = [head(own[placed]).float() for head, own in zip(self.of_latents, of_layers, strict=True)]
            total = total + LATENT_WEIGHT * torch.stack([F.mse_loss(each, wanted) for each in values]).mean()
            figures["latents near"] = max(waves.near(each, batch.places[placed]) for each in values)
        missed = torch.cat([overlooked(model, batch, part) for part in parts])
        if len(missed):
            total = total + LOOK_WEIGHT * missed.mean()
            figures["overlooked"] = missed.mean().item()
        aligned = [batch.aligned.of(part.rows, part.length) for part in parts]
        saying = [own.said[..., 0] != labels.NOWHERE for own in aligned]
        states = torch.cat([part.states[at] for part, at in zip(parts, saying, strict=True)])
        if len(states):
            places = torch.cat([own.said[at] for own, at in zip(aligned, saying, strict=True)])
            writing = torch.cat([own.writing[at] for own, at in zip(aligned, saying, strict=True)])
            states, wanted = F.rms_norm(states, states.shape[-1:]), waves.waves(places)
            values = self.of_answer(states).float()
            total = total + ANSWER_WEIGHT * F.mse_loss(values, wanted)
            figures["answers near"] = waves.near(values, places)
            digit = writing != alignment.NOTHING
            off = F.mse_loss(self.of_digit(states[digit]).float(), of_digits(places[digit], writing[digit]))
            total = total + DIGIT_WEIGHT * off
            figures["digits off"] = off.item()
        return total, figures


def of_digits(places: Tensor, writing: Tensor) -> Tensor:
    """What digits ``writing`` (N,) tell of ``places`` (N, PLACES): (N, WAVES / PLACES), the waves of their number.

    Where the tens are written and odd, the short ones count from these tens on: they are turned by half."""
    number, ones, each = writing // 2, writing % 2, torch.arange(len(places), device=places.device)
    own = waves.of_numbers(waves.waves(places))[each, number]
    long, short = own.split((2, own.shape[1] - 2), dim=1)
    odd = ones * (places[each, number] // 10 % 2)
    return torch.cat((long, (1 - 2 * odd)[:, None] * short), dim=1)


def attention_of(model: KimiVL) -> Attention:
    """That of ANSWER_LAYER."""
    layer = model.language_model.model.layers[ANSWER_LAYER]
    assert isinstance(layer, Layer)
    return layer.self_attn


def overlooked(model: KimiVL, batch: gallery.LessonBatch, part: forward.Learnt) -> Tensor:
    """How far ANSWER_HEAD is from looking at what the next token is about, and nowhere else: -log of its attention
    there, (M,) of every EVERY-th of these tokens."""
    assert batch.aligned is not None and batch.shared_ids is not None and batch.shown is not None
    assert part.cache is not None and part.cache.rows is not None
    about, cache, rows = batch.aligned.of(part.rows, part.length).about, part.cache, part.cache.rows
    row, step = (about != alignment.NOTHING).nonzero().T[:, ::EVERY]
    attention = attention_of(model)
    config = attention.config
    seen = torch.cat((cache.past[ANSWER_LAYER].index_select(0, rows), cache.present[ANSWER_LAYER]), dim=1)
    latent, k_rope = seen.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)  # (r, L, R), (r, L, P)
    up = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))[ANSWER_HEAD]
    keys = torch.cat((latent @ up[: config.qk_nope_head_dim].T, k_rope), dim=-1)  # (r, L, Q+P)
    query = cache.queries[ANSWER_LAYER][row, ANSWER_HEAD, step]  # (M, Q+P)
    scores = torch.einsum("md,mld->ml", query, keys[row]).float() * attention.scale  # (M, L)
    shared = batch.shared_ids.shape[1]
    later = torch.arange(seen.shape[1], device=scores.device) > shared + step[:, None]
    attended = scores.masked_fill(later, float("-inf")).log_softmax(-1)[:, :shared]
    objects = torch.full((*batch.shared_ids.shape, 4), alignment.NOTHING, device=scores.device)
    objects[batch.shared_ids == model.config.media_placeholder_token_id] = batch.shown
    there = (objects[rows][row] == about[row, step][:, None, None]).any(-1)  # (M, shared)
    shown = there.any(-1)
    return -attended.masked_fill(~there, float("-inf"))[shown].logsumexp(-1)
