"""What attention remembers of the past: one latent and one rotary key a token, layer by layer.

Knows no model; the decoder is handed a cache and writes into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TextConfig


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

    def write(self, layer: int, positions: Tensor, states: Tensor) -> None:
        """Store ``states`` (B, S, width) at ``positions`` (B, S)."""
        rows = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)  # (B, 1)
        self._states[layer][rows, positions] = states

    def read(self, layer: int, length: int) -> Tensor:
        """The first ``length`` slots of every row: (B, length, width)."""
        return self._states[layer, :, :length]

    @property
    def nbytes(self) -> int:
        return self._states.nbytes
