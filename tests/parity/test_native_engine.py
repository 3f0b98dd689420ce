"""The engine over native operations gives the plain loop's tokens, and says what it falls back on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import kimi_vl
from kimi_vl import kernels
from kimi_vl.engine.engine import Engine
from kimi_vl.engine.sampling import Sampling
from kimi_vl.kernels.cpu import binding, build
from kimi_vl.model.generation import Prompt, greedy
from kimi_vl.weights import loader
from tests.parity.test_engine import SMALL, ask, send, settle, some_requests

DEMO = Path(kimi_vl.__file__).parent / "demo"

pytestmark = pytest.mark.skipif(
    not set(build.NEEDED) <= build.processor_features(), reason="this processor has no AVX-512 or no VNNI"
)


def test_native_operations_give_the_plain_loops_tokens(monkeypatch: pytest.MonkeyPatch):
    """The demo in float32, where no two of the best scores are as close as rounding: one request after another, then
    all at once, greedy ones and sampled ones."""
    called: set[str] = set()
    kernel = binding.kernel
    monkeypatch.setattr("kimi_vl.kernels.cpu.norm.kernel", lambda name, *more: called.add(name) or kernel(name, *more))
    monkeypatch.setattr("kimi_vl.kernels.cpu.mla.kernel", lambda name, *more: called.add(name) or kernel(name, *more))
    model = loader.load(DEMO, dtype=torch.float32)
    options = dataclasses.replace(SMALL, cache_bytes=1 << 22, max_num_batched_tokens=64)
    engine = Engine(model, 1024, options, ops=kernels.select_ops("cpu", "native"))
    sampled = Sampling(1, 0.9, 0, 3)
    alone = []
    for ids, patches in some_requests():
        pixels = torch.from_numpy(patches[0].pixel_values) if patches else None
        plain = greedy(model, [Prompt(ids, pixels, [image.grid for image in patches])], frozenset(), 12)[0]
        assert ask(engine, ids, patches, max_new_tokens=12) == plain
        alone.append(ask(engine, ids, patches, max_new_tokens=12, sampling=sampled))
    sent = [send(engine, *request, max_new_tokens=12, sampling=sampled)[0] for request in some_requests()]
    assert [listener.result() for listener in sent] == alone
    assert called == {"add_rms_norm", "norm_router", "mla_prepare", "mla_decode"}
    settle(engine)
    engine.close()
