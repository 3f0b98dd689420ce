"""For all tests: Triton decides when it is imported, by whomever, whether kernels are interpreted; and what machines
differ in."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.rings"]


@pytest.fixture
def anything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed on a machine that lacks the instructions or the memory, too."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("kimi_vl.device.memory.available", lambda: 2**40)
