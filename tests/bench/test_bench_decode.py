"""`scripts/bench throughput` and `mixed` at a tiny size: whole reports, and the bytes and operations of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_suite import checkpoint, contestants, traffic
from bench_suite.decode import bytes_a_step, prefill_operations
from torch.utils.flop_counter import FlopCounterMode

from kimi_vl.model.config import PUBLISHED_TEXT, Config, TextConfig
from kimi_vl.weights import loader

ROOT = Path(__file__).parents[2]


def published(layers: int) -> TextConfig:
    return replace(PUBLISHED_TEXT, num_hidden_layers=layers)


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The last line of its output."""
    command = [str(ROOT / "scripts" / "bench"), *arguments, "--cache", str(tmp_path)]
    command += "--layers 2 --divide 16 --tokens 5 --rounds 1 --peer transformers".split()
    process = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert min(report[key] for key in ("copy_gb_per_s", "read_gb_per_s", "gemm_tflop_per_s")) > 0
    assert report["versions"].keys() == {"kimi_vl", "transformers"}
    return report


def test_the_report_of_equal_requests_is_complete(tmp_path):
    results = bench(tmp_path, *"throughput --sequences 1 3 --context 20".split())["results"]
    assert [(result["sequences"], result["who"]) for result in results] == [
        (sequences, who) for sequences in (1, 3) for who in ("kimi_vl", "transformers")
    ]
    for result in results:
        assert result["tokens_per_second"] == pytest.approx(result["sequences"] / result["step_ms"] * 1e3, rel=0.01)
        assert result["gb_per_s"] == pytest.approx(result["gb_a_step"] / result["step_ms"] * 1e3, rel=0.01)
        assert min(result["first_token_s"], result["percent_of_reading"]) > 0
    assert results[0]["experts_read"] == 6  # of one row: those it chose
    assert 6 <= results[2]["experts_read"] <= 18


def test_the_report_of_mixed_requests_is_complete(tmp_path):
    results = bench(tmp_path, *"mixed --requests 5 --longest 30 --side 8".split())["results"]
    assert [result["who"] for result in results] == ["kimi_vl", "transformers"]
    for result in results:
        assert result["requests_per_second"] == pytest.approx(5 / result["seconds"], rel=0.05)
        assert 0 < result["first_token_s"] <= result["last_first_token_s"] < result["seconds"]
        assert result["percent_of_ceiling"] > 0


def test_mixed_requests_are_the_same_each_time_and_of_all_kinds():
    config = Config.from_dict(checkpoint.divided(16, 2, 1))
    requests = traffic.mixture(config, 30, 200, 16, 40)
    assert requests == traffic.mixture(config, 30, 200, 16, 40)
    assert {request["side"] for request in requests} == {0, 4, 8, 16}
    for request in requests:
        placeholders = request["ids"].count(config.media_placeholder_token_id)
        assert placeholders == request["side"] ** 2 // 4
        assert 2 <= request["max_new_tokens"] <= 40
        assert 4 <= len(request["ids"]) - placeholders <= 200
    assert len({len(request["ids"]) for request in requests}) > 10


def test_a_contestant_that_ends_is_named():
    with pytest.raises(SystemExit, match="vllm ended with status"):
        contestants.Process(
            "vllm", Path("/nowhere"), device="cpu", dtype="bfloat16", sequences=1, threads=1, python=sys.executable
        )


def test_operations_of_a_prompt_are_those_that_torch_counts():
    config = Config.from_dict(checkpoint.divided(16, 3, 1))
    text, length = config.text_config, 24
    model = loader.empty_model(config, torch.float32).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.language_model(torch.randn(1, length, text.hidden_size), torch.arange(length).unsqueeze(0))
    # it counts the half of the scores that a causal mask hides
    width = text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim
    hidden = length * (length - 1) * text.num_hidden_layers * text.num_attention_heads * width
    assert counter.get_total_flops() == pytest.approx(prefill_operations(text, length) + hidden)


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


def test_a_checkpoint_with_fewer_ids_is_one_of_its_own(tmp_path):
    whole, fewer = (checkpoint.with_layers(tmp_path, 2, divisor=16, vocabulary=ids) for ids in (0, 512))
    assert whole.folder != fewer.folder and fewer.shape == whole.shape + ", a vocabulary of 512"
    config = loader.load(fewer.folder).config
    assert config.text_config.vocab_size == 512 and config.media_placeholder_token_id == 512 - 235
    assert fewer.nbytes < whole.nbytes


def test_many_sequences_read_all_experts_and_no_more():
    text = published(27)
    assert bytes_a_step(text, 1000, 0) == pytest.approx(bytes_a_step(text, 1, 0, distinct=text.n_routed_experts))
    assert bytes_a_step(text, 2, 0) < 2 * bytes_a_step(text, 1, 0)
