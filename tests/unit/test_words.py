"""The field's standard terms are used throughout: what was renamed to them does not come back under its old name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What must not be written, and the term that stands in its place.
GONE = {
    r"\broads?\b": "path, way",
    r"\b(Face|public) face\b": "integration",
    r"\bin company\b|\bcompany changes\b": "batch-invariant",
    r"\bnot paid\b": "no speed-up",
    r"\bfaults of\b": "failure modes",
    r"\b(max_rows|step_tokens)\b": "max_num_seqs, max_num_batched_tokens",
    r"--rows\b|\b(a|each|every|per) row and step\b|\bat (one|\d+) rows?\b": "sequences",
    r"\b(continue_last)\b": "continue_final_message",
    r"\b(latent_write)\b": "write to the KV cache",
    r"\bgive_back\(|\.(forget|remember)\(": "release, evict, register",
    r"\b(Ticket|Unguided|_Flight)\b|\bclass (Work|Guide|Row|Rows|Strips)\b": "RequestHandle, ScheduledChunk, …",
    r"\b(draw_together|lay_out|laid_out)\b|\bkernels\.(choose|strips)\b": "sample_batch_on_device, prepack, select_ops",
    r"\bweight first\b": "W·xᵀ layout",
    r"\b(matrix|rounded) products?\b": "GEMM",
    r"\bnobody's business\b|\bgoes? through a token's\b|\bsaid at once\b|\ba person is told\b": "a plain sentence",
    r"^\s*from .* import .* as (devices|flash|graphs|hub|weights)\b": "a module's own name",
    r"\bhost waits\b|\bmakes? the host wait\b": "device synchronisation",
    r"\bturned (around|by the)\b|\bwritten out for\b|\bin one piece\b": "rotated, expanded, contiguous",
}
# Drawings of the demo have faces and roads of their own, and a law is a law.
ELSEWHERE = ("scripts/demo_world/", "tests/golden/", "tests/unit/test_words.py", "LICENSE")


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    names = listed or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")]
    return [name for name in names if name.endswith((".py", ".md", ".sh")) and not name.startswith(ELSEWHERE)]


@pytest.mark.slow  # asks git
@pytest.mark.parametrize("pattern", GONE, ids=list(GONE.values()))
def test_old_names_do_not_come_back(pattern: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in files()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"write {GONE[pattern]!r} instead"
