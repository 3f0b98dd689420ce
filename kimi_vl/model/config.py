"""Strict, frozen configurations read from a checkpoint's ``config.json``.

Fields are spelled as in the published checkpoints and have no defaults: a missing one is an error, and so is a value
that this implementation does not compute. Knows nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from ..quantization.scheme import Quantization
from . import published

_MISSING = object()

# What the text model computes, and the value a field means when config.json leaves it out (the default of the
# published configuration class). Anything else is refused by name.
_TEXT_SUPPORTED: dict[str, tuple[Any, Any]] = {
    "q_lora_rank": (None, 1536),
    "n_group": (1, None),
    "topk_group": (1, None),
    "topk_method": ("noaux_tc", "gready"),
    "scoring_func": ("sigmoid", "softmax"),
    "norm_topk_prob": (True, False),
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "moe_layer_freq": (1, 1),
    "pretraining_tp": (1, 1),
    "tie_word_embeddings": (False, False),
}


@dataclass(frozen=True)
class VisionConfig:
    """MoonViT (``vision_config``)."""

    patch_size: int
    init_pos_emb_height: int
    init_pos_emb_width: int
    num_attention_heads: int
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    merge_kernel_size: tuple[int, int]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def merged_size(self) -> int:
        """Width of one merged group of patches, the projector's input."""
        return self.hidden_size * self.merge_kernel_size[0] * self.merge_kernel_size[1]


def num_image_tokens(grid: Sequence[int], merge_kernel_size: Sequence[int] = (2, 2)) -> int:
    """Placeholders that an image of ``grid`` patches (rows, columns) takes in the prompt: one a merged group."""
    return grid[0] * grid[1] // (merge_kernel_size[0] * merge_kernel_size[1])


@dataclass(frozen=True)
class TextConfig:
    """The decoder (``text_config``): multi-head latent attention and a mixture of experts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_values_per_token(self) -> int:
        """Numbers in the KV cache for one token, all layers together."""
        return self.num_hidden_layers * (self.kv_lora_rank + self.qk_rope_head_dim)

    def is_dense(self, layer: int) -> bool:
        """Whether ``layer`` has a plain MLP instead of experts."""
        return layer < self.first_k_dense_replace


PUBLISHED_TEXT = TextConfig(
    vocab_size=163_840,
    hidden_size=2048,
    intermediate_size=11_264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    routed_scaling_factor=2.446,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_theta=800_000.0,
)
"""The decoder of Kimi-VL-A3B-Thinking, which says what a model takes that nobody has fetched."""


@dataclass(frozen=True)
class Config:
    """A whole Kimi-VL checkpoint (``config.json``). ``quantization`` None: all weights are floating-point."""

    vision_config: VisionConfig
    text_config: TextConfig
    media_placeholder_token_id: int
    quantization: Quantization | None = None

    @classmethod
    def from_directory(cls, directory: str | Path) -> Config:
        """Read ``directory/config.json``; :class:`CheckpointError` names the file or field at fault."""
        path = Path(directory) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: is not JSON ({error})") from None
        try:
            return cls.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from the parsed ``config.json``, in any spelling that :mod:`kimi_vl.model.published` knows."""
        if not isinstance(values, Mapping):
            raise CheckpointError("the top level must be an object")
        if values.get("model_type") != "kimi_vl":
            raise CheckpointError(f"model_type is {values.get('model_type')!r}; only 'kimi_vl' is supported")
        values = published.config(values)
        vision = _section(values, "vision_config")
        text = _section(values, "text_config")
        for name, section in (("text_config", text), ("vision_config", vision)):
            if section.get("quantization_config") is not None:
                raise CheckpointError(f"{name}.quantization_config is there; only one for the whole model is supported")
        quantization = values.get("quantization_config")
        for name, (supported, absent) in _TEXT_SUPPORTED.items():
            value = text.get(name, absent)
            if value != supported or isinstance(value, bool) != isinstance(supported, bool):
                raise CheckpointError(f"text_config.{name} is {value!r}; only {supported!r} is supported")
        if values.get("tie_word_embeddings"):
            raise CheckpointError("tie_word_embeddings is true; only false is supported")
        config = cls(
            vision_config=_read(VisionConfig, vision, "vision_config"),
            text_config=_read(TextConfig, text, "text_config"),
            media_placeholder_token_id=_integer(values, "media_placeholder_token_id", minimum=0),
            quantization=None if quantization is None else Quantization.from_config(quantization),
        )
        _check_consistency(config, text)
        return config


_Section = TypeVar("_Section", VisionConfig, TextConfig)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{name} is missing or not an object")
    return section


def _read(kind: type[_Section], values: Mapping[str, Any], section: str) -> _Section:
    read: dict[str, Any] = {}
    for field in fields(kind):
        if field.type == "int":
            # only the number of leading dense layers may be zero
            minimum = 0 if field.name == "first_k_dense_replace" else 1
            read[field.name] = _integer(values, field.name, minimum, section)
        elif field.type == "float":
            read[field.name] = _positive(values, field.name, section)
        else:
            read[field.name] = _pair(values, field.name, section)
    return kind(**read)


def _present(values: Mapping[str, Any], name: str, section: str) -> tuple[str, Any]:
    full = f"{section}.{name}" if section else name
    value = values.get(name, _MISSING)
    if value is _MISSING:
        raise CheckpointError(f"{full} is missing")
    return full, value


def _integer(values: Mapping[str, Any], name: str, minimum: int, section: str = "") -> int:
    full, value = _present(values, name, section)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(f"{full} is {value!r}; it must be an integer of at least {minimum}")
    return value


def _positive(values: Mapping[str, Any], name: str, section: str) -> float:
    full, value = _present(values, name, section)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise CheckpointError(f"{full} is {value!r}; it must be a positive number")
    return float(value)


def _pair(values: Mapping[str, Any], name: str, section: str) -> tuple[int, int]:
    full, value = _present(values, name, section)
    if value != [2, 2] and value != (2, 2):
        raise CheckpointError(f"{full} is {value!r}; only [2, 2] is supported")
    return (2, 2)


def _check_consistency(config: Config, text_values: Mapping[str, Any]) -> None:
    vision, text = config.vision_config, config.text_config
    heads = text_values.get("num_key_value_heads", text.num_attention_heads)
    if heads != text.num_attention_heads:
        raise CheckpointError(
            f"text_config.num_key_value_heads is {heads!r}; only num_attention_heads "
            f"({text.num_attention_heads}) is supported"
        )
    if vision.hidden_size % vision.num_attention_heads or vision.head_dim % 4:
        raise CheckpointError(
            f"vision_config.hidden_size {vision.hidden_size} must give each of {vision.num_attention_heads} heads "
            "a multiple of 4 dimensions"
        )
    if text.qk_rope_head_dim % 2:
        raise CheckpointError(f"text_config.qk_rope_head_dim is {text.qk_rope_head_dim}; it must be even")
    if text.num_experts_per_tok > text.n_routed_experts:
        raise CheckpointError(
            f"text_config.num_experts_per_tok {text.num_experts_per_tok} exceeds "
            f"n_routed_experts {text.n_routed_experts}"
        )
    if config.media_placeholder_token_id >= text.vocab_size:
        raise CheckpointError(
            f"media_placeholder_token_id {config.media_placeholder_token_id} is outside the vocabulary "
            f"of {text.vocab_size}"
        )
