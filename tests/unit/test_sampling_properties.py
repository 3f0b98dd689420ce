"""Sampling is, for any logits and parameters, what a slow and plain reference says; and the statistics could tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_vl.engine import sampling
from kimi_vl.engine.sampling import Sampling, sample_one

STEPS = 300


def reference(logits: list[float], temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """Probability of each token: temperature, then the top_k likeliest, then the fewest of those that reach top_p."""
    if temperature == 0 or top_p == 0:
        return {max(range(len(logits)), key=lambda index: logits[index]): 1.0}
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    order = order[:top_k] if top_k else order
    weights = {index: math.exp((logits[index] - logits[order[0]]) / temperature) for index in order}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for index in order:
        if sum(kept.values()) >= top_p * total:
            break
        kept[index] = weights[index]
    return {index: weight / sum(kept.values()) for index, weight in kept.items()}


def shares(logits: list[float], options: Sampling) -> dict[int, float]:
    """How much of [0, 1) leads to each token: the draw is asked for evenly spread numbers."""
    values = torch.tensor(logits)
    counts: dict[int, int] = {}
    for step in range(STEPS):
        index = sample_one(values, options, (step + 0.5) / STEPS)
        counts[index] = counts.get(index, 0) + 1
    return {index: count / STEPS for index, count in counts.items()}


@settings(max_examples=25, deadline=None)
@given(
    # logits of one place after the point: no two are so close that rounding decides
    logits=st.lists(st.integers(-60, 60), min_size=1, max_size=12, unique=True).map(lambda v: [x / 10 for x in v]),
    temperature=st.sampled_from([0.0, 0.1, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 0.05, 0.3, 0.77, 0.95, 1.0]),
    top_k=st.integers(0, 14),
)
def test_every_token_has_the_share_of_the_reference(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    expected = reference(logits, temperature, top_p, top_k)
    found = shares(logits, Sampling(temperature, top_p, top_k, 0))
    assert found.keys() <= expected.keys()
    for index, probability in expected.items():
        assert abs(found.get(index, 0.0) - probability) <= 2 / STEPS


@pytest.mark.parametrize("spread", [0.2, 1.5, 3.0, 8.0])  # nearly flat to peaked: few or all have to be looked at
@pytest.mark.parametrize("top_p", [0.02, 0.4, 0.9, 0.999])
def test_a_large_vocabulary_is_cut_where_a_full_sort_cuts_it(spread: float, top_p: float) -> None:
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(3)) * spread
    kept = list(reference(logits.tolist(), 0.7, top_p, 0))
    options = Sampling(0.7, top_p, 0, 0)
    for number, token in ((0.0, kept[0]), (1 - 1e-12, kept[-1])):
        assert sample_one(logits, options, number) == token


def chi_square(counts: np.ndarray, expected: dict[int, float]) -> tuple[float, float]:
    """The statistic and its 99.9 % point, by Wilson and Hilferty; infinite where the impossible was drawn."""
    draws = int(counts.sum())
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    if any(counts[index] for index in range(len(counts)) if index not in expected):
        return math.inf, limit
    return sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items()), limit


LOGITS = np.random.default_rng(5).normal(0, 1.5, 20).tolist()
OPTIONS = (0.8, 0.85, 9)


def draws(options: Sampling, logits: list[float] = LOGITS, count: int = 4000) -> np.ndarray:
    values = torch.tensor(logits)
    found = [sample_one(values, options, sampling.uniform(options.seed, position)) for position in range(count)]
    return np.bincount(found, minlength=len(logits))


def test_all_three_together_follow_the_reference() -> None:
    statistic, limit = chi_square(draws(Sampling(*OPTIONS, seed=3)), reference(LOGITS, *OPTIONS))
    assert statistic <= limit


def wrong_order(logits: list[float]) -> dict[int, float]:
    """top-p before top-k."""
    nucleus = reference(logits, OPTIONS[0], OPTIONS[1], 0)
    kept = sorted(nucleus, key=lambda index: -nucleus[index])[: OPTIONS[2]]
    total = sum(nucleus[index] for index in kept)
    return {index: nucleus[index] / total for index in kept}


MISTAKES: dict[str, Callable[[list[float]], dict[int, float]]] = {
    "top-p before top-k": wrong_order,
    "another temperature": lambda logits: reference(logits, OPTIONS[0] * 1.15, *OPTIONS[1:]),
    "a token more": lambda logits: reference(logits, OPTIONS[0], OPTIONS[1], 0),
    "a token fewer": lambda logits: reference(logits, OPTIONS[0], OPTIONS[1], 5),
    "no temperature": lambda logits: reference(logits, 1.0, *OPTIONS[1:]),
    "one logit changed": lambda logits: reference([value + 0.3 * (value == max(logits)) for value in logits], *OPTIONS),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_statistics_would_tell(mistake: str) -> None:
    statistic, limit = chi_square(draws(Sampling(*OPTIONS, seed=3)), MISTAKES[mistake](LOGITS))
    assert statistic > limit


def test_a_number_that_is_not_even_would_be_told() -> None:
    lean = np.random.default_rng(1).random(4000) ** 1.1
    numbers = iter(lean)
    with mock.patch.object(sampling, "uniform", lambda seed, position: float(next(numbers))):
        counts = draws(Sampling(*OPTIONS, seed=3))
    statistic, limit = chi_square(counts, reference(LOGITS, *OPTIONS))
    assert statistic > limit


@pytest.mark.parametrize("seeds", [(0, 1), (7, 8), (2**63, 2**64 - 1)])
def test_seeds_are_independent_of_each_other(seeds: tuple[int, int]) -> None:
    first, second = (np.array([sampling.uniform(seed, n) for n in range(2000)]) for seed in seeds)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1


@pytest.mark.parametrize("temperature", [5e-324, 1e-301, 1e-45, 1e-38, 1e-10, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (5e-324, 0), (0.3, 5), (1e-300, 2)])
def test_the_smallest_values_take_the_likeliest(temperature: float, top_p: float, top_k: int) -> None:
    for size in (1.0, 1e4):
        logits = torch.tensor(LOGITS) * size
        assert sample_one(logits, Sampling(temperature, top_p, top_k, 1), 0.3) == int(logits.argmax())


def test_equal_logits_are_drawn_alike_however_large() -> None:
    for value in (-1e30, 0.0, 1e30):
        logits, options = torch.full((4,), value), Sampling(0.7, 1.0, 0, 0)
        found = {sample_one(logits, options, sampling.uniform(seed, 0)) for seed in range(60)}
        assert found == {0, 1, 2, 3}
