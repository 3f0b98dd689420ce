"""Both implementations against what the original computes, and proof that the comparison sees single mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.model import language, projector, vision

GOLDEN = Path(__file__).parent / "golden_a"
FOLDERS = golden.case_folders(GOLDEN)
Patch = Callable[[pytest.MonkeyPatch, golden.Native], None]


@pytest.fixture(scope="module")
def native():
    return golden.Native(GOLDEN / "checkpoint")


@pytest.fixture(scope="module")
def hugging_face():
    return golden.HuggingFace(GOLDEN / "checkpoint")


def test_all_cases_are_here():
    assert len(FOLDERS) == 14
    assert (GOLDEN / "cases" / "07_two_images" / "stages.safetensors").exists()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_native(native, folder):
    found = golden.compare(native, folder)
    assert len(found) >= 5
    assert [difference for difference in found if not difference.good] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_hugging_face(hugging_face, folder):
    found = golden.compare(hugging_face, folder)
    assert len(found) >= 5
    assert [difference for difference in found if not difference.good] == []


def test_every_stage_is_compared(native):
    folder = GOLDEN / "cases" / "07_two_images"
    stages = {difference.stage for difference in golden.compare(native, folder)}
    assert len([stage for stage in stages if "." in stage]) == 53


def test_an_absent_stage_is_a_failure(native):
    folder = GOLDEN / "cases" / "07_two_images"
    with mock.patch.object(native, "stages", return_value={}):
        bad = [difference for difference in golden.compare(native, folder) if not difference.good]
    assert len(bad) == 53


# ---------------------------------------------------------------------------------------------
# Planted mistakes: each is a plausible misreading of the model, and each must be seen.


def _epsilon(value: float, choose: Callable[[str], bool]) -> Patch:
    def plant(patch: pytest.MonkeyPatch, native: golden.Native) -> None:
        chosen = [module for name, module in native.model.named_modules() if choose(name)]
        assert chosen
        for module in chosen:
            patch.setattr(module, "eps", value)

    return plant


def _exact_gelu(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
    patch.setattr(vision.Mlp, "forward", lambda self, states: self.fc1(F.gelu(self.fc0(states))))


def _tanh_gelu(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
    def forward(self: projector.Projector, groups: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(groups).flatten(1)), approximate="tanh"))

    patch.setattr(projector.Projector, "forward", forward)


def _rope_not_taken_apart(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
    def apply_rope_half(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat((-second, first), dim=-1) * sin

    patch.setattr(language, "apply_rope_half", apply_rope_half)


def _rope_order(order: Callable[[Tensor], Tensor]) -> Patch:
    """``order`` rearranges the angles, seen as (P, D/4, 2) with columns first."""

    def plant(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
        right = vision.rope_angles

        def angles(grids, head_dim, device):
            return order(right(grids, head_dim, device).unflatten(-1, (-1, 2))).flatten(1)

        patch.setattr(vision, "rope_angles", angles)

    return plant


def _resized(**options) -> Patch:
    def plant(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
        def resized(self: vision.PositionTable, grid):
            table = F.interpolate(self.weight.permute(2, 0, 1).unsqueeze(0), size=grid, **options)
            return table.squeeze(0).permute(1, 2, 0).flatten(0, 1)

        patch.setattr(vision.PositionTable, "resized", resized)

    return plant


def _merge_by_columns(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
    right = vision.merge
    patch.setattr(vision, "merge", lambda *arguments: right(*arguments)[:, [0, 2, 1, 3]])


def _attention_across_images(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
    right = vision.attention
    patch.setattr(vision, "attention", lambda query, key, value, lengths: right(query, key, value, [sum(lengths)]))


def _gate(score: Callable[[Tensor], Tensor], bias: bool, bias_in_weights: bool, normalise: bool, scale: bool) -> Patch:
    def plant(patch: pytest.MonkeyPatch, _: golden.Native) -> None:
        def forward(self: language.Gate, states: Tensor) -> tuple[Tensor, Tensor]:
            scores = score(F.linear(states.float(), self.weight.float()))
            biased = scores + self.e_score_correction_bias if bias else scores
            chosen = biased.topk(self.top_k, dim=-1).indices
            weights = (biased if bias_in_weights else scores).gather(-1, chosen)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if normalise else weights
            return chosen, weights * (self.scaling if scale else 1.0)

        patch.setattr(language.Gate, "forward", forward)

    return plant


def _scaled_shared_experts(patch: pytest.MonkeyPatch, native: golden.Native) -> None:
    for name, module in native.model.named_modules():
        if name.endswith("shared_experts"):
            right = module.forward
            patch.setattr(module, "forward", lambda states, right=right: right(states) * 2.446)


def _value_before_key(patch: pytest.MonkeyPatch, native: golden.Native) -> None:
    """The halves of kv_b_proj's output exchanged (nope and v are equally wide here)."""
    for name, module in native.model.named_modules():
        if name.endswith("kv_b_proj"):
            right = module.forward
            heads = native.model.config.text_config.num_attention_heads

            def exchanged(states, right=right, heads=heads):
                return right(states).unflatten(-1, (heads, 2, -1)).flip(-2).flatten(-3)

            patch.setattr(module, "forward", exchanged)


