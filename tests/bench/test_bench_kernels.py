"""`scripts/bench_kernels` and `scripts/bench_gpu` without a GPU: their sums, their reports, and how they fail."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench_suite import triton_on_cpu  # isort: skip

assert triton_on_cpu.interpreter  # it comes before any kernel

from bench_suite import checkpoint, gpu, kernels, vision  # noqa: E402

from kimi_vl import kernels as choices  # noqa: E402
from kimi_vl.engine import cuda_graphs  # noqa: E402
from kimi_vl.kernels import Widths  # noqa: E402
from kimi_vl.kernels.inputs import PUBLISHED  # noqa: E402
from kimi_vl.model.config import Config  # noqa: E402

ROOT = Path(__file__).parents[2]
TOY = Widths(hidden=64, experts=8, top_k=3, inner=32, shared=64)


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
    assert attention.nbytes == 3 * 50 * 1152 + 2 * 3 * 2 * (576 + 128) + 2 * 2 * 512 * 128
    assert attention.operations == 3 * 50 * 2 * 2 * (576 + 512) + 3 * 2 * 2 * 512 * 128
    chunk = kernels.Cases(Widths(heads=2), torch.device("cpu"), 0).mla_prefill(2, 5)  # they attend to 4 and 5 tokens
    assert chunk.nbytes == 2 * (2 * 2 * (192 + 128) + 5 * (2 * 256 + 64))
    assert chunk.operations == (4 + 5) * 2 * 2 * (192 + 128)


def test_attention_cases_use_pages_of_their_own():
    case = kernels.Cases(Widths(heads=1, rank=16, rope=8), torch.device("cpu"), 5e3).mla_decode(2, 40)
    assert len(case.calls) == 2  # 3,840 bytes each
    pages = torch.cat([call.arguments[2].page_table[:, :2].flatten() for call in case.calls])
    assert pages.unique().numel() == pages.numel() == len(case.calls[0].arguments[1])


def test_a_failing_contender_is_a_line_and_no_end(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **more: object) -> None:
        raise NotImplementedError("not here\nand not there")

    broken = dataclasses.replace(choices.TORCH, name="broken", moe=fail)
    monkeypatch.setattr(kernels, "contenders", lambda _: [broken, choices.TORCH])
    rows: list[dict[str, object]] = []
    where = kernels.Machine("toy", torch.device("cpu"), 1e9, 1e12, False)
    with torch.inference_mode():
        kernels.bench(where, kernels.Cases(TOY, where.device, 0), True, rows.append, budget=0)
    failed = [row for row in rows if "error" in row]
    assert {(row["who"], row["op"]) for row in failed} == {("broken", "moe")}
    assert all("NotImplementedError: not here |" in kernels.row(row) for row in failed)
    assert "error" not in rows[rows.index(failed[0]) + 1]


def test_the_table_is_complete(capsys: pytest.CaptureFixture[str]):
    assert kernels.main(["--quick", "--experts", "2", "--device", "cpu"]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert "no GPU" in first
    report = json.loads(last)
    assert {row["op"] for row in report["results"]} == {
        "add_rms_norm", "norm_router", "moe", "mla_prepare", "mla_decode", "mla_prefill",
    }  # fmt: skip
    assert {row["who"] for row in report["results"]} - {"native"} == {"torch"}
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(report["results"])
    for row in report["results"]:
        assert row["microseconds"] > 0
        if row["gb_per_s"] > 1:
            share = 100 * row["gb_per_s"] / report["copy_gb_per_s"]
            assert math.isclose(row["percent_of_copy"], share, rel_tol=0.1, abs_tol=0.2)


# scripts/bench_gpu


REHEARSED = ["decoder_against_float64", "ladder_graphs"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(section.name, marks=[] if section.name in REHEARSED else pytest.mark.nightly)
        for section in gpu.SECTIONS
    ],
)
def test_a_rehearsal_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in (choices.VARIABLE, cuda_graphs.VARIABLE):
        monkeypatch.setenv(variable, "")  # set by the section, and put back
    (section,) = (section for section in gpu.SECTIONS if section.name == name)
    section.run(gpu.Job(tmp_path / "lines", rehearsal=True))
    reports = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    checks = [value["passed"] for _, value in reports if isinstance(value, dict) and "passed" in value]
    assert reports and all(checks)
    assert checks or name not in REHEARSED
    if name == "ladder_graphs":
        whole = {name: {"ended": "done", "passed": 1, "checks": 1, "reports": reports}}
        assert gpu.summary(whole)["tokens_per_second"].keys() == {"3 sequences of 9"}


STAND_IN = """
import json, pathlib, sys, time
name, lines = sys.argv[sys.argv.index("--section") + 1], sys.argv[sys.argv.index("--lines") + 1]
said = [["a figure", 3], ["a check", {"passed": name != "ladder_kernels", "value": 1}]]
pathlib.Path(lines).write_text("".join(json.dumps(each) + "\\n" for each in said))
if name == "ladder_torch":
    time.sleep(600)
sys.exit(name == "machine")
"""


def test_a_section_that_fails_or_hangs_takes_only_itself_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-S", "-c", STAND_IN])
    limits = {section.name: 0.2 if section.name == "ladder_torch" else 600 for section in gpu.SECTIONS}
    sections = [dataclasses.replace(section, seconds=limits[section.name]) for section in gpu.SECTIONS]
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    wait = subprocess.Popen.wait

    def once_it_has_reported(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """Whatever the machine's speed, a section has reported before its time is over."""
        lines = Path(process.args[-1])  # pyright: ignore[reportArgumentType,reportIndexIssue]
        while timeout == limits["ladder_torch"] and not (lines.exists() and lines.read_text().count("\n") == 2):
            time.sleep(0.01)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_has_reported)
    wanted = ["machine", "ladder_torch", "ladder_kernels", "tiles"]
    assert gpu.main(["--only", *wanted, "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert {name: (section["ended"], section["passed"], section["checks"]) for name, section in report.items()} == {
        "machine": ("failed", 1, 1),
        "ladder_torch": ("out of time", 1, 1),  # what it had reported by then is kept
        "ladder_kernels": ("done", 0, 1),
        "tiles": ("done", 1, 1),
    }
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["passed"] is False
    assert last["sections"]["tiles"] == ["done", 1, 1]
    assert gpu.main(["--only", "tiles", "--out", str(tmp_path)]) == 0


def test_the_script_starts():
    command = [str(ROOT / "scripts" / "bench_gpu"), "--help"]
    environment = os.environ | {"KIMI_VL_PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    assert "--rehearse" in done.stdout


# scripts/bench vision


def test_operations_of_a_picture():
    """As the published widths give them: 3.37 TFLOP of products, 2.09 of attention, and the projector's."""
    config = Config.from_dict(checkpoint.divided(1, 1, 27))
    assert math.isclose(vision.operations(config, 64), 5.52e12, rel_tol=2e-3)
    assert math.isclose(vision.operations(config, 128), 47.1e12, rel_tol=2e-3)


def test_pictures_are_measured(capsys: pytest.CaptureFixture[str]):
    assert vision.main(["--divide", "16", "--blocks", "2", "--sides", "4", "8", "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert (report["bench"], report["blocks"], report["attention"]) == ("vision", 2, "torch")
    assert [(row["patches"], row["tokens"]) for row in report["results"]] == [(16, 4), (64, 16)]
    assert len([line for line in lines if line.startswith("|")]) == 4
    for row in report["results"]:
        assert row["milliseconds"] > 0
    with pytest.raises(SystemExit):
        vision.main(["--sides", "3"])
