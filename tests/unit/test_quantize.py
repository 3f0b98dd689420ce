"""Weights as small numbers: how far they are from what they were, and how files of them are written and read."""

from __future__ import annotations

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
from kimi_vl.quantization import scheme as schemes
from kimi_vl.quantization import search
from kimi_vl.quantization.scheme import FORMS, Quantization
from kimi_vl.quantization.weight import FLOAT8, QuantizedWeight, joined, pack, unpack
from kimi_vl.weights import loader, resolve
from kimi_vl.weights.pack import pack_quantized, write_quantized
from tests.quantized_checkpoints import EXPERT, held, relative

# The search


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


@pytest.mark.parametrize("kind", WEIGHTS)
def test_float8_is_as_exact_as_rounding_can_be(kind):
    """A value is off by no more than a 16th of itself or, below the normal numbers, by half of the least one."""
    weight = WEIGHTS[kind].double()
    found = search.quantized(weight, FORMS["float8"])
    assert found.codes.dtype == FLOAT8 and found.kind == "float8"
    away = (found.dequantize(torch.float64) - weight).abs()
    scales = found.scales.double()
    assert (away <= torch.maximum(weight.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 1e-6)).all()
    assert 0.02 < relative(found.dequantize(torch.float64), weight) < 0.03
    assert found.codes.float().abs().amax(1).ge(440).all()  # the whole range is used


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
    most = largest * {"int8": 0.006, "float8": 0.04, "int4": 0.3}[scheme.kind] + 2.0**-120
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


@pytest.mark.parametrize("form", ["int4", "float8"])
def test_joined_weights_are_parts_of_one(form):
    parts = [search.quantized(torch.randn(count, 64), FORMS[form]) for count in (3, 5)]
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
    """Every weight of a checkpoint of packed integers or float8 in float64, from the definition of its tensors: integer
    i of an output channel is in bits (i * bits) % 32 and up of word i * bits // 32, plus half of the range."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    read = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight_packed":
            if not kind.startswith("weight_"):
                scale = tensors.get(f"{name}_scale", torch.ones(1))
                read[name] = tensor.double().numpy() * scale.double().numpy()
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


@pytest.fixture(params=["int8", "int4", "float8"])
def packed(request, quantized) -> tuple[str, Path]:
    return request.param, quantized(request.param)


def test_a_packed_checkpoint_is_what_another_reader_finds_and_what_loading_quantises(packed, demo):
    form, folder = packed
    others, own = read_independently(folder), held(loader.load(folder, dtype=torch.float32))
    at_once = held(loader.load(resolve.DEMO, dtype=torch.float32, form=form))
    assert (folder / "config.json").read_text().count('"float-quantized"') == (2 if form == "float8" else 0)
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
        kept = re.search(r"vision_tower|multi_modal_projector|norm|mlp\.gate\.|embed_tokens", name)
        if kept:
            assert error == 0, name
        elif form == "float8":
            assert 0.02 < error < 0.03, name
        elif form == "int8" or module.endswith(("lm_head", "kv_b_proj")):
            assert 0.003 < error < 0.01, name
        else:
            assert 0.05 < error < 0.12, name


def test_the_card_ends_with_what_was_done(packed):
    form, folder = packed
    before, after = ((each / "README.md").read_text(encoding="utf-8") for each in (resolve.DEMO, folder))
    assert after.startswith(before) and f"--quantize {form}`" in after.removeprefix(before)


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


def test_own_configurations_are_read_as_they_are_written():
    for name in FORMS:
        made = schemes.form(name)
        assert Quantization.from_config(json.loads(json.dumps(schemes.to_config(made)))) == made
        module = "language_model.model.layers.3.mlp.experts.7.down_proj"
        assert made.scheme(module, linear=True) == FORMS[name]
        assert made.scheme("language_model.lm_head", linear=True) == FORMS[name if name == "float8" else "int8"]
        assert made.scheme("layers.1.self_attn.kv_b_proj", linear=True) == made.scheme("lm_head", linear=True)
        for kept in ("layers.1.mlp.gate", "embed_tokens", "vision_tower.blocks.0.wo"):
            assert made.scheme(kept, linear=True) is None
    with pytest.raises(ValueError, match="not as 'int3'"):
        schemes.form("int3")
