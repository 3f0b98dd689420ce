"""From logits to one token: temperature, then top-k, then top-p, then a draw that depends on seed and position alone.

Knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

MAX_SEED = 2**64 - 1
LEAST_TEMPERATURE = 1e-4  # below it the likeliest token is all that is left, and a division by it may not be finite


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; values outside their bounds raise :class:`UserError` (E_PARAMETER).

    ``temperature`` 0 (or next to it, or ``top_p`` 0, or ``top_k`` 1) takes the most likely token. ``top_k`` 0 is off.
    The same ``seed`` gives the same draws.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 2)
        _check("top_p", self.top_p, 0, 1)
        _check("top_k", self.top_k, 0, None)
        _check("seed", self.seed, 0, MAX_SEED)

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE or self.top_p == 0 or self.top_k == 1


def _check(name: str, value: float, low: float, high: float | None) -> None:
    if not (value >= low and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UserError("E_PARAMETER", f"{name} must be {bounds}; change it.")


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token id from float32 ``logits`` (V,); ``position`` counts the tokens drawn before in this request."""
    if sampling.greedy:
        return int(logits.argmax())
    # float64, or the tail of a large vocabulary is lost in rounding
    scores, ids = (logits / sampling.temperature).double(), None
    if sampling.top_k and sampling.top_k < scores.numel():
        scores, ids = scores.topk(sampling.top_k)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1 and ids is None:
        probabilities, ids = _likeliest(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        # the smallest set that reaches top_p: a token belongs if those before it do not reach it
        kept = int((cumulative - probabilities < sampling.top_p).sum())
        cumulative = cumulative[:kept]
    target = uniform(sampling.seed, position) * cumulative[-1]
    index = min(int(torch.searchsorted(cumulative, target, right=True)), cumulative.numel() - 1)
    return index if ids is None else int(ids[index])


def _likeliest(probabilities: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """The largest of ``probabilities`` (V,), falling, and their indices: as many as surely reach ``total``.

    Sorting all of a large vocabulary takes far longer than finding the few that matter.
    """
    for count in (64, 2048):
        if count < probabilities.numel():
            best, ids = probabilities.topk(count)
            if best.sum() > total:
                return best, ids
    return probabilities.sort(descending=True)


def draw(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], limits: Sequence[int]) -> list[int]:
    """One token id for each row of float32 ``logits`` (B, V), of the ids below its limit; see :func:`sample`.

    A row's draw depends on nothing but its own logits, seed and position.
    """
    vocabulary = logits.shape[-1]
    if all(sampling.greedy for sampling in samplings) and all(limit == vocabulary for limit in limits):
        return logits.argmax(-1).tolist()
    rows = zip(logits, samplings, positions, limits, strict=True)
    return [sample(row[:limit], sampling, position) for row, sampling, position, limit in rows]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) made by a counter-based generator from ``seed`` and ``position`` alone."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())
