"""The Hugging Face face of Kimi-VL: configuration, model and processor under the names of that library.

The model is assembled from modules that transformers brings (the vision tower and projector of ``kimi_k25``,
the decoder of ``deepseek_v3``) and shares no line with :mod:`kimi_vl.model.kimi_vl`, so it is also a second
implementation to hold the first against. Importing this file registers the classes: ``AutoConfig``,
``AutoModel``, ``AutoModelForCausalLM``, ``AutoModelForImageTextToText`` and ``AutoProcessor`` then open a
Kimi-VL folder without running the code that its ``auto_map`` names. This is the only file of the package that
imports transformers.

Where kimi_k25 and Kimi-VL part ways: images have no time axis (one frame each), the position table need not
be square, the head is not tied to the embedding, and a placeholder without an image is an ordinary token.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, PermuteForRope, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Model, DeepseekV3TopkRouter
from transformers.models.kimi_k25.modeling_kimi_k25 import (
    Kimi_K25MultimodalProjection,
    Kimi_K25PreTrainedModel,
    Kimi_K25VisionModel,
    Kimi_K25VisionPositionEmbeddings,
)
from transformers.utils.generic import can_return_tuple

from ..errors import CheckpointError
from ..media import data_url
from ..media.images import ImageOptions, preprocess
from ..model import published
from ..text import chat
from ..text.messages import read
from ..text.tokenizer import Tokenizer

_EOS_OFFSET, _IM_END_OFFSET = 1, 2  # from the first special token, [BOS]
# What the KV cache is called among the decoder's arguments and outputs: newer versions have renamed it.
_CACHE = "cache" if "cache" in inspect.signature(DeepseekV3Model.forward).parameters else "past_key_values"

# -----------------------------------------------------------------------------------------------------------
# Configuration
# -----------------------------------------------------------------------------------------------------------


def _as_published(values: dict[str, Any]) -> dict[str, Any]:
    """``to_dict`` of a configuration without what transformers adds, spelled as in the published file."""
    base = PreTrainedConfig().to_dict()
    own = ("transformers_version", "model_type")
    values = {
        name: value
        for name, value in values.items()
        if name in own or (not name.startswith("_") and (name not in base or value != base[name]))
    }
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    return values


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The declared settings of a configuration that is being made; what else came is not there yet."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


class KimiVLTextConfig(DeepseekV3Config):
    """The decoder (``text_config``): the fields of the published file, by default those of Kimi-VL-A3B."""

    default_theta = 800_000.0

    vocab_size: int = 163_840
    hidden_size: int = 2048
    intermediate_size: int = 11_264
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    n_shared_experts: int = 2
    n_routed_experts: int = 64
    routed_scaling_factor: float = 2.446
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_rope_head_dim: int = 64
    v_head_dim: int | None = 128
    qk_nope_head_dim: int = 128
    n_group: int | None = 1
    topk_group: int | None = 1
    topk_method: str = "noaux_tc"
    num_experts_per_tok: int | None = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int | None = 1
    norm_topk_prob: bool | None = True
    scoring_func: str = "sigmoid"
    hidden_act: str = "silu"
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 163_839
    bos_token_id: int | None = 163_584
    eos_token_id: int | list[int] | None = 163_585
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers' decoder computes these only, and would pass over another value without a word
        supported = {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "tie_word_embeddings": False,
        }
        for name, value in supported.items():
            found = getattr(self, name)
            if found != value:
                raise ValueError(f"text_config.{name} is {found!r}; only {value!r} is supported")
        settings = published.text(_fields(self) | kwargs)
        theta = settings.get("rope_theta", self.default_theta)
        self.rope_parameters = {"rope_type": "default", "rope_theta": theta}
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in published.ROPE})
        self.num_mtp_layers = 0  # the checkpoints have none

    def to_dict(self) -> dict[str, Any]:
        # what DeepSeek's models have and the published file does not is left out unless someone set it
        defaults = super(KimiVLTextConfig, KimiVLTextConfig()).to_dict()
        published = KimiVLTextConfig.__annotations__
        values = {
            name: value
            for name, value in _as_published(super().to_dict()).items()
            if name in published or name == "model_type" or name not in defaults or value != defaults[name]
        }
        for name in ("head_dim", "qk_head_dim"):
            values.pop(name, None)
        rope = dict(self.rope_parameters or {})
        values.pop("rope_parameters", None)
        values["rope_theta"] = rope.pop("rope_theta", self.default_theta)
        values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        values["transformers_version"] = transformers.__version__  # the caller takes it out
        return values


class KimiVLVisionConfig(PreTrainedConfig):
    """MoonViT (``vision_config``); the defaults are those of Kimi-VL-A3B."""

    model_type = "moonvit"
    default_rope_type = "axial"
    attribute_map: ClassVar[dict[str, str]] = {
        "pos_emb_height": "init_pos_emb_height",
        "pos_emb_width": "init_pos_emb_width",
    }

    patch_size: int = 14
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    hidden_act: str = "gelu_pytorch_tanh"
    merge_kernel_size: tuple[int, int] | list[int] = (2, 2)
    rope_parameters: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        published.vision(_fields(self) | kwargs)
        super().__post_init__(**kwargs)

    @property
    def pos_emb_time(self) -> int:
        """Frames that the (unused) table of time positions is built for."""
        return 1

    def to_dict(self) -> dict[str, Any]:
        values = _as_published(super().to_dict())
        values.pop("rope_parameters", None)
        if self.hidden_act == KimiVLVisionConfig.hidden_act:
            del values["hidden_act"]  # the published file takes it for granted
        return values


class KimiVLConfig(PreTrainedConfig):
    """A whole model, as in the published config.json; sub-configurations may be given as dictionaries."""

    model_type = "kimi_vl"
    # named by 5.17 itself, and by later versions in the place of one they derive
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": KimiVLTextConfig,
        "vision_config": KimiVLVisionConfig,
    }

    # dictionaries, or nothing, become these
    text_config: KimiVLTextConfig = None  # pyright: ignore[reportAssignmentType]
    vision_config: KimiVLVisionConfig = None  # pyright: ignore[reportAssignmentType]
    ignore_index: int = -100
    media_placeholder_token_id: int = 163_605
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # before the base class: it hands attn_implementation on to the sub-configurations
        for name, kind in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                value = value.to_dict() if isinstance(value, PreTrainedConfig) else dict(value or {})
                value = published.text(value) if kind is KimiVLTextConfig else published.vision(value)
                setattr(self, name, kind(**{k: v for k, v in value.items() if k != "model_type"}))
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true; only false is supported")
        published.config(_fields(self) | kwargs | {"text_config": None, "vision_config": None})
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(published.config(config_dict), **kwargs)

    @property
    def projection_hidden_size(self) -> int:
        """Width over which the projector's norm runs."""
        return self.vision_config.hidden_size

    @property
    def projection_layer_norm_eps(self) -> float:
        return 1e-5

    def to_dict(self) -> dict[str, Any]:
        return _as_published(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        # in full: a saved folder must not depend on the defaults above
        return self.to_dict()


# -----------------------------------------------------------------------------------------------------------
# Model
# -----------------------------------------------------------------------------------------------------------

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
        self._complete_generation_config()

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but strict: :class:`CheckpointError` names tensors that are missing, unexpected
        or of the wrong shape. No code of the folder is run, whatever ``trust_remote_code`` says."""
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
            model._complete_generation_config()
        return (model, info) if report else model

    def _complete_generation_config(self) -> None:
        """Stop at [EOS] and <|im_end|>: published generation configurations name the first alone, turns end
        with the second."""
        text, defaults = self.config.text_config, self.generation_config
        if text.bos_token_id is None or defaults is None:
            return
        named = defaults.eos_token_id
        named = [] if named is None else [named] if isinstance(named, int) else list(named)
        ends = [text.bos_token_id + _EOS_OFFSET, text.bos_token_id + _IM_END_OFFSET]
        defaults.eos_token_id = list(dict.fromkeys([*named, *ends]))
        defaults.bos_token_id = text.bos_token_id if defaults.bos_token_id is None else defaults.bos_token_id
        defaults.pad_token_id = text.pad_token_id if defaults.pad_token_id is None else defaults.pad_token_id

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
                slots -= row[-1][0].shape[0] // (merge[0] * merge[1])
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

# -----------------------------------------------------------------------------------------------------------
# Processor
# -----------------------------------------------------------------------------------------------------------

_FILES = (
    "tiktoken.model",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)


class KimiVLTokenizer(Tokenizer):
    """:class:`kimi_vl.text.tokenizer.Tokenizer` with the names that callers of Hugging Face tokenizers use."""

    padding_side = "left"

    @property
    def bos_token_id(self) -> int:
        return self.bos_id

    @property
    def eos_token_id(self) -> int:
        return self.eos_id

    @property
    def pad_token_id(self) -> int:
        return self.pad_id

    @property
    def vocab_size(self) -> int:
        return self.num_ranks

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Ids of special tokens by name."""
        return self.special[tokens] if isinstance(tokens, str) else [self.special[token] for token in tokens]

    def decode(self, ids: Any, skip_special: bool = False, *, skip_special_tokens: bool = False, **ignored: Any) -> str:
        """The text of ids in a list, an array or a tensor (or of one id); see :meth:`Tokenizer.decode`."""
        return super().decode(_ids(ids), skip_special=skip_special or skip_special_tokens)

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False, **ignored: Any) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


