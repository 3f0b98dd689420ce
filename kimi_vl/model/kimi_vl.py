"""The whole Kimi-VL network, with the checkpoint's module names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import Config
from .language import Cache, LanguageModel
from .projector import Projector
from .vision import Grid, VisionTower


class KimiVL(nn.Module):
    """``KimiVLForConditionalGeneration`` of the checkpoint, for inference and training in plain PyTorch."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    def encode_images(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embeddings (T, H) for the placeholders of all images, in order.

        ``pixel_values`` (P, 3, 14, 14) are the patches of all images, ``grids`` each image's (rows, columns).
        """
        pixels = pixel_values.to(self.vision_tower.patch_embed.proj.weight.dtype)
        return self.multi_modal_projector(self.vision_tower(pixels, grids)).to(self.dtype)

    def widen_vision(self) -> None:
        """Keep vision tower and projector in float32; embeddings have the decoder's dtype as before."""
        self.vision_tower.float()
        self.multi_modal_projector.float()

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Embeddings (B, S, H) of ids (B, S), where placeholders are replaced in order by ``image_features`` (T, H)."""
        embeddings = self.language_model.model.embed_tokens(input_ids)
        if image_features is None:
            return embeddings
        slots = input_ids == self.config.media_placeholder_token_id
        if int(slots.sum()) != image_features.shape[0]:
            raise ValueError(f"{int(slots.sum())} image placeholders for {image_features.shape[0]} image vectors")
        return embeddings.masked_scatter(slots.unsqueeze(-1), image_features.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        grids: Sequence[Grid] = (),
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """float32 logits (B, S, vocab_size) of every token, for tests and training."""
        features = None if pixel_values is None else self.encode_images(pixel_values, grids)
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        states = self.language_model(self.embed(input_ids, features), positions, cache)
        return self.language_model.logits(states)
