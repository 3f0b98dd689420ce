"""`scripts/bench throughput` and `mixed` at a tiny size: whole reports, and the bytes and operations of the model."""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_suite import checkpoint, conditions, contestants, decode, traffic
from bench_suite.contest import Contest
from bench_suite.decode import bytes_a_step, prefill_operations
from bench_suite.gguf_file import Source
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from kimi_vl.engine.engine import Engine, EngineOptions
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
    assert report["versions"].keys() == report["ready_s"].keys() == {"kimi_vl", "transformers"}
    assert report["machine"] == conditions.processor() and report["machine"] in process.stdout.partition("{")[0]
    assert len(report["load_average"]) == 2 and min(report["others_cores"]) >= 0
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
        assert result["experts_read"] == pytest.approx(result["experts_if_even"], rel=0.25)  # of a few steps
        assert result["first_token_times_kimi_vl"] > 0
    assert results[0]["experts_read"] == results[1]["experts_read"] == 6  # of one sequence: those it chose
    assert results[2]["experts_read"] == results[3]["experts_read"]  # both compute the same model
    assert [result["times_kimi_vl"] == 1 for result in results] == [True, False, True, False]


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


def decoding(folder: Path, sequences: int, tokens: int, form: str | None = None) -> tuple[float, int]:
    """Experts a layer reads in a step, and how many sequences count to the token that they should."""
    model = loader.load(folder)
    options = EngineOptions(prefix_caching=False, max_num_seqs=sequences, embedding_bytes=0)
    with closing(Engine(model, model.config.text_config.vocab_size, options)) as engine:
        ids = decode.prompts(sequences, 6, model.config.text_config.vocab_size)
        with decode.counted_experts(engine, sequences) as counts:
            *_, last = decode.run_engine(engine, ids, tokens)
    right = sum(found == prompt[-1] + tokens for prompt, found in zip(ids, last, strict=True))
    return statistics.mean(counts), right


@pytest.mark.parametrize("sequences", [4, 16])
@pytest.mark.parametrize("form", [None, "int8"])
def test_random_weights_choose_experts_evenly_and_count(tmp_path_factory, form, sequences):
    cache = tmp_path_factory.getbasetemp() / "even"
    folder = checkpoint.with_layers(cache, 4, divisor=16, vocabulary=2048, form=form).folder
    experts, right = decoding(folder, sequences, 16)
    assert experts == pytest.approx(64 * (1 - (1 - 6 / 64) ** sequences), rel=0.05)
    assert right == sequences


def test_experts_that_are_chosen_unevenly_are_seen(tmp_path):
    folder = checkpoint.with_layers(tmp_path, 2, divisor=16, vocabulary=512).folder
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = 100 * value
    save_file(tensors, path)
    experts, _ = decoding(folder, 16, 6)
    assert experts < 0.6 * 64 * (1 - (1 - 6 / 64) ** 16)


def test_answers_that_do_not_count_are_an_error():
    ids = [[7, 3], [9, 5]]
    traffic._check("somebody", ids, [{"last": [8, 10]}, {"last": [8, 10]}], 5)
    with pytest.raises(SystemExit, match="somebody gave 1 of 2 sequences other tokens"):
        traffic._check("somebody", ids, [{"last": [8, 10]}, {"last": [8, 11]}], 5)


def test_sequences_begin_to_count_at_different_ids_below_the_special_ones():
    ids = decode.prompts(64, 3, 512)
    assert len({prompt[-1] for prompt in ids}) == 64
    assert max(map(max, ids)) < 256
    assert ids == decode.prompts(64, 3, 512) != decode.prompts(64, 4, 512)


def test_each_round_but_the_warm_up_begins_when_a_line_comes(monkeypatch):
    lines = io.StringIO("\n\n\n")
    monkeypatch.setattr("sys.stdin", lines)
    began: list[int] = []
    Contest({}, wait=True).ask([], 2, lambda: began.append(lines.tell()))
    assert began == [0, 1, 2]


