"""Settings in every spelling that versions of transformers write, brought to the published one.

Two spellings of one setting must agree, and a setting that the models here do not have must say what they compute;
:class:`CheckpointError` names any that does not. Knows nothing of tensors, and reads no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CheckpointError

VISION_ROPE_THETA = 10_000.0

# newer spelling: published spelling
_RENAMED = {
    "": {"image_token_id": "media_placeholder_token_id", "image_token_index": "media_placeholder_token_id"},
    "text_config": {"num_local_experts": "n_routed_experts", "hidden_activation": "hidden_act"},
    "vision_config": {
        "pos_emb_height": "init_pos_emb_height",
        "pos_emb_width": "init_pos_emb_width",
        "spatial_merge_size": "merge_kernel_size",
    },
    "image_processor": {"merge_size": "merge_kernel_size"},
}
# Settings that the published files leave out, and all values that mean what is computed.
_IMPLIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"projection_layer_norm_eps": (1e-5,), "projector_hidden_act": ("gelu",)},
    "text_config": {
        "model_type": ("deepseek_v3", "kimi_k2"),
        "rope_interleave": (True,),
        "sliding_window": (),
        "use_sliding_window": (False,),
        "attention_chunk_size": (),
        "mlp_bias": (False,),
    },
    "vision_config": {
        "model_type": ("moonvit",),
        "hidden_act": ("gelu_pytorch_tanh",),
        "layer_norm_eps": (1e-5,),
        "num_channels": (3,),
        "in_channels": (3,),
        "pos_emb_time": (1,),
    },
    "image_processor": {
        "image_processor_type": ("KimiVLImageProcessor", "KimiVLImageProcessorFast"),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_pad": (True,),
        "do_convert_rgb": (True,),
        "do_center_crop": (False,),
        "resample": (3, "bicubic"),
        "rescale_factor": (1 / 255,),
    },
}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types")
"""Settings that are ``rope_theta`` alone in the published spelling."""

# Parameters of a scaled RoPE, by the value with which they scale nothing.
_UNSCALED = {"partial_rotary_factor": 1.0, "factor": 1.0, "attention_factor": 1.0}


def config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json``, its sections included, in the published spelling."""
    settings = _settings(values, "")
    for section, read in (("text_config", text), ("vision_config", vision)):
        if isinstance(settings.get(section), Mapping):
            settings[section] = read(settings[section])
    _agree_with_sections(settings)
    return settings


