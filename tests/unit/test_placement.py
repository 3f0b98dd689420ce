"""Which form of the weights is taken, by free memory."""

from __future__ import annotations

import logging

import pytest
import torch
from bench_suite import checkpoint

from kimi_vl import pipeline, placement
from kimi_vl.cli import check
from kimi_vl.model.config import Config
from kimi_vl.quantization.scheme import form, to_config
from kimi_vl.quantization.weight import QuantizedWeight
from kimi_vl.weights import loader, resolve

GIB = 2**30
CONFIG = Config.from_dict(checkpoint.divided(1, 27, 27))
CUDA = torch.device("cuda")


def tokens(name: str | None, free: float) -> int:
    return placement.place(CONFIG, torch.bfloat16, name, "cuda", int(free * GIB)).tokens


def test_the_published_model_fits_small_cards():
    assert tokens("int4", 15) >= 32_768
    assert tokens("int8", 22) >= 65_536
    assert tokens("int8", 15) == tokens(None, 22) == 0
    assert tokens(None, 44) >= 131_072


@pytest.mark.parametrize(
    ("free", "chosen"), [(80, None), (44, None), (33, "int8"), (22, "int8"), (19, "int4"), (15, "int4"), (4, "int4")]
)
def test_auto_takes_the_most_exact_form_that_leaves_a_cache(free, chosen, monkeypatch, caplog):
    monkeypatch.setenv("KIMI_VL_QUANTIZE", "auto")
    monkeypatch.setattr(placement, "free_bytes", lambda device: free * GIB)
    with caplog.at_level(logging.INFO):
        assert placement.choose(CONFIG, torch.bfloat16, CUDA) == chosen
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"weights as {chosen or 'they are'}: ")
    if chosen:
        better = {"int8": None, "int4": "int8"}[chosen]
        assert tokens(better, free) < placement.WANTED


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: 22 * GIB)
    monkeypatch.delenv("KIMI_VL_QUANTIZE", raising=False)
    with pytest.raises(RuntimeError, match=r"the weights take 30\.6 GiB .* 22\.0 GiB .* set KIMI_VL_QUANTIZE=auto"):
        placement.choose(CONFIG, torch.bfloat16, CUDA)
    monkeypatch.setenv("KIMI_VL_QUANTIZE", "int8")
    assert placement.choose(CONFIG, torch.bfloat16, CUDA) == "int8"
    monkeypatch.setenv("KIMI_VL_QUANTIZE", "int3")
    with pytest.raises(ValueError, match="not 'int3'"):
        placement.choose(CONFIG, torch.bfloat16, CUDA)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_float8_is_refused_where_a_gpu_does_not_have_it(capability, monkeypatch):
    monkeypatch.setenv("KIMI_VL_QUANTIZE", "float8")
    monkeypatch.setattr(placement, "free_bytes", lambda device: 22 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (22 * GIB, 24 * GIB))
    quantized = Config.from_dict(checkpoint.divided(16, 2, 1) | {"quantization_config": to_config(form("float8"))})
    forms = {fit.model for fit in check.quantized_fits(check.Device("cuda", "a card", 24 * GIB, 22 * GIB, 2))}
    for config in (CONFIG, quantized):
        if capability < (8, 9):
            with pytest.raises(RuntimeError, match=r"no float8, .* set KIMI_VL_QUANTIZE=int8"):
                placement.choose(config, torch.bfloat16, CUDA)
            assert "float8" not in forms
        else:
            assert placement.choose(config, torch.bfloat16, CUDA) == "float8"
            assert "float8" in forms
    assert placement.choose(CONFIG, torch.float32, torch.device("cpu")) == "float8"


def test_a_quantised_checkpoint_stays_as_it_is(monkeypatch):
    values = checkpoint.divided(16, 2, 1) | {"quantization_config": to_config(form("int8"))}
    config = Config.from_dict(values)
    for asked, chosen in (("auto", None), ("none", None), ("int8", "int8")):
        monkeypatch.setenv("KIMI_VL_QUANTIZE", asked)
        assert placement.choose(config, torch.bfloat16, CUDA) == chosen


@pytest.mark.parametrize("name", check.QUANTIZED_BYTES)
def test_the_command_counts_what_the_loader_makes(name):
    model = loader.planned_model(CONFIG, torch.bfloat16, name)
    codes = sum(module.nbytes for module in model.modules() if isinstance(module, QuantizedWeight))
    assert codes == check.QUANTIZED_BYTES[name]
    everything = sum(parameter.nbytes for parameter in model.parameters())
    assert (everything - codes) // 2 == check.KEPT_VALUES


def test_gpus_without_bfloat16_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5, which has no bfloat16"):
        pipeline.refuse_without_bfloat16(CUDA, torch.bfloat16)
    pipeline.refuse_without_bfloat16(CUDA, torch.float32)
    pipeline.refuse_without_bfloat16(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    pipeline.refuse_without_bfloat16(CUDA, torch.bfloat16)


def test_a_large_model_is_bfloat16_where_it_is_fast(monkeypatch):
    small, cpu = Config.from_directory(resolve.DEMO), torch.device("cpu")
    for missing, dtype in (("", torch.bfloat16), ("there is no g++", torch.float32)):
        monkeypatch.setattr(placement.kernels, "missing_native", lambda missing=missing: missing)
        assert placement.choose_dtype(CONFIG, cpu) == dtype
        assert placement.choose_dtype(small, cpu) == torch.float32
        assert placement.choose_dtype(small, CUDA) == placement.choose_dtype(CONFIG, CUDA) == torch.bfloat16
