"""The demo's weights, and the same quantised, made once for all tests of a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from kimi_vl.weights import resolve
from kimi_vl.weights.pack import write_quantized


@pytest.fixture(scope="session")
def demo() -> dict[str, Tensor]:
    return load_file(resolve.DEMO / "model.safetensors")


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the demo in a form, which is not to be changed."""

    @functools.cache
    def folder(form: str) -> Path:
        made = tmp_path_factory.mktemp("quantized") / form
        write_quantized(resolve.DEMO, made, form)
        return made

    return folder
