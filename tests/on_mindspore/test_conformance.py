"""The MindSpore model against what the original computes, and proof that the comparison sees single mistakes."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import golden
import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import ops
from safetensors.torch import load_file
from torch import Tensor

from kimi_vl import KimiVLForConditionalGeneration, KimiVLProcessor
from kimi_vl.mindspore import language, layers, vision
from kimi_vl.model.generation import Prompt
from tests.on_mindspore.conftest import inputs_of

GOLDEN = Path(__file__).parents[1] / "golden" / "golden_a"
FOLDERS = golden.case_folders(GOLDEN)


class OnMindSpore(golden.HuggingFace):
    """The backend, with the processor of the Hugging Face integration."""

    name = "kimi_vl.mindspore"

    def __init__(self, directory: Path):
        self.model: Any = KimiVLForConditionalGeneration.from_pretrained(directory, mindspore_dtype=ms.float32)
        self.processor = KimiVLProcessor.from_pretrained(directory)

    def vision(self, pixel_values: Tensor, grids: golden.Grids) -> Tensor:
        weights, config = self.model._weights / "vision_tower", self.model.network.vision_config
        return from_mindspore(vision.vision_tower(weights, config, ms.Tensor(pixel_values.numpy()), grids))

    def projected(self, pixel_values: Tensor, grids: golden.Grids) -> Tensor:
        return from_mindspore(self.model.encode_images(ms.Tensor(pixel_values.numpy()), grids))

    def logits(self, ids: list[int], pixel_values: Tensor | None, grids: golden.Grids) -> Tensor:
        return from_mindspore(self.model(**inputs_of([Prompt(ids, pixel_values, grids)])))[0]

    def generate(self, ids: list[int], pixel_values: Tensor | None, grids: golden.Grids) -> tuple[list[int], Tensor]:
        steps = []

        def kept(states: Any, logits: Callable[[Any], Any] = self.model._logits) -> Any:
            steps.append(logits(states))
            return steps[-1]

        inputs = inputs_of([Prompt(ids, pixel_values, grids)])
        with mock.patch.object(self.model, "_logits", kept):
            whole = self.model.generate(**inputs, max_new_tokens=golden.GENERATED, eos_token_id=-1)
        return whole.asnumpy()[0, len(ids) :].tolist(), torch.cat([from_mindspore(step) for step in steps])

    def stages(self, ids: list[int], pixel_values: Tensor | None, grids: golden.Grids) -> dict[str, Tensor]:
        """What functions give, call after call."""
        watched = {
            "vit.patch_embed": (vision, "patch_embed"),
            "vit.block{}.out": (vision, "block"),
            "projector.out": (vision, "projector"),
            "lm.layer{}.self_attn": (language, "self_attention"),
            "lm.layer{}.gate": (language, "route"),
            "lm.norm": (language, "decoder"),
        }
        caught: dict[str, Any] = {}
        with ExitStack() as stack:
            for name, (module, function) in watched.items():
                first = self.model.network.text_config.first_k_dense_replace if "gate" in name else 0
                wrapped = keeping(caught, name, first, getattr(module, function))
                stack.enter_context(mock.patch.object(module, function, wrapped))
            self.logits(ids, pixel_values, grids)
        found = {name: from_mindspore(value) for name, value in caught.items() if not isinstance(value, tuple)}
        for name, value in caught.items():
            if "gate" in name:
                found[f"{name}.topk_idx"], found[f"{name}.topk_weight"] = map(from_mindspore, value)
            elif isinstance(value, tuple):
                found[name] = from_mindspore(value[0])
        return found


def from_mindspore(values: Any) -> Tensor:
    return torch.from_numpy(values.asnumpy())


def keeping(caught: dict[str, Any], name: str, first: int, function: Callable[..., Any]) -> Callable[..., Any]:
    count = first

    def call(*arguments: Any) -> Any:
        nonlocal count
        caught[name.format(count)] = result = function(*arguments)
        count += 1
        return result

    return call


@pytest.fixture(scope="module")
def implementation() -> OnMindSpore:
    return OnMindSpore(GOLDEN / "checkpoint")


def test_all_cases_are_here():
    assert len(FOLDERS) == 14


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_case(implementation, folder):
    found = golden.compare(implementation, folder)
    assert len(found) >= 5
    assert [difference for difference in found if not difference.good] == []


def test_stages_are_compared(implementation):
    stages = {difference.stage for difference in golden.compare(implementation, GOLDEN / "cases" / "07_two_images")}
    layers_ = implementation.model.network.text_config.num_hidden_layers
    assert len([stage for stage in stages if "." in stage]) >= 2 * layers_ + 4


# ---------------------------------------------------------------------------------------------
# Planted mistakes: each is a plausible misreading of the model, and each must be seen.


def _rotate_halves(states: Any, cos: Any, sin: Any) -> Any:
    """Pairs of the two halves in the place of neighbours."""
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    return ops.cat((first * cos - second * sin, first * sin + second * cos), axis=-1)


def _interpolated(table: Any, grid: tuple[int, int]) -> Any:
    planes = table.transpose(2, 0, 1).expand_dims(0)
    resized = ops.interpolate(planes, size=grid, mode="bicubic", align_corners=False)
    return resized[0].transpose(1, 2, 0).reshape(-1, table.shape[-1])


def _other_experts(weights: Any, config: Any, tokens: Any, topk_ids: Any, topk_weights: Any) -> Any:
    return _EXPERTS(weights, config, tokens, config.n_routed_experts - 1 - topk_ids, topk_weights)


def _exchanged_weights(weights: Any, config: Any, tokens: Any, topk_ids: Any, topk_weights: Any) -> Any:
    """The experts' results in the order of the experts, their weights in the order of the scores."""
    order = np.argsort(topk_ids.asnumpy(), axis=-1)
    return _EXPERTS(weights, config, tokens, ms.Tensor(np.take_along_axis(topk_ids.asnumpy(), order, -1)), topk_weights)


