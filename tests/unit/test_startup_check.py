"""Kernels that earn their place: each that does not is replaced, alone, with one line that says why.

Kernels run in Triton's interpreter, on the CPU; a table with a fault in it stands for a card that they do not suit.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import logging
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench_suite import triton_on_cpu  # isort: skip

assert triton_on_cpu.interpreter  # it comes before any kernel

import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from kimi_vl import kernels, pipeline  # noqa: E402
from kimi_vl.engine import warm_up  # noqa: E402
from kimi_vl.engine.decoder import widths  # noqa: E402
from kimi_vl.engine.engine import Engine  # noqa: E402
from kimi_vl.kernels import flash_attention, startup_check  # noqa: E402
from kimi_vl.weights import loader  # noqa: E402
from tests.parity.test_engine import CHECKPOINT, SMALL, ask, some_requests  # noqa: E402

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TRITON = kernels.triton_ops()


@pytest.fixture(scope="module")
def model():
    return loader.load(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def use(model) -> kernels.Use:
    return SMALL.use(model)


def test_calls_have_a_model_s_own_widths_of_keys_and_values(model, use):
    text = dataclasses.replace(model.config.text_config, qk_nope_head_dim=32, v_head_dim=24)
    calls = startup_check.Calls(dataclasses.replace(use, widths=widths(text, 8)), CPU)
    heads, rank = text.num_attention_heads, text.kv_lora_rank
    assert {call.arguments[1].shape for call in calls.of("mla_prepare")} == {(heads, rank, 32)}
    assert {call.arguments[4].shape for call in calls.of("mla_decode")} == {(heads, 24, rank)}
    assert {call.arguments[3].shape[1:] for call in calls.of("mla_prefill")} == {(heads, 32 + 24)}
    assert {call.arguments[1].shape[-1] for call in calls.of("project")} == {text.hidden_size, heads * 24, rank}


def raising(error: Exception) -> Callable[..., Any]:
    def operation(*arguments: Any, **named: Any) -> Any:
        raise error

    return operation


def slightly_wrong(operation: str) -> Callable[..., Any]:
    """The first result is off by a thousandth, as a kernel with an error in its last entries is."""

    def wrong(*arguments: Any, **named: Any) -> Any:
        result = getattr(TRITON, operation)(*arguments, **named)
        first = result[0] if isinstance(result, tuple) else result
        first[..., -1] *= 1.001
        return result

    return wrong


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "wrong experts": ("moe", slightly_wrong("moe"), "off by .* times what rounding explains"),
    "wrong norm": ("add_rms_norm", slightly_wrong("add_rms_norm"), "off by .* times what rounding explains"),
    "not finite": ("mla_decode", lambda query, *given: query[..., : given[3].shape[1]] / 0, "off by inf"),
    "another shape": ("moe", lambda states, *rest: states[:, :-1], "off by inf"),
    "wrong router": ("norm_router", lambda *given: TRITON.norm_router(*given[:-1], 1.0), "off by"),
    "does not fit": (
        "norm_router",
        raising(OutOfResources(122_880, 101_376, "shared memory")),
        "needs 122880 of shared memory, and this card has 101376",
    ),
    "does not compile": ("mla_prepare", raising(triton.CompilationError("", ast.parse("x"), "")), "does not compile"),
    "not assembled": ("moe", raising(PTXASError("no")), "does not compile"),
    "wrong prefill": ("mla_prefill", slightly_wrong("mla_prefill"), "off by .* times what rounding explains"),
    "fails": ("mla_decode", raising(RuntimeError("an illegal memory access was encountered")), r"it fails \(RuntimeE"),
}  # fmt: skip


def judged(operation: str, ops: kernels.Ops, use: kernels.Use) -> str:
    """What the process that checks says of an operation, within this one."""
    return startup_check.reason_against(operation, ops, startup_check.Calls(use, CPU).of(operation), use.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sound_kernels_are_taken(use, dtype):
    use = dataclasses.replace(use, dtype=dtype)
    assert [judged(name, TRITON, use) for name in kernels.OPERATIONS] == [""] * len(kernels.OPERATIONS)
    assert kernels.without(TRITON, {}) is TRITON


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_replaces_its_operation_and_one_line_says_why(fault, use, monkeypatch, caplog):
    operation, faulty, message = FAULTS[fault]
    broken = dataclasses.replace(TRITON, **{operation: faulty})
    reason = judged(operation, broken, use)
    monkeypatch.setattr(kernels, "triton_ops", lambda: broken)
    monkeypatch.setattr(startup_check, "refusals", lambda device, given: {operation: reason})
    with caplog.at_level(logging.WARNING):
        ops = kernels._automatic(CPU, use, kernels.triton_ops)
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(f"plain PyTorch instead of kernels for {operation}: .*{message}.*", lines[0])
    assert len(lines) == (1 if ops.static else 2)
    for name in kernels.OPERATIONS:
        assert getattr(ops, name) is getattr(kernels.TORCH if name == operation else TRITON, name)
    assert ops.static == (operation in ("norm_router", "add_rms_norm", "mla_prefill"))


def test_operations_refused_for_one_reason_share_a_line(caplog):
    everything = dict.fromkeys(kernels.OPERATIONS, "no")
    kernels.report(everything, kernels.without(TRITON, everything))
    assert kernels.without(TRITON, everything) is kernels.TORCH
    assert caplog.records[0].getMessage().endswith("mla_prefill: no")
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    "refused",
    [{"norm_router"}, {"moe"}, {"mla_prefill"}, {"add_rms_norm", "mla_prepare", "mla_decode"}],
    ids=lambda each: "+".join(sorted(each)),
)
def test_mixed_operations_give_the_same_tokens(refused, model, monkeypatch):
    plain = Engine(copy.deepcopy(model), 1024, SMALL)
    monkeypatch.setattr(kernels, "select_ops", lambda *given, **named: kernels.without(TRITON, refused))
    mixed = Engine(copy.deepcopy(model), 1024, SMALL)
    assert mixed.ops.name == "mixed"
    ids, patches = some_requests()[2]
    assert ask(mixed, ids, patches, max_new_tokens=3) == ask(plain, ids, patches, max_new_tokens=3)
    mixed.close()
    plain.close()


CHILD = """
import dataclasses, os, signal, sys, time, types
from bench_suite import triton_on_cpu
from kimi_vl import kernels
from kimi_vl.kernels import startup_check

