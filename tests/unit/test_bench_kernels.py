"""`scripts/bench_kernels` and `scripts/bench_gpu` without a GPU: their sums, their reports, and how they fail."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_suite import kernels
from bench_suite.kernel_inputs import PUBLISHED, Inputs, Widths, distances

ROOT = Path(__file__).parents[2]
TOY = Widths(hidden=64, experts=8, top_k=3, inner=32, shared=64)


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KIMI_VL_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)


def test_bytes_of_a_token():
    """The experts of a whole step, as the model's parameters give them: 6 of 64 routed ones and the shared two."""
    cases = kernels.Cases(TOY, torch.device("cpu"), 0)
    case, expert = cases.moe(1), 3 * TOY.hidden * TOY.inner
    assert case.nbytes == 2 * expert * (TOY.top_k + 2) + 4 * TOY.hidden
    assert case.operations == 2 * expert * (TOY.top_k + 2)
    assert cases.moe(1, shared=False).nbytes == 2 * expert * TOY.top_k + 4 * TOY.hidden
    # 26 layers of the published model: 2.699 and 0.900 GB
    published = 26 * 6 * PUBLISHED.hidden * PUBLISHED.inner * (PUBLISHED.top_k + 2)
    assert math.isclose(published, 2.699e9 + 0.900e9, rel_tol=1e-3)
    attention = kernels.Cases(Widths(heads=2), torch.device("cpu"), 0).mla_decode(3, 50)
    assert attention.nbytes == 3 * 50 * 1152 + 2 * 3 * 2 * (576 + 512)
    assert attention.operations == 3 * 50 * 2 * 2 * (576 + 512)


def test_attention_cases_use_pages_of_their_own():
    case = kernels.Cases(Widths(heads=1, rank=16, rope=8), torch.device("cpu"), 5e3).mla_decode(2, 40)
    assert len(case.calls) == 2  # 3,840 bytes each
    pages = torch.cat([call.arguments[2][:, :2].flatten() for call in case.calls])
    assert pages.unique().numel() == pages.numel() == len(case.calls[0].arguments[1])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("routing", ["random", "same"])
def test_grouped_products_compute_the_same(shared: bool, routing: str):
    call = Inputs(TOY, torch.bfloat16).moe(9, routing, shared)
    assert max(distances((kernels.grouped_mm(*call.arguments),), call.twin())) <= call.tolerance(torch.bfloat16)


def test_a_failing_contender_is_a_line_and_no_end(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise NotImplementedError("not here\nand not there")

    monkeypatch.setattr(kernels, "grouped_mm", fail)
    rows: list[dict[str, object]] = []
    where = kernels.Machine("toy", torch.device("cpu"), 1e9, 1e12, False)
    with torch.inference_mode():
        kernels.bench(where, kernels.Cases(TOY, where.device, 0), True, rows.append, budget=0)
    failed = [row for row in rows if "error" in row]
    assert {row["who"] for row in failed} == {"grouped_mm"}
    assert all("NotImplementedError: not here |" in kernels.row(row) for row in failed)
    assert "error" not in rows[rows.index(failed[0]) + 1]


def test_the_table_is_complete():
    process = script("bench_kernels", "--quick", "--experts", "2", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    first, *lines, last = process.stdout.splitlines()
    assert "no GPU" in first
    report = json.loads(last)
    assert {row["op"] for row in report["results"]} == {
        "add_rms_norm", "router", "moe", "latent_write", "mla_decode",
    }  # fmt: skip
    assert {row["who"] for row in report["results"]} == {"torch", "grouped_mm"}
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(report["results"])
    for row in report["results"]:
        assert row["microseconds"] > 0
        if row["gb_per_s"] > 1:
            share = 100 * row["gb_per_s"] / report["copy_gb_per_s"]
            assert math.isclose(row["percent_of_copy"], share, rel_tol=0.1, abs_tol=0.2)


def test_a_rehearsal_passes(tmp_path: Path):
    process = script(
        "bench_gpu", "--rehearse", "--only", "kernels_in_graphs", "layer_against_float64", "--out", str(tmp_path)
    )
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rehearsal"] is True
    assert list(report["sections"]) == ["kernels_in_graphs", "layer_against_float64"]
    section = report["sections"]["layer_against_float64"]
    assert (section["ended"], section["checks"], section["passed"]) == ("done", 2, 2)


def test_a_failing_section_does_not_stop_the_rest(tmp_path: Path):
    """Here every section fails, for there is no GPU."""
    process = script("bench_gpu", "--only", "kernels_in_graphs", "layer_against_float64", "--out", str(tmp_path))
    assert process.returncode == 1
    report = json.loads((tmp_path / "results.json").read_text())
    assert {name: section["ended"] for name, section in report["sections"].items()} == {
        "kernels_in_graphs": "failed",
        "layer_against_float64": "failed",
    }
    assert "NOT everything passed" in process.stdout


def test_a_section_out_of_time_is_ended(tmp_path: Path):
    process = script(
        "bench_gpu", "--rehearse", "--only", "kernels_against_twins", "--seconds", "5.2", "--out", str(tmp_path)
    )
    assert process.returncode == 1
    (section,) = json.loads((tmp_path / "results.json").read_text())["sections"].values()
    assert section["ended"] == "out of time"
    assert section["seconds"] < 30