def text(values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``text_config`` in the published spelling: RoPE as ``rope_theta`` and a ``rope_scaling`` of None."""
    settings = _settings(values, "text_config")
    theta = _rope_theta(settings, "text_config", ("default",))
    for layer_type in settings.get("layer_types") or ():
        if layer_type != "full_attention":
            _refuse("text_config.layer_types", layer_type, ("full_attention",))
    nope, rope = settings.get("qk_nope_head_dim"), settings.get("qk_rope_head_dim")
    if isinstance(nope, int) and isinstance(rope, int):
        for name, computed in (("head_dim", rope), ("qk_head_dim", nope + rope)):
            if settings.get(name) is not None and not _is(settings[name], computed):
                _refuse(f"text_config.{name}", settings[name], (computed,))
    settings = {name: value for name, value in settings.items() if name not in ROPE}
    return settings | {"rope_scaling": None} | ({} if theta is None else {"rope_theta": theta})


def vision(values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``vision_config`` in the published spelling, which has no RoPE settings."""
    settings = _settings(values, "vision_config")
    theta = _rope_theta(settings, "vision_config", ("default", "axial"))
    if theta is not None and theta != VISION_ROPE_THETA:
        _refuse("vision_config.rope_theta", theta, (VISION_ROPE_THETA,))
    return {name: value for name, value in settings.items() if name not in ROPE}


def image_processor(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an image processor, from either file that holds them, in the published spelling."""
    return _settings(values, "image_processor")


# Spellings


def _settings(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    settings = dict(values)
    for new, published in (_RENAMED[section] | {"dtype": "torch_dtype"}).items():
        if (value := settings.pop(new, None)) is None:
            continue
        if published == "merge_kernel_size" and not isinstance(value, list | tuple):
            value = [value, value]
        there = settings.get(published)
        if there is not None and _plain(there) != _plain(value):
            raise CheckpointError(
                f"{_full(section, new)} is {value!r}, but {_full(section, published)} is {there!r}; keep the right one"
            )
        settings[published] = value if there is None else there
    for name, allowed in _IMPLIED[section].items():
        value = settings.get(name) if name == "model_type" else settings.pop(name, None)
        if value is not None and not any(_is(value, one) for one in allowed):
            _refuse(_full(section, name), value, allowed)
    return settings


def _plain(value: Any) -> Any:
    """A value as it compares: types of tensors are names, with or without their module, and pairs are tuples."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return str(value).removeprefix("torch.") if not isinstance(value, int | float) else value


def _is(value: Any, wanted: Any) -> bool:
    """Equality that tells true from 1."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _full(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _refuse(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    supported = " or ".join(repr(one) for one in allowed) or "null"
    raise CheckpointError(f"{name} is {value!r}; only {supported} is supported")


# RoPE


def _rope_theta(settings: Mapping[str, Any], section: str, kinds: tuple[str, ...]) -> float | None:
    """The base of the rotary frequencies, None where no setting has it. Anything but the plain form is refused."""
    factor = settings.get("partial_rotary_factor")
    if factor is not None and not _is(factor, 1.0):
        _refuse(_full(section, "partial_rotary_factor"), factor, (1.0,))
    found: dict[str, Any] = {}
    if settings.get("rope_theta") is not None:
        found[_full(section, "rope_theta")] = settings["rope_theta"]
    for name in ("rope_parameters", "rope_scaling"):
        for where, parameters in _flat(settings.get(name), _full(section, name)):
            _check_unscaled(parameters, where, kinds, settings.get("max_position_embeddings"))
            if parameters.get("rope_theta") is not None:
                found[f"{where}.rope_theta"] = parameters["rope_theta"]
    for name, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"{name} is {value!r}; it must be a positive number")
        first = next(iter(found))
        if value != found[first]:
            raise CheckpointError(f"{name} is {value!r}, but {first} is {found[first]!r}; keep the right one")
    return next(iter(found.values()), None)


def _flat(parameters: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """RoPE parameters, and those of each type of layer where they are given apart, with their names."""
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"{where} is {parameters!r}; it must be an object or null")
    nested = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    yield where, {name: value for name, value in parameters.items() if name not in nested}
    for name, value in nested.items():
        yield f"{where}.{name}", value


def _check_unscaled(parameters: Mapping[str, Any], where: str, kinds: tuple[str, ...], context: Any) -> None:
    neutral = _UNSCALED | {"original_max_position_embeddings": context}
    for name, value in parameters.items():
        full = f"{where}.{name}"
        if name in ("rope_type", "type"):
            if value is not None and value not in kinds:
                _refuse(full, value, kinds)
        elif name in neutral:
            if value is not None and not _is(value, neutral[name]):
                _refuse(full, value, (neutral[name],))
        elif name != "rope_theta":
            raise CheckpointError(f"{full} is {value!r}; it is not supported, remove it if it has no effect")


def _agree_with_sections(settings: dict[str, Any]) -> None:
    """Settings of a section that are repeated above it: they have no effect there, so they must not differ."""
    text_settings, vision_settings = settings.get("text_config"), settings.get("vision_config")
    theta = _rope_theta(settings, "", ("default",))
    if theta is not None and isinstance(text_settings, Mapping) and theta != text_settings.get("rope_theta"):
        raise CheckpointError(
            f"rope_theta is {theta!r}, but text_config.rope_theta is {text_settings.get('rope_theta')!r}; "
            "keep the right one"
        )
    width = settings.pop("projection_hidden_size", None)
    if width is not None and isinstance(vision_settings, Mapping) and width != vision_settings.get("hidden_size"):
        _refuse("projection_hidden_size", width, (vision_settings.get("hidden_size"),))
