"""Who may import whom, read from the source; and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kimi_vl"

# The package's modules and which of its own modules each may import.
ALLOWED = {
    "__init__": {"errors", "events", "hf", "pipeline"},
    "cog_streaming": set(),
    "errors": set(),
    "events": set(),
    "published": {"errors"},
    "config": {"errors", "published"},
    "tokenizer": {"errors"},
    "stops": {"errors"},
    "messages": {"errors"},
    "chat": {"errors", "messages", "stops", "tokenizer"},
    "icc": set(),
    "tiff_samples": set(),
    "image_files": {"icc", "tiff_samples"},
    "data_url": {"errors", "image_files"},
    "images": {"data_url", "errors", "icc", "image_files", "published", "tiff_samples"},
    "repetition": set(),
    "flash": set(),
    "vision": {"config", "flash"},
    "projector": {"config", "vision"},
    "language": {"config", "flash"},
    "devices": set(),
    "cache": {"config", "devices", "flash", "language"},
    "memory": set(),
    "budget": {"cache", "config", "memory"},
    "fused": {"cache", "kernels", "language", "memory"},
    "graphs": {"cache", "devices", "faults", "fused", "model", "sampling"},
    "model": {"config", "language", "projector", "vision"},
    "loader": {"config", "errors", "memory", "model"},
    "parameters": {"errors"},
    "sampling": {"devices", "parameters"},
    "generation": {"cache", "model", "vision"},
    "pages": set(),
    "scheduler": {"pages"},
    "faults": {"devices", "errors"},
    "embeddings": set(),
    "tickets": {"faults", "sampling", "scheduler", "vision"},
    "engine": {
        "budget", "cache", "config", "devices", "embeddings", "errors", "faults", "fused", "graphs", "kernels", "model",
        "pages", "sampling", "scheduler", "tickets",
    },
    "foreign": set(),
    "archive": {"errors", "foreign"},
    "progress": set(),
    "download": {"archive", "errors", "progress"},
    "hub": {"download", "errors", "progress"},
    "verify": {"errors", "foreign", "loader", "progress"},
    "weights": {"download", "errors", "hub", "verify"},
    "pack": {"download", "errors", "foreign", "loader", "progress", "verify"},
    "pipeline": {
        "chat", "config", "data_url", "engine", "errors", "events", "images", "kernels", "loader", "messages", "model",
        "parameters", "repetition", "sampling", "stops", "tokenizer", "warm_up", "weights",
    },
    "warm_up": {"engine", "sampling"},
    "hf": {"chat", "config", "data_url", "errors", "images", "loader", "messages", "published", "tokenizer"},
}  # fmt: skip


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of this package and of others that ``path`` imports, wherever in the file."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return own, foreign


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ALLOWED.keys()


@pytest.mark.parametrize("module", ALLOWED)
def test_directions(module):
    own, foreign = imports(PACKAGE / f"{module}.py")
    assert own <= ALLOWED[module]
    assert "cog" not in foreign
    assert "transformers" not in foreign or module == "hf"
    if module in ("scheduler", "errors", "events", "config", "tokenizer", "messages", "chat"):
        assert "torch" not in foreign


@pytest.mark.slow
def test_importing_the_package_is_light():
    program = "import sys, kimi_vl; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("transformers", "cog", "torchvision", "torch", "numpy", "PIL", "huggingface_hub"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.slow
def test_loading_the_pipeline_needs_neither_transformers_nor_cog():
    program = "import sys, kimi_vl; kimi_vl.load; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "'torch'" in loaded
    for heavy in ("transformers", "cog", "torchvision", "huggingface_hub"):
        assert f"'{heavy}'" not in loaded
