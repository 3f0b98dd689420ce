"""`scripts/bench throughput` at a tiny size: its report is complete, and its account of bytes is the model's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from bench_suite import checkpoint
from bench_suite.decode import bytes_a_step

from kimi_vl import loader
from kimi_vl.config import Config, TextConfig

ROOT = Path(__file__).parents[2]


def published(layers: int) -> TextConfig:
    text = {**checkpoint.PUBLISHED["text_config"], "num_hidden_layers": layers}
    return Config.from_dict({**checkpoint.PUBLISHED, "text_config": text}).text_config


def test_the_report_is_complete(tmp_path):
    options = "--layers 2 --divide 16 --rows 1 3 --context 20 --tokens 5 --rounds 1 --peer".split()
    command = [str(ROOT / "scripts" / "bench"), "throughput", *options, "--cache", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])["results"]
    assert [(result["rows"], result["who"]) for result in results] == [
        (rows, who) for rows in (1, 3) for who in ("kimi_vl", "transformers")
    ]
    assert all(result["step_ms"] > 0 and result["of_read_bandwidth"] > 0 for result in results)
    assert results[0]["experts_read"] == 6  # of one row: those it chose
    assert 6 <= results[2]["experts_read"] <= 18


def test_bytes_of_one_row_are_its_active_parameters(tmp_path):
    folder = checkpoint.with_layers(tmp_path, 3, divisor=16).folder
    model = loader.load(folder)
    text = model.config.text_config
    language = dict(model.language_model.named_parameters())
    routed = sum(p.numel() for name, p in language.items() if ".experts." in name)
    read_whole = sum(p.numel() for name, p in language.items() if "norm" not in name and "bias" not in name) - routed
    read_whole -= language["model.embed_tokens.weight"].numel()
    active = read_whole + routed * text.num_experts_per_tok / text.n_routed_experts
    latents = text.num_hidden_layers * 100 * (text.kv_lora_rank + text.qk_rope_head_dim)
    assert bytes_a_step(text, 1, 100) == pytest.approx(2 * (active + latents))


def test_many_rows_read_all_experts_and_no_more():
    text = published(27)
    assert bytes_a_step(text, 1000, 0) == pytest.approx(bytes_a_step(text, 1, 0, distinct=text.n_routed_experts))
    assert bytes_a_step(text, 2, 0) < 2 * bytes_a_step(text, 1, 0)
