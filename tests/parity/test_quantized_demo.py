"""The demo model with quantised weights does its tasks as well as with those it was trained to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from demo_world import evaluate, lessons
from kimi_vl.quantization.weight import QuantizedWeight
from kimi_vl.weights import loader, resolve

ALLOWED = {"int8": 0.005, "float8": 0.02, "int4": 0.02}  # of the answers, fewer exactly right


class Examinee(evaluate.Examinee):
    """The demo with its weights in a form."""

    def __init__(self, form: str | None):
        super().__init__(resolve.DEMO)
        self.model = loader.load(resolve.DEMO, dtype=torch.float32, form=form)


def right(examinee: Examinee, count: int, task: str) -> list[bool]:
    return [result.right for result in evaluate.examine(examinee, evaluate.SEED, count, [task])]


def lost(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Of the answers, how many more were right before."""
    return (sum(before) - sum(after)) / len(before)


@pytest.mark.slow
def test_a_few_sums_and_talks_are_answered_as_well():
    """With so few questions one more wrong answer is chance."""
    for task in ("sum", "talk"):
        wanted = right(Examinee(None), 12, task)
        assert sum(wanted) >= 9
        for form in ALLOWED:
            assert lost(wanted, right(Examinee(form), 12, task)) <= 1 / 12, (task, form)


@pytest.mark.nightly
@pytest.mark.parametrize("task", lessons.TASKS)
def test_every_task_is_answered_as_well(task: str):
    """192 fresh pictures, the same for each form."""
    wanted = right(Examinee(None), 192, task)
    for form, allowed in ALLOWED.items():
        assert lost(wanted, right(Examinee(form), 192, task)) <= allowed, form


@pytest.mark.slow
def test_wrong_scales_are_seen():
    """What the comparison is worth: with scales of another channel nothing is answered."""
    examinee = Examinee("int4")
    for name, module in examinee.model.named_modules():
        if isinstance(module, QuantizedWeight) and "o_proj" in name:
            module.scales.data = module.scales.data.roll(1, 0).neg()
    assert sum(right(examinee, 6, "sum")) <= 2
