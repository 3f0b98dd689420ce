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
ANSWER_LAYER, ANSWER_HEAD, RECALL_HEAD = 2, 3, 2
"""Before this layer a token is to know the label of the frame or page that it reads. With one head it is to look at the
object that the next token is about, at the ground where that says there is none, or at the label of the prompt that the
next one repeats, with another at what the next one repeats of the completion. After this layer it is to know the place
that the next ones say, and what the digit due tells of it."""
EVERY = 4  # tokens: attention is computed again for one of so many
LATENT_WEIGHT, ANSWER_WEIGHT, DIGIT_WEIGHT, LOOK_WEIGHT, LABEL_WEIGHT = 0.3, 0.2, 1.0, 0.03, 0.3
DIGITS = 10


class Aids(nn.Module):
    """Linear probes for places, and all auxiliary losses."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.of_latents = nn.ModuleList(nn.Linear(config.kv_lora_rank, waves.WAVES) for _ in LATENT_LAYERS)
        self.of_label = nn.Linear(config.kv_lora_rank, alignment.LABEL_DIGITS * DIGITS)
        self.of_answer = nn.Linear(config.hidden_size, waves.WAVES)
        self.of_digit = nn.Linear(config.hidden_size, waves.WAVES // labels.PLACES)
        self.of_wanted = nn.Linear(config.hidden_size, alignment.LABEL_DIGITS * DIGITS)

    def loss(
        self,
        model: KimiVL,
        batch: gallery.LessonBatch,
        past: forward.SharedPast | None,
        parts: Sequence[forward.Learnt],
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum and figures of all losses that a batch has something for."""
        total, figures = torch.zeros((), device=batch.ids.device), {}
        if batch.aligned is None:
            return total, figures
        forgotten = torch.cat([unrecalled(model, batch, part) for part in parts])
        if len(forgotten):
            total = total + LOOK_WEIGHT * forgotten.mean()
            figures["unrecalled"] = forgotten.mean().item()
        if past is None or batch.places is None or batch.labels is None:
            return total, figures
        if (batch.labels != alignment.NOTHING).any():
            [of_layer] = forward.latents(model, batch, past, (ANSWER_LAYER,))
            mislabelled = misread(self.of_label(of_layer), batch.labels)
            total = total + LABEL_WEIGHT * mislabelled
            figures["mislabelled"] = mislabelled.item()
            wanted = torch.cat([batch.aligned.of(part.rows, part.length).labels.flatten(0, 1) for part in parts])
            sought = (wanted != alignment.NOTHING).any(-1)
            if sought.any():
                states = torch.cat([part.before.flatten(0, 1) for part in parts])[sought]
                lost = misread(self.of_wanted(F.rms_norm(states, states.shape[-1:])), wanted[sought])
                total = total + LABEL_WEIGHT * lost
                figures["lost"] = lost.item()
        placed = batch.places[:, 0] != labels.NOWHERE
        if placed.any():
            wanted = waves.waves(batch.places[placed])
            of_layers = forward.latents(model, batch, past, LATENT_LAYERS)
            values = [head(own[placed]).float() for head, own in zip(self.of_latents, of_layers, strict=True)]
            total = total + LATENT_WEIGHT * torch.stack([F.mse_loss(each, wanted) for each in values]).mean()
            figures["latents near"] = max(waves.near(each, batch.places[placed]) for each in values)
        unseen = torch.cat([overlooked(model, batch, part) for part in parts])
        if len(unseen):
            total = total + LOOK_WEIGHT * unseen.mean()
            figures["overlooked"] = unseen.mean().item()
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


def misread(logits: Tensor, digits: Tensor) -> Tensor:
    """The mean loss of logits (N, LABEL_DIGITS * DIGITS) for a label's last ``digits`` (N, LABEL_DIGITS)."""
    each = logits.float().unflatten(1, (alignment.LABEL_DIGITS, DIGITS)).flatten(0, 1)
    return F.cross_entropy(each, digits.flatten(), ignore_index=alignment.NOTHING)


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


def attended(model: KimiVL, part: forward.Learnt, head: int, row: Tensor, step: Tensor) -> Tensor:
    """Logarithms of what a head of ANSWER_LAYER attends to, for tokens ``step`` (M,) of rows ``row`` (M,) of a part:
    (M, L), with what the rows share before their own tokens."""
    attention, cache = attention_of(model), part.cache
    config, seen = attention.config, cache.present[ANSWER_LAYER]
    own = seen.shape[1]
    if cache.rows is not None:
        seen = torch.cat((cache.past[ANSWER_LAYER].index_select(0, cache.rows), seen), dim=1)
    latent, k_rope = seen.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)  # (r, L, R), (r, L, P)
    up = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))[head]
    keys = torch.cat((latent @ up[: config.qk_nope_head_dim].T, k_rope), dim=-1)  # (r, L, Q+P)
    query = cache.queries[ANSWER_LAYER][row, head, step]  # (M, Q+P)
    scores = torch.einsum("md,mld->ml", query, keys[row]).float() * attention.scale  # (M, L)
    later = torch.arange(seen.shape[1], device=scores.device) > seen.shape[1] - own + step[:, None]
    return scores.masked_fill(later, float("-inf")).log_softmax(-1)


def missed(attends: Tensor, there: Tensor) -> Tensor:
    """-log of the attention (M, L) to where ``there`` (M, L) is true, of those that have such a place."""
    known = there.any(-1)
    return -attends.masked_fill(~there, float("-inf"))[known].logsumexp(-1)


def overlooked(model: KimiVL, batch: gallery.LessonBatch, part: forward.Learnt) -> Tensor:
    """How far ANSWER_HEAD is from looking at what the next token is about, and nowhere else: (M,), of every EVERY-th of
    these tokens."""
    assert batch.aligned is not None and batch.shared_ids is not None and batch.shown is not None
    about, rows = batch.aligned.of(part.rows, part.length).about, part.cache.rows
    assert rows is not None
    row, step = (about != alignment.NOTHING).nonzero().T[:, ::EVERY]
    shared = batch.shared_ids.shape[1]
    attends = attended(model, part, ANSWER_HEAD, row, step)[:, :shared]
    return missed(attends, (batch.shown[rows][row] == about[row, step][:, None, None]).any(-1))


def unrecalled(model: KimiVL, batch: gallery.LessonBatch, part: forward.Learnt) -> Tensor:
    """How far RECALL_HEAD is from looking at what the next token repeats: (M,)."""
    assert batch.aligned is not None
    aligned = batch.aligned.of(part.rows, part.length)
    row, step = (aligned.wanted != alignment.NOTHING).nonzero().T
    attends = attended(model, part, RECALL_HEAD, row, step)  # (M, L)
    # what is known at a token stands at the one before it; a token's own name does not count
    before = attends.shape[1] - part.length
    known = F.pad(aligned.known, (before + 1, -1), value=alignment.NOTHING)  # (r, L)
    earlier = torch.arange(attends.shape[1], device=attends.device) < before + step[:, None]
    return missed(attends, (known[row] == aligned.wanted[row, step][:, None]) & earlier)
