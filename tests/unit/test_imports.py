"""Who may import whom, and how large rooms are, read from the source; and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kimi_vl"

# The rooms of the package (folders, and modules beside them), and which of the others each may import. Nothing points
# upward: a room may only import those that stand above it here.
ALLOWED = {
    "errors": set(),
    "events": set(),
    "parameters": {"errors"},
    "text": {"errors", "events"},
    "annotate": {"text"},
    "device": set(),
    "quantization": {"errors"},
    "kernels": {"device", "quantization"},
    "model": {"errors", "kernels", "quantization"},
    "media": {"errors", "model", "parameters"},
    "weights": {"device", "errors", "model", "quantization"},
    "engine": {"device", "errors", "kernels", "model", "parameters", "quantization"},
    "mindspore": {"engine", "errors", "model", "parameters", "weights"},
    "hf": {"errors", "media", "mindspore", "model", "text", "weights"},
    "output_processor": {"engine", "events", "text"},
    "coalescer": {"events", "output_processor"},
    "event_loop": {"events"},
    "attachments": {"errors", "events", "media", "text"},
    "placement": {"device", "engine", "kernels", "model", "quantization", "weights"},
    "prompt": {"attachments", "engine", "errors", "events", "media", "parameters", "text"},
    "pipeline": {
        "coalescer",
        "engine",
        "errors",
        "events",
        "kernels",
        "media",
        "model",
        "output_processor",
        "parameters",
        "placement",
        "prompt",
        "text",
        "weights",
    },
    "__init__": {"errors", "events", "hf", "pipeline", "text"},
    "cog_streaming": set(),
    "serving": {
        "__init__",
        "engine",
        "errors",
        "event_loop",
        "events",
        "media",
        "parameters",
        "pipeline",
        "prompt",
        "text",
    },
    "batch": {"__init__", "errors", "events", "pipeline", "prompt", "serving", "text"},
    "cluster": {"errors", "serving"},
    "cli": {
        "kernels",
        "annotate",
        "__init__",
        "batch",
        "cluster",
        "device",
        "engine",
        "errors",
        "events",
        "media",
        "model",
        "parameters",
        "pipeline",
        "placement",
        "quantization",
        "serving",
        "text",
        "weights",
    },
}
WITHOUT_TORCH = {
    "errors",
    "events",
    "parameters",
    "text",
    "event_loop",
    "cog_streaming",
    "model.config",
    "quantization.scheme",
    "engine.scheduler",
    "engine.page_pool",
    "serving.options",
    "serving.protocol",
    "serving.responses",
    "serving.errors",
}
LARGEST_ROOM = 12  # modules of a folder beside its __init__
MOST_CPP = 900  # lines of native kernels


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if "." in name else name] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str) -> tuple[set[str], set[str]]:
    """The rooms of this package, and the other packages, that a module imports wherever in the file."""
    path = MODULES[module]
    folder = path.relative_to(PACKAGE).parent.parts
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            named = [*base, *(node.module.split(".") if node.module else [])]
            own |= {named[0]} if named else {a.name if a.name in ALLOWED else "__init__" for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return own - {room(module)}, foreign


def test_every_room_is_known_and_small():
    assert {room(module) for module in MODULES} == ALLOWED.keys()
    sizes = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert max(sizes.values()) <= LARGEST_ROOM


def test_native_kernels_are_few_lines():
    sources = [path for path in (PACKAGE / "kernels" / "cpu").iterdir() if path.suffix in (".cpp", ".h")]
    assert sources and sum(len(path.read_text().splitlines()) for path in sources) <= MOST_CPP
    assert all(len(line) <= 120 for path in sources for line in path.read_text().splitlines())


def test_nothing_points_upward():
    order = list(ALLOWED)
    for name, allowed in ALLOWED.items():
        assert all(order.index(other) < order.index(name) for other in allowed), name


@pytest.mark.parametrize("module", MODULES)
def test_directions(module):
    own, foreign = imports(module)
    assert own <= ALLOWED[room(module)]
    assert "cog" not in foreign
    assert "transformers" not in foreign or room(module) == "hf"
    assert "mindspore" not in foreign or room(module) == "mindspore"
    assert "ray" not in foreign or room(module) == "cluster"
    if module in WITHOUT_TORCH or room(module) in WITHOUT_TORCH:
        assert "torch" not in foreign


@pytest.mark.slow
def test_importing_the_package_is_light():
    program = "import sys, kimi_vl; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("transformers", "cog", "torchvision", "torch", "mindspore", "numpy", "PIL", "huggingface_hub"):
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
