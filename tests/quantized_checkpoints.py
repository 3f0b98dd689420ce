"""Quantised checkpoints of the demo, as others write them, and the values that a model holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.quantization.weight import QuantizedWeight
from kimi_vl.weights import loader, resolve

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"
HEAD = "language_model.lm_head.weight"


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


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
    "FP8 blocks": weights_config(format="float-quantized", type="float", strategy="block", block_structure=[48, 32]),
}
