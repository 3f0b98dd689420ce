"""Quantised checkpoints that others made, and damaged ones: read as they are meant, or refused by a name."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_vl import kernels, pipeline
from kimi_vl.device import cuda
from kimi_vl.engine.engine import EngineOptions
from kimi_vl.errors import CheckpointError
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.quantization import scheme as schemes
from kimi_vl.quantization.scheme import Quantization
from kimi_vl.quantization.weight import QuantizedWeight
from kimi_vl.weights import loader, resolve
from tests.quantized_checkpoints import EXPERT, FOREIGN, HEAD, Q_PROJ, held, relative, weights_config, written


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_that_others_quantised_load(tmp_path, demo, kind):
    """Every value, whatever the decoder computes with; integers stay integers."""
    due = written(tmp_path, FOREIGN[kind], demo)
    model = loader.load(tmp_path, dtype=torch.float32)
    for name, value in held(model).items():
        assert relative(value, due[name]) < 1e-6, name
    assert (Q_PROJ not in dict(model.named_parameters())) == (not kind.startswith("FP8"))
    assert HEAD in dict(model.named_parameters())


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if kind.startswith("FP8")])
def test_float8_stays_where_the_device_has_it(tmp_path, demo, kind, monkeypatch):
    """Unless blocks do not fit a weight: of 160 inputs none has whole blocks of 128."""
    due = written(tmp_path, FOREIGN[kind], demo)
    monkeypatch.setattr(cuda, "has_float8", lambda device: True)
    model = loader.load(tmp_path, dtype=torch.float32)
    for name, value in held(model).items():
        assert relative(value, due[name]) < 1e-6, name
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    assert {module.kind for module in modules.values()} == {"float8"}
    assert (Q_PROJ in modules) == (kind != "FP8 block")
    planned = loader.planned_model(Config.from_directory(tmp_path), torch.float32)
    assert [(*each,) for each in shapes(planned)] == [(*each,) for each in shapes(model)]


@pytest.mark.parametrize("kind", ["W4A16 group", "int8"])
def test_what_is_checked_while_weights_load_is_what_the_engine_asks_for(tmp_path, demo, kind):
    """Or else the check would run twice; scales are of the files' dtype, float32 here."""
    written(tmp_path, FOREIGN[kind], demo)
    planned = loader.planned_model(Config.from_directory(tmp_path), torch.float32, directory=tmp_path)
    options, gpu = EngineOptions(), torch.device("cuda")
    use = options.use(loader.load(tmp_path, dtype=torch.float32))
    assert options.use(planned, torch.device("cpu")) == use
    assert {dtype for _, _, dtype in use.projections} == {"float32"}
    assert options.use(planned, gpu).max_num_batched_tokens == options.batched_tokens("cuda") == 2048


def test_the_pipeline_prepares_what_its_engine_asks_for(tmp_path, demo, monkeypatch):
    written(tmp_path, FOREIGN["W4A16 group"], demo)
    asked, select = [], kernels.select_ops
    monkeypatch.setattr(EngineOptions, "batched_tokens", lambda self, kind: {"cpu": 99}[kind])
    monkeypatch.setattr(kernels, "prepare", lambda device, use: asked.append(use))
    monkeypatch.setattr(kernels, "select_ops", lambda device, use: asked.append(use) or select(device, "torch"))
    pipeline.load(str(tmp_path), "cpu", torch.float32, EngineOptions(max_num_seqs=2, cache_bytes=1 << 20)).close()
    first, second = asked
    assert first == second and first.max_num_seqs == 2


def shapes(model: KimiVL) -> Iterator[tuple[str, torch.Size]]:
    return ((name, parameter.shape) for name, parameter in model.named_parameters())


def test_float8_is_of_gpus_that_have_it(monkeypatch):
    for capability, has in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert cuda.has_float8(torch.device("cuda:0")) == has
        assert not cuda.has_float8(torch.device("cpu"))


def test_w8a8_serves_with_its_weights_alone(tmp_path, demo):
    config = copy.deepcopy(FOREIGN["int8"])
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    due = written(tmp_path, config, demo)
    assert relative(held(loader.load(tmp_path, dtype=torch.float32))[Q_PROJ], due[Q_PROJ]) < 1e-6
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(CheckpointError, match=r"input_activations\.dynamic is False"):
        Quantization.from_config(config)


