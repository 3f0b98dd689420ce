"""Sampling against a slow reference, its statistics, and its independence of everything but seed and position."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from kimi_vl.errors import UserError
from kimi_vl.sampling import Sampling, choose, draw, draw_together, finite, sample, uniform, uniforms


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


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_numbers_drawn_in_one_go_are_the_same(seed):
    assert uniforms(seed, 3, 9) == [uniform(seed, position) for position in range(3, 12)]


OPTIONS = [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.7, 0.8, 0), (1.0, 0.05, 0), (1.3, 1.0, 5), (0.8, 0.7, 600), (0.9, 0.99, 2)]
GREEDY = [(0.0, 1.0, 0), (1.0, 0.0, 0), (1.0, 0.5, 1), (1e-5, 0.9, 7)]


@pytest.mark.parametrize("options", [OPTIONS + GREEDY, OPTIONS[:2] + GREEDY, GREEDY], ids=["cut", "plain", "greedy"])
def test_choosing_on_tensors_draws_the_same(options):
    """Rows of every kind side by side, of a long and a short vocabulary, against the draw of one row at a time."""
    rng = random.Random(3)
    chosen = set()
    for position in range(40):
        samplings = [Sampling(*rng.choice(options), seed=rng.randrange(2**40)) for _ in range(9)]
        logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(position)) * 3
        given = samplings, [position] * 9, [rng.choice((500, 500, 31)) for _ in samplings]
        found = draw_together(logits, *given)
        assert found == draw(logits, *given)
        chosen |= set(found)
    assert len(chosen) > 50
    assert draw_together(logits[:0], [], [], []) == []


def test_rows_of_nan_give_an_id_and_leave_their_neighbours_alone():
    logits = torch.randn(3, 40)
    logits[1] = float("nan")
    ones, limits = torch.ones(3, dtype=torch.float64), torch.tensor([40, 40, 40])
    given = ones, ones * 0.9, torch.zeros(3, dtype=torch.int64), limits, ones * 0.3
    found = choose(logits, *given, greedy_only=False, cut=True)
    assert ((found >= 0) & (found < 40)).all()
    logits[1] = 0
    assert torch.equal(found[[0, 2]], choose(logits, *given, greedy_only=False, cut=True)[[0, 2]])


def test_rows_that_hold_an_infinity_or_no_number_are_not_finite():
    logits = torch.zeros(6, 1000)
    for row, values in enumerate(([torch.inf], [-torch.inf], [torch.nan], [torch.inf, -torch.inf], [1e30, 1e30])):
        logits[row, 7 : 7 + len(values)] = torch.tensor(values)
    assert finite(logits).tolist() == [False, False, False, False, True, True]
