"""The published names without MindSpore: a dtype of its chooses it, and what is missing is one sentence."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration, UserError, mindspore
from kimi_vl.hf import on_mindspore

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "kimi_vl" / "demo"

# As MindSpore's own: the type's module says whose it is.
BFloat = type("BFloat", (), {"__module__": "mindspore._c_expression.typing"})
Tensor = type("Tensor", (), {"__module__": "mindspore.common.tensor"})


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str, right: Any = metadata.version) -> str:
        if name == "mindspore":
            raise metadata.PackageNotFoundError(name)
        return right(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize("name", ["mindspore_dtype", "torch_dtype", "dtype"])
def test_a_dtype_of_mindspore_chooses_it(absent: None, name: str) -> None:
    """By every name that a dtype has, in both ways to make a model."""
    words = r"MindSpore is not installed; run pip install 'kimi-vl\[mindspore\]' in an environment of its own\."
    with pytest.raises(UserError, match=words) as caught:
        KimiVLForConditionalGeneration.from_pretrained(DEMO, **{name: BFloat()})
    assert caught.value.code == "E_BACKEND"
    with pytest.raises(UserError, match=words):
        KimiVLForConditionalGeneration._from_config(KimiVLConfig.from_pretrained(DEMO), **{name: BFloat()})


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"torch_dtype": "auto"}, {"dtype": None}])
def test_any_other_dtype_is_of_pytorch(options: dict[str, Any]) -> None:
    assert not on_mindspore.wanted(options)


def test_pytorch_is_what_it_was(absent: None) -> None:
    config = KimiVLConfig.from_pretrained(DEMO)
    for model in (
        KimiVLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32),
        KimiVLForConditionalGeneration._from_config(config, dtype=torch.float32),
    ):
        assert isinstance(model, torch.nn.Module) and model.dtype == torch.float32


@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", None])
def test_mindspore_takes_no_other_dtype(value: Any) -> None:
    with pytest.raises(UserError, match=r"mindspore_dtype is .+; hand over mindspore_dtype=mindspore\.bfloat16 alone"):
        KimiVLForConditionalGeneration.from_pretrained(DEMO, mindspore_dtype=value)


def test_tensors_of_mindspore_are_refused_on_pytorch() -> None:
    model = KimiVLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
    for call in (model.generate, model):
        with pytest.raises(UserError, match="attention_mask is a MindSpore tensor, but the model is on PyTorch"):
            call(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=Tensor())


@pytest.mark.parametrize(
    ("version", "allowed"),
    [("2.6.0rc1", False), ("2.7.0", True), ("2.7.1.post1", True), ("2.10.0", True), ("2.11.0", False), ("3.0", False)],
)
def test_versions_of_mindspore(monkeypatch: pytest.MonkeyPatch, version: str, allowed: bool) -> None:
    monkeypatch.setattr(metadata, "version", {"mindspore": version, "numpy": "1.26.4"}.__getitem__)
    if allowed:
        return mindspore.require()
    with pytest.raises(UserError, match=rf"must be at least 2\.7 and below 2\.11, and {version} is installed"):
        mindspore.require()


def test_numpy_2_does_not_work_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"mindspore": "2.10.0", "numpy": "2.0.0"}.__getitem__)
    with pytest.raises(UserError, match=r"does not work with NumPy 2\.0\.0; run pip install 'numpy<2'"):
        mindspore.require()


def test_the_versions_are_those_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest, below = (".".join(map(str, version)) for version in (mindspore.OLDEST, mindspore.BELOW))
    assert project["optional-dependencies"]["mindspore"] == [f"mindspore>={oldest},<{below}", "numpy<2"]


def test_the_backend_is_small() -> None:
    """It is one more implementation to keep in step."""
    files = (ROOT / "kimi_vl" / "mindspore").glob("*.py")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 600
