"""config.json is read strictly: what is missing or not computed here is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from kimi_vl.errors import CheckpointError
from kimi_vl.model.config import Config

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
VALUES = json.loads((CHECKPOINT / "config.json").read_text())


def changed(section: str | None, name: str, value: object) -> dict:
    values = copy.deepcopy(VALUES)
    (values[section] if section else values)[name] = value
    return values


def test_reads_the_published_form():
    config = Config.from_directory(CHECKPOINT)
    assert config.text_config.qk_head_dim == 32
    assert config.vision_config.head_dim == 24
    assert [config.text_config.is_dense(layer) for layer in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("text_config", "q_lora_rank", 64),
        ("text_config", "n_group", 8),
        ("text_config", "scoring_func", "softmax"),
        ("text_config", "topk_method", "greedy"),
        ("text_config", "norm_topk_prob", False),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "rope_scaling", {"type": "yarn", "factor": 4}),
        ("text_config", "attention_bias", True),
        ("text_config", "tie_word_embeddings", True),
        ("text_config", "num_key_value_heads", 2),
        ("text_config", "hidden_size", "64"),
        ("text_config", "hidden_size", 0),
        ("text_config", "rms_norm_eps", -1.0),
        ("text_config", "num_experts_per_tok", 9),
        ("text_config", "qk_rope_head_dim", 15),
        ("vision_config", "merge_kernel_size", [4, 4]),
        ("vision_config", "model_type", "clip"),
        ("vision_config", "hidden_size", 70),
        (None, "media_placeholder_token_id", 5000),
        (None, "tie_word_embeddings", True),
        (None, "model_type", "llava"),
        (None, "vision_config", None),
    ],
)
def test_what_is_not_computed_is_refused_by_name(section, name, value):
    with pytest.raises(CheckpointError, match=name):
        Config.from_dict(changed(section, name, value))


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_no_field_has_a_default(section):
    read = {
        "init_pos_emb_height",
        "hidden_size",
        "num_hidden_layers",
        "kv_lora_rank",
        "rope_theta",
        "q_lora_rank",
    }
    for name in read & VALUES[section].keys():
        values = copy.deepcopy(VALUES)
        del values[section][name]
        with pytest.raises(CheckpointError, match=name):
            Config.from_dict(values)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null"])
def test_a_bad_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Config.from_directory(tmp_path)