def _wrong_scale(patch: pytest.MonkeyPatch, native: golden.Native) -> None:
    for name, module in native.model.named_modules():
        if name.endswith("self_attn"):
            patch.setattr(module, "scale", native.model.config.text_config.qk_nope_head_dim**-0.5)


MISTAKES: dict[str, Patch] = {
    "kv_a_layernorm takes rms_norm_eps": _epsilon(1e-5, lambda name: name.endswith("kv_a_layernorm")),
    "rms norms take 1e-6": _epsilon(
        1e-6, lambda name: name.endswith(("input_layernorm", "post_attention_layernorm", "model.norm"))
    ),
    "vision layer norms take 1e-6": _epsilon(
        1e-6, lambda name: name.endswith(("norm0", "norm1", "final_layernorm")) and "vision" in name
    ),
    "pre_norm takes 1e-6": _epsilon(1e-6, lambda name: name.endswith("pre_norm")),
    "exact GELU in the vision MLP": _exact_gelu,
    "tanh GELU in the projector": _tanh_gelu,
    "text rope pairs halves, not neighbours": _rope_not_taken_apart,
    "vision rope axes exchanged": _rope_order(lambda angles: angles.flip(-1)),
    "vision rope axes one after the other": _rope_order(lambda angles: angles.transpose(1, 2)),
    "position table antialiased": _resized(mode="bicubic", antialias=True),
    "position table aligned at its corners": _resized(mode="bicubic", align_corners=True),
    "position table bilinear": _resized(mode="bilinear"),
    "patches merged by columns": _merge_by_columns,
    "attention across images": _attention_across_images,
    "router bias unused": _gate(torch.sigmoid, False, False, True, True),
    "router bias in the weights": _gate(torch.sigmoid, True, True, True, True),
    "router weights not normalised": _gate(torch.sigmoid, True, False, False, True),
    "router weights not scaled": _gate(torch.sigmoid, True, False, True, False),
    "router scores by softmax": _gate(lambda scores: scores.softmax(-1), True, False, True, True),
    "shared experts scaled": _scaled_shared_experts,
    "kv_b_proj gives values first": _value_before_key,
    "attention scaled by the nope part alone": _wrong_scale,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(native, monkeypatch, name):
    folder = GOLDEN / "cases" / ("07_two_images" if "across" in name else "04_portrait")
    monkeypatch.setattr(native, "stages", lambda *_: {})  # outputs alone must show it
    MISTAKES[name](monkeypatch, native)
    outputs = [difference for difference in golden.compare(native, folder) if "." not in difference.stage]
    assert any(not difference.good for difference in outputs)


def test_the_router_patch_is_the_router_when_nothing_is_wrong(native, monkeypatch):
    """The mistakes of the router differ from the right one by their mistake alone."""
    _gate(torch.sigmoid, True, False, True, True)(monkeypatch, native)
    assert all(difference.good for difference in golden.compare(native, GOLDEN / "cases" / "04_portrait"))
