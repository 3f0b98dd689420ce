"""What `kimi-vl check` says of models that nobody has loaded, against what an engine would make of the memory."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest
import torch

from kimi_vl.cli import check
from kimi_vl.device import memory
from kimi_vl.engine import kv_cache
from kimi_vl.engine.decoder import widths
from kimi_vl.kernels import Widths
from kimi_vl.model.config import PUBLISHED_TEXT

GIB = 1 << 30
WEIGHTS = check.PUBLISHED_BYTES / GIB  # in bfloat16
CACHED_TOKEN = 27 * (512 + 64)  # values in the KV cache


def contexts(device: check.Device, folder: Path) -> set[tuple[bool, int]]:
    """(Whether it fits, its context) of the published models."""
    return {(fit.fits, fit.context) for fit in check.fits(device, folder) if fit.model != "demo"}


@pytest.mark.parametrize("beside", [-8.0, -0.1, 0.0, 1.0, 2.5, 3.0, 3.5, 5.0, 8.0, 13.3, 48.0, 109.0])
def test_a_gpu_has_the_context_that_the_engine_s_budget_leaves(beside, monkeypatch, tmp_path):
    free = int((WEIGHTS + beside) * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    budget = kv_cache.cache_bytes(
        max(0, free - check.PUBLISHED_BYTES), PUBLISHED_TEXT, torch.bfloat16,
        sequences=64, max_num_batched_tokens=2048, images=256 << 20,
    )  # fmt: skip
    right = min(131_072, budget // (32 * CACHED_TOKEN * 2) * 32)
    assert contexts(check.Device("cuda", "a card", 2 * free, free, 2), tmp_path) == {(right >= 4096, right)}
    if beside in (0.0, 13.3):  # at both ends of what the arithmetic can say
        assert right == (131_072 if beside else 0)


@pytest.mark.parametrize("total", [24, 128, 512])
def test_a_cpu_has_to_hold_weights_and_cache(total, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "total", lambda: total * GIB)
    cache = min(4 * GIB, total * GIB // 10)
    tokens = cache // (32 * CACHED_TOKEN * 4) * 32
    needed = 2 * check.PUBLISHED_BYTES + tokens * CACHED_TOKEN * 4
    for free, right in ((needed, (True, tokens)), (needed - 1, (False, 0)), (0, (False, 0))):
        assert contexts(check.Device("cpu", "a CPU", total * GIB, free, 4), tmp_path) == {right}


def test_the_published_model_has_the_widths_that_operations_are_tried_with():
    assert widths(PUBLISHED_TEXT, 32) == Widths()


def test_what_reads_videos_and_documents_is_named_or_what_installs_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KIMI_VL_CACHE", str(tmp_path))
    arguments, imported = argparse.Namespace(json=False), set(sys.modules)
    assert check.run(arguments) == 0
    assert re.search(r"^videos     av \d.*\ndocuments  pypdfium2 \d", capsys.readouterr().out, re.MULTILINE)
    assert not {"av", "pypdfium2"} & (set(sys.modules) - imported)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert check.run(arguments) == 0
    shown = capsys.readouterr().out
    assert '\nvideos     not read: pip install "kimi-vl[video]"\n' in shown
    assert '\ndocuments  not read: pip install "kimi-vl[pdf]"\n' in shown
