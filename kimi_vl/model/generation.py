"""Prefill once, then one token of each sequence a step: the plain generation loop over the reference KV cache.

Knows ids and tensors; no text, no sampling rules, no queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kimi_vl import KimiVL
from .latent_cache import LatentCache
from .vision import Grid


@dataclass(frozen=True)
class Prompt:
    """Ids with image placeholders, and the images' patches (P, 3, 14, 14), float32, one image after another."""

    ids: Sequence[int]
    pixel_values: Tensor | None = None
    grids: Sequence[Grid] = ()


class Session:
    """Some sequences being continued together. ``logits`` (B, vocab_size) are those of the next token of each row.

    ``max_new_tokens`` is how many new tokens a row may get; the memory for them is taken at once.
    """

    @torch.inference_mode()
    def __init__(self, model: KimiVL, prompts: Sequence[Prompt], max_new_tokens: int):
        self._model = model
        device = model.device
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        longest = int(lengths.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        ids, self._lengths = ids.to(device), lengths.to(device)
        self.cache = LatentCache(
            model.config.text_config, len(prompts), longest + max_new_tokens, dtype=model.dtype, device=device
        )
        features = self._encode_images(prompts)
        positions = torch.arange(longest, device=device).expand(len(prompts), -1)
        states = model.language_model(model.embed(ids, features), positions, self.cache)  # (B, S, H)
        last = states[torch.arange(len(prompts), device=device), self._lengths - 1]  # (B, H)
        self.logits = model.language_model.logits(last)

    def _encode_images(self, prompts: Sequence[Prompt]) -> Tensor | None:
        pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
        if not pixels:
            return None
        grids = [grid for prompt in prompts for grid in prompt.grids]
        return self._model.encode_images(torch.cat(pixels).to(self._model.device), grids)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; returns the logits that follow, also kept in ``logits``."""
        ids = torch.tensor(tokens, device=self._model.device).unsqueeze(1)  # (B, 1)
        states = self._model.language_model(self._model.embed(ids), self._lengths.unsqueeze(1), self.cache)
        self._lengths = self._lengths + 1
        self.logits = self._model.language_model.logits(states[:, -1])
        return self.logits


def greedy(model: KimiVL, prompts: Sequence[Prompt], stop_ids: frozenset[int], limit: int) -> list[list[int]]:
    """Most likely continuations, each ending before its first stop id or after ``limit`` tokens."""
    session = Session(model, prompts, limit)
    outputs: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(limit):
        tokens = session.logits.argmax(-1).tolist()
        for row in list(open_rows):
            if tokens[row] in stop_ids:
                open_rows.discard(row)
            else:
                outputs[row].append(tokens[row])
        if not open_rows:
            break
        session.step(tokens)
    return outputs
