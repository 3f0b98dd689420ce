"""The demo checkpoint's shape and files, in exactly the published on-disk format."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from kimi_vl.media.images import ImageOptions
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import NUM_SPECIAL_TOKENS, Tokenizer
from kimi_vl.weights import loader

NUM_RANKS = 1024
VOCAB_SIZE = NUM_RANKS + NUM_SPECIAL_TOKENS - 2
CONTEXT = 8192


def config_values() -> dict[str, Any]:
    """``config.json`` of the demo model; the fields are those of the published one."""
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "vision_config": {
            "model_type": "moonvit",
            "patch_size": 14,
            "init_pos_emb_height": 24,
            "init_pos_emb_width": 24,
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            "hidden_size": 128,
            "intermediate_size": 512,
            "merge_kernel_size": [2, 2],
            "torch_dtype": "bfloat16",
        },
        "text_config": {
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": CONTEXT,
            "hidden_size": 160,
            "intermediate_size": 384,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_shared_experts": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 40,
            "routed_scaling_factor": 2.446,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "ep_size": 1,
            "pretraining_tp": 1,
            "aux_loss_alpha": 0.001,
            "seq_aux": True,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "rope_theta": 800000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
            "tie_word_embeddings": False,
            "bos_token_id": NUM_RANKS,
            "eos_token_id": NUM_RANKS + 1,
            "pad_token_id": NUM_RANKS + 255,
            "torch_dtype": "bfloat16",
        },
        "ignore_index": -100,
        "media_placeholder_token_id": NUM_RANKS + 21,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def preprocessor_values() -> dict[str, Any]:
    """``preprocessor_config.json``; 1,024 patches are a picture of 448 x 448 pixels, the largest it has seen."""
    return {
        "image_processor_type": "KimiVLImageProcessor",
        "in_token_limit": 1024,
        "patch_size": 14,
        "num_pooled_tokens": 1024,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "pad_input": True,
    }


def image_options() -> ImageOptions:
    values = preprocessor_values()
    mean, std = values["image_mean"], values["image_std"]
    return ImageOptions(values["patch_size"], values["in_token_limit"], tuple(mean), tuple(std))


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-pair ranks for ``texts``, single bytes first in the published order; no token joins two digits."""
    alphabet = _printable_first_bytes()
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_RANKS,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # markers stand alone, so that an opener or closer put there by the engine has the same tokens as a learnt one
    bpe.train_from_iterator(_without_markers(texts), trainer)
    merged = sorted((index, token) for token, index in bpe.get_vocab().items() if len(token) > 1)
    mapping = _byte_level_mapping()
    ranks = {byte: rank for rank, byte in enumerate(alphabet)}
    for _, token in merged:
        ranks[bytes(mapping[character] for character in token)] = len(ranks)
    while len(ranks) < NUM_RANKS:  # a small corpus may have too few pairs; the rest are runs of spaces
        ranks[b" " * (NUM_RANKS - len(ranks) + 2)] = len(ranks)
    return Tokenizer(ranks)


def _without_markers(texts: Iterable[str]) -> Iterator[str]:
    marker = re.compile(f"{THINK_OPEN}|{THINK_CLOSE}")
    for text in texts:
        yield from (piece for piece in marker.split(text) if piece)
    yield from ["◁", "think", "▷", "◁/"] * 1000


def _printable_first_bytes() -> list[bytes]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [bytes([value]) for value in [*printable, *(value for value in range(256) if value not in set(printable))]]


def _byte_level_mapping() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, back to the byte."""
    order = [byte[0] for byte in _printable_first_bytes()]
    printable = 94 + 12 + 82
    return {chr(v) if n < printable else chr(256 + n - printable): v for n, v in enumerate(order)}


def write(directory: Path, model: KimiVL, tokenizer: Tokenizer) -> None:
    """All files of the checkpoint: weights in bfloat16, configuration, tokenizer, image processor."""
    directory.mkdir(parents=True, exist_ok=True)
    loader.save(model, directory / "model.safetensors")
    write_without_weights(directory, tokenizer)


def write_without_weights(directory: Path, tokenizer: Tokenizer) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    lines = (
        base64.b64encode(tokenizer.token_bytes(rank)).decode() + f" {rank}\n" for rank in range(tokenizer.num_ranks)
    )
    (directory / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    _write_json(directory / "config.json", config_values())
    _write_json(directory / "preprocessor_config.json", preprocessor_values())
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": [tokenizer.eos_id],
            "pad_token_id": tokenizer.pad_id,
        },
    )
    named = {
        str(index): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for name, index in tokenizer.named.items()
    }
    _write_json(
        directory / "tokenizer_config.json",
        {
            "added_tokens_decoder": named,
            "additional_special_tokens": [name for name in tokenizer.named if name.startswith("<|")],
            "bos_token": "[BOS]",
            "eos_token": "[EOS]",
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1048576,
            "tokenizer_class": "TikTokenTokenizer",
        },
    )


def demo_config() -> Config:
    return Config.from_dict(config_values())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
