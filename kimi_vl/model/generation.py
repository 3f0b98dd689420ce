"""The plain generation loop: one prefill, then one token of each sequence a decode step, over the reference KV cache.

Knows token ids and tensors; no text, no sampling rules, no queue. The engine is tested against it.
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
    """Token ids with image placeholders, and the patches (P, 3, 14, 14), float32, of all its images in order."""

    ids: Sequence[int]
    pixel_values: Tensor | None = None
    grids: Sequence[Grid] = ()


class Session:
    """A batch of B sequences in generation. ``logits`` (B, vocab_size), float32, are those of each one's next token.

    The cache is allocated at once, for the longest prompt and ``max_new_tokens`` more.
    """

    @torch.inference_mode()
    def __init__(self, model: KimiVL, prompts: Sequence[Prompt], max_new_tokens: int):
        self._model = model
        device = model.device
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        longest = int(lengths.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for sequence, prompt in enumerate(prompts):
            ids[sequence, : len(prompt.ids)] = torch.tensor(prompt.ids)
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
        """Append one token to each sequence; returns the logits (B, vocab_size) after it, also kept in ``logits``."""
        ids = torch.tensor(tokens, device=self._model.device).unsqueeze(1)  # (B, 1)
        states = self._model.language_model(self._model.embed(ids), self._lengths.unsqueeze(1), self.cache)
        self._lengths = self._lengths + 1
        self.logits = self._model.language_model.logits(states[:, -1])
        return self.logits


def greedy(model: KimiVL, prompts: Sequence[Prompt], stop_ids: frozenset[int], limit: int) -> list[list[int]]:
    """Greedy continuations, each ending before its first stop id or after ``limit`` tokens."""
    session = Session(model, prompts, limit)
    outputs: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for _ in range(limit):
        tokens = session.logits.argmax(-1).tolist()
        for sequence in list(unfinished):
            if tokens[sequence] in stop_ids:
                unfinished.discard(sequence)
            else:
                outputs[sequence].append(tokens[sequence])
        if not unfinished:
            break
        session.step(tokens)
    return outputs