def _route(bias: bool, bias_in_weights: bool, scale: bool) -> Callable[..., Any]:
    def route(weights: Any, config: Any, tokens: Any) -> Any:
        scores = ops.sigmoid(layers.gemm(tokens, weights["weight"]))
        biased = scores + weights["e_score_correction_bias"] if bias else scores
        _, topk_ids = ops.topk(biased, config.num_experts_per_tok)
        chosen = ops.gather_elements(biased if bias_in_weights else scores, 1, topk_ids)
        chosen = chosen / (chosen.sum(-1, keepdims=True) + 1e-20)
        return topk_ids, chosen * (config.routed_scaling_factor if scale else 1.0)

    return route


def _tanh_projector(weights: Any, groups: Any) -> Any:
    with mock.patch.object(ops, "gelu", lambda x: 0.5 * x * (1 + ops.tanh(0.7978845608 * (x + 0.044715 * x**3)))):
        return _PROJECTOR(weights, groups)


_EXPERTS, _PROJECTOR, _MERGE, _ATTEND = language.experts, vision.projector, vision.merge, vision.attend
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "text rope pairs halves": (language, "rotate", _rotate_halves),
    "vision rope pairs halves": (vision, "rotate", _rotate_halves),
    "position table by ops.interpolate": (vision, "resize", _interpolated),
    "experts in the other order": (language, "experts", _other_experts),
    "weights of other experts": (language, "experts", _exchanged_weights),
    "router bias unused": (language, "route", _route(False, False, True)),
    "router bias in the weights": (language, "route", _route(True, True, True)),
    "router weights not scaled": (language, "route", _route(True, False, False)),
    "latent norm takes rms_norm_eps": (language, "LATENT_NORM_EPS", 1e-5),
    "vision layer norms take 1e-6": (vision, "EPS", 1e-6),
    "tanh GELU in the projector": (vision, "projector", _tanh_projector),
    "patches merged by columns": (vision, "merge", lambda *given: _MERGE(*given)[:, [0, 2, 1, 3]]),
    "attention across images": (vision, "attend", lambda q, k, v, lengths: _ATTEND(q, k, v, [sum(lengths)])),
    "nothing is hidden": (layers, "hidden", lambda visible: visible.astype(ms.float32) * 0),
}


def outputs_are_good(implementation: OnMindSpore, folder: Path) -> bool:
    """Whether vision, projector and logits of a case are within tolerance."""
    expected, stored = json.loads((folder / "expected.json").read_text()), load_file(folder / "tensors.safetensors")
    grids = [(rows, columns) for rows, columns in expected["image_grid_hws"]]
    pixels = stored["pixel_values"]
    outputs = {
        "vit_output": implementation.vision(pixels, grids),
        "projector_output": implementation.projected(pixels, grids),
        "logits": implementation.logits(expected["input_ids"], pixels, grids),
    }
    distances = {}
    for name, ours in outputs.items():
        theirs = stored[name] if name in stored else stored[f"{name}_tail"]
        distances[name] = golden._distance(ours[-len(theirs) :], theirs)
    return all(distance <= golden.TOLERANCES[name] for name, distance in distances.items())


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(implementation, monkeypatch, name):
    folder = GOLDEN / "cases" / ("07_two_images" if "across" in name else "04_portrait")
    assert outputs_are_good(implementation, folder)
    module, attribute, wrong = MISTAKES[name]
    monkeypatch.setattr(module, attribute, wrong)
    assert not outputs_are_good(implementation, folder)


def test_the_router_patch_is_the_router_when_nothing_is_wrong(implementation, monkeypatch):
    monkeypatch.setattr(language, "route", _route(True, False, True))
    assert outputs_are_good(implementation, GOLDEN / "cases" / "04_portrait")
