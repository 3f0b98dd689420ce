"""`scripts/bench media` at a tiny size: nothing is missing from its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_suite import media


def test_the_report_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--seconds 2 --size 160 120 --frames 1 5 --pages 2 --rounds 1 --cache".split()
    for _ in range(2):  # the second time the film is there
        assert media.main([*arguments, str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        report = json.loads(lines[-1])
        assert [{**result, "seconds": 0, "processor_seconds": 0, "peak_mb": 0} for result in report["results"]] == [
            {"frames": 1, "seconds": 0, "processor_seconds": 0, "peak_mb": 0},
            {"frames": 5, "seconds": 0, "processor_seconds": 0, "peak_mb": 0},
            {"pages": 2, "seconds": 0, "processor_seconds": 0, "peak_mb": 0},
        ]
        for result in report["results"]:
            assert result["seconds"] > 0 and result["processor_seconds"] > 0 and 5 < result["peak_mb"] < 500
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) == 5 and rows[3].startswith("| 5 frames | ")
    assert [path.name for path in tmp_path.iterdir()] == ["film-2-160-120.mp4"]
