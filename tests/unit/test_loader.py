"""A checkpoint that is not whole is refused with one sentence that names the file or tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_vl import loader
from kimi_vl.errors import CheckpointError

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
GATE = "language_model.model.layers.1.mlp.gate.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_saving_gives_back_every_tensor(folder):
    model = loader.load(folder, dtype=torch.float32)
    loader.save(model, folder / "again.safetensors", dtype=torch.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(folder / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_split_checkpoint_is_the_same_model(folder):
    whole = loader.load(folder, dtype=torch.float32).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(7):
        file = f"model-{number + 1:05d}-of-00007.safetensors"
        save_file({name: tensors[name] for name in names[number::7]}, folder / file)
        weight_map |= dict.fromkeys(names[number::7], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    split = loader.load(folder, dtype=torch.float32, threads=3).state_dict()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    (folder / "model-00003-of-00007.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00007\.safetensors: is missing"):
        loader.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(GATE), rf"missing tensor {GATE}"),
        (lambda t: t.pop(EXPERT), rf"missing tensor {EXPERT}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (
            lambda t: t.update({GATE: t[GATE][:4].clone()}),
            rf"{GATE} has shape \(4, 64\); \(8, 64\) was expected",
        ),
        (lambda t: t.update({GATE: t[GATE].int()}), rf"{GATE} has dtype I32"),
    ],
    ids=["missing", "missing expert", "unexpected", "misshapen", "integers"],
)
def test_a_wrong_tensor_is_named(folder, change, words):
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=words):
        loader.load(folder)


@pytest.mark.parametrize("length", [0, 5, 2000, 1_000_000])
def test_a_cut_off_file_is_named(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a complete safetensors file"):
        loader.load(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        loader.load(folder)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {"x": "../model.safetensors"}}', '{"weight_map": 3}'])
def test_a_bad_index_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        loader.load(folder)
