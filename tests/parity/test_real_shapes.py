"""The published model's shapes: every tensor name, the parameter count, and layers of real width that run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_suite import checkpoint
from safetensors.torch import save_file

from kimi_vl.model import language, vision
from kimi_vl.model.config import Config
from kimi_vl.model.projector import Projector
from kimi_vl.weights import loader

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

PUBLISHED = checkpoint.divided(1, 27, 27)


def published_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The published checkpoint's tensors, written out from its index rather than from our modules."""
    tower = "vision_tower"
    yield f"{tower}.patch_embed.proj.weight", (1152, 3, 14, 14)
    yield f"{tower}.patch_embed.proj.bias", (1152,)
    yield f"{tower}.patch_embed.pos_emb.weight", (64, 64, 1152)
    linear = {"wqkv": (3456, 1152), "wo": (1152, 1152), "mlp.fc0": (4304, 1152), "mlp.fc1": (1152, 4304)}
    for block in range(27):
        prefix = f"{tower}.encoder.blocks.{block}"
        for name in ("norm0", "norm1"):
            yield f"{prefix}.{name}.weight", (1152,)
            yield f"{prefix}.{name}.bias", (1152,)
        for name, shape in linear.items():
            yield f"{prefix}.{name}.weight", shape
            yield f"{prefix}.{name}.bias", shape[:1]
    for name in (f"{tower}.encoder.final_layernorm", "multi_modal_projector.pre_norm"):
        yield f"{name}.weight", (1152,)
        yield f"{name}.bias", (1152,)
    for name, shape in (("linear_1", (4608, 4608)), ("linear_2", (2048, 4608))):
        yield f"multi_modal_projector.{name}.weight", shape
        yield f"multi_modal_projector.{name}.bias", shape[:1]
    yield "language_model.model.embed_tokens.weight", (163840, 2048)
    for layer in range(27):
        prefix = f"language_model.model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (2048,)
        yield f"{prefix}.post_attention_layernorm.weight", (2048,)
        yield f"{prefix}.self_attn.q_proj.weight", (3072, 2048)
        yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", (576, 2048)
        yield f"{prefix}.self_attn.kv_a_layernorm.weight", (512,)
        yield f"{prefix}.self_attn.kv_b_proj.weight", (4096, 512)
        yield f"{prefix}.self_attn.o_proj.weight", (2048, 2048)
        mlps = {f"{prefix}.mlp": 11264}
        if layer:
            yield f"{prefix}.mlp.gate.weight", (64, 2048)
            yield f"{prefix}.mlp.gate.e_score_correction_bias", (64,)
            mlps = {f"{prefix}.mlp.experts.{expert}": 1408 for expert in range(64)}
            mlps[f"{prefix}.mlp.shared_experts"] = 2816
        for name, width in mlps.items():
            yield f"{name}.gate_proj.weight", (width, 2048)
            yield f"{name}.up_proj.weight", (width, 2048)
            yield f"{name}.down_proj.weight", (2048, width)
    yield "language_model.model.norm.weight", (2048,)
    yield "language_model.lm_head.weight", (163840, 2048)


def test_every_tensor_and_the_parameter_count():
    config = Config.from_dict(PUBLISHED)
    assert sum(p.numel() for p in loader.empty_model(config).parameters()) == 16_407_656_048
    layout = loader.checkpoint_layout(config)
    assert len(layout) == 5652
    assert {name: slot.shape for name, slot in layout.items()} == dict(published_tensors())


def relative_error(module: torch.nn.Module, *inputs: torch.Tensor, **options) -> float:
    """Of ``module`` in bfloat16 against the same rounded weights and inputs in float64."""
    with torch.inference_mode():
        rounded = module.bfloat16()(*(x.bfloat16() for x in inputs), **options).double()
        exact = module.double()(*(x.bfloat16().double() for x in inputs), **options)
    return float((rounded - exact).norm() / exact.norm())


