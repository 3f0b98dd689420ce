"""Synthetic checkpoints of a wanted size, with the published widths where there is room for them.

Made once and kept: a folder's name says what is in it, and it gets that name only when it is complete.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kimi_vl.model.config import PUBLISHED_TEXT, Config
from kimi_vl.quantization import scheme
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader, resolve

from . import random_weights

CACHE = Path(__file__).parents[2] / ".cache" / "bench"
# The published config.json, but for the numbers of layers.
PUBLISHED: dict[str, Any] = {
    "architectures": ["KimiVLForConditionalGeneration"],
    "model_type": "kimi_vl",
    "media_placeholder_token_id": 163605,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "model_type": "moonvit",
        "patch_size": 14,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "num_attention_heads": 16,
        "num_hidden_layers": 1,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "merge_kernel_size": [2, 2],
    },
    "text_config": {
        **asdict(PUBLISHED_TEXT),
        "num_hidden_layers": 2,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rope_scaling": None,
    },
}
_VISION_BLOCKS = _TEXT_LAYERS = 27
_SHARD_BYTES = 500e6


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and in words what is in it."""

    folder: Path
    shape: str
    nbytes: int

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def ready(cache: Path, nbytes: float) -> Checkpoint:
    """A bfloat16 checkpoint of at most ``nbytes``, from ``cache`` where it was made before.

    It has all the layers that fit, at the published widths or, where not even two layers of those do, at the
    largest power of two under them. Raises ValueError where nothing fits.
    """
    return _made(cache, *_configuration(nbytes))


def with_layers(
    cache: Path,
    text_layers: int,
    vision_blocks: int = 1,
    divisor: int = 1,
    vocabulary: int = 0,
    form: str | None = None,
) -> Checkpoint:
    """A checkpoint with so many layers, from ``cache`` where it was made before; widths as published, or divided by
    ``divisor``, as many ids as ``vocabulary`` says, and weights in bfloat16 or quantised as ``form``."""
    values = divided(divisor, text_layers, vision_blocks)
    return _made(cache, divisor, with_vocabulary(values, vocabulary) if vocabulary else values, form)


def _made(cache: Path, divisor: int, values: dict[str, Any], form: str | None = None) -> Checkpoint:
    text, vision = values["text_config"]["num_hidden_layers"], values["vision_config"]["num_hidden_layers"]
    ids = values["text_config"]["vocab_size"]
    fewer = ids < PUBLISHED["text_config"]["vocab_size"] // divisor
    name = f"counting-{'published' if divisor == 1 else f'div{divisor}'}-{text}-{vision}"
    folder = cache / "-".join(filter(None, (name, str(ids) if fewer else "", form)))
    quantized = {"quantization_config": scheme.to_config(scheme.form(form))} if form else {}
    config = json.dumps(values | quantized, indent=1)
    if not (folder.exists() and (folder / "config.json").read_text(encoding="utf-8") == config):
        shutil.rmtree(folder, ignore_errors=True)  # of another version of this file
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        try:
            part.mkdir(parents=True)
            _write(part, Config.from_dict(values), form)
            _write_companions(part, ids)
            (part / "config.json").write_text(config, encoding="utf-8")
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    widths = "published widths" if divisor == 1 else f"published widths / {divisor}"
    shape = f"{widths}, {text} of {_TEXT_LAYERS} text layers, {vision} of {_VISION_BLOCKS} vision blocks"
    shape += f", a vocabulary of {ids:,}" if fewer else ""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Checkpoint(folder, shape, size)


def _configuration(nbytes: float) -> tuple[int, dict[str, Any]]:
    for divisor in (1, 2, 4, 8, 16):
        smallest = _size(divided(divisor, 2, 1))
        if smallest > nbytes:
            continue
        layer, block = (_size(divided(divisor, 3, 1)) - smallest), (_size(divided(divisor, 2, 2)) - smallest)
        text = min(_TEXT_LAYERS, 2 + int((nbytes - smallest) // layer))
        left = nbytes - smallest - (text - 2) * layer
        return divisor, divided(divisor, text, min(_VISION_BLOCKS, 1 + int(left // block)))
    raise ValueError(f"{nbytes / 1e6:.1f} MB is too little for a checkpoint; {smallest / 1e6:.1f} MB is the least")


def divided(divisor: int, text_layers: int, vision_blocks: int) -> dict[str, Any]:
    """The published values with every width divided and so many layers; heads stay as wide as they are."""
    values = copy.deepcopy(PUBLISHED)
    text, vision = values["text_config"], values["vision_config"]
    for name in (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads num_key_value_heads "
        "kv_lora_rank"
    ).split():
        text[name] //= divisor
    for name in "hidden_size intermediate_size num_attention_heads".split():
        vision[name] //= divisor
    for name in ("init_pos_emb_height", "init_pos_emb_width"):
        vision[name] = max(4, vision[name] // divisor)
    text["num_hidden_layers"], vision["num_hidden_layers"] = text_layers, vision_blocks
    return with_vocabulary(values, text["vocab_size"])


def with_vocabulary(values: dict[str, Any], size: int) -> dict[str, Any]:
    """The same configuration with so many ids, of which the last 256 are special tokens in the published order."""
    special = {name: size - end for name, end in (("bos_token_id", 256), ("eos_token_id", 255), ("pad_token_id", 1))}
    text = values["text_config"] | special | {"vocab_size": size}
    return values | {"text_config": text, "media_placeholder_token_id": size - 235}


def _size(values: dict[str, Any]) -> int:
    return sum(parameter.nbytes for parameter in loader.empty_model(Config.from_dict(values)).parameters())


def _write(folder: Path, config: Config, form: str | None) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(random_weights.tensors(config, form)), start=1):
        file = f"model-{number:05d}.safetensors"
        print(f"set-up: writing {file} of a synthetic checkpoint (once)", file=sys.stderr, flush=True)
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _write_companions(folder: Path, ids: int) -> None:
    """What a pipeline needs beside the weights. The tokens are bytes and then words that are their own ids."""
    words = [bytes([value]) for value in range(256)] + [f" {number}".encode() for number in range(256, ids - 256)]
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
    (folder / "tiktoken.model").write_text("".join(lines), encoding="utf-8")
    special = Tokenizer({word: rank for rank, word in enumerate(words)}).special
    added = {str(index): {"content": name, "special": True} for name, index in special.items()}
    text = json.dumps({"added_tokens_decoder": added}, indent=1)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    shutil.copy(resolve.DEMO / "preprocessor_config.json", folder)


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, value in tensors:
        shard[name], held = value.contiguous(), held + value.nbytes
        if held >= _SHARD_BYTES:
            yield shard
            shard, held = {}, 0
    if shard:
        yield shard
