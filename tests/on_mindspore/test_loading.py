"""Folders to weights on MindSpore, as strictly as on PyTorch; and every mistake of a caller is one sentence."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import logging
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import nn
from safetensors.torch import load_file, save_file

from kimi_vl import CheckpointError, KimiVLConfig, KimiVLForConditionalGeneration, UserError
from kimi_vl.mindspore import layers, model
from kimi_vl.model.config import Config
from kimi_vl.weights import huggingface, loader
from tests import weights_world
from tests.on_mindspore.conftest import DEMO

GATE = "language_model.model.layers.1.mlp.gate.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"
BIAS = "language_model.model.layers.1.mlp.gate.e_score_correction_bias"


def load(folder: Path | str, dtype: Any = ms.float32, **options: Any) -> Any:
    return KimiVLForConditionalGeneration.from_pretrained(folder, mindspore_dtype=dtype, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(weights_world.CHECKPOINT, tmp_path / "model")


def test_every_value_arrives(folder):
    """Names, shapes and values are those of the file; the router's bias stays float32."""
    stored = load_file(folder / "model.safetensors")
    parameters = dict(load(folder, ms.float16).parameters_and_names())
    assert parameters.keys() == stored.keys() == loader.checkpoint_layout(Config.from_directory(folder)).keys()
    for name, parameter in parameters.items():
        assert parameter.name == name and not parameter.requires_grad
        assert parameter.dtype == (ms.float32 if name.endswith("e_score_correction_bias") else ms.float16)
        assert np.array_equal(
            parameter.asnumpy(), stored[name].to(torch.float32).numpy().astype(parameter.asnumpy().dtype)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_other_types_are_converted(folder, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    for name, parameter in load(folder).parameters_and_names():
        assert np.array_equal(parameter.asnumpy(), stored[name].float().numpy())


def test_bits_of_bfloat16_are_kept():
    values = torch.randn(50, 3).to(torch.bfloat16)
    arrived = layers.from_torch(values, ms.bfloat16)
    assert arrived.dtype == ms.bfloat16 and arrived.shape == (50, 3)
    assert np.array_equal(arrived.astype(ms.float32).asnumpy(), values.float().numpy())


def test_shards_are_read_one_tensor_at_a_time(folder, monkeypatch):
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    files = {name: f"model-{1 + index % 3:05d}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: stored[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    alive: list[torch.Tensor] = []
    most = 0

    def watched(values: torch.Tensor, dtype: Any, convert: Any = layers.from_torch) -> Any:
        nonlocal most
        alive.append(values.untyped_storage()._weak_ref())  # pyright: ignore[reportArgumentType]
        most = max(most, sum(not torch.UntypedStorage._expired(each) for each in alive))
        return convert(values, dtype)

    monkeypatch.setattr(model, "from_torch", watched)
    parameters = dict(load(folder, ms.float16).parameters_and_names())
    assert len(alive) == len(stored) and most <= 2
    assert all(
        np.array_equal(parameters[n].asnumpy(), stored[n].half().numpy()) for n in names if not n.endswith("bias")
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(GATE), rf"missing tensor {GATE}"),
        (lambda t: t.pop(EXPERT), rf"missing tensor {EXPERT}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (lambda t: t.update({GATE: t[GATE][:4].clone()}), rf"{GATE} has shape \(4, 64\); \(8, 64\) was expected"),
        (lambda t: t.update({GATE: t[GATE].int()}), rf"{GATE} has dtype I32"),
    ],
    ids=["missing", "missing expert", "unexpected", "misshapen", "integers"],
)
def test_a_wrong_tensor_is_named(folder, change, words):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load(folder)


UNSUPPORTED = [
    ({"n_group": 2}, "n_group is 2"),
    ({"topk_group": 2}, "topk_group is 2"),
    ({"q_lora_rank": 32}, "q_lora_rank is 32"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
]


@pytest.mark.parametrize(("settings", "words"), UNSUPPORTED, ids=[next(iter(s)) for s, _ in UNSUPPORTED])
def test_what_is_not_computed_is_refused_by_name(folder, settings, words):
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= settings
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_what_is_not_computed_is_refused_in_a_configuration(folder):
    config = KimiVLConfig.from_pretrained(folder)
    config.text_config.n_group = 2
    with pytest.raises(CheckpointError, match="n_group is 2; only 1 is supported"):
        KimiVLForConditionalGeneration._from_config(config, torch_dtype=ms.float32)


def test_quantised_weights_are_refused():
    config = Config.from_directory(DEMO)
    object.__setattr__(config, "quantization", object())
    with pytest.raises(CheckpointError, match="quantization_config is there"):
        model.load(DEMO, config, ms.float32)


def test_bfloat16_becomes_float32_on_a_cpu_and_says_so(folder, caplog):
    with caplog.at_level(logging.INFO, "kimi_vl"):
        loaded = load(folder, ms.bfloat16, attn_implementation="flash_attention_2")
    assert loaded.dtype == ms.float32
    assert [
        record.message for record in caplog.records if "mindspore" in record.name and "bfloat16" in record.message
    ] == ["bfloat16 becomes float32: MindSpore does not compute with it on a CPU"]
    assert len([record for record in caplog.records if "flash_attention_2" in record.message]) == 1


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2", None])
def test_attention_is_the_same_by_every_name(folder, attention):
    config = KimiVLConfig.from_pretrained(folder, attn_implementation="flash_attention_2")
    ms.set_seed(1)
    loaded = KimiVLForConditionalGeneration._from_config(config, dtype=ms.float32, attn_implementation=attention)
    ids = ms.Tensor(np.arange(20, 40, dtype=np.int32)[None])
    ms.set_seed(1)
    again = KimiVLForConditionalGeneration._from_config(config, dtype=ms.float32)
    assert np.array_equal(loaded(ids).asnumpy(), again(ids).asnumpy())


def test_a_fresh_model_has_values_wherever_it_is_made(folder):
    """Also where MindSpore is told to leave parameters without values."""
    with nn.no_init_parameters():
        fresh = KimiVLForConditionalGeneration._from_config(
            KimiVLConfig.from_pretrained(folder), torch_dtype=ms.float32
        )
    values = {name: parameter.asnumpy() for name, parameter in fresh.parameters_and_names()}
    assert values.keys() == load_file(folder / "model.safetensors").keys()
    assert 0.018 < values[EXPERT].std() < 0.022 and not values[BIAS].any()
    assert (values["language_model.model.norm.weight"] == 1).all()


def test_names_of_the_hub_are_resolved_and_verified(tmp_path, monkeypatch):
    """From the cache that the processor reads, whose files have to be what their names say."""
    tree = weights_world.cache_tree(tmp_path)
    name = "moonshotai/Kimi-VL-A3B-Thinking"
    assert load(name, cache_dir=tmp_path).dtype == ms.float32
    assert load(name, cache_dir=tmp_path, revision=weights_world.REVISION).dtype == ms.float32
    monkeypatch.setenv("KIMI_VL_CACHE", str(tmp_path))
    assert load(name).dtype == ms.float32

    def no_network(*_: Any) -> Path:
        raise CheckpointError("no network")

    monkeypatch.setattr(huggingface, "fetch", no_network)
    monkeypatch.setenv("KIMI_VL_VERIFY", "always")
    assert load(name).dtype == ms.float32
    weights_world.flip(weights_world.largest_blob(tree))
    with pytest.raises(CheckpointError, match="no network"):
        load(name)
    with pytest.raises(CheckpointError, match="is neither one of"):
        load("no such model")


# ---------------------------------------------------------------------------------------------
# Mistakes of callers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mindspore_dtype": torch.bfloat16}, "mindspore_dtype is a dtype of PyTorch's; hand over"),
        ({"mindspore_dtype": "bfloat16"}, "mindspore_dtype is no dtype of MindSpore's; hand over"),
        ({"mindspore_dtype": None}, "mindspore_dtype is no dtype of MindSpore's; hand over"),
        ({"mindspore_dtype": ms.float32, "torch_dtype": torch.float32}, "torch_dtype is a dtype of PyTorch's"),
        ({"mindspore_dtype": ms.float32, "dtype": ms.float16}, "mindspore_dtype and dtype differ; hand over"),
        ({"dtype": ms.int8}, r"it must be mindspore\.bfloat16, float16 or float32"),
        ({"dtype": ms.float32, "attn_implementation": "sparse"}, "attn_implementation must be one of eager"),
        ({"dtype": ms.float32, "device_map": "auto"}, "device_map is not supported on MindSpore; leave it out"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        KimiVLForConditionalGeneration.from_pretrained(DEMO, **options)


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("mindspore", "2.6.0", r"must be at least 2\.7 and below 2\.11, and 2\.6\.0 is installed; run pip"),
        ("mindspore", "2.11.0rc1", r"2\.11\.0rc1 is installed"),
        ("mindspore", "3.0", r"3\.0 is installed"),
        ("numpy", "2.4.6", r"NumPy 2\.4\.6; run pip install 'numpy<2'"),
    ],
)
def test_an_environment_that_does_not_work_is_named(monkeypatch, package, version, words):
    right = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == package else right(name))
    with pytest.raises(UserError, match=words) as caught:
        load(DEMO)
    assert caught.value.code == "E_BACKEND"


def given(**changes: Any) -> dict[str, Any]:
    """A prompt with a picture of 4 × 6 patches for the demo."""
    ids = [[40, 1045, 1045, 1045, 1045, 1045, 1045, 41]]
    pixels, grids = np.zeros((24, 3, 14, 14), np.float32), np.array([[4, 6]], np.int32)
    tensors = {"input_ids": np.array(ids, np.int32), "pixel_values": pixels, "image_grid_hws": grids}
    return {name: ms.Tensor(value) for name, value in tensors.items()} | changes


def tensor(values: Any, dtype: Any = np.int32) -> Any:
    return ms.Tensor(np.array(values, dtype))


def test_the_prompt_of_these_tests_is_right(demo):
    whole = demo.generate(**given(attention_mask=tensor([[1] * 8])), max_new_tokens=1)
    assert whole.shape == (1, 9) and whole.dtype == ms.int32
    long = demo.generate(**given(input_ids=tensor([[40, *[1045] * 6, 41]], np.int64)), max_new_tokens=1)
    assert long.dtype == ms.int64 and long.asnumpy().tolist() == whole.asnumpy().tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": torch.ones(1, 8)}, r"input_ids is a torch Tensor, and the model is on MindSpore; use"),
        ({"input_ids": np.ones((1, 8))}, r"input_ids is a numpy ndarray"),
        ({"input_ids": [[1, 2]]}, r"input_ids is a Python list"),
        ({"pixel_values": torch.zeros(24, 3, 14, 14)}, "pixel_values is a torch Tensor"),
        ({"pixel_values": None}, "pixel_values is missing"),
        ({"image_grid_hws": None}, "image_grid_hws is missing"),
        ({"input_ids": tensor([40, 41])}, r"input_ids has shape \(2,\); it must be \(B, S\)"),
        ({"input_ids": tensor([[40.0]], np.float32)}, r"input_ids must be of mindspore\.int32 or int64"),
        ({"attention_mask": tensor([[1] * 7])}, r"attention_mask has shape \(1, 7\); it must be \(1, 8\)"),
        ({"attention_mask": tensor([[0] * 8])}, "a sequence without tokens"),
        ({"input_ids": tensor([[1280, *[1045] * 6]])}, "an id that is not in the vocabulary"),
        ({"input_ids": tensor([[-1, *[1045] * 6]])}, "an id that is not in the vocabulary"),
        ({"input_ids": tensor([[40, *[1045] * 5]])}, "has 5 places for images that take 6"),
        ({"image_grid_hws": tensor([4, 6])}, r"image_grid_hws has shape \(2,\); it must be \(n, 2\)"),
        (
            {"image_grid_hws": tensor([[4, 8]])},
            r"pixel_values has shape \(24, 3, 14, 14\); it must be \(32, 3, 14, 14\)",
        ),
        ({"image_grid_hws": tensor([[3, 8]])}, "image_grid_hws must be even and above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1 to"),
        ({"max_new_tokens": 8192}, "max_new_tokens must be from 1 to 8184"),
        ({"do_sample": True, "temperature": 3}, "temperature must be from 0 to 2"),
        ({"do_sample": True, "seed": "x"}, "seed must be a whole number"),
        ({"num_beams": 4}, "num_beams is not supported on MindSpore; leave it out"),
    ],
)
def test_wrong_inputs_are_named(demo, changes, words):
    with pytest.raises(UserError, match=words):
        demo.generate(**given(**changes))


def test_tensors_of_mindspore_are_refused_on_pytorch():
    loaded = KimiVLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
    for call in (loaded.generate, loaded):
        with pytest.raises(UserError, match="input_ids is a MindSpore tensor, but the model is on PyTorch"):
            call(**given())
