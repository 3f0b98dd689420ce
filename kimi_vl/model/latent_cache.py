"""The reference KV cache: a latent and a rotary key for each token and layer; slot i of a sequence holds position i.

For the plain generation loop and comparisons with golden data. The engine has a paged cache:
:mod:`kimi_vl.engine.kv_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TextConfig
from .language import Attention


class LatentCache:
    """Slots for ``capacity`` tokens of each of ``batch`` sequences.

    A slot has ``kv_lora_rank + qk_rope_head_dim`` values of ``dtype`` for each layer: 1,152 bytes in the published
    model in bfloat16, where expanded keys and values would be nine times as much.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        self.capacity = capacity
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, batch, capacity, width)
        # zeros, since a NaN in uninitialised memory would pass the mask: 0 * NaN is NaN
        self._states = torch.zeros(shape, dtype=dtype, device=device)

    def at(self, positions: Tensor) -> _Slots:
        """The cache for new tokens at ``positions`` (B, S), which are also their slots.

        Sequences may have different lengths: pad on the right, and use the state of each one's own last token. Raises
        ValueError for a position past the capacity.
        """
        length, mask = int(positions.max()) + 1, None
        if length > self.capacity:
            raise ValueError(f"position {length - 1} is past the cache's capacity of {self.capacity}")
        if length > positions.shape[1]:  # otherwise all sequences begin here, and causal attention is the same
            slots = torch.arange(length, device=positions.device)
            # slots past a token's own position may hold padding, and are masked
            mask = (slots <= positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, S, L)
        return _Slots(self._states, positions, length, mask)

    @property
    def nbytes(self) -> int:
        return self._states.nbytes


@dataclass(frozen=True)
class _Slots:
    """The cache as new tokens see it."""

    states: Tensor
    positions: Tensor
    length: int
    mask: Tensor | None

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, new_kv: Tensor) -> Tensor:
        sequences = torch.arange(self.positions.shape[0], device=self.positions.device).unsqueeze(1)  # (B, 1)
        self.states[layer][sequences, self.positions] = new_kv
        form = attention.absorbed if q_nope.shape[2] == 1 else attention.expanded
        return form(q_nope, q_rope, self.states[layer, :, : self.length], self.mask)