def changed(path: str, value: Any) -> dict[str, Any]:
    config: Any = weights_config()
    *above, last = path.split(".")
    place = config
    for step in above:
        place = place[step]
    place[last] = value
    return config


WEIGHTS_AT = "config_groups.group_0.weights"
REFUSED = {
    "awq": ({"quant_method": "awq"}, "quant_method is 'awq'"),
    "gptq": ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    "fp8": ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
    "a list": ([], "quantization_config is not an object"),
    "marlin": (changed("format", "marlin-24"), "format is 'marlin-24'"),
    "no format": (changed("format", None), "format is None"),
    "no groups": (changed("config_groups", {}), "config_groups is missing or empty"),
    "not compressed": (changed("quantization_status", "frozen"), "quantization_status is 'frozen'"),
    "cache": (changed("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is"),
    "sparse": (changed("sparsity_config", {"format": "sparse-24"}), "sparsity_config is there"),
    "asymmetric": (changed(f"{WEIGHTS_AT}.symmetric", False), "weights.symmetric is False"),
    "3 bits": (changed(f"{WEIGHTS_AT}.num_bits", 3), "weights.num_bits is 3"),
    "one bit is not true": (changed(f"{WEIGHTS_AT}.symmetric", 1), "weights.symmetric is 1"),
    "reordered": (changed(f"{WEIGHTS_AT}.actorder", "group"), "weights.actorder is 'group'"),
    "strategy": (changed(f"{WEIGHTS_AT}.strategy", "token"), "weights.strategy is 'token'"),
    "no group size": (changed(f"{WEIGHTS_AT}.strategy", "group"), "weights.group_size is None"),
    "float4": (changed(WEIGHTS_AT, {"num_bits": 4, "type": "float"}), "weights.num_bits is 4"),
    "packed floats": (
        changed(WEIGHTS_AT, {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
        "type is 'float', which the format 'pack-quantized' does not have",
    ),
    "no weights": (changed(WEIGHTS_AT, None), "weights is missing"),
    "targets": (changed("config_groups.group_0.targets", "Linear"), "targets is not a list of names"),
    "pattern": (changed("ignore", ["re:("]), "a pattern that is no regular expression"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_schemes_are_refused_by_name(kind):
    config, words = REFUSED[kind]
    values = json.loads((resolve.DEMO / "config.json").read_text())
    with pytest.raises(CheckpointError, match=re.escape(words)):
        Config.from_dict(values | {"quantization_config": config})


def change_config(folder: Path, path: str, value: Any) -> None:
    """Set one value of the ``quantization_config`` in ``folder``."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    *above, last = path.split(".")
    place = values["quantization_config"]
    for step in above:
        place = place[step]
    place[last] = value
    file.write_text(json.dumps(values))


UP, O_PROJ = EXPERT, Q_PROJ.replace("q_proj", "o_proj")
DAMAGE = {
    "no scale": ("int4", lambda t: t.pop(f"{Q_PROJ}_scale"), rf"missing tensor {Q_PROJ}_scale"),
    "no scale of float8": ("float8", lambda t: t.pop(f"{UP}_scale"), rf"missing tensor {UP}_scale"),
    "no shape": ("int4", lambda t: t.pop(f"{UP}_shape"), rf"missing tensor {UP}_shape"),
    "zero scale": ("int4", lambda t: t[f"{UP}_scale"][3].zero_(), rf"{UP}_scale has a scale that is zero"),
    "zero scale of float8": ("float8", lambda t: t[f"{UP}_scale"][3].zero_(), rf"{UP}_scale has a scale that is zero"),
    "NaN scale": (
        "int4",
        lambda t: t[f"{Q_PROJ}_scale"][0].fill_(float("nan")),
        rf"{Q_PROJ}_scale has a scale that is zero, not finite",
    ),
    "infinite": (
        "int4",
        lambda t: t[f"{HEAD}_scale"][9].fill_(float("inf")),
        rf"{HEAD}_scale has a scale that is zero, not",
    ),
    "a product past float32": (
        "float8",
        lambda t: t[f"{HEAD}_scale"][9].fill_(1e36),
        rf"{HEAD}_scale has a scale that is .* too large",
    ),
    "other group": (
        "int4",
        lambda t: t.update({f"{Q_PROJ}_scale": t[f"{Q_PROJ}_scale"][:, ::5].clone()}),
        rf"{Q_PROJ}_scale has shape \(160, 1\); \(160, 5\) was expected",
    ),
    "scales without their second dimension": (
        "float8",
        lambda t: t.update({f"{Q_PROJ}_scale": t[f"{Q_PROJ}_scale"].flatten()}),
        rf"{Q_PROJ}_scale has shape \(160,\); \(160, 1\) was expected",
    ),
    "scales of another matrix": (
        "float8",
        lambda t: t.update({f"{UP}_scale": t[f"{HEAD}_scale"].clone()}),
        rf"{UP}_scale has shape \(1280, 1\)",
    ),
    "integers as scales": (
        "int8",
        lambda t: t.update({f"{Q_PROJ}_scale": t[f"{Q_PROJ}_scale"].int()}),
        rf"{Q_PROJ}_scale has dtype I32; a floating-point one was expected",
    ),
    "shape": ("int4", lambda t: t[f"{Q_PROJ}_shape"].add_(1), rf"{Q_PROJ}_shape says \(161, 161\); \(160, 160\)"),
    "shape the other way around": (
        "int8",
        lambda t: t.update({f"{UP}_shape": t[f"{UP}_shape"].flip(0)}),
        rf"{UP}_shape says \(160, 64\); \(64, 160\)",
    ),
    "words": (
        "int4",
        lambda t: t.update({f"{Q_PROJ}_packed": t[f"{Q_PROJ}_packed"].long()}),
        rf"{Q_PROJ}_packed has dtype I64",
    ),
    "fewer words": (
        "int4",
        lambda t: t.update({f"{Q_PROJ}_packed": t[f"{Q_PROJ}_packed"][:, 1:].clone()}),
        rf"{Q_PROJ}_packed has shape \(160, 19\); \(160, 20\) was expected",
    ),
    "words of 8 bits": (
        "int4",
        lambda t: t.update({f"{Q_PROJ}_packed": t[f"{Q_PROJ}_packed"].repeat(1, 2)}),
        rf"{Q_PROJ}_packed has shape \(160, 40\); \(160, 20\) was expected",
    ),
    "floats": ("int4", lambda t: t.update({Q_PROJ: torch.zeros(160, 160)}), rf"unexpected tensor {Q_PROJ}"),
    "zero points": (
        "int4",
        lambda t: t.update({f"{Q_PROJ}_zero_point": torch.zeros(20, 5, dtype=torch.int32)}),
        f"unexpected tensor {Q_PROJ}_zero_point",
    ),
    "an order of inputs": (
        "int4",
        lambda t: t.update({f"{Q_PROJ}_g_idx": torch.arange(160, dtype=torch.int32)}),
        f"unexpected tensor {Q_PROJ}_g_idx",
    ),
    "float8 that is bfloat16": (
        "float8",
        lambda t: t.update({UP: t[UP].bfloat16()}),
        rf"{UP} has dtype BF16; F8_E4M3 was expected",
    ),
    "float8 with more exponent": (
        "float8",
        lambda t: t.update({UP: t[UP].to(torch.float8_e5m2)}),
        rf"{UP} has dtype F8_E5M2; F8_E4M3 was expected",
    ),
    "float8 as bytes": (
        "float8",
        lambda t: t.update({UP: t[UP].view(torch.uint8)}),
        rf"{UP} has dtype U8; F8_E4M3 was expected",
    ),
    "NaN of float8": (
        "float8",
        lambda t: t[UP].view(torch.uint8)[5, 7].fill_(0xFF),
        rf"{UP} has a value that is not finite",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_tensor(tmp_path, quantized, kind):
    form, change, words = DAMAGE[kind]
    folder = Path(shutil.copytree(quantized(form), tmp_path / "out"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        loader.load(folder)


@pytest.mark.parametrize("has_float8", [False, True])
def test_float8_that_is_not_finite_is_refused_on_every_device(tmp_path, quantized, has_float8, monkeypatch):
    monkeypatch.setattr(cuda, "has_float8", lambda device: has_float8)
    test_a_damaged_checkpoint_is_refused_by_tensor(tmp_path, quantized, "NaN of float8")


def test_integers_that_do_not_fit_are_refused(tmp_path, demo):
    written(tmp_path, FOREIGN["int4 in bytes"], demo)
    for value in (8, -9, 127, -128):
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[Q_PROJ][3, 5] = value
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has an integer of more than 4 bits"):
            loader.load(tmp_path)


GROUP = "config_groups.group_1"  # of int4: the head is group_0
LIES = {
    "group size": (f"{GROUP}.weights.group_size", 64, r"has 160 inputs, which are no groups of 64"),
    "smaller groups": (f"{GROUP}.weights.group_size", 16, rf"{O_PROJ}_scale has shape \(160, 5\); \(160, 10\)"),
    "bits": (f"{GROUP}.weights.num_bits", 8, rf"{O_PROJ}_packed has shape \(160, 20\); \(160, 40\)"),
    "by channel": (
        f"{GROUP}.weights",
        {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
        rf"{O_PROJ}_scale has shape \(160, 5\); \(160, 1\)",
    ),
    "integers that are not packed": ("config_groups.group_0.format", "int-quantized", rf"{HEAD}_packed; "),
    "unknown scheme": (f"{GROUP}.format", "nvfp4-pack-quantized", r"group_1\.format is 'nvfp4-pack-quantized'"),
    "ignored, but quantised": (
        "ignore", [*schemes.KEPT, "re:.*lm_head$"], rf"unexpected tensor {HEAD}_packed.*missing tensor {HEAD}$",
    ),
    "not ignored, and floating-point": (
        "ignore",
        [name for name in schemes.KEPT if "vision_tower" not in name],
        r"unexpected tensor vision_tower\S+\.weight.* more problems",
    ),
    "targets of nothing": (f"{GROUP}.targets", ["re:nothing"], r"unexpected tensor \S+_packed.* more problems"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_configuration_that_says_otherwise_than_the_tensors_is_refused(tmp_path, quantized, kind):
    path, value, words = LIES[kind]
    folder = Path(shutil.copytree(quantized("int4"), tmp_path / "out"))
    change_config(folder, path, value)
    with pytest.raises(CheckpointError, match=words):
        loader.load(folder)


def in_two_shards(folder: Path) -> list[Path]:
    """Cut the only file in ``folder`` in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), [folder / f"model-{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::2]}, file)
    weight_map = {name: files[place % 2].name for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("form", ["int4", "float8"])
def test_a_tensor_in_two_shards_is_refused(tmp_path, quantized, form):
    folder = Path(shutil.copytree(quantized(form), tmp_path / "out"))
    files = in_two_shards(folder)
    loader.check(folder)
    scale = f"{Q_PROJ}_scale"
    own, other = (load_file(file) for file in files)
    if scale in other:
        files, own, other = files[::-1], other, own
    save_file(other | {scale: own[scale]}, files[1])
    with pytest.raises(CheckpointError, match=rf"{files[1].name}: unexpected tensor {scale}$"):
        loader.load(folder)


@pytest.mark.parametrize("form", ["int4", "float8"])
@pytest.mark.parametrize("read", [loader.check, loader.load])
def test_a_cut_off_shard_is_refused(tmp_path, quantized, form, read):
    folder = Path(shutil.copytree(quantized(form), tmp_path / "out"))
    path = in_two_shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{path.name}: is not a complete safetensors file"):
        read(folder)


def test_scales_of_a_layer_s_experts_may_be_of_different_types(tmp_path, demo):
    """Those of float32 lose nothing beside others of float16."""
    due = written(tmp_path, FOREIGN["W8A16 channel"], demo)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(name for name in tensors if ".experts." in name and name.endswith("_scale"))
    last = [name for name in names if "experts.7" in name]
    assert 0 < len(last) < len(names)
    for name in last:
        half = tensors[name].half()
        due[name.removesuffix("_scale")] *= (half.double() / tensors[name].double()).view(-1, 1)
        tensors[name] = half
    save_file(tensors, tmp_path / "model.safetensors")
    for name, value in held(loader.load(tmp_path, dtype=torch.float32)).items():
        assert relative(value, due[name]) < 1e-6, name
