"""`scripts/bench launches`: what it counts of a step, and what a step may take."""

from __future__ import annotations

import json
import types
from typing import Any

import numpy as np
import pytest
from bench_suite import launches, plan  # the first before any kernel

import torch  # isort: skip


def test_every_layer_adds_the_same_to_a_step():
    one, two, three = (launches.count_steps("torch", 2, layers, max_new_tokens=6) for layers in (1, 2, 3))
    for name in ("launches", "device_waits", "event_waits"):
        counted = [getattr(each, name) for each in (one, two, three)]
        assert launches.carried_on(counted[0], counted[1], 3) == counted[2]
    assert two.launches > one.launches + 20
    # nothing in a layer waits
    assert one.device_waits == three.device_waits


@pytest.mark.parametrize("sequences", [1, 5])
def test_no_layer_waits_where_products_are_not_grouped(sequences: int):
    one, two = (launches.count_steps("torch, sm_80", sequences, layers, max_new_tokens=6) for layers in (1, 2))
    assert one.device_waits == two.device_waits


def test_kernels_take_few_launches_and_no_layer_waits():
    one, two = (launches.count_steps("kernels", 1, layers, max_new_tokens=4) for layers in (1, 2))
    assert launches.carried_on(one.launches, two.launches) <= 330
    assert one.device_waits == two.device_waits


def test_a_sector_counts_once_a_launch():
    values = torch.zeros(64, dtype=torch.float32)
    watch = launches._Sectors()
    watch.expect([values])
    base = values.data_ptr() & -32

    def touch(offsets: list[int], writes: bool, shown: list[bool] | None = None) -> None:
        pointers = types.SimpleNamespace(data=np.array([base + offset for offset in offsets], dtype=np.uint64))
        watch.note(pointers, types.SimpleNamespace(data=np.array(shown or [True] * len(offsets))), writes)

    shift = values.data_ptr() - base
    touch([shift + 0, shift + 4, shift + 4], False)
    assert (watch.read, watch.wrote) == (32, 0)
    touch([shift + 0, shift + 64, shift + 128], False, [True, True, False])
    touch([shift + 8], True)
    assert (watch.read, watch.wrote) == (64, 32)
    assert watch.written == {0}
    watch.expect([values])
    assert (watch.read, watch.wrote) == (0, 0)


@pytest.mark.parametrize("form", ["float8", pytest.param("int8", marks=pytest.mark.nightly)])
def test_a_step_with_quantised_weights_reads_fewer_bytes(form: str):
    """By the kernels, which also enter and leave the latent space by them: about half of all matrices but one."""
    values = launches.small(2)
    values["text_config"] |= {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64}
    counts = [launches.count_bytes("kernels", 1, 2, context=40, values=values, form=each)[0] for each in (None, form)]
    before, after = (each.bytes_read for each in counts)
    matrices = loader_bytes(values, None) - loader_bytes(values, form)
    assert 0.9 * matrices <= before - after <= 1.1 * matrices


def loader_bytes(values: dict[str, Any], form: str | None) -> int:
    return plan.bytes_a_step(launches.Config.from_dict(values), form)


def test_bytes_of_a_step_of_plain_torch_and_the_report(capsys: pytest.CaptureFixture[str]):
    values = launches.small(2)
    counts, met = launches.count_bytes("torch", 3, 2, context=40, values=values)
    assert 6 <= met <= 18
    config = launches.Config.from_dict(values).text_config
    assert counts.bytes_read > launches.decode.bytes_a_step(config, 3, 40, met)
    assert launches.main(["--ways", "torch", "--sequences", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    report = json.loads(out[-1])
    assert report["bench"] == "launches" and report["steps"][0]["sequences"] == 1
    assert any("not measured" in line for line in out)