sound = kernels.triton_ops()

def hang(*arguments, **named):
    while True:
        time.sleep(1)

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGSEGV)

def wrong(*arguments, **named):
    print("what a library says")
    return tuple(2 * result for result in sound.add_rms_norm(*arguments, **named))

sys.modules["flash_attn.cute"] = types.SimpleNamespace(flash_attn_func=wrong, flash_attn_varlen_func=wrong)
sys.exit(startup_check.main(dataclasses.replace(sound, norm_router=hang, moe=die, add_rms_norm=wrong)))
"""


@pytest.mark.slow
def test_kernels_that_hang_or_crash_end_with_their_process_and_the_others_are_checked(use, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"))
    processes = []
    start = startup_check._Checker.__init__
    monkeypatch.setattr(
        startup_check._Checker, "__init__", lambda self, *given: (start(self, *given), processes.append(self))[0]
    )
    monkeypatch.setattr(flash_attention, "candidates", lambda device: ["flash_attn.cute", "flash_attn"])
    read, said = startup_check._Checker.next, []

    def read_soon(self: startup_check._Checker, seconds: float) -> dict[str, Any] | None:
        """Waits shortly for what hangs, and for everything else as long as a slow machine needs."""
        hangs = said[-1:] == [{"operation": "norm_router"}]
        said.append(None)
        said[-1] = read(self, 0.5 if hangs else 600)
        return said[-1]

    monkeypatch.setattr(startup_check._Checker, "next", read_soon)
    refused = startup_check.check(CPU, use, (sys.executable, "-c", CHILD), call_seconds=20)
    assert {"operation": "norm_router"} in said
    assert refused.keys() == {"add_rms_norm", "norm_router", "moe", "flash_attn.cute"}
    assert refused["flash_attn.cute"] == "it fails (TypeError)"  # and the other one is not installed
    assert "is off by" in refused["add_rms_norm"]
    assert refused["norm_router"] == "a call does not end within 20 s"
    assert refused["moe"] == "the process that checks it ended (exit status -11)"
    assert len(processes) == 3
    assert all(each._process.returncode is not None for each in processes)


@pytest.mark.slow
def test_a_check_that_cannot_start_refuses_everything(use):
    refused = startup_check.check(CPU, use, (sys.executable, "-c", "raise SystemExit(3)"))
    assert refused.keys() == set(kernels.OPERATIONS)
    assert len(set(refused.values())) == 1
    assert "does not start" in refused["moe"]


def test_the_same_check_runs_once(use, monkeypatch):
    asked = []
    monkeypatch.setattr(startup_check, "_running", {})
    monkeypatch.setattr(startup_check, "check", lambda *given: asked.append(given) or {"moe": "no"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels.prepare("cpu", use)
    assert not asked
    kernels.prepare("cuda", use)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert startup_check.refusals(first, use) == startup_check.refusals(second, use) == {"moe": "no"}
    assert asked == [(first, use), (second, use)]


@pytest.mark.slow
def test_a_kernel_that_was_forced_and_cannot_run_fails_the_setup_with_a_sentence(use):
    broken = dataclasses.replace(TRITON, norm_router=raising(OutOfResources(122_880, 101_376, "shared memory")))
    startup_check.launch_all(TRITON, CPU, use)
    with pytest.raises(
        RuntimeError, match=r"kernel of norm_router cannot run on this GPU \(OutOfResources\); unset KIMI"
    ):
        startup_check.launch_all(broken, CPU, use)


# The first request


def test_a_model_is_ready_when_a_first_request_was_answered(monkeypatch):
    seen = []
    step = Engine._step

    def watched(self: Engine, chunks: Any, forward: Any) -> None:
        seen.append([chunk.end - chunk.begin for chunk in chunks])
        step(self, chunks, forward)

    monkeypatch.setattr(Engine, "_step", watched)
    loaded = pipeline.load(str(CHECKPOINT), device="cpu")
    assert seen == [[6], [1], [1]]
    assert loaded.healthy()
    loaded.close()


@pytest.mark.parametrize("fault", ["vision", "prefill", "decoding", "never"])
def test_a_first_request_that_fails_fails_the_setup(fault, model, monkeypatch):
    engine = Engine(copy.deepcopy(model), 1024, SMALL)
    forward, let_go = Engine._forward, threading.Event()

    def faulty(self: Engine, chunks: Any) -> Any:
        if fault == ("prefill" if chunks[0].begin == 0 else "decoding"):
            raise OutOfResources(122_880, 101_376, "shared memory")
        if fault == "never":
            let_go.wait(300)
        return forward(self, chunks)

    monkeypatch.setattr(Engine, "_forward", faulty)
    if fault == "vision":
        monkeypatch.setattr(engine.model, "encode_images", raising(RuntimeError("no kernel image")))
    said = "is not done after 0.1 s" if fault == "never" else r"fails \((OutOfResources|RuntimeError)\)"
    with pytest.raises(RuntimeError, match=f"the model cannot serve on this machine: a first request {said}"):
        warm_up.warm_up(engine, seconds=0.1 if fault == "never" else 60)
    let_go.set()
    with pytest.raises(RuntimeError, match="stopped"):
        ask(engine, [1, 2], [], max_new_tokens=1)
