"""The weights that llama.cpp gets from a checkpoint are the checkpoint's own, in the blocks that its files have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_suite import checkpoint, derived, gguf_file
from bench_suite.gguf_file import Source

from kimi_vl.quantization.scheme import FORMS
from kimi_vl.quantization.weight import QuantizedWeight
from kimi_vl.weights import loader

LAYER = "language_model.model.layers.1"


def made(cache: Path, form: str | None, divisor: int = 4) -> Path:
    return checkpoint.with_layers(cache, 2, divisor=divisor, vocabulary=512, form=form).folder


def as_int4_or_int8(data: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """The values of blocks of q4_0 or q8_0, as llama.cpp describes them: a float16 scale and 32 weights each."""
    blocks = data.reshape(-1, 2 + (16 if kind == "Q4_0" else 32))
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    values = np.empty((len(blocks), 32), np.float32)
    for place in range(32):
        if kind == "Q8_0":
            values[:, place] = np.ascontiguousarray(blocks[:, 2 + place]).view(np.int8)
        else:
            byte = blocks[:, 2 + place % 16]
            values[:, place] = (byte >> 4 if place >= 16 else byte & 15).astype(np.float32) - 8
    return values * scales


@pytest.mark.parametrize(("form", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_integers_keep_their_values(form, kind):
    generator = torch.Generator().manual_seed(1)
    scheme = FORMS[form]
    integers = torch.randint(-(1 << scheme.bits - 1), 1 << scheme.bits - 1, (6, 64), generator=generator)
    scales = torch.randn(6, 2 if scheme.group else 1, generator=generator).half().float()  # of either sign
    expected = integers.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
    data = gguf_file.moved(integers.to(torch.int8).numpy(), scales.numpy(), kind)
    assert np.array_equal(as_int4_or_int8(data, kind).reshape(6, 64), expected.flatten(1).numpy())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_values_of_a_quantised_checkpoint_are_those_of_the_loader(tmp_path, form):
    folder = made(tmp_path, form, divisor=4 if form == "int4" else 16)
    source, model = Source(folder), loader.load(folder, dtype=torch.float32)
    for name in (f"{LAYER}.mlp.experts.5.up_proj.weight", "language_model.lm_head.weight"):
        slot = loader.checkpoint_layout(model.config)[name]
        held = model.get_submodule(slot.parameter)
        assert isinstance(held, QuantizedWeight)
        expected = held[slot.index].dequantize(torch.float32) if slot.index else held.dequantize(torch.float32)
        assert source.shape(name) == tuple(expected.shape)
        assert np.array_equal(source.floating(name), expected.numpy())
    kind = gguf_file.TYPES[form]
    moved = source.encoded(f"{LAYER}.self_attn.q_proj.weight", kind, no_quantizer)
    values = as_int4_or_int8(moved, kind).reshape(source.shape(f"{LAYER}.self_attn.q_proj.weight"))
    assert np.allclose(values, source.floating(f"{LAYER}.self_attn.q_proj.weight"), rtol=1e-3)  # a scale in float16


def no_quantizer(values: Any, kind: str) -> Any:
    raise AssertionError("these weights are quantised already")


def test_every_tensor_of_the_decoder_has_a_place_and_its_values(tmp_path):
    folder = made(tmp_path, None, divisor=16)
    source, config = Source(folder), loader.load(folder).config.text_config
    found = {name: (shape, content()) for name, shape, _, content in gguf_file.entries(
        source, vars(config), "BF16", no_quantizer)}  # fmt: skip
    weights = sum(int(np.prod(shape)) for shape, _ in found.values())
    decoder = loader.empty_model(loader.load(folder).config).language_model
    assert weights == sum(parameter.numel() for parameter in decoder.parameters())

    def values(name: str) -> torch.Tensor:
        shape, data = found[name]
        return torch.from_numpy(data.copy()).view(torch.bfloat16).float().view(shape)

    def stored(name: str) -> torch.Tensor:
        return torch.from_numpy(source.floating(name).copy())

    assert torch.equal(values("blk.1.ffn_down_exps.weight")[9], stored(f"{LAYER}.mlp.experts.9.down_proj.weight"))
    heads, keys = config.num_attention_heads, config.qk_nope_head_dim
    both = stored(f"{LAYER}.self_attn.kv_b_proj.weight").view(heads, keys + config.v_head_dim, -1)
    query, latent = torch.randn(keys), torch.randn(config.kv_lora_rank)
    for head in range(heads):  # a query in the latent space, and a value out of it
        absorbed = values("blk.1.attn_k_b.weight")[head] @ query
        assert torch.allclose(absorbed, query @ both[head, :keys], atol=1e-4)
        assert torch.allclose(values("blk.1.attn_v_b.weight")[head] @ latent, both[head, keys:] @ latent, atol=1e-4)


def test_what_is_made_of_a_checkpoint_is_made_once_and_again_for_a_newer_one(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    written = []

    def write(part: Path) -> None:
        written.append(part.name)
        part.write_text("content")

    target = derived.beside(folder, ".file", write)
    assert derived.beside(folder, ".file", write) == target == tmp_path / "model.file"
    assert len(written) == 1 and target.read_text() == "content"
    newer = target.stat().st_mtime + 10

    os.utime(folder / "config.json", (newer, newer))
    derived.beside(folder, ".file", write)
    assert len(written) == 2

    def fails(part: Path) -> None:
        part.write_text("half")
        raise OSError

    os.utime(folder / "config.json", (newer + 1e6, newer + 1e6))
    with pytest.raises(OSError):
        derived.beside(folder, ".file", fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