@pytest.mark.parametrize("apart", [True, False])
def test_contestants_take_turns_there_and_back_alone_in_memory_or_together(apart):
    running: list[str] = []
    turns: list[tuple[str, str]] = []

    class Fake:
        version, weights, ready_s, group = "1", None, 0.5, 0

        def __init__(self, name: str):
            self.name = name
            running.append(name)

        def ask(self, question: str) -> dict[str, Any]:
            turns.append((self.name, question))
            return {"in memory": sorted(running)}

        def kill(self) -> None:
            running.remove(self.name)

    starts: Any = {name: partial(Fake, name) for name in "ab"}
    contest = Contest(starts, apart=apart)
    first, second = contest.ask([("x",), ("y",)], 2, lambda: None)
    contest.end()
    assert not running
    assert first == second == {name: [{"in memory": [name] if apart else ["a", "b"]}] * 2 for name in "ab"}
    there, back = [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")], [("b", "x"), ("a", "x"), ("b", "y"), ("a", "y")]
    if apart:
        there, back = sorted(there), sorted(back, key=lambda turn: turn[0], reverse=True)
    assert turns == there + back + there
    # who ends a round begins the next one
    assert contest.ready_s == {name: [0.5] * (2 if apart else 1) for name in "ab"}


def test_the_neighbour_keeps_a_core_busy_and_others_are_counted():
    with conditions.busy_neighbour() as group:
        ours, others = conditions.Others([group]), conditions.Others([])
        used = Path(f"/proc/{group}/stat").read_text()
        deadline = time.monotonic() + 60
        while int(Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[11]) < 20:
            assert time.monotonic() < deadline and used
            time.sleep(0.05)
        with_it, without = others.cores(), ours.cores()
    assert with_it > without >= 0
    assert not Path(f"/proc/{group}").exists()


def test_a_processor_is_named_with_what_kernels_need(tmp_path):
    text = "cpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 amx_tile avx512_vnni\n"
    (tmp_path / "cpuinfo").write_text(text + text.replace("Some Xeon", "Another"))
    assert conditions.processor(tmp_path / "cpuinfo") == "Some Xeon (family 6, model 207; avx2 avx512_vnni amx_tile)"
    (tmp_path / "plain").write_text("model name : Old\ncpu family : 5\nmodel : 4\nflags : fpu\n")
    assert conditions.processor(tmp_path / "plain").startswith("Old (family 5, model 4; none of avx2 ")
    assert conditions.processor(tmp_path / "missing")


def test_a_stopped_contestant_ends_with_its_benchmark(tmp_path):
    """Whoever starts one and is killed while it has not the turn."""
    code = f"""
import pathlib, signal, os, sys
from bench_suite.contestants import Process
from bench_suite import checkpoint
folder = checkpoint.with_layers(pathlib.Path({str(tmp_path)!r}), 2, divisor=16, vocabulary=512).folder
one = Process("kimi_vl", folder, device="cpu", dtype="bfloat16", sequences=1, threads=1)
print(one.group, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    stat, deadline = Path(f"/proc/{int(process.stdout)}/stat"), time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody may wait for it
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


@pytest.mark.parametrize("form", [None, "int8"])
def test_weights_that_a_step_reads_are_those_of_the_loaded_decoder(tmp_path, form):
    folder = checkpoint.with_layers(tmp_path, 3, divisor=16, vocabulary=512, form=form).folder
    always, routed = Source(folder).weights_read()
    sizes = {name: value.nbytes for name, value in loader.load(folder).language_model.named_parameters()}
    shapes = 16 * sum(1 for path in folder.glob("*.safetensors") for name in load_file(path) if name.endswith("_shape"))
    assert routed + always - shapes == sum(sizes.values()) - sizes["model.embed_tokens.weight"]
    inside = sum(nbytes for name, nbytes in sizes.items() if ".experts." in name)
    assert inside <= routed <= inside + shapes


def test_many_sequences_read_all_experts_and_no_more():
    text = published(27)
    assert bytes_a_step(text, 1000, 0) == pytest.approx(bytes_a_step(text, 1, 0, distinct=text.n_routed_experts))
    assert bytes_a_step(text, 2, 0) < 2 * bytes_a_step(text, 1, 0)
