"""The reference KV cache: a latent and a rotary key a token and layer, slot i of a sequence holding its position i.

Used by the plain generation loop and golden comparisons. The engine has pages instead: :mod:`kimi_vl.engine.kv_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TextConfig
from .language import Attention


class LatentCache:
    """Room for ``capacity`` tokens of each of ``batch`` sequences, slot i of a row holding its position i.

    Per token and layer ``kv_lora_rank + qk_rope_head_dim`` values of ``dtype`` (1,152 bytes in the published model
    in bfloat16), where expanded keys and values would take nine times as much.
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
        # zeros, not uninitialised memory: a masked slot that held NaN would poison the weighted sum
        self._states = torch.zeros(shape, dtype=dtype, device=device)

    def at(self, positions: Tensor) -> _Rows:
        """For new tokens at ``positions`` (B, S), which are also the slots they take.

        Rows may be of different lengths: pad on the right and read the state of each row's own last token.
        """
        length, mask = int(positions.max()) + 1, None
        if length > self.capacity:
            raise ValueError(f"position {length - 1} is past the cache's capacity of {self.capacity}")
        if length > positions.shape[1]:  # else all rows begin here, and plain causal attention is the same
            slots = torch.arange(length, device=positions.device)
            # a row's slots past its own position may hold padding, and are never seen
            mask = (slots <= positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, S, L)
        return _Rows(self._states, positions, length, mask)

    @property
    def nbytes(self) -> int:
        return self._states.nbytes


@dataclass(frozen=True)
class _Rows:
    """A plain cache as new tokens see it."""

    states: Tensor
    positions: Tensor
    length: int
    mask: Tensor | None

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, new_kv: Tensor) -> Tensor:
        rows = torch.arange(self.positions.shape[0], device=self.positions.device).unsqueeze(1)  # (B, 1)
        self.states[layer][rows, self.positions] = new_kv
        form = attention.absorbed if q_nope.shape[2] == 1 else attention.expanded
        return form(q_nope, q_rope, self.states[layer, :, : self.length], self.mask)
