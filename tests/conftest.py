"""For all tests: Triton decides when it is imported, by whomever, whether kernels are interpreted; and what machines
and shells differ in."""

import os
import signal

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what runs in its background with SIGINT ignored, and whoever is started from there ignores it, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.rings"]


@pytest.fixture
def anything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed on a machine that lacks the instructions or the memory, too."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("kimi_vl.device.memory.available", lambda: 2**40)
