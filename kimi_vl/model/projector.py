"""``multi_modal_projector``: merged groups of vision features to vectors as wide as the text model.

Source: the published modeling_kimi_vl.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .vision import LAYER_NORM_EPS


class Projector(nn.Module):
    """LayerNorm over each patch, then two linear maps with an exact GELU: (T, 4, C) to (T, hidden_size)."""

    def __init__(self, config: Config):
        super().__init__()
        vision, width = config.vision_config, config.vision_config.merged_size
        self.pre_norm = nn.LayerNorm(vision.hidden_size, eps=LAYER_NORM_EPS)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, groups: Tensor) -> Tensor:
        merged = self.pre_norm(groups).flatten(1)  # (T, 4 C)
        return self.linear_2(F.gelu(self.linear_1(merged)))  # (T, hidden_size)
