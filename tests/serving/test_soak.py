"""`scripts/soak --openai`: requests of every kind leave nothing behind, and what is wrong is seen."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai_local import soak

ARGUMENTS = ["--requests", "60", "--lines", "2", "--callers", "4", "--seed", "3"]


@pytest.fixture(autouse=True)
def demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_VL_MODEL", "demo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(soak, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(soak, "FLAT_MEGABYTES", 1000.0)  # sixty requests are not enough to warm up


def figures(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak.main(ARGUMENTS)
    found, said = figures(capsys)
    assert status == 0, said
    assert found["counts"].keys() == soak.KINDS.keys() and sum(found["counts"].values()) == found["soak"] == 60
    assert found["left"] == {"requests_running": 0, "requests_waiting": 0, "cache_usage_ratio": 0, "healthy": 1}


@pytest.mark.nightly
def test_what_is_wrong_is_seen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An expectation that does not hold, an answer that changes, and memory that grows."""
    monkeypatch.setattr(soak, "BAD", [({}, 400, "e_parameter")])
    monkeypatch.setattr(soak, "GOOD", [soak.ask("Hello.", temperature=2)])
    monkeypatch.setattr(soak, "SUM_ANSWER", "?")
    monkeypatch.setattr(soak, "FLAT_MEGABYTES", -1000.0)
    assert soak.main(ARGUMENTS) == 1
    _, said = figures(capsys)
    for wrong in ("to the sum", "400 e_parameter was expected", "answered in another way", "MB were gained"):
        assert re.search(f"wrong: .*{wrong}", said), wrong
