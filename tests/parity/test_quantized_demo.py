"""The demo model with quantised weights does its tasks as well as with those it was trained to."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch

from demo_world import evaluate, lessons
from kimi_vl.quantization.weight import QuantizedWeight
from kimi_vl.weights import loader, resolve

# Of the answers, fewer right: of one task's 192, where an answer more or less is chance, and of all tasks' together.
ALLOWED = {"int8": 0.011, "float8": 0.02, "int4": 0.03}
ALLOWED_TOGETHER = {"int8": 0.002, "float8": 0.005, "int4": 0.01}


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


@functools.cache
def examinee(form: str | None) -> Examinee:
    return Examinee(form)


@functools.cache
def answered(form: str | None, task: str) -> list[bool]:
    """Which of 192 fresh pictures, the same for each form, are answered right."""
    return right(examinee(form), 192, task)


@pytest.mark.nightly
@pytest.mark.parametrize("task", lessons.TASKS)
def test_every_task_is_answered_as_well(task: str):
    for form, allowed in ALLOWED.items():
        assert lost(answered(None, task), answered(form, task)) <= allowed, form


@pytest.mark.nightly
def test_all_tasks_together_are_answered_as_well():
    wanted = [each for task in lessons.TASKS for each in answered(None, task)]
    for form, allowed in ALLOWED_TOGETHER.items():
        assert lost(wanted, [each for task in lessons.TASKS for each in answered(form, task)]) <= allowed, form


@pytest.mark.slow
def test_wrong_scales_are_seen():
    """What the comparison is worth: with scales of another channel nothing is answered."""
    examinee = Examinee("int4")
    for name, module in examinee.model.named_modules():
        if isinstance(module, QuantizedWeight) and "o_proj" in name:
            module.scales.data = module.scales.data.roll(1, 0).neg()
    assert sum(right(examinee, 6, "sum")) <= 2
