"""Configurations of Kimi-VL for transformers: the fields of the published config.json, and nothing else when saved."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from ..model import published


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


_EOS_OFFSET, _IM_END_OFFSET = 1, 2  # from the first special token, [BOS]


def complete_generation_config(defaults: Any, config: Any) -> None:
    """Stop at [EOS] and <|im_end|>: published generation configurations name the first alone, turns end with the
    second. ``defaults`` is a GenerationConfig or None, ``config`` the model's."""
    text = config.text_config
    if text.bos_token_id is None or defaults is None:
        return
    named = defaults.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    ends = [text.bos_token_id + _EOS_OFFSET, text.bos_token_id + _IM_END_OFFSET]
    defaults.eos_token_id = list(dict.fromkeys([*named, *ends]))
    defaults.bos_token_id = text.bos_token_id if defaults.bos_token_id is None else defaults.bos_token_id
    defaults.pad_token_id = text.pad_token_id if defaults.pad_token_id is None else defaults.pad_token_id


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
