"""Sampling against a slow reference, its statistics, and its independence of everything but seed and position."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from kimi_vl.errors import UserError
from kimi_vl.sampling import Sampling, sample, uniform


def reference(logits: list[float], temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """Probability of each token after temperature, then top-k, then top-p; written for clarity."""
    scaled = sorted(((value / temperature, -index) for index, value in enumerate(logits)), reverse=True)
    scaled = scaled[:top_k] if top_k else scaled
    total = sum(math.exp(value - scaled[0][0]) for value, _ in scaled)
    kept, mass = {}, 0.0
    for value, negative in scaled:
        if mass >= top_p:
            break
        kept[-negative] = math.exp(value - scaled[0][0]) / total
        mass += kept[-negative]
    return {index: value / sum(kept.values()) for index, value in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 5), (0.8, 0.7, 6), (2.0, 0.05, 0)],
)
def test_draws_follow_the_reference(temperature, top_p, top_k):
    rng = random.Random(5)
    logits = [rng.gauss(0, 1.5) for _ in range(20)]
    expected = reference(logits, temperature, top_p, top_k)
    draws = 4000
    sampling = Sampling(temperature, top_p, top_k, seed=11)
    values = torch.tensor(logits)
    counts = np.bincount([sample(values, sampling, position) for position in range(draws)], minlength=20)
    assert {index for index in range(20) if counts[index]} <= expected.keys()
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    freedom = len(expected) - 1
    # the 99.9 % point of chi-square, by Wilson and Hilferty
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert chi_square <= limit


@pytest.mark.parametrize("options", [(0.0, 1.0, 0), (1.0, 0.0, 0), (1.0, 1.0, 1)])
def test_greedy_forms(options):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert {sample(logits, Sampling(*options, seed=s), p) for s in range(5) for p in range(5)} == {int(logits.argmax())}


def test_draws_depend_on_seed_and_position_alone():
    logits = torch.zeros(1000)
    once = [sample(logits, Sampling(1.0, 1.0, 0, 7), position) for position in range(50)]
    torch.manual_seed(1)
    again = [sample(logits, Sampling(1.0, 1.0, 0, 7), position) for position in reversed(range(50))]
    assert once == again[::-1]
    assert once != [sample(logits, Sampling(1.0, 1.0, 0, 8), position) for position in range(50)]


def test_seed_zero_is_a_seed_and_numbers_are_even():
    values = [uniform(0, position) for position in range(2000)]
    assert len(set(values)) == 2000
    assert all(0 <= value < 1 for value in values)
    assert abs(float(np.mean(values)) - 0.5) < 0.03


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_k", -1),
        ("seed", -1),
    ],
)
def test_bounds(name, value):
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0} | {name: value}
    with pytest.raises(UserError, match=f"E_PARAMETER: {name}"):
        Sampling(**options)