class KimiVLProcessor:
    """Text and images to the tensors that the model takes, and ids back to text.

    As in the published processor the rendered text is the interface: control tokens in it are control tokens,
    wherever they come from. (:func:`kimi_vl.text.chat.encode` keeps text of users apart.)
    """

    def __init__(self, tokenizer: Any, options: ImageOptions, source: Path | None = None):
        self.tokenizer: KimiVLTokenizer = tokenizer
        self.options = options
        self._source = source

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> KimiVLProcessor:
        """Read a folder, or the same files from the Hub (``revision``, ``cache_dir``, ``token``,
        ``local_files_only`` and ``force_download`` are understood). No code of the folder is run."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
            choice = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
            name = str(pretrained_model_name_or_path)
            folder = Path(snapshot_download(name, allow_patterns=list(_FILES), **choice))
        return cls(KimiVLTokenizer.from_directory(folder), ImageOptions.from_directory(folder), folder)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Copy the files this was read from."""
        if self._source is None:
            raise ValueError("this processor was not read from a folder, so there is nothing to copy")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self._source / name).exists() and not (Path(save_directory) / name).exists():
                shutil.copyfile(self._source / name, Path(save_directory) / name)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The conversation as text; a list of conversations gives a list. With ``tokenize`` the tensors of
        :meth:`__call__`, where the image parts must hold their images (Pillow images, arrays, paths or data
        URLs)."""
        several = len(conversation) > 0 and not isinstance(conversation[0], Mapping)
        rows = list(conversation) if several else [conversation]
        texts = [chat.render(messages, add_generation_prompt) for messages in rows]
        if not tokenize:
            return texts if several else texts[0]
        images = [part.source for messages in rows for turn in read(messages) for part in turn.images]
        return self(text=texts, images=images, return_tensors=kwargs.get("return_tensors"))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        **ignored: Any,
    ) -> BatchFeature:
        """One rendered text or several, and the images of all of them in order.

        Gives ``input_ids`` and ``attention_mask`` ``(B, S)``, padded at the left, and with images
        ``pixel_values`` ``(sum of P, 3, 14, 14)`` and ``image_grid_hws`` ``(n, 2)``, rows and columns.
        ``return_tensors`` is "pt", "np", or None for lists of ids. Each ``<|media_pad|>`` of the text becomes
        as many as its image takes. A prompt is never cut: one longer than ``max_length`` is an error where
        ``truncation`` is asked for.
        """
        if text is None:
            raise ValueError("text is missing; an image goes with a text that has its place")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}; it must be 'pt', 'np' or None")
        pictures = [preprocess(_image(image), self.options) for image in _flat(images)]
        merged = self.options.merge_kernel_size[0] * self.options.merge_kernel_size[1]
        counts = [rows * columns // merged for _, (rows, columns) in pictures]
        rows = self._encode([text] if isinstance(text, str) else list(text), counts)
        longest = max((len(row) for row in rows), default=0)
        if truncation and max_length is not None and longest > max_length:
            raise ValueError(f"a prompt of {longest} tokens exceeds max_length {max_length}; it is never cut")
        width = max_length if padding == "max_length" and max_length is not None else longest
        lacking = [max(0, width - len(row)) if padding else 0 for row in rows]
        data: dict[str, Any] = {
            "input_ids": [[self.tokenizer.pad_id] * n + row for n, row in zip(lacking, rows, strict=True)],
            "attention_mask": [[0] * n + [1] * len(row) for n, row in zip(lacking, rows, strict=True)],
        }
        if return_tensors is not None:
            data = {name: np.asarray(value, dtype=np.int64) for name, value in data.items()}
        if pictures:
            data["pixel_values"] = np.concatenate([patches for patches, _ in pictures])
            data["image_grid_hws"] = np.asarray([grid for _, grid in pictures], dtype=np.int64)
        if return_tensors == "pt":
            data = {name: torch.from_numpy(value) for name, value in data.items()}
        return BatchFeature(data)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **ignored: Any) -> str:
        """The text of a row of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False, **ignored: Any) -> list[str]:
        """The text of each row of ids."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens)

    def _encode(self, texts: list[str], counts: list[int]) -> list[list[int]]:
        """Ids of each text; the k-th placeholder of all of them becomes ``counts[k]``."""
        pad = self.tokenizer.media_pad_id
        encoded = [self.tokenizer.encode(text, allow_special=True) for text in texts]
        if not counts:
            return encoded  # a lone placeholder is then an ordinary token
        places = sum(row.count(pad) for row in encoded)
        if places != len(counts):
            raise ValueError(f"the text has {places} places for images ({chat.MEDIA_PAD}), {len(counts)} came")
        left = iter(counts)
        return [[i for t in row for i in ([pad] * next(left) if t == pad else [t])] for row in encoded]


def _ids(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    return [values] if isinstance(values, int) else [int(value) for value in values]


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flat(item)]
    return [images]


def _image(source: Any) -> Image.Image:
    """A Pillow image in the mode it has: the published processor converts after its resize."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, str) and data_url.is_data_url(source):
        source = io.BytesIO(data_url.decode(source))
    if isinstance(source, io.BytesIO) or (isinstance(source, str | Path) and Path(source).is_file()):
        with Image.open(source) as opened:
            opened.load()
            return opened
    raise ValueError(
        "an image must be a Pillow image, an array of bytes (H, W, 3), the path of a file or a data URL of one"
    )


AutoConfig.register(KimiVLConfig.model_type, KimiVLConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(KimiVLConfig, KimiVLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(KimiVLConfig, KimiVLProcessor, exist_ok=True)
