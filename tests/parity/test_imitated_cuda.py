"""The engine on imitated GPUs: its tokens are those of the CPU, and a real GPU would have nothing against it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_suite import imitated_cuda
from bench_suite.imitated_cuda import Machine

from tests.imitated_engine import answers, engine_of, load, save_model, some_asks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(folder) -> list[list[int]]:
    """What the CPU answers to some_asks."""
    with engine_of(load(folder)) as engine:
        return answers(engine, some_asks())


@pytest.fixture
def machine() -> Iterator[Machine]:
    with imitated_cuda.imitated() as machine:
        yield machine


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", ["torch", "captured"])
def test_tokens_are_those_of_the_cpu(folder, wanted, machine, way, late):
    with engine_of(load(folder, "cuda:0"), way) as engine:
        assert answers(engine, some_asks(), late) == wanted
        assert engine.healthy()
    machine.check()


@pytest.mark.parametrize("way", ["kernels", "graphs"])
def test_kernels_give_the_tokens_of_the_cpu(folder, wanted, machine, way):
    with engine_of(load(folder, "cuda:0"), way) as engine:
        assert answers(engine, some_asks(3)) == wanted[:3]
        assert engine.healthy()
    machine.check()
