"""Settings in every spelling that versions of transformers write: accepted by both implementations, or by neither."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3 import DeepseekV3Config

from kimi_vl.errors import CheckpointError
from kimi_vl.hf import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLProcessor, KimiVLTextConfig
from kimi_vl.media.images import ImageOptions
from kimi_vl.model.config import Config
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader, verify

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
PUBLISHED = json.loads((CHECKPOINT / "config.json").read_text())
THETA = PUBLISHED["text_config"]["rope_theta"]
DEFAULT = {"rope_type": "default", "rope_theta": THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def config(section: str | None = "text_config", without: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    """The published settings, without some and with others, in one section."""
    values = copy.deepcopy(PUBLISHED)
    target = values[section] if section else values
    for name in without:
        del target[name]
    target |= settings
    return values


def as_transformers_writes_it() -> dict[str, Any]:
    """The decoder's settings by the class of transformers itself, whatever its version writes today."""
    values = copy.deepcopy(PUBLISHED)
    values["text_config"] = DeepseekV3Config(**values["text_config"]).to_dict()
    return json.loads(json.dumps(values, default=str))


ROPE = ("rope_theta", "rope_scaling")
EQUIVALENT = {
    "as published": config(),
    "rope_parameters": config(without=ROPE, rope_parameters=DEFAULT),
    "rope_parameters beside rope_theta": config(without=("rope_scaling",), rope_parameters=DEFAULT),
    "rope_parameters without theta": config(without=("rope_scaling",), rope_parameters={"rope_type": "default"}),
    "rope_parameters null": config(rope_parameters=None),
    "rope_parameters empty": config(rope_parameters={}),
    "theta as an integer": config(without=ROPE, rope_parameters={"rope_theta": int(THETA)}),
    "rope_scaling left out": config(without=("rope_scaling",)),
    "rope_scaling default": config(rope_scaling={"type": "default"}),
    "rope_scaling default twice": config(rope_scaling={"type": "default", "rope_type": "default"}),
    "rope_scaling with theta": config(without=ROPE, rope_scaling=DEFAULT),
    "rope_scaling that scales by one": config(rope_scaling={"rope_type": "default", "factor": 1.0}),
    "both": config(rope_scaling={"type": "default"}, rope_parameters=DEFAULT),
    "for a type of layer": config(without=ROPE, rope_parameters={"full_attention": DEFAULT}),
    "for two types of layer": config(
        without=ROPE, rope_parameters={"full_attention": DEFAULT, "sliding_attention": DEFAULT}
    ),
    "for a type of layer and for all": config(
        without=ROPE, rope_parameters={"full_attention": {"rope_type": "default"}, "rope_theta": THETA}
    ),
    "types of layers": config(layer_types=["full_attention"] * 3),
    "the whole head turns": config(partial_rotary_factor=1.0),
    "the whole head turns, inside": config(rope_parameters={**DEFAULT, "partial_rotary_factor": 1.0}),
    "interleaved": config(rope_interleave=True),
    "dtype": config(without=("torch_dtype",), dtype="float32"),
    "dtype twice": config(torch_dtype="float32", dtype="torch.float32"),
    "dtype of the whole": config(None, without=("torch_dtype",), dtype="float32"),
    "experts": config(without=("n_routed_experts",), num_local_experts=8),
    "experts twice": config(num_local_experts=8),
    "widths of heads": config(head_dim=16, qk_head_dim=32),
    "kind of decoder": config(model_type="deepseek_v3"),
    "no window": config(sliding_window=None, use_sliding_window=False),
    "position table": config(
        "vision_config",
        without=("init_pos_emb_height", "init_pos_emb_width"),
        pos_emb_height=16,
        pos_emb_width=16,
    ),
    "axial rope": config("vision_config", rope_parameters={"rope_type": "axial", "rope_theta": 10_000.0}),
    "activation of the tower": config("vision_config", hidden_act="gelu_pytorch_tanh"),
    "merge": config("vision_config", without=("merge_kernel_size",), spatial_merge_size=2),
    "placeholder": config(None, without=("media_placeholder_token_id",), image_token_id=1045),
    "placeholder twice": config(None, image_token_id=1045),
    "projector": config(None, projection_hidden_size=72, projection_layer_norm_eps=1e-5),
    "theta above": config(None, rope_theta=THETA),
    "as transformers writes it": as_transformers_writes_it(),
}