def scaled(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of the size that keeps activations near one."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def test_real_width_vision_block_and_projector_in_bfloat16():
    config = Config.from_dict(PUBLISHED)
    angles = vision.rope_angles([(8, 8), (4, 6)], 72, torch.device("cpu")).unsqueeze(1)
    states = torch.randn(88, 1152)
    block = scaled(vision.Block(config.vision_config))
    assert relative_error(block, states, cos=angles.cos(), sin=angles.sin(), lengths=[64, 24]) < 0.02
    assert relative_error(scaled(Projector(config)), torch.randn(10, 4, 1152)) < 0.02


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "experts"])
def test_real_width_text_layer_in_bfloat16(dense):
    config = Config.from_dict(PUBLISHED).text_config
    layer = scaled(language.Layer(config, layer=0 if dense else 1))
    positions = torch.arange(12).unsqueeze(0)
    cos, sin = language.rope_tables(positions, 64, config.rope_theta, torch.bfloat16)

    def run(states: torch.Tensor) -> torch.Tensor:
        tables = (cos.to(states.dtype), sin.to(states.dtype))
        return layer(states, *tables, None)

    states = torch.randn(1, 12, 2048).bfloat16()
    with torch.inference_mode():
        layer.bfloat16()
        rounded = run(states).double()
        exact = layer.double() and run(states.double())
    # a token whose best experts nearly tie may be routed otherwise after rounding: most tokens must agree closely
    errors = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.median() < 0.02
    assert (errors < 0.02).double().mean() >= 0.75


# ---------------------------------------------------------------------------------------------
# Loading


def real_width_values(layers: int, experts: int) -> dict:
    """Real widths with fewer layers, experts and words, so that a test has room for it."""
    values = copy.deepcopy(PUBLISHED)
    values["text_config"] |= {"num_hidden_layers": layers, "n_routed_experts": experts, "vocab_size": 4096}
    values["vision_config"] |= {"num_hidden_layers": 1}
    values["media_placeholder_token_id"] = 4000
    return values


def write_shards(folder: Path, values: dict) -> int:
    """A checkpoint of random bfloat16 tensors in many shards; returns its bytes."""
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)
    weight_map, shard, held, total, count = {}, {}, 0, 0, 0

    def flush():
        nonlocal shard, held, count
        count += 1
        name = f"model-{count:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard, held = {}, 0

    for name, slot in loader.checkpoint_layout(Config.from_dict(values)).items():
        shard[name] = torch.randn(slot.shape, generator=generator).bfloat16()
        held, total = held + shard[name].nbytes, total + shard[name].nbytes
        if held > 40e6:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert count >= 5
    return total


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real_width")
    assert write_shards(folder, real_width_values(layers=2, experts=8)) > 300e6
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_shards_load_exactly_and_with_little_memory(many_shards, dtype):
    program = f"""
        import json, re, torch
        from pathlib import Path
        from kimi_vl.weights import loader

        def status(name):
            return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        loader.load({str(ROOT / "tests/golden/golden_a/checkpoint")!r})  # what Python and torch take the first time
        before = status("VmRSS")
        model = loader.load({str(many_shards)!r}, dtype=torch.{dtype})
        taken = (status("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters())
        experts = model.language_model.model.layers[1].mlp.experts
        sums = [float(t.double().sum()) for t in (experts.gate_up_proj[3, 1408:], experts.down_proj[7])]
        print(json.dumps([taken, sums]))
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    taken, sums = json.loads(output)
    assert 0.9 < taken < 1.1  # mapped files count as well
    weights = {}
    from safetensors import safe_open

    for path in many_shards.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(("experts.3.up_proj.weight", "experts.7.down_proj.weight")):
                    weights[name.rsplit(".", 2)[1]] = float(file.get_tensor(name).double().sum())
    assert sums == [weights["up_proj"], weights["down_proj"]]
