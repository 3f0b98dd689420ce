"""cog.yaml and the requirements against what Cog does with them; Cog itself ignores most mistakes."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from cog_local.server import MEMORY

ROOT = Path(__file__).resolve().parents[2]
TOP_KEYS = {"build", "image", "model", "run", "predict", "train", "environment", "concurrency", "weights"}
BUILD_KEYS = {
    "python_version",
    "gpu",
    "cuda",
    "cudnn",
    "python_requirements",
    "system_packages",
    "run",
    "sdk_version",
}
DENIED_NAMES = {
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "PYTHONUNBUFFERED",
    "LIBRARY_PATH",
    "HF_ENDPOINT",
    "HF_HUB_ENABLE_HF_TRANSFER",
}
DENIED_PREFIXES = ("R8_", "REPLICATE_", "CUDA_", "NVIDIA_", "NV_", "PGET_", "KUBERNETES_")
PIN = re.compile(r"[A-Za-z0-9_.-]+==[0-9][0-9.]*")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cog.yaml").read_text())


def pins(path: str) -> dict[str, str]:
    """name -> version of a requirements file, in which every line must be an exact pin."""
    found = {}
    for line in (ROOT / path).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        assert PIN.fullmatch(line.partition(";")[0]), f"{path}: {line} is not pinned exactly"
        name, _, version = line.partition("==")
        found[name.lower().replace("_", "-")] = version
    return found


def extra(name: str) -> dict[str, str]:
    """name -> version of what an extra of the package pins."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {pin: version for text in extras[name] for pin, _, version in [text.partition("==")] if version}


def test_the_concurrent_image_is_the_same_but_for_its_predictor(config: dict[str, Any]) -> None:
    concurrent = yaml.safe_load((ROOT / "cog.concurrent.yaml").read_text())
    assert concurrent.pop("predict") == "predict.py:ConcurrentPredictor"
    assert concurrent == {key: value for key, value in config.items() if key != "predict"}
    assert "concurrency" not in concurrent, "it would take the place of @concurrent without a word"


def test_only_keys_that_cog_knows(config: dict[str, Any]) -> None:
    assert set(config) <= TOP_KEYS
    assert set(config["build"]) <= BUILD_KEYS
    assert not {"run", "predict"} <= set(config), "Cog refuses both names of the predictor at once"
    assert "concurrency" not in config, "a sync predictor serves one request at a time"


def test_versions_are_strings(config: dict[str, Any]) -> None:
    for key in ("python_version", "cuda", "sdk_version"):
        assert isinstance(config["build"][key], str), f"quote {key}: 3.10 would be read as 3.1"
    assert config["build"]["python_version"] in ("3.10", "3.11", "3.12", "3.13")


def test_cuda_is_named_and_torch_is_pinned(config: dict[str, Any]) -> None:
    build = config["build"]
    assert build["gpu"] is True
    assert build["cuda"] == "12.8"
    torch = tuple(int(part) for part in pins(build["python_requirements"])["torch"].split("."))
    assert torch <= (2, 11, 0), "Cog has no table of CUDA builds for a newer torch"


def test_sdk_is_pinned_to_what_the_tests_run(config: dict[str, Any]) -> None:
    assert config["build"]["sdk_version"] == extra("cog")["cog"]
    assert not {"cog", "coglet"} & set(pins("requirements.txt")), "Cog strips these from the requirements"


IMAGE_EXTRAS = ("structured", "server", "video", "pdf")


def test_the_image_has_versions_that_the_package_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(text for name in IMAGE_EXTRAS for text in extras[name])]
    image = pins("requirements.txt")
    allowed = {Requirement(text).name.lower().replace("_", "-"): Requirement(text).specifier for text in wanted}
    allowed.pop("kimi-vl")  # an extra that names another one
    assert allowed.keys() == image.keys(), "each dependency of the package is pinned for the image, and nothing else"
    assert all(specifier.contains(image[name]) for name, specifier in allowed.items())
    assert allowed["torch"].contains(extra("checkout")["torch"])


def test_environment_is_allowed(config: dict[str, Any]) -> None:
    names = []
    for entry in config["environment"]:
        name, separator, value = entry.partition("=")
        assert separator and value
        assert name not in DENIED_NAMES and not name.startswith(DENIED_PREFIXES), f"Cog refuses {name}"
        names.append(name)
    assert len(names) == len(set(names))
    assert "KIMI_VL_MODEL=thinking" in config["environment"]


def test_gpu_memory_grows_in_place(config: dict[str, Any]) -> None:
    """torch 2.9 takes this name without effect."""
    values = dict(entry.split("=", 1) for entry in config["environment"])
    assert values["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in values, "an older name of the same, which torch warns of"
    assert tuple(int(part) for part in pins("requirements.txt")["torch"].split(".")) >= (2, 10, 0)


def test_a_server_without_docker_keeps_as_much_memory(config: dict[str, Any]) -> None:
    values = dict(entry.split("=", 1) for entry in config["environment"])
    assert MEMORY and MEMORY.items() <= values.items()


def test_predictor_exists(config: dict[str, Any]) -> None:
    match = re.fullmatch(r"([^:]+\.py):(\w+)", config["predict"])
    assert match
    module = ast.parse((ROOT / match.group(1)).read_text())
    assert match.group(2) in {node.name for node in module.body if isinstance(node, ast.ClassDef)}


def test_pget_is_pinned_and_a_failed_download_fails_the_build(config: dict[str, Any]) -> None:
    (command,) = config["build"]["run"]
    assert isinstance(command, str) and "\n" not in command
    assert re.search(r"/releases/download/v\d+\.\d+\.\d+/pget_linux_x86_64\b", command)
    assert "curl --fail" in command and "chmod +x /usr/local/bin/pget" in command


def test_the_image_leaves_out_what_it_does_not_need() -> None:
    ignored = {line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {
        ".git",
        ".github",
        ".venv",
        ".cog",
        ".pre-commit-config.yaml",
        "model_cache",
        "tests",
        "docs",
        "*.md",
    } <= ignored
    assert not {"kimi_vl", "predict.py", "requirements.txt"} & ignored
