"""Kimi-VL assembled from the vision tower and projector of ``kimi_k25`` and the decoder of ``deepseek_v3``.

Where kimi_k25 and Kimi-VL part ways: images have no time axis (one frame each), the position table need not
be square, the head is not tied to the embedding, and a placeholder without an image is an ordinary token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, PermuteForRope, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Model, DeepseekV3TopkRouter
from transformers.models.kimi_k25.modeling_kimi_k25 import (
    Kimi_K25MultimodalProjection,
    Kimi_K25PreTrainedModel,
    Kimi_K25VisionModel,
    Kimi_K25VisionPositionEmbeddings,
)
from transformers.utils.generic import can_return_tuple

from ..errors import CheckpointError
from ..model.config import num_image_tokens
from . import on_mindspore
from .configuration import KimiVLConfig, KimiVLVisionConfig, complete_generation_config

# What the KV cache is called among the decoder's arguments and outputs: newer versions have renamed it.
_CACHE = "cache" if "cache" in inspect.signature(DeepseekV3Model.forward).parameters else "past_key_values"

# Checkpoint names to module names. Each step can be undone on its own, for transformers saves by walking the
# list backwards; the list it has for kimi_k25 cannot (layers of the decoder would become blocks). The experts
# are fused by the list that transformers has for the decoder, which it finds by itself.
_CONVERSION = [
    WeightRenaming(r"^language_model\.model\.", r"model\.language_model\."),
    WeightRenaming(r"^language_model\.lm_head\.", r"lm_head\."),
    WeightRenaming(r"^multi_modal_projector\.", r"model\.mm_projector\."),
    WeightRenaming(r"\.mm_projector\.linear_1\.", r"\.mm_projector\.in_proj\."),
    WeightRenaming(r"\.mm_projector\.linear_2\.", r"\.mm_projector\.out_proj\."),
    WeightRenaming(r"^vision_tower\.patch_embed\.", r"model\.vision_tower\.patch_embed\."),
    WeightRenaming(r"\.pos_emb\.weight", r"\.pos_emb\.position_embeddings"),
    WeightRenaming(r"^vision_tower\.encoder\.final_layernorm\.", r"model\.vision_tower\.final_layernorm\."),
    WeightRenaming(r"^vision_tower\.encoder\.blocks\.", r"model\.vision_tower\.layers\."),
    # 1 to 2 before 0 to 1, or both would end as 2
    WeightRenaming(r"\.norm1\.", r"\.norm2\."),
    WeightRenaming(r"\.norm0\.", r"\.norm1\."),
    WeightRenaming(r"\.mlp\.fc1\.", r"\.mlp\.fc2\."),
    WeightRenaming(r"\.mlp\.fc0\.", r"\.mlp\.fc1\."),
    WeightRenaming(r"\.wo\.", r"\.attn\.proj\."),
    # the checkpoint rotates neighbouring components, kimi_k25 the two halves of a head: q and k are permuted
    WeightConverter(
        source_patterns=[r"\.wqkv\."],
        target_patterns=[r"\.attn\.q_proj\.", r"\.attn\.k_proj\.", r"\.attn\.v_proj\."],
        operations=[
            Chunk(dim=0),
            PermuteForRope(subconfig_key="vision_config", permute_layer_names=["q_proj", "k_proj"]),
        ],
    ),
]


class KimiVLPositionEmbeddings(Kimi_K25VisionPositionEmbeddings):
    """The learned position table, resized to each image's grid; kimi_k25's own takes square tables only."""

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        table = self.position_embeddings  # (table rows, table columns, C)
        resized = []
        for _, rows, columns in grid_thw.tolist():
            if (rows, columns) == tuple(table.shape[:2]):
                resized.append(table.flatten(0, 1))  # (P, C)
            else:
                planes = table.permute(2, 0, 1).unsqueeze(0)  # (1, C, table rows, table columns)
                planes = F.interpolate(planes, size=(rows, columns), mode="bicubic", align_corners=False)
                resized.append(planes.squeeze(0).permute(1, 2, 0).flatten(0, 1))  # (P, C)
        return hidden_states + torch.cat(resized).to(hidden_states.dtype)  # (sum of P, C)


class KimiVLVisionModel(Kimi_K25VisionModel):
    """MoonViT: kimi_k25's tower with the position table above."""

    config: KimiVLVisionConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    input_modalities = ("image",)

    def __init__(self, config: KimiVLVisionConfig):
        super().__init__(config)  # pyright: ignore[reportArgumentType]
        self.patch_embed.pos_emb = KimiVLPositionEmbeddings(config)


