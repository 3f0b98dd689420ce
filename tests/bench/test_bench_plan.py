"""`scripts/bench plan`: what the forms of the weights take, and what they are to stay below."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_suite import decode, plan

from kimi_vl.cli import check

ROOT = Path(__file__).parents[2]

CONFIG = plan.published()


@pytest.fixture(scope="module")
def rows() -> dict[str | None, plan.Plan]:
    return {row.form: row for row in plan.rows(CONFIG)}


def test_a_decode_step_reads_what_is_allowed(rows: dict[str | None, plan.Plan]):
    """The count of floating-point weights is that of the widths, which the other benchmarks take."""
    by_widths = decode.bytes_a_step(CONFIG.text_config, 1, 0, distinct=6)
    assert rows[None].a_step == pytest.approx(by_widths, rel=1e-3)
    assert rows["int4-g128"].a_step <= 1.55e9
    assert rows["int4"].a_step <= 1.65e9
    assert rows["int8"].a_step == rows["float8"].a_step <= 2.7e9


def test_small_cards_hold_a_cache_beside_the_weights(
    rows: dict[str | None, plan.Plan], monkeypatch: pytest.MonkeyPatch
):
    """And `kimi-vl check` says so, of one request at most."""
    assert rows["int4"].tokens["16 GB"] >= 32_768
    assert rows["int8"].tokens["24 GB"] >= 65_536
    assert rows["float8"].tokens["24 GB"] >= 65_536
    assert rows[None].tokens["24 GB"] == 0
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for card, free in plan.CARDS.items():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * plan.GIB, 80 * plan.GIB))
        device = check.Device("cuda", "a card", 80 * plan.GIB, free * plan.GIB, 2)
        told = {fit.model: fit.context for fit in check.quantized_fits(device)}
        most = CONFIG.text_config.max_position_embeddings
        assert told == {form: min(most, row.tokens[card]) for form, row in rows.items() if form}


def test_the_document_has_the_table_that_the_command_prints(
    rows: dict[str | None, plan.Plan], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(plan, "rows", lambda config: rows.values())
    assert plan.main([]) == 0
    printed, report = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert printed in (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert [row["form"] for row in json.loads(report)["forms"]] == [*plan.NAMES]
