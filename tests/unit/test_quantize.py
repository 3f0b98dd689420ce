"""Weights as small integers: how far they are from what they were, and how files of them are written and read."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimi_vl.errors import CheckpointError
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.quantization import scheme as schemes
from kimi_vl.quantization import search
from kimi_vl.quantization.scheme import FORMS, Quantization, Scheme
from kimi_vl.quantization.weight import QuantizedWeight, joined, pack, unpack
from kimi_vl.weights import loader, resolve
from kimi_vl.weights.pack import pack_quantized, write_quantized

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"
HEAD = "language_model.lm_head.weight"


# The search


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """To the nearest multiple of the largest magnitude by the largest integer: what needs no search."""
    groups = weight.double().unflatten(1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True) / ((1 << bits - 1) - 1)
    return ((groups / scales).round() * scales).flatten(1)


def heavy_tailed(*shape: int) -> Tensor:
    normal = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    chi = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2)).square().mean(0)
    return normal / chi.sqrt()  # Student's t with 4 degrees of freedom


def layer_like(outputs: int, inputs: int) -> Tensor:
    """Normal weights, some input channels ten times as large, and output channels of different size."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    weight[:, torch.randperm(inputs, generator=generator)[: inputs // 100]] *= 10
    return weight * torch.rand(outputs, 1, generator=generator).add(0.5)


WEIGHTS = {
    "heavy-tailed": heavy_tailed(256, 1024),
    "an expert's down": layer_like(512, 1408),  # of the published width; the error does not depend on how many
    "a projection": layer_like(512, 2048),
}