class KimiVLPreTrainedModel(Kimi_K25PreTrainedModel):
    """What model and head have in common."""

    config: KimiVLConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = KimiVLConfig
    input_modalities = ("image", "text")
    _no_split_modules: ClassVar[list[str]] = ["Kimi_K25VisionEncoderLayer", "DeepseekV3DecoderLayer"]

    def post_init(self) -> None:
        super().post_init()
        # Newer versions of the decoder hold the router's weight in float32. It is one of the published tensors and
        # has the dtype that was asked for, like the others; only the correction bias is kept in float32.
        embeddings: Any = self.get_input_embeddings()
        for module in self.modules():
            if isinstance(module, DeepseekV3TopkRouter):
                module.weight = nn.Parameter(module.weight.to(embeddings.weight.dtype))
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) - {"gate.weight"}


class KimiVLModel(KimiVLPreTrainedModel):
    """Vision tower, projector and decoder, without the head."""

    def __init__(self, config: KimiVLConfig):
        super().__init__(config)  # pyright: ignore[reportArgumentType]
        self.vision_tower = KimiVLVisionModel._from_config(config.vision_config)
        self.mm_projector = Kimi_K25MultimodalProjection(config)
        self.language_model = DeepseekV3Model._from_config(config.text_config)
        self.post_init()

    def vision_features(self, pixel_values: torch.Tensor, image_grid_hws: torch.Tensor) -> torch.Tensor:
        """The vision tower: patches ``(sum of P, 3, 14, 14)`` and grids ``(n, 2)`` of (rows, columns) to
        groups of four neighbours ``(T, 4, C)``, image after image."""
        grids = image_grid_hws.to(pixel_values.device, torch.long)
        if grids.ndim != 2 or grids.shape[1] != 2 or int(grids.prod(-1).sum()) != pixel_values.shape[0]:
            raise ValueError(
                f"image_grid_hws {grids.tolist()} must give rows and columns of each image, "
                f"{pixel_values.shape[0]} patches in all"
            )
        frames = F.pad(grids, (1, 0), value=1)  # (n, 3): one frame each
        patches = pixel_values.to(self.vision_tower.dtype)
        return self.vision_tower(patches, grid_thw=frames).pooler_output  # (T, 4, C)

    def projected(self, pixel_values: torch.Tensor, image_grid_hws: torch.Tensor) -> torch.Tensor:
        """What takes the place of the placeholders: ``(T, H)``, image after image."""
        features = self.vision_features(pixel_values, image_grid_hws)  # (T, 4, C)
        return self.mm_projector(features).squeeze(1)  # (T, H)

    def _embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, image_grid_hws: torch.Tensor | None
    ) -> torch.Tensor:
        embeds = self.get_input_embeddings()(input_ids)  # (B, S, H)
        if pixel_values is None:
            return embeds
        if image_grid_hws is None:
            raise ValueError("pixel_values came without image_grid_hws")
        images = self.projected(pixel_values, image_grid_hws).to(embeds)  # (T, H)
        slots = input_ids == self.config.media_placeholder_token_id  # (B, S)
        if int(slots.sum()) != images.shape[0]:
            raise ValueError(f"the prompt has {int(slots.sum())} image tokens, its images {images.shape[0]}")
        return embeds.masked_scatter(slots.unsqueeze(-1), images)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of ids or embeddings; images need ids, and replace the placeholders in order."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, pixel_values, image_grid_hws)  # (B, S, H)
        elif pixel_values is not None:
            raise ValueError("pixel_values go with input_ids, not with inputs_embeds")
        kwargs.setdefault(_CACHE, past_key_values)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class KimiVLForConditionalGeneration(KimiVLPreTrainedModel, GenerationMixin):
    """Kimi-VL with its language model head."""

    accepts_loss_kwargs = False  # the loss is a plain mean

    def __init__(self, config: KimiVLConfig):
        super().__init__(config)  # pyright: ignore[reportArgumentType]
        text = config.text_config
        self.model = KimiVLModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        # the decoder's class would have layer 61, which is beyond ours, ignored in a checkpoint
        self._keys_to_ignore_on_load_unexpected = set()
        complete_generation_config(self.generation_config, config)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but strict: :class:`CheckpointError` names tensors that are missing, unexpected
        or of the wrong shape. No code of the folder is run, whatever ``trust_remote_code`` says.

        A dtype of MindSpore's, or any ``mindspore_dtype``, gives a model on MindSpore instead
        (:mod:`kimi_vl.hf.on_mindspore`)."""
        if on_mindspore.wanted(kwargs):
            return on_mindspore.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        kwargs.pop("trust_remote_code", None)
        report = kwargs.pop("output_loading_info", False)
        own_generation_config = kwargs.get("generation_config") is not None
        # what does not fit is collected and named below
        kwargs["ignore_mismatched_sizes"] = True
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        _require_complete(info, pretrained_model_name_or_path)
        if not own_generation_config:
            complete_generation_config(model.generation_config, model.config)
        return (model, info) if report else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers; a dtype of MindSpore's gives a model on MindSpore instead."""
        if on_mindspore.wanted(kwargs):
            return on_mindspore.from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    def vision_features(self, pixel_values: torch.Tensor, image_grid_hws: torch.Tensor) -> torch.Tensor:
        """See :meth:`KimiVLModel.vision_features`: ``(T, 4, C)``."""
        return self.model.vision_features(pixel_values, image_grid_hws)

    def projected(self, pixel_values: torch.Tensor, image_grid_hws: torch.Tensor) -> torch.Tensor:
        """See :meth:`KimiVLModel.projected`: ``(T, H)``."""
        return self.model.projected(pixel_values, image_grid_hws)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, S, V)``, or of the last ``logits_to_keep`` positions alone, and the loss of labels."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        on_mindspore.refuse_tensors(given | {"image_grid_hws": image_grid_hws})
        kwargs.setdefault(_CACHE, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_hws=image_grid_hws,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, kept, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: outputs.get(_CACHE)},
        )

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers. Prefill in chunks is refused with images: 5.17 would drop them silently."""
        on_mindspore.refuse_tensors({"input_ids": inputs} | kwargs)
        chunk = kwargs.get("prefill_chunk_size") or getattr(
            generation_config or self.generation_config, "prefill_chunk_size", None
        )
        if chunk is not None and kwargs.get("pixel_values") is not None:
            raise NotImplementedError("prefill_chunk_size is not supported with images")
        return super().generate(  # pyright: ignore[reportAttributeAccessIssue]
            inputs, generation_config, **kwargs
        )

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        # beams and several answers: each copy of a row takes copies of that row's images along; the base
        # class repeats along the first dimension of every tensor, which for patches is not the row
        pixels, grids = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_grid_hws", None)
        if pixels is not None and grids is not None and expand_size > 1 and input_ids is not None:
            pixels, grids = self._repeat_images(input_ids, pixels, grids, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # pyright: ignore[reportArgumentType]
            **model_kwargs,
        )
        if pixels is not None:
            model_kwargs |= {"pixel_values": pixels, "image_grid_hws": grids}
        return input_ids, model_kwargs

    def _repeat_images(
        self, input_ids: torch.Tensor, pixels: torch.Tensor, grids: torch.Tensor, times: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        patches = grids.prod(-1).tolist()
        images = list(zip(pixels.split(patches), grids, strict=True))
        repeated: list[tuple[torch.Tensor, torch.Tensor]] = []
        merge = self.model.vision_tower.merge_kernel_size
        for slots in (input_ids == self.config.media_placeholder_token_id).sum(-1).tolist():
            row = []
            while slots > 0 and images:
                row.append(images.pop(0))
                slots -= num_image_tokens(row[-1][1].tolist(), merge)
            if slots:
                raise ValueError("the image tokens of a row do not agree with the sizes of its images")
            repeated += row * times
        if images:
            raise ValueError("there are more images than the prompt has places for")
        return torch.cat([image for image, _ in repeated]), torch.stack([grid for _, grid in repeated])


def _require_complete(info: Mapping[str, Any], source: Any) -> None:
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "wrong shape": sorted(f"{name} {tuple(a)} not {tuple(b)}" for name, a, b in info["mismatched_keys"]),
    }
    complaints = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in wrong.items()
        if names
    ]
    if complaints:
        raise CheckpointError(f"{source}: the tensors are not those of config.json; {'; '.join(complaints)}")


register_checkpoint_conversion_mapping(KimiVLConfig.model_type, _CONVERSION, overwrite=True)
