"""Sampling against a slow reference, its statistics, and its independence of everything but seed and position."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimi_vl.engine.sampling import (
    Sampling,
    _best,
    finite,
    sample_batch,
    sample_batch_on_device,
    sample_from_tensors,
    sample_one,
    uniform,
    uniforms,
)
from kimi_vl.errors import UserError


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
    counts = np.bincount(
        [sample_one(values, sampling, uniform(11, position)) for position in range(draws)], minlength=20
    )
    assert {index for index in range(20) if counts[index]} <= expected.keys()
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    freedom = len(expected) - 1
    # the 99.9 % point of chi-square, by Wilson and Hilferty
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert chi_square <= limit


@pytest.mark.parametrize("options", [(0.0, 1.0, 0), (1.0, 0.0, 0), (1.0, 1.0, 1)])
def test_greedy_forms(options):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert {sample_one(logits, Sampling(*options, seed=s), uniform(s, p)) for s in range(5) for p in range(5)} == {
        int(logits.argmax())
    }


def test_draws_depend_on_seed_and_position_alone():
    logits = torch.zeros(1000)
    once = [sample_one(logits, Sampling(1.0, 1.0, 0, 7), uniform(7, position)) for position in range(50)]
    torch.manual_seed(1)
    again = [sample_one(logits, Sampling(1.0, 1.0, 0, 7), uniform(7, position)) for position in reversed(range(50))]
    assert once == again[::-1]
    assert once != [sample_one(logits, Sampling(1.0, 1.0, 0, 8), uniform(8, position)) for position in range(50)]


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
def test_a_batch_on_a_device_gives_the_same_tokens(options):
    """Sequences of every kind in one batch, of a long and a short vocabulary, against one sequence at a time."""
    rng = random.Random(3)
    chosen = set()
    for position in range(40):
        samplings = [Sampling(*rng.choice(options), seed=rng.randrange(2**40)) for _ in range(9)]
        logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(position)) * 3
        given = (
            samplings,
            [uniform(s.seed, position) for s in samplings],
            [rng.choice((500, 500, 31)) for _ in samplings],
        )
        found = sample_batch_on_device(logits, *given)
        assert found == sample_batch(logits, *given)
        chosen |= set(found)
    assert len(chosen) > 50
    assert sample_batch_on_device(logits[:0], [], [], []) == []


@pytest.mark.parametrize("vocabulary", [1, 200, 256, 257, 700, 1024])
def test_a_device_draws_no_token_without_probability(vocabulary):
    """Whole blocks of tokens are ruled out at either end and between, numbers are the least and the greatest ones."""
    generator, rng = torch.Generator().manual_seed(vocabulary), random.Random(vocabulary)
    cases = [(0, vocabulary), (vocabulary // 2, vocabulary), (0, vocabulary // 3 + 1), (vocabulary - 1, vocabulary)]
    allowed = torch.zeros(len(cases) + 1, vocabulary, dtype=torch.bool)
    for own, (begin, end) in zip(allowed, cases, strict=False):
        own[begin:end] = True
    allowed[-1, [0, -1]] = True  # the first and the last
    limits = [vocabulary, vocabulary, vocabulary // 2 + 1, vocabulary, vocabulary]
    for temperature in (1e-4, 0.6, 2.0):
        for number in (0.0, math.nextafter(1, 0), *(rng.random() for _ in range(20))):
            logits = torch.randn(allowed.shape, generator=generator).masked_fill(~allowed, float("-inf"))
            samplings = [Sampling(temperature, 1.0, 0, 0)] * len(logits)
            found = sample_batch_on_device(logits, samplings, [number] * len(logits), limits)
            for own, token, limit in zip(logits, found, limits, strict=True):
                assert token < limit
                assert (own / temperature).double().softmax(-1)[token] > 0
            if number < math.nextafter(1, 0):  # which rounding decides
                assert found == sample_batch(logits, samplings, [number] * len(logits), limits)


@pytest.mark.parametrize("away", [-1, 0, 1])
def test_a_device_draws_no_token_without_probability_where_a_block_ends(away):
    """Numbers beside what the blocks before sum up to, which rounding may give to either block."""
    count = 300
    logits = torch.randn(count, 768, generator=torch.Generator().manual_seed(1))
    logits[:, 512:600] = float("-inf")
    sums = (logits.double() - logits.amax(-1, keepdim=True)).exp().unflatten(-1, (3, 256)).sum(-1)
    shares = (sums[:, 0] + sums[:, 1]) / sums.cumsum(-1)[:, -1]
    numbers = [share if away == 0 else math.nextafter(share, share + away) for share in shares.tolist()]
    found = sample_batch_on_device(logits, [Sampling(1.0, 1.0, 0, 0)] * count, numbers, [768] * count)
    assert all(logits[range(count), found] > float("-inf"))
    assert all(256 <= token < 768 for token in found)


@pytest.mark.parametrize("spread", [0.05, 3.0, 30.0])
@pytest.mark.parametrize("options", [OPTIONS, [*OPTIONS, *GREEDY]], ids=["cut", "all"])
def test_bfloat16_logits_need_no_sorting(options, spread):
    """Many of them are equal; signs differ, zeros have either, and some tokens are ruled out by infinities."""
    rng, generator = random.Random(4), torch.Generator().manual_seed(5)
    for position in range(3):
        samplings = [Sampling(*rng.choice(options), seed=rng.randrange(2**40)) for _ in range(5)]
        logits = (torch.randn(5, 3000, generator=generator) * spread).bfloat16().float()
        logits[:, ::7] = -0.0
        logits[:, ::9] = 0.0
        logits[:, 5::100] = float("-inf")
        logits[::2, 70:] -= 1e4
        logits = logits.bfloat16().float()
        given = (
            samplings,
            [uniform(s.seed, position) for s in samplings],
            [rng.choice((3000, 3000, 31)) for _ in samplings],
        )
        right = sample_batch(logits, *given)
        assert sample_batch_on_device(logits, *given, rounded=True) == right
        assert sample_batch_on_device(logits, *given, rounded=False) == right


@pytest.mark.parametrize("count", [1, 3, 64, 2048])
def test_of_equal_tokens_the_first_are_the_likeliest(count):
    values = torch.randint(0, 50, (3000,), generator=torch.Generator().manual_seed(1)).double()
    best, ids = _best(values, count)
    right, order = values.sort(descending=True, stable=True)
    assert torch.equal(best, right[:count])
    assert torch.equal(ids, order[:count])


def test_top_k_and_top_p_sort_no_vocabulary_and_needs_little_memory():
    """What a GPU samples for 64 sequences of a bfloat16 model."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            assert "sort" not in func.__name__.replace("searchsorted", "")
            sizes.extend(each.nbytes for each in tree_leaves(result) if isinstance(each, torch.Tensor))
            return result

    count, vocabulary = 64, 163840
    logits = torch.randn(count, 1).bfloat16().float().expand(-1, vocabulary)
    half = torch.full((count,), 0.5, dtype=torch.float64)
    limits, zeros = torch.full((count,), vocabulary), torch.zeros(count, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch():
        sample_from_tensors(logits, half, half, zeros, limits, half, greedy_only=False, cut=True, rounded=True)
    assert max(sizes) <= 16 * vocabulary * 8


def test_logits_of_nan_give_an_id_and_leave_the_other_sequences_alone():
    logits = torch.randn(3, 40)
    logits[1] = float("nan")
    ones, limits = torch.ones(3, dtype=torch.float64), torch.tensor([40, 40, 40])
    given = ones, ones * 0.9, torch.zeros(3, dtype=torch.int64), limits, ones * 0.3
    found = sample_from_tensors(logits, *given, greedy_only=False, cut=True)
    assert ((found >= 0) & (found < 40)).all()
    logits[1] = 0
    assert torch.equal(found[[0, 2]], sample_from_tensors(logits, *given, greedy_only=False, cut=True)[[0, 2]])


def test_logits_with_an_infinity_or_nan_are_not_finite():
    logits = torch.zeros(6, 1000)
    for sequence, values in enumerate(([torch.inf], [-torch.inf], [torch.nan], [torch.inf, -torch.inf], [1e30, 1e30])):
        logits[sequence, 7 : 7 + len(values)] = torch.tensor(values)
    assert finite(logits).tolist() == [False, False, False, False, True, True]