@pytest.mark.parametrize("form", ["int4", "int4-g128"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_search_for_int4_scales_pays(kind, form):
    """A fifth of the squared error of plain rounding at least, whose scales need not even be rounded themselves."""
    weight, scheme = WEIGHTS[kind], FORMS[form]
    found = relative(search.quantized(weight, scheme).dequantize(torch.float64), weight)
    plain = relative(rounded(weight, 4, scheme.group), weight)
    assert found**2 <= 0.8 * plain**2
    assert found >= 0.5 * plain  # or the two do not compare the same


@pytest.mark.parametrize("kind", WEIGHTS)
def test_int8_is_as_exact_as_rounding_can_be(kind):
    weight = WEIGHTS[kind]
    found = relative(search.quantized(weight, FORMS["int8"]).dequantize(torch.float64), weight)
    steps = weight.double().abs().amax(1, keepdim=True) / 127
    floor = float((steps**2 / 12).mul(weight.shape[1]).sum().sqrt() / weight.double().norm())
    assert 0.9 * floor < found <= 1.2 * floor


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(list(FORMS.values())),
    st.integers(0, 2**31),
    st.sampled_from([1e-38, 1e-12, 1.0, 1e30]),
    st.booleans(),
)
def test_no_value_is_more_than_a_step_from_what_it_was(outputs, blocks, scheme, seed, size, zeros):
    weight = torch.randn(outputs, blocks * (scheme.group or 32), generator=torch.Generator().manual_seed(seed)) * size
    if zeros:
        weight[0] = 0
    found = search.quantized(weight, scheme)
    assert found.scales.isfinite().all() and (found.scales != 0).all()
    away = (found.dequantize(torch.float64) - weight.double()).abs().unflatten(1, (-1, found.group)).amax(-1)
    largest = weight.double().abs().unflatten(1, (-1, found.group)).amax(-1)
    # the search may clip the largest value by a third: 11 steps, of which there are 8
    most = largest * (0.006 if scheme.bits == 8 else 0.3) + 2.0**-120
    assert (away <= most).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value):
    weight = torch.ones(3, 64)
    weight[2, 63] = value
    for scheme in FORMS.values():
        if not weight.shape[1] % (scheme.group or 1):
            with pytest.raises(CheckpointError, match=r"a\.weight has a value that is not finite"):
                search.quantize(weight, scheme, "a.weight")


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_integer(bits):
    limit = 1 << bits - 1
    integers = torch.arange(-limit, limit, dtype=torch.int8).repeat(3, 2)
    assert torch.equal(unpack(pack(integers, bits), bits), integers)
    assert pack(integers, bits).shape == (3, integers.shape[1] * bits // 8)


def test_joined_weights_are_parts_of_one():
    parts = [search.quantized(torch.randn(count, 64), FORMS["int4"]) for count in (3, 5)]
    before = [part.dequantize(torch.float32) for part in parts]
    whole = joined(parts)
    assert whole is not None
    assert torch.equal(whole.dequantize(torch.float32), torch.cat(before))
    assert parts[1].codes.data_ptr() == whole[3:].codes.data_ptr()
    assert all(torch.equal(part.dequantize(torch.float32), wanted) for part, wanted in zip(parts, before, strict=True))
    assert joined([parts[0], search.quantized(torch.randn(5, 64), FORMS["int8"])]) is None


def test_codes_and_scales_of_different_matrices_are_refused():
    for scales in ((2, 3), (3, 2), (2, 0)):
        with pytest.raises(ValueError, match="different matrices"):
            QuantizedWeight(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(scales), 4)


# Files


def read_independently(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every weight of a checkpoint of packed integers in float64, from the definition of its tensors: number i of an
    output channel is in bits (i * bits) % 32 and up of word i * bits // 32, plus half of the range."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    read = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight_packed":
            if not kind.startswith("weight_"):
                read[name] = tensor.double().numpy()
            continue
        bits = next(
            group["weights"]["num_bits"]
            for group in groups.values()
            for target in group["targets"]
            if target == "Linear" or re.match(target.removeprefix("re:"), module)
        )
        outputs, inputs = tensors[f"{module}.weight_shape"].tolist()
        words = tensor.numpy().astype(np.int64) & 0xFFFFFFFF
        scales = tensors[f"{module}.weight_scale"].double().numpy()
        values = np.empty((outputs, inputs))
        for number in range(inputs):
            code = words[:, number * bits // 32] >> number * bits % 32 & (1 << bits) - 1
            values[:, number] = (code - (1 << bits - 1)) * scales[:, number // (inputs // scales.shape[1])]
        read[f"{module}.weight"] = values
    return read


def held(model: KimiVL) -> dict[str, Tensor]:
    """Every weight of a model in float64, by its name in a floating-point checkpoint."""
    found = {}
    for name, slot in loader.checkpoint_layout(model.config).items():
        try:
            value = model.get_parameter(slot.parameter).detach()
        except AttributeError:
            value = model.get_submodule(slot.parameter)
            assert isinstance(value, QuantizedWeight)
            value = value.dequantize(torch.float64)
        found[name] = value[slot.index].double() if slot.index else value.double()
    return found


@pytest.fixture(scope="module", params=["int8", "int4"])
def packed(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("packed") / request.param
    write_quantized(resolve.DEMO, folder, request.param)
    return request.param, folder


@pytest.fixture(scope="module")
def demo() -> dict[str, Tensor]:
    return load_file(resolve.DEMO / "model.safetensors")


def test_a_packed_checkpoint_is_what_another_reader_finds_and_what_loading_quantises(packed, demo):
    form, folder = packed
    others, own = read_independently(folder), held(loader.load(folder, dtype=torch.float32))
    at_once = held(loader.load(resolve.DEMO, dtype=torch.float32, form=form))
    assert others.keys() == own.keys() == demo.keys() == at_once.keys()
    for name, value in own.items():
        assert np.array_equal(others[name], value.numpy()), name
        assert torch.equal(value, at_once[name]), name


def test_what_is_quantised_and_what_is_not(packed, demo):
    """Errors tell the forms apart: none, that of 8 bits, and that of 4."""
    form, folder = packed
    for name, value in read_independently(folder).items():
        error = relative(torch.from_numpy(value), demo[name])
        module = name.removesuffix(".weight")
        kept = re.search(r"vision_tower|multi_modal_projector|norm|mlp\.gate\.|embed_tokens|kv_b_proj", name)
        if kept:
            assert error == 0, name
        elif form == "int8" or module.endswith("lm_head"):
            assert 0.003 < error < 0.01, name
        else:
            assert 0.05 < error < 0.12, name


def test_the_files_are_small_and_their_tensors_aligned(packed, demo):
    _, folder = packed
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % {"I64": 8, "I32": 4, "F32": 4}.get(entry["dtype"], 2) == 0
    assert (folder / "model.safetensors").stat().st_size < 0.85 * sum(value.nbytes for value in demo.values())


def test_a_tar_is_verified_and_loads(tmp_path):
    packed = pack_quantized(resolve.DEMO, tmp_path / "demo.tar", "int4")
    assert packed is not None
    assert [path.name for path in tmp_path.iterdir()] == ["demo.tar"]
    again = pack_quantized(resolve.DEMO, tmp_path / "again.tar", "int4")
    assert again == packed
    with pytest.raises(CheckpointError, match="is there already"):
        pack_quantized(resolve.DEMO, tmp_path / "demo.tar", "int4")


def test_shards_stay_shards(tmp_path, demo):
    source = Path(shutil.copytree(resolve.DEMO, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    names, weight_map = sorted(demo), {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        save_file({name: demo[name] for name in names[number::3]}, source / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_quantized(source, tmp_path / "out", "int8")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index[f"{EXPERT}_packed"] == weight_map[EXPERT]
    whole, split = (held(loader.load(folder, dtype=torch.float32)) for folder in (source, tmp_path / "out"))
    assert 0 < relative(split[EXPERT], whole[EXPERT]) < 0.01


def test_what_cannot_be_quantised_leaves_nothing(packed, tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has 24 inputs, which are no groups of 32"):
        write_quantized(golden, tmp_path / "out", "int4")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has 160 inputs, which are no groups of 128"):
        loader.load(resolve.DEMO, form="int4-g128")
    with pytest.raises(CheckpointError, match="is quantised already"):
        write_quantized(packed[1], tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="is quantised already, and not as int4-g128"):
        loader.load(packed[1], form="int4-g128")
    assert not list(tmp_path.iterdir())
    assert loader.load(packed[1], form=packed[0]).language_model.lm_head.weight is not None


# What others wrote


def weights_config(**weights: Any) -> dict[str, Any]:
    """A ``quantization_config`` of one group, as checkpoints have it that others quantised."""
    form = weights.pop("format", "pack-quantized")
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
        "ignore": ["language_model.lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "quantization_status": "compressed",
    }


def written(folder: Path, config: dict[str, Any], demo: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of ``config`` in ``folder``; returns what each weight has to be, in float64."""
    shutil.copytree(resolve.DEMO, folder, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    scheme = config["config_groups"]["group_0"]["weights"]
    tensors, due = {}, {}
    for name, value in demo.items():
        linear = name.endswith("_proj.weight") or "kv_a_proj" in name
        if not linear:
            tensors[name], due[name] = value, value.double()
            continue
        wide, (outputs, inputs) = value.float(), value.shape
        rows, columns = {
            "tensor": (outputs, inputs),
            "channel": (1, inputs),
            "group": (1, scheme.get("group_size")),
            "block": scheme.get("block_structure") or (1, 1),
        }[scheme["strategy"]]
        padded = torch.zeros(-(-outputs // rows) * rows, -(-inputs // columns) * columns)
        padded[:outputs, :inputs] = wide
        blocks = padded.view(-1, rows, padded.shape[1] // columns, columns)
        most = {"float": 448, "int": (1 << scheme["num_bits"] - 1) - 1}[scheme["type"]]
        scales = (blocks.abs().amax((1, 3)) / most).clamp(min=1e-6)
        spread = scales.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :inputs]
        if scheme["type"] == "float":
            tensors[name] = (wide / spread).to(torch.float8_e4m3fn)
            integers = tensors[name].double()
        else:
            integers = (wide / spread).round()
            if config["format"] == "pack-quantized":
                bits = scheme["num_bits"]
                codes = (integers + (1 << bits - 1)).long().unflatten(1, (-1, 32 // bits))
                words = (codes << torch.arange(0, 32, bits)).sum(-1)
                tensors[f"{name}_packed"] = torch.where(words >= 2**31, words - 2**32, words).int()
                tensors[f"{name}_shape"] = torch.tensor([outputs, inputs])
            else:
                tensors[name] = integers.to(torch.int8)
        tensors[f"{name}_scale"] = scales.view(1) if scheme["strategy"] == "tensor" else scales
        due[name] = integers.double() * spread.double()
    save_file(tensors, folder / "model.safetensors")
    return due


FOREIGN = {
    "W8A16 channel": weights_config(),
    "W8A16 group": weights_config(strategy="group", group_size=32),
    "W4A16 group": weights_config(num_bits=4, strategy="group", group_size=32),
    "W4A16 small groups": weights_config(num_bits=4, strategy="group", group_size=8),
    "W4A16 channel": weights_config(num_bits=4),
    "int8": weights_config(format="int-quantized"),
    "int8 of a tensor": weights_config(format="int-quantized", strategy="tensor"),
    "int4 in bytes": weights_config(format="int-quantized", num_bits=4, strategy="group", group_size=16),
    "FP8 channel": weights_config(format="float-quantized", type="float"),
    "FP8 tensor": weights_config(format="float-quantized", type="float", strategy="tensor"),
    "FP8 block": weights_config(format="float-quantized", type="float", strategy="block", block_structure=[48, 128]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_that_others_quantised_load(tmp_path, demo, kind):
    """Every value, whatever the decoder computes with; integers stay integers."""
    due = written(tmp_path, FOREIGN[kind], demo)
    model = loader.load(tmp_path, dtype=torch.float32)
    for name, value in held(model).items():
        assert relative(value, due[name]) < 1e-6, name
    stays = not kind.startswith("FP8") and "tensor" not in kind
    assert (Q_PROJ not in dict(model.named_parameters())) == stays
    assert HEAD in dict(model.named_parameters())


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


DAMAGE = {
    "no scale": (lambda t: t.pop(f"{Q_PROJ}_scale"), rf"missing tensor {Q_PROJ}_scale"),
    "no shape": (lambda t: t.pop(f"{EXPERT}_shape"), rf"missing tensor {EXPERT}_shape"),
    "zero scale": (lambda t: t[f"{EXPERT}_scale"][3].zero_(), rf"{EXPERT}_scale has a scale that is zero"),
    "NaN scale": (
        lambda t: t[f"{Q_PROJ}_scale"][0].fill_(float("nan")),
        rf"{Q_PROJ}_scale has a scale that is zero or",
    ),
    "infinite": (lambda t: t[f"{HEAD}_scale"][9].fill_(float("inf")), rf"{HEAD}_scale has a scale that is zero or not"),
    "other group": (
        lambda t: t.update({f"{Q_PROJ}_scale": t[f"{Q_PROJ}_scale"][:, ::5].clone()}),
        rf"{Q_PROJ}_scale has shape \(160, 1\); \(160, 5\) was expected",
    ),
    "shape": (lambda t: t[f"{Q_PROJ}_shape"].add_(1), rf"{Q_PROJ}_shape says \(161, 161\); \(160, 160\)"),
    "words": (
        lambda t: t.update({f"{Q_PROJ}_packed": t[f"{Q_PROJ}_packed"].long()}),
        rf"{Q_PROJ}_packed has dtype I64",
    ),
    "floats": (lambda t: t.update({Q_PROJ: torch.zeros(160, 160)}), rf"unexpected tensor {Q_PROJ}"),
    "zero points": (
        lambda t: t.update({f"{Q_PROJ}_zero_point": torch.zeros(20, 5, dtype=torch.int32)}),
        f"unexpected tensor {Q_PROJ}_zero_point",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_tensor(tmp_path, kind):
    write_quantized(resolve.DEMO, tmp_path / "out", "int4")
    change, words = DAMAGE[kind]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        loader.load(tmp_path / "out")


def test_a_cut_off_shard_is_refused(packed, tmp_path):
    shutil.copytree(packed[1], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a complete safetensors file"):
        loader.check(tmp_path)


def test_own_configurations_are_read_as_they_are_written():
    for name in FORMS:
        made = schemes.form(name)
        assert Quantization.from_config(json.loads(json.dumps(schemes.to_config(made)))) == made
        module = "language_model.model.layers.3.mlp.experts.7.down_proj"
        assert made.scheme(module, linear=True) == FORMS[name]
        assert made.scheme("language_model.lm_head", linear=True) == Scheme(8)
        for kept in ("layers.1.self_attn.kv_b_proj", "layers.1.mlp.gate", "embed_tokens", "vision_tower.blocks.0.wo"):
            assert made.scheme(kept, linear=True) is None
    with pytest.raises(ValueError, match="not as 'int3'"):
        schemes.form("int3")