REFUSED = {
    "rope_scaling.rope_type": config(rope_scaling=YARN),
    "rope_scaling.type": config(rope_scaling={"type": "linear", "factor": 2.0}),
    "rope_parameters.rope_type": config(without=ROPE, rope_parameters={**YARN, "rope_theta": THETA}),
    # beside rope_theta
    "text_config.rope_parameters.rope_type": config(rope_parameters=YARN),
    # the older key is left behind
    "rope_parameters.type": config(rope_parameters={"rope_type": "default", "type": "yarn"}),
    "rope_parameters.rope_theta is 10000.0, but text_config.rope_theta": config(
        rope_parameters={"rope_theta": 10000.0}
    ),
    "rope_scaling.rope_theta": config(rope_scaling={"type": "default", "rope_theta": 500_000}),
    "rope_parameters.rope_theta is '8e5'": config(without=ROPE, rope_parameters={"rope_theta": "8e5"}),
    "rope_parameters.rope_theta is True": config(without=ROPE, rope_parameters={"rope_theta": True}),
    "rope_theta is 0": config(without=ROPE, rope_theta=0),
    "rope_parameters.full_attention.rope_type": config(without=ROPE, rope_parameters={"full_attention": YARN}),
    "sliding_attention.rope_theta": config(
        without=ROPE,
        rope_parameters={"full_attention": DEFAULT, "sliding_attention": {**DEFAULT, "rope_theta": 10_000.0}},
    ),
    "rope_parameters.sliding_attention": config(
        without=ROPE, rope_parameters={"full_attention": DEFAULT, "sliding_attention": None}
    ),
    "rope_parameters.factor": config(rope_parameters={**DEFAULT, "factor": 4.0}),
    "rope_parameters.mrope_section": config(rope_parameters={**DEFAULT, "mrope_section": [4, 2, 2]}),
    "rope_parameters is": config(rope_parameters=[DEFAULT]),
    "rope_scaling is": config(rope_scaling="yarn"),
    "text_config.partial_rotary_factor": config(partial_rotary_factor=0.5),
    "rope_parameters.partial_rotary_factor": config(rope_parameters={**DEFAULT, "partial_rotary_factor": 0.5}),
    "rope_interleave": config(rope_interleave=False),
    "layer_types": config(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "sliding_window": config(sliding_window=4096),
    "text_config.head_dim": config(head_dim=32),
    "qk_head_dim": config(qk_head_dim=16),
    "text_config.model_type": config(model_type="llama"),
    "num_local_experts": config(num_local_experts=16),
    "text_config.dtype": config(torch_dtype="bfloat16", dtype="float32"),
    "^[^.]*dtype is": config(None, torch_dtype="bfloat16", dtype="float32"),
    "pos_emb_height": config("vision_config", pos_emb_height=32),
    "vision_config.rope_parameters.rope_type": config("vision_config", rope_parameters=YARN),
    "vision_config.rope_theta": config("vision_config", rope_parameters={"rope_theta": THETA}),
    "vision_config.hidden_act": config("vision_config", hidden_act="gelu"),
    "layer_norm_eps": config("vision_config", layer_norm_eps=1e-6),
    "pos_emb_time": config("vision_config", pos_emb_time=4),
    "spatial_merge_size": config("vision_config", spatial_merge_size=4),
    "image_token_id": config(None, image_token_id=1046),
    "projection_layer_norm_eps": config(None, projection_layer_norm_eps=1e-6),
    "projection_hidden_size": config(None, projection_hidden_size=64),
    "rope_theta is 10000.0, but text_config": config(None, rope_theta=10_000.0),
}


@pytest.mark.parametrize("form", EQUIVALENT)
def test_equivalent_forms_are_read_alike(tmp_path, form):
    wanted = Config.from_dict(PUBLISHED)
    assert Config.from_dict(EQUIVALENT[form]) == wanted
    (tmp_path / "config.json").write_text(json.dumps(EQUIVALENT[form]))
    read = KimiVLConfig.from_pretrained(tmp_path)
    assert read.text_config.rope_parameters == DEFAULT
    read.save_pretrained(tmp_path / "saved")
    assert Config.from_directory(tmp_path / "saved") == wanted
    assert KimiVLConfig.from_pretrained(tmp_path / "saved").to_dict() == read.to_dict()


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_refused_by_name(form):
    with pytest.raises(CheckpointError, match=form):
        Config.from_dict(REFUSED[form])
    with pytest.raises(ValueError, match=form):
        KimiVLConfig.from_dict(copy.deepcopy(REFUSED[form]))


@pytest.mark.parametrize("settings", [{"rope_scaling": YARN}, {"rope_parameters": YARN}, {"rope_interleave": False}])
def test_a_configuration_made_in_python_is_held_to_the_same(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KimiVLTextConfig(**settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        KimiVLConfig(text_config=settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="image_token_id"):
        KimiVLConfig(image_token_id=7)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("section", [None, "text_config", "vision_config"])
def test_quantized_weights_are_refused_by_our_own_loader(section):
    with pytest.raises(CheckpointError, match="quantization_config"):
        Config.from_dict(config(section, quantization_config={"quant_method": "fp8"}))


def test_another_theta_is_computed_with(tmp_path):
    values = config(without=ROPE, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    assert Config.from_dict(values).text_config.rope_theta == 10_000.0
    assert KimiVLConfig.from_dict(values).text_config.rope_parameters["rope_theta"] == 10_000.0
    KimiVLTextConfig(rope_parameters={"rope_theta": 10_000.0}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 10_000.0


# Image processor and tokenizer


OPTIONS = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
MORE = {
    "image_processor_type": "KimiVLImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": None,
    "resample": 3,
    "merge_size": 2,
    "data_format": "channels_first",
    "size": None,
}


def processor_folder(folder: Path, old: Any = None, new: Any = None) -> Path:
    """A checkpoint whose image processor's settings are in the older file, in the newer, or in both."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "preprocessor_config.json").unlink()
    for name, values in (("preprocessor_config.json", old), ("processor_config.json", new)):
        if values is not None:
            (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OPTIONS, None),
        (OPTIONS | MORE, None),
        (None, {"image_processor": OPTIONS, "processor_class": "KimiVLProcessor"}),
        (None, {"image_processor": OPTIONS | MORE}),
        (OPTIONS, {"processor_class": "KimiVLProcessor"}),
        (OPTIONS, {"image_processor": OPTIONS | MORE}),
    ],
)
def test_settings_of_the_image_processor(tmp_path, old, new):
    folder = processor_folder(tmp_path / "made", old, new)
    wanted = ImageOptions.from_directory(CHECKPOINT)
    assert ImageOptions.from_directory(folder) == wanted
    verify.check(folder)
    KimiVLProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert KimiVLProcessor.from_pretrained(tmp_path / "saved").options == wanted


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (None, None, "preprocessor_config.json: cannot be read"),
        (None, {"processor_class": "KimiVLProcessor"}, "preprocessor_config.json: cannot be read"),
        (None, {"image_processor": [1]}, "processor_config.json: has no object"),
        ([OPTIONS], None, "preprocessor_config.json: has no object"),
        (None, {"image_processor": OPTIONS | {"do_rescale": False}}, "do_rescale"),
        (OPTIONS | {"rescale_factor": 1.0}, None, "rescale_factor"),
        (OPTIONS | {"resample": 2}, None, "resample"),
        (OPTIONS | {"merge_size": 4}, None, "merge_kernel_size"),
        (OPTIONS | {"merge_size": 4, "merge_kernel_size": [2, 2]}, None, "merge_size"),
        (OPTIONS | {"image_processor_type": "Kimi_K25ImageProcessor"}, None, "image_processor_type"),
        (OPTIONS | {"do_center_crop": True}, None, "do_center_crop"),
        (OPTIONS, {"image_processor": OPTIONS | {"in_token_limit": 16384}}, "in_token_limit is 16384, but preproc"),
        (OPTIONS, {"image_processor": OPTIONS | {"pad_input": False}}, "pad_input"),
    ],
)
def test_settings_of_another_image_processor_are_refused_by_name(tmp_path, old, new, says):
    with pytest.raises(CheckpointError, match=says):
        ImageOptions.from_directory(processor_folder(tmp_path / "made", old, new))


def newer_tokenizer(values: dict[str, Any]) -> None:
    values["extra_special_tokens"] = values.pop("additional_special_tokens")
    values["bos_token"] = {"__type": "AddedToken", "content": "[BOS]", "special": True}
    values["backend"] = "custom"


@pytest.mark.parametrize("change", [newer_tokenizer, lambda values: values.pop("additional_special_tokens")])
def test_settings_of_the_tokenizer(tmp_path, change: Callable[[dict[str, Any]], Any]):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    change(values)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    assert Tokenizer.from_directory(tmp_path).special == Tokenizer.from_directory(CHECKPOINT).special


# What is saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_is_saved_loads_in_both(tmp_path, dtype):
    KimiVLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype).save_pretrained(tmp_path)
    KimiVLProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    verify.check(tmp_path)
    own = loader.load(tmp_path, dtype=dtype).state_dict()
    for name, value in loader.load(CHECKPOINT, dtype=dtype).state_dict().items():
        assert torch.equal(own[name], value), name
    again = KimiVLForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert again.config.text_config.rope_parameters == DEFAULT
